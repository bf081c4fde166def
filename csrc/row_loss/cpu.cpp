// Row statistics and derivatives on a CPU. A row is read twice for its statistics (maximum, then exponentials) and once more
// for the derivative; it is in the cache by then, so an exponential is what an element costs.
//
// Logits of 16 bits are widened a block at a time into a buffer: one body for fp32 and one for fp64 instead of one per pair of
// types. Reductions are allowed to vectorise one by one (omp simd), not by -ffast-math, under which NaN would not survive.
#include "row_loss/args.h"

#include <cmath>
#include <limits>

#include "mr1/cpu.h"

namespace mr1 {
namespace {

// Elements a block has. Inside a block sums are made in W, lane by lane, and blocks are added in double: as accurate as adding
// by halves, and in an order that depends on nothing but the row's length.
constexpr int64_t BLOCK = 256;

// e^x for x <= 0 (and a little above), NaN for NaN, 0 below -87 (where fp32 runs out of normal numbers) and at -inf.
// x = k ln 2 + r with |r| <= ln(2)/2; e^r = 1 + r + r^2 q(r), q of degree 4 fitted for the smallest relative error (3e-9 before
// rounding). Relative error at most 1.2e-7, with and without fused multiply-add; tests/ops/test_op_row_loss.py measures it.
MR1_INLINE float exponential(float x) {
  const float bounded = x < -87.0f ? -87.0f : x;  // a comparison with NaN is false: NaN stays
  const float shifted = bounded * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: k ends up in the lowest bits
  const float k = shifted - 12582912.0f;
  const float r = (bounded - k * 0.693359375f) + k * 2.12194440e-4f;  // ln 2 in two parts, the first with 9 significant bits
  float q = r * 0.00138145406f + 0.00836874545f;
  q = q * r + 0.041668389f;
  q = q * r + 0.166665211f;
  q = q * r + 0.49999994f;
  const float y = (q * (r * r) + r) + 1.0f;
  const float power = bits_to_float((float_to_bits(shifted) << 23) + 0x3f800000u);
  return x < -87.0f ? 0.0f : y * power;
}
MR1_INLINE double exponential(double x) { return std::exp(x); }

// A block of a row as W: where it is if that is its type already, else widened into `buffer`.
MR1_INLINE const float* fetch(DType type, const void* row, int64_t begin, int64_t count, float* buffer) {
  if (type == DType::f32) return static_cast<const float*>(row) + begin;
  const uint16_t* from = static_cast<const uint16_t*>(row) + begin;
  if (type == DType::bf16) {
    for (int64_t i = 0; i < count; ++i) buffer[i] = Half16<bf16>::low(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) buffer[i] = Half16<f16>::low(from[i]);
  }
  return buffer;
}
MR1_INLINE const double* fetch(DType, const void* row, int64_t begin, int64_t, double*) { return static_cast<const double*>(row) + begin; }

// Where a block of the derivative is made, and its way home.
MR1_INLINE float* workplace(DType type, void* row, int64_t begin, float* buffer) {
  return type == DType::f32 ? static_cast<float*>(row) + begin : buffer;
}
MR1_INLINE double* workplace(DType, void* row, int64_t begin, double*) { return static_cast<double*>(row) + begin; }
MR1_INLINE void put_back(DType type, void* row, int64_t begin, int64_t count, const float* made) {
  uint16_t* to = static_cast<uint16_t*>(row) + begin;
  if (type == DType::bf16) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint16_t>(Half16<bf16>::rounded(made[i]) >> 16);
  } else if (type == DType::f16) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint16_t>(Half16<f16>::narrow(made[i]));
  }
}
MR1_INLINE void put_back(DType, void*, int64_t, int64_t, const double*) {}

MR1_INLINE int64_t size_of(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }
MR1_INLINE const void* row_of(const void* base, int64_t row, int64_t stride, DType type) {
  return base ? static_cast<const char*>(base) + row * stride * size_of(type) : nullptr;
}

template <class W>
MR1_INLINE W largest(DType type, const void* row, int64_t columns, W* buffer) {
  W top = -std::numeric_limits<W>::infinity();
  for (int64_t begin = 0; begin < columns; begin += BLOCK) {
    const int64_t count = columns - begin < BLOCK ? columns - begin : BLOCK;
    const W* p = fetch(type, row, begin, count, buffer);
    W most = -std::numeric_limits<W>::infinity();
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < count; ++i) most = p[i] > most ? p[i] : most;
    top = most > top ? most : top;
  }
  return top;
}

// The shift under exp: any finite number where there is no maximum, so that exp(-inf - shift) is 0 and not NaN.
template <class W>
MR1_INLINE W shift(W top) { return top == -std::numeric_limits<W>::infinity() ? W(0) : top; }

