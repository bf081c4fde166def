// Host side of the row-loss kernels: which instance, how many threads. Declared in args.h.
#include <algorithm>

#include "row_loss/args.h"
#include "row_loss/kernel.cuh"

namespace mr1 {
namespace {

const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int64_t bytes_of(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }

// Whether every row starts at a multiple of 16 bytes.
bool aligned(const void* p, int64_t rows, int64_t stride, DType type) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && (rows == 1 || stride * bytes_of(type) % 16 == 0);
}

// Whole warps; 32 columns a thread where the row has that many.
unsigned threads_for(int64_t columns) {
  const int64_t wanted = ceil_div(columns, 32);
  return static_cast<unsigned>(std::min<int64_t>(row_loss::MOST_THREADS, std::max<int64_t>(32, ceil_div(wanted, 32) * 32)));
}

// One launch has at most 2^31 - 1 blocks; more rows than that do not fit any GPU.
template <class Args>
const char* refused(const Args& a) { return a.rows > 0x7fffffff ? "more than 2^31 - 1 rows" : nullptr; }

template <class Z>
const char* stats(const RowStatsArgs& a, void* stream) {
  const bool vector = aligned(a.z, a.rows, a.z_stride, a.z_type) && (!a.t || aligned(a.t, a.rows, a.t_stride, a.t_type));
  const auto kernel = a.t ? row_loss::row_stats_kernel<Z, true> : row_loss::row_stats_kernel<Z, false>;
  MR1_LAUNCH(kernel, dim3(static_cast<unsigned>(a.rows)), dim3(threads_for(a.columns)), 0, stream, a, vector);
  return last_error();
}

template <class Z>
const char* grad(const SoftmaxGradArgs& a, void* stream) {
  const bool vector = aligned(a.z, a.rows, a.z_stride, a.z_type) && (!a.t || aligned(a.t, a.rows, a.t_stride, a.t_type));
  const auto kernel = a.t ? row_loss::softmax_grad_kernel<Z, true> : row_loss::softmax_grad_kernel<Z, false>;
  MR1_LAUNCH(kernel, dim3(static_cast<unsigned>(a.rows)), dim3(threads_for(a.columns)), 0, stream, a, vector);
  return last_error();
}

}  // namespace

const char* row_stats_cuda(const RowStatsArgs& a, void* stream) {
  if (a.rows == 0) return nullptr;
  if (const char* why = refused(a)) return why;
  switch (a.z_type) {
    case DType::f32: return stats<float>(a, stream);
    case DType::bf16: return stats<bf16>(a, stream);
    case DType::f16: return stats<f16>(a, stream);
    case DType::f64: return stats<double>(a, stream);
  }
  return "an unknown type";
}

const char* softmax_grad_cuda(const SoftmaxGradArgs& a, void* stream) {
  if (a.rows == 0) return nullptr;
  if (const char* why = refused(a)) return why;
  switch (a.z_type) {
    case DType::f32: return grad<float>(a, stream);
    case DType::bf16: return grad<bf16>(a, stream);
    case DType::f16: return grad<f16>(a, stream);
    case DType::f64: return grad<double>(a, stream);
  }
  return "an unknown type";
}

}  // namespace mr1
