// Between torch's stable ABI and our argument structs: the only header that includes torch. Included by binding.cpp files.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <dlfcn.h>

#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "mr1/types.h"

namespace mr1 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// MR1_EXPECT(condition, "qkv", "a last dimension of 3072", "shape " << shape(qkv), "pass ..."): raises RuntimeError in three
// parts, like every error of this project. Always names the argument.
#define MR1_EXPECT(condition, argument, expected, found, fix)                                                      \
  do {                                                                                                             \
    if (!(condition)) {                                                                                            \
      std::ostringstream mr1_message;                                                                              \
      mr1_message << "expected: " << argument << ": " << expected << "\n   found: " << found << "\n      do: " << fix; \
      throw std::runtime_error(mr1_message.str());                                                                 \
    }                                                                                                              \
  } while (0)

inline std::string shape(const Tensor& t) {
  std::ostringstream out;
  out << "[";
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << "]";
  return out.str();
}

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return "another dtype";
  }
}

inline DType dtype_of(const Tensor& t, const char* argument) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Double: return DType::f64;
    default: break;
  }
  MR1_EXPECT(false, argument, "float32, bfloat16, float16 or float64", dtype_name(t.scalar_type()), "convert it first");
  return DType::f32;
}

inline void expect_dim(const Tensor& t, int64_t dim, const char* argument, const char* legend) {
  MR1_EXPECT(t.dim() == dim, argument, dim << " dimensions " << legend, "shape " << shape(t), "reshape it");
}

inline void expect_size(const Tensor& t, int64_t axis, int64_t size, const char* argument, const char* legend) {
  MR1_EXPECT(t.size(axis) == size, argument, legend << " of size " << size << " (dimension " << axis << ")", "shape " << shape(t),
             "make it fit the other arguments");
}

inline void expect_unit_stride(const Tensor& t, const char* argument) {
  MR1_EXPECT(t.dim() == 0 || t.numel() == 0 || t.size(-1) <= 1 || t.stride(t.dim() - 1) == 1, argument, "elements of the last dimension side by side",
             "stride " << t.stride(t.dim() - 1), "call .contiguous() first");
}

inline void expect_countable(const Tensor& t, const char* argument) {
  MR1_EXPECT(t.numel() <= std::numeric_limits<int32_t>::max(), argument, "at most 2^31 - 1 elements", t.numel() << " elements",
             "process fewer tokens at a time");
}

inline void expect_same_device(const Tensor& t, const Tensor& like, const char* argument, const char* other) {
  MR1_EXPECT(t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(), argument, "the same device as " << other,
             (t.is_cpu() ? "cpu" : "a GPU") << " and " << (like.is_cpu() ? "cpu" : "a GPU"), "move one of them");
}

// The raw stream of the current device as void* (cudaStream_t). Looked up at run time, so that the same file loads under a torch
// without CUDA; the stable ABI's own accessor exists from torch 2.13 only.
inline void* current_cuda_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static Get get = [] {
    void* lib = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return reinterpret_cast<Get>(lib ? dlsym(lib, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  MR1_EXPECT(get != nullptr, "torch", "a build with CUDA", "libtorch_cuda.so is not loaded", "install a CUDA build of torch");
  void* stream = nullptr;
  MR1_EXPECT(get(device, &stream) == 0, "stream", "torch's current CUDA stream", "an error from torch", "report this");
  return stream;
}

}  // namespace mr1