template <class W, bool TEACHER, bool HARD>
MR1_INLINE void stats_row(const RowStatsArgs& a, int64_t row) {
  W z_buffer[BLOCK], t_buffer[BLOCK];
  const void* z = row_of(a.z, row, a.z_stride, a.z_type);
  const void* t = row_of(a.t, row, a.t_stride, a.t_type);
  const W inv_t = static_cast<W>(a.inv_temperature);
  const W top = largest<W>(a.z_type, z, a.columns, z_buffer), teacher_top = TEACHER ? largest<W>(a.t_type, t, a.columns, t_buffer) : W(0);
  const W m = shift(top), u = shift(teacher_top);
  double sum = 0, hard = 0, teacher = 0, cross = 0;
  for (int64_t begin = 0; begin < a.columns; begin += BLOCK) {
    const int64_t count = a.columns - begin < BLOCK ? a.columns - begin : BLOCK;
    const W* zs = fetch(a.z_type, z, begin, count, z_buffer);
    W s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < count; ++i) s += exponential((zs[i] - m) * inv_t);
    sum += s;
    if constexpr (HARD) {
      W h = 0;
#pragma omp simd reduction(+ : h)
      for (int64_t i = 0; i < count; ++i) h += exponential(zs[i] - m);
      hard += h;
    }
    if constexpr (TEACHER) {
      const W* ts = fetch(a.t_type, t, begin, count, t_buffer);
      W p_sum = 0, c = 0;
#pragma omp simd reduction(+ : p_sum, c)
      for (int64_t i = 0; i < count; ++i) {
        const W p = exponential((ts[i] - u) * inv_t);
        const W gap = p * ((ts[i] - zs[i]) * inv_t);
        p_sum += p;
        c += p == W(0) ? W(0) : gap;
      }
      teacher += p_sum;
      cross += c;
    }
  }
  W* out = static_cast<W*>(a.out) + row * ROW_STATS;
  out[TOP] = top;
  out[SUM] = static_cast<W>(sum);
  out[HARD_SUM] = static_cast<W>(hard);
  out[TEACHER_TOP] = teacher_top;
  out[TEACHER_SUM] = static_cast<W>(teacher);
  out[CROSS] = static_cast<W>(cross);
}

template <class W, bool TEACHER, bool HARD>
MR1_INLINE void grad_row(const SoftmaxGradArgs& a, int64_t row) {
  W z_buffer[BLOCK], t_buffer[BLOCK];
  void* z = const_cast<void*>(row_of(a.z, row, a.z_stride, a.z_type));
  const void* t = row_of(a.t, row, a.t_stride, a.t_type);
  const W* numbers = static_cast<const W*>(a.numbers) + row * ROW_NUMBERS;
  const W inv_t = static_cast<W>(a.inv_temperature);
  const W m = shift(numbers[G_TOP]), u = shift(numbers[G_TEACHER_TOP]);
  const W scale = numbers[G_SCALE], hard_scale = numbers[G_HARD_SCALE], teacher_scale = numbers[G_TEACHER_SCALE];
  const int64_t label = a.labels ? a.labels[row] : -1;
  for (int64_t begin = 0; begin < a.columns; begin += BLOCK) {
    const int64_t count = a.columns - begin < BLOCK ? a.columns - begin : BLOCK;
    const W* zs = fetch(a.z_type, z, begin, count, z_buffer);
    const W* ts = TEACHER ? fetch(a.t_type, t, begin, count, t_buffer) : nullptr;
    W* made = workplace(a.z_type, z, begin, z_buffer);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const W x = zs[i] - m;
      W d = exponential(x * inv_t) * scale;
      if constexpr (HARD) d += exponential(x) * hard_scale;
      if constexpr (TEACHER) d -= exponential((ts[i] - u) * inv_t) * teacher_scale;
      made[i] = d;
    }
    if (label >= begin && label < begin + count) made[label - begin] -= numbers[G_PICK];
    put_back(a.z_type, z, begin, count, made);
  }
}

template <class W>
MR1_INLINE void stats_rows(const RowStatsArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (a.t && a.hard) stats_row<W, true, true>(a, row);
    else if (a.t) stats_row<W, true, false>(a, row);
    else if (a.hard) stats_row<W, false, true>(a, row);
    else stats_row<W, false, false>(a, row);
  }
}

template <class W>
MR1_INLINE void grad_rows(const SoftmaxGradArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (a.t && a.hard) grad_row<W, true, true>(a, row);
    else if (a.t) grad_row<W, true, false>(a, row);
    else if (a.hard) grad_row<W, false, true>(a, row);
    else grad_row<W, false, false>(a, row);
  }
}

MR1_CLONES void stats_float(const RowStatsArgs& a, int64_t begin, int64_t end) { stats_rows<float>(a, begin, end); }
MR1_CLONES void grad_float(const SoftmaxGradArgs& a, int64_t begin, int64_t end) { grad_rows<float>(a, begin, end); }

}  // namespace

// fp64 is there for derivative checks, and std::exp does not vectorise: it is not compiled several times.
void row_stats_cpu(const RowStatsArgs& a, int64_t begin, int64_t end) {
  if (a.z_type == DType::f64) stats_rows<double>(a, begin, end);
  else stats_float(a, begin, end);
}

void softmax_grad_cpu(const SoftmaxGradArgs& a, int64_t begin, int64_t end) {
  if (a.z_type == DType::f64) grad_rows<double>(a, begin, end);
  else grad_float(a, begin, end);
}

}  // namespace mr1
