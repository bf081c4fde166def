// GPU kernels of the plain path: what follows each matrix product (cuBLAS) of wgrad_dot and grad_dot. Bound by memory.
//
// Legend: K probes. Every sum has a fixed order that depends on the sizes alone: the same bits every time.
#pragma once

#include "influence/args.h"
#include "mr1/platform.cuh"
#include "mr1/types.h"

namespace mr1 {

constexpr int kPlainThreads = 256;
constexpr int kPerThread = 16;                             // elements of the block a thread keeps in registers
constexpr int kPerBlock = kPlainThreads * kPerThread;

// W neighbours, read and written in one access where W elements are 16 bytes or fewer.
template <class T, int W>
struct alignas(W * sizeof(T) < 16 ? W * sizeof(T) : 16) Pack {
  T at[W];
};

// The block's sum, in thread 0. `sums` has kPlainThreads / 32 places and is free again after the next __syncthreads.
template <class S>
__device__ __forceinline__ S block_sum(S value, S* sums) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) value += __shfl_xor_sync(0xffffffffu, value, apart);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  S sum = 0;
  if (threadIdx.x == 0) {
    for (int w = 0; w < kPlainThreads / 32; ++w) sum += sums[w];
  }
  return sum;
}

// main_grad += block; partial[blockIdx.x, k] = <block, g[k]> over this block's kPerBlock elements (of the rows laid end to end).
// S: the type of the block, of main_grad and of the sums; G: of the probes. W divides cols, all strides and all alignments (in elements).
template <class S, class G, int W>
__global__ void __launch_bounds__(kPlainThreads) add_and_dot_kernel(const AddAndDotArgs p, S* partial) {
  MR1_SHARED(S, sums, kPlainThreads / 32);
  constexpr int packs = kPerThread / W;
  const int64_t packs_per_row = p.cols / W, all = p.rows * packs_per_row;
  Pack<S, W> kept[packs];
  int64_t row[packs], column[packs];
#pragma unroll
  for (int i = 0; i < packs; ++i) {
    const int64_t pack = (static_cast<int64_t>(blockIdx.x) * packs + i) * kPlainThreads + threadIdx.x;
    row[i] = pack < all ? pack / packs_per_row : -1;
    column[i] = pack < all ? pack % packs_per_row * W : 0;
    if (row[i] >= 0) {
      kept[i] = *reinterpret_cast<const Pack<S, W>*>(static_cast<const S*>(p.block) + row[i] * p.block_stride + column[i]);
      if (p.main_grad != nullptr) {
        auto* const where = reinterpret_cast<Pack<S, W>*>(static_cast<S*>(p.main_grad) + row[i] * p.main_grad_stride + column[i]);
        Pack<S, W> grad = *where;
#pragma unroll
        for (int e = 0; e < W; ++e) grad.at[e] += kept[i].at[e];
        *where = grad;
      }
    }
  }
  for (int64_t k = 0; k < p.probes; ++k) {
    const G* const g = static_cast<const G*>(p.g) + k * p.g_probe_stride;
    S sum = 0;
#pragma unroll
    for (int i = 0; i < packs; ++i) {
      if (row[i] >= 0) {
        const auto probe = *reinterpret_cast<const Pack<G, W>*>(g + row[i] * p.g_stride + column[i]);
#pragma unroll
        for (int e = 0; e < W; ++e) sum += static_cast<S>(to_float(probe.at[e])) * kept[i].at[e];
      }
    }
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0) partial[blockIdx.x * p.probes + k] = sum;
    __syncthreads();
  }
}

// scores[k] += the partial sums of probe k, in order. Launch: K blocks.
template <class S>
__global__ void __launch_bounds__(kPlainThreads) add_partial_kernel(const S* partial, int blocks, int probes, S* scores) {
  MR1_SHARED(S, sums, kPlainThreads / 32);
  S sum = 0;
  for (int b = threadIdx.x; b < blocks; b += kPlainThreads) sum += partial[static_cast<int64_t>(b) * probes + blockIdx.x];
  sum = block_sum(sum, sums);
  if (threadIdx.x == 0) scores[blockIdx.x] += sum;
}

// rows[t] = <x[t], y[t]>, one warp for each. Launch: ceil(T / 8) blocks. W divides the width, the strides and the alignments.
template <class S, class X, class Y, int W>
__global__ void __launch_bounds__(kPlainThreads) row_dot_kernel(const RowDotArgs p, S* rows) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * (kPlainThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  S sum = 0;
  if (t < p.tokens) {
    const X* const x = static_cast<const X*>(p.x) + t * p.x_stride;
    const Y* const y = static_cast<const Y*>(p.y) + t * p.y_stride;
    for (int64_t i = lane * W; i < p.width; i += 32 * W) {
      const auto left = *reinterpret_cast<const Pack<X, W>*>(x + i);
      const auto right = *reinterpret_cast<const Pack<Y, W>*>(y + i);
#pragma unroll
      for (int e = 0; e < W; ++e) sum += static_cast<S>(to_float(left.at[e])) * static_cast<S>(to_float(right.at[e]));
    }
  }
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
  if (lane == 0 && t < p.tokens) rows[t] = sum;
}

// scores[d] = the sum of rows over the tokens of document d (0 for an empty one). Launch: n blocks.
template <class S>
__global__ void __launch_bounds__(kPlainThreads) document_sum_kernel(const S* rows, const int32_t* cu, S* scores, int64_t score_stride) {
  MR1_SHARED(S, sums, kPlainThreads / 32);
  const int to = cu[blockIdx.x + 1];
  S sum = 0;
  for (int t = cu[blockIdx.x] + static_cast<int>(threadIdx.x); t < to; t += kPlainThreads) sum += rows[t];
  sum = block_sum(sum, sums);
  if (threadIdx.x == 0) scores[blockIdx.x * score_stride] = sum;
}

}  // namespace mr1
