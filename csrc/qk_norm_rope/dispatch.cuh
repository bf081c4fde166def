// Which kernel of kernel.cuh runs, on how many blocks. Host code, the same under nvcc and under the emulator.
#pragma once

#include <algorithm>
#include <cstdint>

#include "qk_norm_rope/kernel.cuh"

namespace mr1 {
namespace qknr {

// MR1_QKNR_ONE (emulator only) leaves all but one instance of the kernels of 16-byte accesses out; plain ones stand in for them.
#if defined(MR1_QKNR_ONE)
constexpr bool kEveryInstance = false;
#else
constexpr bool kEveryInstance = true;
#endif

inline int64_t bytes_of(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether 16-byte accesses fit: every head starts at a multiple of 16 bytes.
inline bool aligned(const HeadsView& v, const QkNormRopeArgs& a) {
  const int64_t n = 16 / bytes_of(a.type);
  return aligned(v.data) && (a.s <= 1 || v.stride_s % n == 0) && (a.b <= 1 || v.stride_b % n == 0) && v.stride_head % n == 0;
}

inline bool fits_vectors(const QkNormRopeArgs& a, bool backward) {
  if (a.type == DType::f64 || a.parity || (a.head_dim != 64 && a.head_dim != 128) || 2 * a.half != a.head_dim) return false;
  if (!kEveryInstance && !(a.head_dim == 64 && a.interleaved)) return false;
  if (!aligned({a.qkv, a.stride_s, a.stride_b, a.head_dim}, a) || !aligned(a.cos) || !aligned(a.sin)) return false;
  if (!aligned(a.q_weight) || !aligned(a.k_weight)) return false;
  return backward ? aligned(a.dq, a) && aligned(a.dk, a) && aligned(a.dv, a) && aligned(a.dqkv) : aligned(a.q) && aligned(a.k);
}

// How the heads of all tokens are shared out among `resident` blocks that run at once: whole tokens where there are many (their
// angles are read once), pieces of them where there are few; never more blocks than work. At least one, for the gains' zeros.
struct Shares {
  Items of;
  unsigned blocks;
};

inline Shares share_out(int64_t tokens, int heads, int in_flight, int groups_per_block, int resident) {
  const int64_t groups = static_cast<int64_t>(resident) * groups_per_block;
  // Several items to a group, so that the last ones to finish do not keep the others waiting long.
  const int64_t wanted = ceil_div(4 * groups, std::max<int64_t>(tokens, 1));
  const int64_t most = ceil_div(heads, in_flight);
  const int64_t steps = ceil_div(most, std::min<int64_t>(std::max<int64_t>(wanted, 1), most));
  Shares shares;
  shares.of.heads_per_item = static_cast<int>(steps * in_flight);
  shares.of.items_per_token = static_cast<unsigned>(ceil_div(heads, shares.of.heads_per_item));
  shares.of.items = static_cast<unsigned>(tokens * shares.of.items_per_token);
  shares.blocks = static_cast<unsigned>(std::max<int64_t>(1, std::min<int64_t>(resident, ceil_div(shares.of.items, groups_per_block))));
  return shares;
}

// plain_*_kernel: threads of a block; shared memory holds two rows of a head for each warp.
inline unsigned plain_threads(const QkNormRopeArgs& a) { return a.head_dim > 512 ? 64 : kThreads; }

inline unsigned plain_blocks(int64_t heads, unsigned threads, int resident) {
  return static_cast<unsigned>(std::max<int64_t>(1, std::min<int64_t>(resident, ceil_div(heads, threads / 32))));
}

inline int64_t heads_of(const QkNormRopeArgs& a, bool backward) {
  return static_cast<int64_t>(a.groups) * (a.group_queries + (backward ? 2 : 1) * a.group_keys);
}

// resident(kernel, threads, shared bytes) -> blocks of it the whole GPU runs at once, -1 if it can not be asked.
template <class T, int H, bool Interleaved, class Resident>
void forward_vectors(const QkNormRopeArgs& a, void* stream, const Resident& resident) {
  constexpr int kInFlight = 4, kGroups = kThreads / Lanes<T, H, Interleaved>::kCount;
  const auto kernel = forward_kernel<T, H, Interleaved, kInFlight>;
  const Shares shares = share_out(a.s * a.b, static_cast<int>(heads_of(a, false)), kInFlight, kGroups, resident(kernel, kThreads, 0));
  MR1_LAUNCH(kernel, dim3(shares.blocks), dim3(kThreads), 0, stream, a, shares.of);
}

// Launches, or only counts blocks (the gains' partials) where `launch` is false. Returns the number of blocks.
template <class T, int H, bool Interleaved, bool Gain, class Resident>
unsigned backward_vectors(const QkNormRopeArgs& a, bool launch, void* stream, const Resident& resident) {
  constexpr int kInFlight = Gain ? 1 : 2, kGroups = kThreads / Lanes<T, H, Interleaved>::kCount;
  const auto kernel = backward_kernel<T, H, Interleaved, Gain, kInFlight>;
  const Shares shares = share_out(a.s * a.b, static_cast<int>(heads_of(a, true)), kInFlight, kGroups, resident(kernel, kThreads, 0));
  if (launch) MR1_LAUNCH(kernel, dim3(shares.blocks), dim3(kThreads), 0, stream, a, shares.of);
  return shares.blocks;
}

template <class T, class Resident>
void forward(const QkNormRopeArgs& a, void* stream, const Resident& resident) {
  if constexpr (sizeof(T) != 8) {
    if (fits_vectors(a, false)) {
      if constexpr (kEveryInstance) {
        if (a.head_dim == 128)
          return a.interleaved ? forward_vectors<T, 128, true>(a, stream, resident) : forward_vectors<T, 128, false>(a, stream, resident);
        if (!a.interleaved) return forward_vectors<T, 64, false>(a, stream, resident);
      }
      return forward_vectors<T, 64, true>(a, stream, resident);
    }
  }
  const auto kernel = plain_forward_kernel<T>;
  const unsigned threads = plain_threads(a);
  const int64_t heads = a.s * a.b * heads_of(a, false);
  MR1_LAUNCH(kernel, dim3(plain_blocks(heads, threads, resident(kernel, threads, 0))), dim3(threads), 0, stream, a, static_cast<unsigned>(heads));
}

template <class T, bool Gain, class Resident>
unsigned backward(const QkNormRopeArgs& a, bool launch, void* stream, const Resident& resident) {
  if constexpr (sizeof(T) != 8) {
    if (fits_vectors(a, true)) {
      if constexpr (kEveryInstance) {
        if (a.head_dim == 128)
          return a.interleaved ? backward_vectors<T, 128, true, Gain>(a, launch, stream, resident)
                               : backward_vectors<T, 128, false, Gain>(a, launch, stream, resident);
        if (!a.interleaved) return backward_vectors<T, 64, false, Gain>(a, launch, stream, resident);
      }
      return backward_vectors<T, 64, true, Gain>(a, launch, stream, resident);
    }
  }
  const auto kernel = plain_backward_kernel<T, Gain>;
  const unsigned threads = plain_threads(a);
  const size_t shared = Gain ? threads / 32 * 2 * a.head_dim * sizeof(typename Wide<T>::type) : 0;
  const int64_t heads = a.s * a.b * heads_of(a, true);
  const unsigned blocks = plain_blocks(heads, threads, resident(kernel, threads, shared));
  if (launch) MR1_LAUNCH(kernel, dim3(blocks), dim3(threads), shared, stream, a, static_cast<unsigned>(heads));
  return blocks;
}

// Backward, and behind it the sum of the gains' partials.
template <class T, class Resident>
void backward_and_sum(const QkNormRopeArgs& a, int64_t partials, void* dq_weight, void* dk_weight, void* stream, const Resident& resident) {
  using W = typename Wide<T>::type;
  if (!a.partials) {
    backward<T, false>(a, true, stream, resident);
    return;
  }
  backward<T, true>(a, true, stream, resident);
  const auto kernel = gain_kernel<W>;
  MR1_LAUNCH(kernel, dim3(static_cast<unsigned>(ceil_div(2 * a.head_dim, 32))), dim3(32 * kSlices), 0, stream, static_cast<const W*>(a.partials),
             partials, a.head_dim, static_cast<W*>(dq_weight), static_cast<W*>(dk_weight));
}

}  // namespace qknr
}  // namespace mr1
