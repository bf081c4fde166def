// Row statistics and derivatives on a GPU: one block per row, 16-byte loads, the softmax's sums made while the row is read once.
//
// A thread keeps the largest entry it has seen and its sums relative to that; when it meets a larger one it rescales them.
// Threads are joined in a fixed order (lanes, then warps), so the same logits give the same bits every time.
#pragma once

#include "mr1/platform.cuh"
#include "row_loss/args.h"

namespace mr1 {
namespace row_loss {

constexpr int MOST_THREADS = 512;
// Columns a thread handles together: 16 bytes of a 16-bit type, two loads of 16 for fp32. Two for fp64: eight would spill.
template <class W>
constexpr int PACK = sizeof(W) == 8 ? 2 : 8;

template <class W>
__device__ __forceinline__ W minus_infinity() { return -static_cast<W>(INFINITY); }

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// The shift under exp: any finite number where there is no maximum, so that exp(-inf - shift) is 0 and not NaN.
template <class W>
__device__ __forceinline__ W shift(W top) { return top == minus_infinity<W>() ? W(0) : top; }

// 16 bytes as one load or store.
template <class T>
struct alignas(16) Sixteen {
  static constexpr int N = 16 / sizeof(T);
  T at[N];
};

// PACK<W> elements from `p`, which is aligned to 16 bytes.
template <class T, class W>
__device__ __forceinline__ void load_pack(const T* p, W (&x)[PACK<W>]) {
  Sixteen<T> part[PACK<W> / Sixteen<T>::N];
#pragma unroll
  for (int i = 0; i < PACK<W> / Sixteen<T>::N; ++i) part[i] = reinterpret_cast<const Sixteen<T>*>(p)[i];
#pragma unroll
  for (int j = 0; j < PACK<W>; ++j) x[j] = to_float(part[j / Sixteen<T>::N].at[j % Sixteen<T>::N]);
}
template <class T, class W>
__device__ __forceinline__ void store_pack(T* p, const W (&x)[PACK<W>]) {
#pragma unroll
  for (int i = 0; i < PACK<W> / Sixteen<T>::N; ++i) {
    Sixteen<T> part;
#pragma unroll
    for (int j = 0; j < Sixteen<T>::N; ++j) part.at[j] = Round<T>::from(x[i * Sixteen<T>::N + j]);
    reinterpret_cast<Sixteen<T>*>(p)[i] = part;
  }
}

// A teacher's row: its type is known at run time only, and the same for the whole launch. Beside fp64 it is fp64.
template <class W>
struct TeacherRow;
template <>
struct TeacherRow<float> {
  const void* p;
  DType type;
  __device__ __forceinline__ TeacherRow(const void* base, int64_t first, DType type) : p(base), type(type) {
    p = static_cast<const char*>(base) + first * (type == DType::f32 ? 4 : 2);
  }
  __device__ __forceinline__ void pack(int64_t i, float (&y)[PACK<float>]) const {
    if (type == DType::f32) load_pack(static_cast<const float*>(p) + i, y);
    else if (type == DType::bf16) load_pack(static_cast<const bf16*>(p) + i, y);
    else load_pack(static_cast<const f16*>(p) + i, y);
  }
  __device__ __forceinline__ float one(int64_t i) const {
    if (type == DType::f32) return static_cast<const float*>(p)[i];
    if (type == DType::bf16) return to_float(static_cast<const bf16*>(p)[i]);
    return to_float(static_cast<const f16*>(p)[i]);
  }
};
template <>
struct TeacherRow<double> {
  const double* p;
  __device__ __forceinline__ TeacherRow(const void* base, int64_t first, DType) : p(static_cast<const double*>(base) + first) {}
  __device__ __forceinline__ void pack(int64_t i, double (&y)[PACK<double>]) const { load_pack(p + i, y); }
  __device__ __forceinline__ double one(int64_t i) const { return p[i]; }
};

// What has been seen of a row (args.h, RowStat).
template <class W>
struct Seen {
  W top = minus_infinity<W>(), sum = 0, hard = 0, teacher_top = minus_infinity<W>(), teacher = 0, cross = 0;
};

// A sum of products with a probability that fell to 0 has no such token any more, whatever its gap was.
template <class W>
__device__ __forceinline__ W fade(W cross, W factor) { return factor == W(0) ? W(0) : cross * factor; }

template <bool TEACHER, class W, int N>
__device__ __forceinline__ void look(Seen<W>& seen, const W (&x)[N], const W (&y)[N], W inv_t, bool hard) {
  W most = seen.top;
#pragma unroll
  for (int j = 0; j < N; ++j) most = x[j] > most ? x[j] : most;  // NaN is passed over, and comes out in the sums
  if (most > seen.top) {
    seen.sum *= exponential((seen.top - most) * inv_t);
    if (hard) seen.hard *= exponential(seen.top - most);
    seen.top = most;
  }
  const W m = shift(seen.top);
#pragma unroll
  for (int j = 0; j < N; ++j) seen.sum += exponential((x[j] - m) * inv_t);
  if (hard) {
#pragma unroll
    for (int j = 0; j < N; ++j) seen.hard += exponential(x[j] - m);
  }
  if constexpr (TEACHER) {
    most = seen.teacher_top;
#pragma unroll
    for (int j = 0; j < N; ++j) most = y[j] > most ? y[j] : most;
    if (most > seen.teacher_top) {
      const W factor = exponential((seen.teacher_top - most) * inv_t);
      seen.teacher *= factor;
      seen.cross = fade(seen.cross, factor);
      seen.teacher_top = most;
    }
    const W u = shift(seen.teacher_top);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const W p = exponential((y[j] - u) * inv_t);
      seen.teacher += p;
      seen.cross += p == W(0) ? W(0) : p * ((y[j] - x[j]) * inv_t);
    }
  }
}

// exp((from - to) / T) for from <= to; 1 where both are -inf.
template <class W>
__device__ __forceinline__ W fall(W from, W to, W inv_t) { return from == to ? W(1) : exponential((from - to) * inv_t); }

template <bool TEACHER, class W>
__device__ __forceinline__ void join(Seen<W>& a, const Seen<W>& b, W inv_t) {
  const W top = b.top > a.top ? b.top : a.top;
  a.sum = a.sum * fall(a.top, top, inv_t) + b.sum * fall(b.top, top, inv_t);
  a.hard = a.hard * fall(a.top, top, W(1)) + b.hard * fall(b.top, top, W(1));
  a.top = top;
  if constexpr (TEACHER) {
    const W most = b.teacher_top > a.teacher_top ? b.teacher_top : a.teacher_top;
    const W fa = fall(a.teacher_top, most, inv_t), fb = fall(b.teacher_top, most, inv_t);
    a.teacher = a.teacher * fa + b.teacher * fb;
    a.cross = fade(a.cross, fa) + fade(b.cross, fb);
    a.teacher_top = most;
  }
}

// The lanes of a warp into its lane 0.
template <bool TEACHER, class W>
__device__ __forceinline__ void join_warp(Seen<W>& seen, W inv_t) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    Seen<W> other;
    other.top = __shfl_down_sync(0xffffffffu, seen.top, step);
    other.sum = __shfl_down_sync(0xffffffffu, seen.sum, step);
    other.hard = __shfl_down_sync(0xffffffffu, seen.hard, step);
    if constexpr (TEACHER) {
      other.teacher_top = __shfl_down_sync(0xffffffffu, seen.teacher_top, step);
      other.teacher = __shfl_down_sync(0xffffffffu, seen.teacher, step);
      other.cross = __shfl_down_sync(0xffffffffu, seen.cross, step);
    }
    join<TEACHER>(seen, other, inv_t);
  }
}

