// Arguments of the row-loss kernels, free of torch: filled by binding.cpp, read by cpu.cpp and launch.cu.
//
// Legend: n rows (positions), V columns (a rank's piece of the vocabulary), T temperature.
//   z [n, V]  a student's logits       elements of a row side by side, rows z_stride apart (strides count elements)
//   t [n, V]  a teacher's, or null     as z; its type may differ from z's, but both are f64 or neither is
// Everything is summed in fp32 at least (fp64 for fp64 logits) and the same whatever the number of threads.
#pragma once

#include <cstdint>

#include "mr1/types.h"

namespace mr1 {

// What row_stats writes for a row; W = float, or double for f64 logits. Numbers nobody asked for are 0.
//   TOP           m = max z                      (NaN is passed over here and comes out in the sums)
//   SUM           sum exp((z - m) / T)
//   HARD_SUM      sum exp(z - m)                  with `hard`
//   TEACHER_TOP   u = max t
//   TEACHER_SUM   sum exp((t - u) / T)
//   CROSS         sum exp((t - u) / T) * (t - z) / T; a token the teacher gives no probability counts 0, whatever z is
// Where a row's maximum is -inf, its sums are 0.
enum RowStat : int { TOP = 0, SUM = 1, HARD_SUM = 2, TEACHER_TOP = 3, TEACHER_SUM = 4, CROSS = 5, ROW_STATS = 6 };

struct RowStatsArgs {
  const void* z = nullptr;
  const void* t = nullptr;
  void* out = nullptr;  // [n, ROW_STATS], contiguous
  int64_t rows = 0, columns = 0, z_stride = 0, t_stride = 0;
  double inv_temperature = 1.0;
  bool hard = false;
  DType z_type = DType::f32, t_type = DType::f32;
};

// What softmax_grad_ reads for a row, and does: z becomes
//   SCALE * exp((z - TOP) / T) + HARD_SCALE * exp(z - TOP) - TEACHER_SCALE * exp((t - TEACHER_TOP) / T)   minus PICK at the label
// TOP and TEACHER_TOP must be at least the row's largest entries (of all pieces). An entry of -inf contributes 0.
enum RowNumber : int { G_TOP = 0, G_SCALE = 1, G_HARD_SCALE = 2, G_TEACHER_TOP = 3, G_TEACHER_SCALE = 4, G_PICK = 5, ROW_NUMBERS = 6 };

struct SoftmaxGradArgs {
  void* z = nullptr;  // overwritten in its own type
  const void* t = nullptr;
  const int64_t* labels = nullptr;  // [n] column, anything outside [0, V) for none; null: none at all
  const void* numbers = nullptr;    // [n, ROW_NUMBERS], contiguous, float (double for f64)
  int64_t rows = 0, columns = 0, z_stride = 0, t_stride = 0;
  double inv_temperature = 1.0;
  bool hard = false;
  DType z_type = DType::f32, t_type = DType::f32;
};

// Rows `begin` to `end`, in cpu.cpp.
void row_stats_cpu(const RowStatsArgs& args, int64_t begin, int64_t end);
void softmax_grad_cpu(const SoftmaxGradArgs& args, int64_t begin, int64_t end);

// All rows, in launch.cu; null or a static sentence about what went wrong (a CUDA error at launch).
const char* row_stats_cuda(const RowStatsArgs& args, void* stream);
const char* softmax_grad_cuda(const SoftmaxGradArgs& args, void* stream);

}  // namespace mr1
