// What CPU kernels share: one function compiled for several instruction sets, and 16-bit numbers handled two at a time.
#pragma once

#include <cstdint>
#include <cstring>

#include "mr1/types.h"

// MR1_CLONES on a plain function (no template): compiled for AVX-512, AVX2 and the baseline, chosen when the library is loaded.
// What it calls must be MR1_INLINE to be compiled with it. Vector lowering happens before inlining, so write plain loops over
// compile-time sizes (`#pragma omp simd` for reductions), not vector types.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MR1_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MR1_CLONES
#endif

// MR1_EXACT on a plain function: a*b+c is two roundings, never one fused operation. For code that must repeat another library's
// bits.
#if defined(__GNUC__) && !defined(__clang__)
#define MR1_EXACT __attribute__((optimize("fp-contract=off")))
#else
#define MR1_EXACT
#endif

#define MR1_INLINE __attribute__((always_inline)) inline

namespace mr1 {

MR1_INLINE float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

MR1_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// fp32 <-> 16 bits in 32-bit lanes, without branches, so that loops over them vectorise on every instruction set.
template <class T>
struct Half16;

template <>
struct Half16<bf16> {
  static MR1_INLINE float low(uint32_t word) { return bits_to_float(word << 16); }
  static MR1_INLINE float high(uint32_t word) { return bits_to_float(word & 0xffff0000u); }
  // x rounded to nearest even, in the upper 16 bits; NaN stays NaN.
  static MR1_INLINE uint32_t rounded(float x) {
    const uint32_t wide = float_to_bits(x);
    const uint32_t nearest = wide + 0x7fffu + ((wide >> 16) & 1u);
    return (wide & 0x7fffffffu) > 0x7f800000u ? (wide | 0x400000u) : nearest;
  }
  static MR1_INLINE uint32_t pack(float low, float high) { return (rounded(low) >> 16) | (rounded(high) & 0xffff0000u); }
};

template <>
struct Half16<f16> {
  static MR1_INLINE float widen(uint32_t half) {  // the lower 16 bits
    const uint32_t magnitude = half & 0x7fffu, sign = (half & 0x8000u) << 16;
    const uint32_t shifted = magnitude << 13;
    const uint32_t normal = shifted + (112u << 23);
    // A subnormal is a whole multiple of 2^-24: made a normal number by adding 2^-14, which is taken away again.
    const uint32_t small = float_to_bits(bits_to_float(shifted + (113u << 23)) - bits_to_float(113u << 23));
    const uint32_t finite = magnitude < 0x0400u ? small : normal;
    return bits_to_float(sign | (magnitude >= 0x7c00u ? (shifted | 0x7f800000u) : finite));
  }
  static MR1_INLINE uint32_t narrow(float x) {  // to the lower 16 bits
    const uint32_t wide = float_to_bits(x);
    const uint32_t magnitude = wide & 0x7fffffffu, sign = (wide >> 16) & 0x8000u;
    const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14 the addition of 1/2 rounds to a multiple of 2^-24.
    const uint32_t small = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t finite = magnitude < 0x38800000u ? small : normal;
    const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return sign | (magnitude >= 0x47800000u ? large : finite);
  }
  static MR1_INLINE float low(uint32_t word) { return widen(word & 0xffffu); }
  static MR1_INLINE float high(uint32_t word) { return widen(word >> 16); }
  static MR1_INLINE uint32_t pack(float low, float high) { return narrow(low) | (narrow(high) << 16); }
};

}  // namespace mr1
