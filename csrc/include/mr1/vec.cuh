// 16 bytes at a time, and sums over neighbouring lanes: what memory-bound kernels are made of.
#pragma once

#include <cstring>

#include "mr1/platform.cuh"
#include "mr1/types.h"

namespace mr1 {

// How many T one 16-byte access moves.
template <class T>
constexpr int kVec = 16 / static_cast<int>(sizeof(T));

// p must be a multiple of 16 bytes. One LDG.E.128 / STG.E.128.
__device__ __forceinline__ uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
__device__ __forceinline__ void store16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }

template <class T>
__device__ __forceinline__ void unpack16(uint4 raw, float (&x)[kVec<T>]) {
  T values[kVec<T>];
  memcpy(values, &raw, sizeof raw);
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) x[i] = to_float(values[i]);
}

// Rounded to nearest even.
template <class T>
__device__ __forceinline__ uint4 pack16(const float (&x)[kVec<T>]) {
  T values[kVec<T>];
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) values[i] = Round<T>::from(x[i]);
  uint4 raw;
  memcpy(&raw, values, sizeof raw);
  return raw;
}

// N consecutive floats, N a multiple of 4, p a multiple of 16 bytes.
template <int N>
__device__ __forceinline__ void load_floats(const float* p, float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float4 v = *reinterpret_cast<const float4*>(p + i);
    x[i] = v.x;
    x[i + 1] = v.y;
    x[i + 2] = v.z;
    x[i + 3] = v.w;
  }
}

// Sum over each aligned group of `Lanes` lanes (a power of two), the same bits in all of them. All 32 lanes must come.
template <int Lanes, class W>
__device__ __forceinline__ W group_sum(W x) {
#pragma unroll
  for (int step = Lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

}  // namespace mr1