// Grid: rows. Block: whole warps, at most MOST_THREADS. `vector`: rows start at multiples of 16 bytes.
template <class Z, bool TEACHER>
__global__ void __launch_bounds__(MOST_THREADS, sizeof(Z) == 8 ? 1 : 2) row_stats_kernel(RowStatsArgs a, bool vector) {
  using W = typename Wide<Z>::type;
  MR1_SHARED(W, of_warps, MOST_THREADS / 32 * ROW_STATS);
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const Z* z = static_cast<const Z*>(a.z) + row * a.z_stride;
  const TeacherRow<W> t(a.t, TEACHER ? row * a.t_stride : 0, a.t_type);
  const W inv_t = static_cast<W>(a.inv_temperature);
  Seen<W> seen;
  const int64_t packed = vector ? a.columns / PACK<W> * PACK<W> : 0;
#pragma unroll 2
  for (int64_t i = int64_t{PACK<W>} * thread; i < packed; i += int64_t{PACK<W>} * threads) {
    W x[PACK<W>], y[PACK<W>];
    load_pack(z + i, x);
    if constexpr (TEACHER) t.pack(i, y);
    look<TEACHER>(seen, x, y, inv_t, a.hard);
  }
  for (int64_t i = packed + thread; i < a.columns; i += threads) {
    const W x[1] = {to_float(z[i])}, y[1] = {TEACHER ? t.one(i) : W(0)};
    look<TEACHER>(seen, x, y, inv_t, a.hard);
  }
  join_warp<TEACHER>(seen, inv_t);
  const int warp = thread / 32, lane = thread % 32;
  if (lane == 0) {
    W* mine = of_warps + warp * ROW_STATS;
    mine[TOP] = seen.top, mine[SUM] = seen.sum, mine[HARD_SUM] = seen.hard;
    mine[TEACHER_TOP] = seen.teacher_top, mine[TEACHER_SUM] = seen.teacher, mine[CROSS] = seen.cross;
  }
  __syncthreads();
  if (warp > 0) return;
  Seen<W> all;
  if (lane < threads / 32) {
    const W* of = of_warps + lane * ROW_STATS;
    all.top = of[TOP], all.sum = of[SUM], all.hard = of[HARD_SUM];
    all.teacher_top = of[TEACHER_TOP], all.teacher = of[TEACHER_SUM], all.cross = of[CROSS];
  }
  join_warp<TEACHER>(all, inv_t);
  if (lane == 0) {
    W* out = static_cast<W*>(a.out) + row * ROW_STATS;
    out[TOP] = all.top, out[SUM] = all.sum, out[HARD_SUM] = all.hard;
    out[TEACHER_TOP] = TEACHER ? all.teacher_top : W(0), out[TEACHER_SUM] = all.teacher, out[CROSS] = all.cross;
  }
}

