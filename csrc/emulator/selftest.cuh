// Small kernels that use each thing the emulator offers. They are plain CUDA: the tests also give this file to nvcc.
// tests/csrc/test_emulator.py runs them against numpy, breaks them line by line, and expects every break to be noticed:
// lines it replaces are marked [mutant].
#pragma once

#include "mr1/platform.cuh"

namespace mr1::selftest {

constexpr unsigned kAll = 0xffffffffu;

// y[block] = sum of x[block, 0:n], for every block twice over with the same shared memory. blockDim.x = Threads.
template <int Threads>
__global__ void __launch_bounds__(Threads) row_sums(float* y, const float* x, int rows, int n) {
  MR1_SHARED(float, partial, Threads / 32);
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += Threads) sum += __ldg(x + static_cast<int64_t>(row) * n + i);  // [mutant] off by one
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();  // [mutant] partial sums are complete
    float total = 0.0f;
    for (int w = 0; w < Threads / 32; ++w) total += partial[w];
    if (threadIdx.x == 0) y[row] = total;
    __syncthreads();  // [mutant] everybody has read them
  }
}

// y[i] = sum of x[i - 1 .. i + 1] within the block, x beyond the block's 2 * Threads elements counting as 0. Plain
// __shared__ arrays, one padded on both sides.
template <int Threads>
__global__ void neighbours(float* y, const float* x) {
  __shared__ float tile[2 * Threads + 2];
  __shared__ int written;
  const int i = 2 * threadIdx.x;
  const int64_t base = static_cast<int64_t>(blockIdx.x) * 2 * Threads;
  tile[1 + i] = x[base + i];
  tile[2 + i] = x[base + i + 1];
  if (threadIdx.x == 0) {
    tile[0] = 0.0f;  // [mutant] the left edge
    tile[2 * Threads + 1] = 0.0f;
    written = 2 * Threads;
  }
  __syncthreads();
  for (int k = i; k < i + 2; ++k) y[base + k] = written == 2 * Threads ? tile[k] + tile[k + 1] + tile[k + 2] : -1.0f;
}

// The four shuffles at every width. y: [4 kinds, 6 widths, 32 values of the argument, 32 lanes].
__global__ void shuffles(int* y, const int* x) {
  const int lane = threadIdx.x;
  for (int w = 0; w < 6; ++w) {
    for (int by = 0; by < 32; ++by) {
      int* out = y + (w * 32 + by) * 32 + lane;
      out[0 * 6 * 32 * 32] = __shfl_sync(kAll, x[lane], by, 1 << w);
      out[1 * 6 * 32 * 32] = __shfl_up_sync(kAll, x[lane], by, 1 << w);
      out[2 * 6 * 32 * 32] = __shfl_down_sync(kAll, x[lane], by, 1 << w);
      out[3 * 6 * 32 * 32] = __shfl_xor_sync(kAll, x[lane], by, 1 << w);
    }
  }
}

// Each half of a warp on its own, in code of its own. y: [3, 32]: votes, sum of the half, largest of the half.
__global__ void halves(unsigned* y, const int* x) {
  const int lane = threadIdx.x % 32;
  if (lane < 16) {
    y[lane] = __ballot_sync(0x0000ffffu, x[lane] > 0);
    y[32 + lane] = __reduce_add_sync(0x0000ffffu, x[lane]);
    y[64 + lane] = __reduce_max_sync(0x0000ffffu, x[lane]);
  } else {
    y[64 + lane] = __reduce_max_sync(0xffff0000u, x[lane]);
    y[32 + lane] = __reduce_add_sync(0xffff0000u, x[lane]);
    y[lane] = __ballot_sync(0xffff0000u, x[lane] > 0);  // [mutant] mask
  }
}

