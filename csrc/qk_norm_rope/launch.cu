// Host side of the CUDA kernels: what GPU this is, and which type. Declared in args.h.
#include "qk_norm_rope/dispatch.cuh"

namespace mr1 {
namespace {

const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Blocks of a kernel that the current device runs at once.
struct Resident {
  template <class Kernel>
  int operator()(Kernel kernel, unsigned threads, size_t shared) const {
    int device = 0, blocks = 0, processors = 0;
    if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, static_cast<int>(threads), shared) != cudaSuccess)
      return 1;  // the launch itself will say what is wrong
    return blocks * processors;
  }
};

template <class Run>
void by_type(DType type, const Run& run) {
  switch (type) {
    case DType::f32: return run(float());
    case DType::bf16: return run(bf16());
    case DType::f16: return run(f16());
    case DType::f64: return run(double());
  }
}

}  // namespace

const char* qk_norm_rope_forward_cuda(const QkNormRopeArgs& a, void* stream) {
  if (a.s * a.b == 0) return nullptr;
  by_type(a.type, [&](auto t) { qknr::forward<decltype(t)>(a, stream, Resident()); });
  return last_error();
}

int64_t qk_norm_rope_partials_cuda(const QkNormRopeArgs& a) {
  int64_t count = 0;
  by_type(a.type, [&](auto t) { count = qknr::backward<decltype(t), true>(a, false, nullptr, Resident()); });
  return count;
}

const char* qk_norm_rope_backward_cuda(const QkNormRopeArgs& a, int64_t partials, void* dq_weight, void* dk_weight, void* stream) {
  if (a.s * a.b == 0 && !a.partials) return nullptr;
  by_type(a.type, [&](auto t) { qknr::backward_and_sum<decltype(t)>(a, partials, dq_weight, dk_weight, stream, Resident()); });
  return last_error();
}

}  // namespace mr1
