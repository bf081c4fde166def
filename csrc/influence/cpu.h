// The CPU side of the influence ops: loops over tiles and documents around a matrix product that the caller brings (BLAS).
// Free of torch. See args.h for the legend.
#pragma once

#include <functional>

#include "influence/args.h"

namespace mr1 {

// A matrix with the elements of a row side by side; stride counts elements between rows.
struct Matrix {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t rows = 0, cols = 0, stride = 0;
};

// out = op(x) op(y), or out += ... where `accumulate`; op is the transpose where asked for. All of one dtype. Must compute an
// element of `out` from the same numbers in the same order whenever the sizes are the same.
using Product = void (*)(const Matrix& out, const Matrix& x, bool transpose_x, const Matrix& y, bool transpose_y, bool accumulate);

// Calls task(i) for i in [0, tasks), on several threads perhaps; never with products threaded inside.
using Parallel = void (*)(int64_t tasks, const std::function<void(int64_t)>& task);

struct CpuTools {
  Product product = nullptr;
  Parallel parallel = nullptr;
};

// Documents of fewer tokens than `rows_below` are scored by rows, sum over t of <b_t, G a_t>, and share one product for their
// weight gradient; every other one has its own weight gradient, a tile at a time, which is scored while it is in the cache.
struct WgradDotCpu {
  WgradDotArgs args;  // cu_device and workspace are not used; scores [n, K] and main_grad (null: scores only) are written
  int64_t rows_below = 0;
  // The operands of the row products in one dtype, and that of the products: read only where documents are scored by rows.
  Matrix a_rows, b_rows;
  const void* g_rows = nullptr;
  DType rows_dtype = DType::f32;
  int64_t g_rows_stride = 0, g_rows_probe_stride = 0;
};

void wgrad_dot_cpu(const WgradDotCpu& call, const CpuTools& tools);

}  // namespace mr1