// Two warps fetch, two warps double: y = 2 x over `steps` tiles of 64, through two buffers and named barriers 1..4.
__global__ void __launch_bounds__(128) pipeline(float* y, const float* x, int steps) {
  MR1_SHARED(float, buffers, 2 * 64);
  const int t = threadIdx.x % 64;
  if (threadIdx.x < 64) {
    for (int s = 0; s < steps; ++s) {
      if (s >= 2) bar_sync(3 + s % 2, 128);  // [mutant] the buffer is empty
      buffers[s % 2 * 64 + t] = x[s * 64 + t];
      bar_arrive(1 + s % 2, 128);
    }
  } else {
    for (int s = 0; s < steps; ++s) {
      bar_sync(1 + s % 2, 128);  // [mutant] the buffer is full
      y[s * 64 + t] = 2.0f * buffers[s % 2 * 64 + 63 - t];
      if (s + 2 < steps) bar_arrive(3 + s % 2, 128);  // [mutant] give it back
    }
  }
}

// Warps beyond `rows` leave at once; the others still meet. y[i] = x[rows * 32 - 1 - i].
__global__ void early_exit(float* y, const float* x, int rows) {
  MR1_DYNAMIC_SHARED(float, tile);
  const int row = threadIdx.x / 32;
  if (row >= rows) return;  // [mutant] whole warps leave
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[rows * 32 - 1 - threadIdx.x];
}

// y = x with its 4-element groups in reverse order, by 16-byte accesses. blockDim.x groups, dynamic shared memory.
__global__ void reverse_vectors(float* y, const float* x) {
  MR1_DYNAMIC_SHARED(float4, tile);
  const int t = threadIdx.x, n = blockDim.x;
  tile[t] = *reinterpret_cast<const float4*>(x + 4 * t);  // [mutant] alignment
  __syncthreads();
  *reinterpret_cast<float4*>(y + 4 * t) = tile[n - 1 - t];  // [mutant] shared index
}

// Counts of x's values below `bins`; each block counts in shared memory and adds what it found.
__global__ void histogram(int* y, const int* x, int n, int bins) {
  MR1_DYNAMIC_SHARED(int, counts);
  for (int b = threadIdx.x; b < bins; b += blockDim.x) counts[b] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) atomicAdd(counts + x[i], 1);
  __syncthreads();  // [mutant] all are counted
  for (int b = threadIdx.x; b < bins; b += blockDim.x) atomicAdd(y + b, counts[b]);
}

// Lane 0 leaves a number in shared memory for its warp.
__global__ void warp_mailbox(int* y, const int* x) {
  MR1_SHARED(int, box, 4);
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) box[warp] = x[warp];
  __syncwarp();  // [mutant] the number is there
  y[threadIdx.x] = box[warp];
}

// Where each thread of a three-dimensional launch stands. y: [blocks, threads, 2], linear block and thread number.
__global__ void positions(int* y) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  y[2 * (block * threads + thread)] = block;
  y[2 * (block * threads + thread) + 1] = thread;
}

// The order threads come in: y[k] = the k-th thread.
__global__ void arrivals(int* y, int* count) { y[atomicAdd(count, 1)] = threadIdx.x; }

// y[0] = sum of x[0:blocks * 32], by whichever block is the last to finish.
__global__ void last_block(int* y, int* partial, unsigned* finished, const int* x) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  const int sum = __reduce_add_sync(kAll, x[i]);
  unsigned before = 0;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();
    before = atomicAdd(finished, 1u);
    __threadfence();  // [mutant] others' sums may be read from here on
  }
  before = __shfl_sync(kAll, before, 0);
  if (before == gridDim.x - 1 && threadIdx.x == 0) {
    int total = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) total += partial[b];
    y[0] = total;
  }
}

// Each of 64 threads lays 64 bytes down and takes up its neighbour's, by memcpy.
__global__ void hand_over(float* y, const float* x) {
  MR1_SHARED_ALIGNED(float, desk, 64 * 16, 16);
  const int t = threadIdx.x;
  float taken[16];
  memcpy(desk + 16 * t, x + 16 * t, sizeof taken);
  __syncthreads();  // [mutant] all lie on the desk
  memcpy(taken, desk + 16 * ((t + 1) % 64), sizeof taken);
  for (int i = 0; i < 16; ++i) y[16 * t + i] = taken[i];
}

// y = x rounded to bf16 and to f16 and back. y: [2, n].
__global__ void round_trip(float* y, const float* x, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  y[i] = to_float(Round<bf16>::from(x[i]));
  y[n + i] = to_float(Round<f16>::from(x[i]));
}

}  // namespace mr1::selftest