// Grid: rows. Block: any. Every element is read and written by one thread, so z may be overwritten.
template <class Z, bool TEACHER>
__global__ void __launch_bounds__(MOST_THREADS, sizeof(Z) == 8 ? 1 : 2) softmax_grad_kernel(SoftmaxGradArgs a, bool vector) {
  using W = typename Wide<Z>::type;
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  Z* z = static_cast<Z*>(a.z) + row * a.z_stride;
  const TeacherRow<W> t(a.t, TEACHER ? row * a.t_stride : 0, a.t_type);
  const W* numbers = static_cast<const W*>(a.numbers) + row * ROW_NUMBERS;
  const W inv_t = static_cast<W>(a.inv_temperature);
  const W m = shift(numbers[G_TOP]), u = shift(numbers[G_TEACHER_TOP]);
  const W scale = numbers[G_SCALE], hard_scale = numbers[G_HARD_SCALE], teacher_scale = numbers[G_TEACHER_SCALE], pick = numbers[G_PICK];
  const int64_t label = a.labels ? a.labels[row] : -1;
  const auto derive = [&](W x, W y) {
    W d = exponential((x - m) * inv_t) * scale;
    if (a.hard) d += exponential(x - m) * hard_scale;
    if constexpr (TEACHER) d -= exponential((y - u) * inv_t) * teacher_scale;
    return d;
  };
  const int64_t packed = vector ? a.columns / PACK<W> * PACK<W> : 0;
  for (int64_t i = int64_t{PACK<W>} * thread; i < packed; i += int64_t{PACK<W>} * threads) {
    W x[PACK<W>], y[PACK<W>] = {};
    load_pack(z + i, x);
    if constexpr (TEACHER) t.pack(i, y);
#pragma unroll
    for (int j = 0; j < PACK<W>; ++j) x[j] = derive(x[j], y[j]);
    if (label >= i && label < i + PACK<W>) {
#pragma unroll
      for (int j = 0; j < PACK<W>; ++j) x[j] -= i + j == label ? pick : W(0);
    }
    store_pack(z + i, x);
  }
  for (int64_t i = packed + thread; i < a.columns; i += threads) {
    const W d = derive(to_float(z[i]), TEACHER ? t.one(i) : W(0));
    z[i] = Round<Z>::from(i == label ? d - pick : d);
  }
}

}  // namespace row_loss
}  // namespace mr1
