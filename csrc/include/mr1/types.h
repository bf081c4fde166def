// Number types and sizes every room of csrc shares. Free of torch and of CUDA headers on a host; included by everything.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MR1_HD __host__ __device__ __forceinline__
#else
#define MR1_HD inline
#endif

namespace mr1 {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

#if defined(__CUDACC__)
using bf16 = __nv_bfloat16;
using f16 = __half;
#else
// The same 16 bits as __nv_bfloat16. Conversion rounds to nearest, ties to even, and keeps NaN a NaN.
struct bf16 {
  uint16_t bits;
};
// _Float16 is the compiler's own IEEE half (g++ >= 12 and clang on x86-64 and arm64).
using f16 = _Float16;
#endif

MR1_HD float to_float(float x) { return x; }
MR1_HD double to_float(double x) { return x; }
#if defined(__CUDACC__)
MR1_HD float to_float(bf16 x) { return __bfloat162float(x); }
MR1_HD float to_float(f16 x) { return __half2float(x); }
#else
MR1_HD float to_float(bf16 x) {
  uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &wide, sizeof y);
  return y;
}
MR1_HD float to_float(f16 x) { return static_cast<float>(x); }
#endif

template <class T>
struct Round;  // Round<T>::from(x): the T nearest to x
template <>
struct Round<float> {
  static MR1_HD float from(float x) { return x; }
};
template <>
struct Round<double> {
  static MR1_HD double from(double x) { return x; }
};
#if defined(__CUDACC__)
template <>
struct Round<bf16> {
  static MR1_HD bf16 from(float x) { return __float2bfloat16_rn(x); }
};
template <>
struct Round<f16> {
  static MR1_HD f16 from(float x) { return __float2half_rn(x); }
};
#else
template <>
struct Round<bf16> {
  // Written without branches, so that loops over it vectorise.
  static MR1_HD bf16 from(float x) {
    uint32_t wide;
    std::memcpy(&wide, &x, sizeof wide);
    const uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
    const uint32_t quiet = (wide >> 16) | 0x40u;
    const bool nan = (wide & 0x7fffffffu) > 0x7f800000u;
    return bf16{static_cast<uint16_t>(nan ? quiet : rounded)};
  }
};
template <>
struct Round<f16> {
  static MR1_HD f16 from(float x) { return static_cast<f16>(x); }
};
#endif

// The type sums are made in: fp32 for everything up to fp32, fp64 for fp64.
template <class T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

MR1_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace mr1
