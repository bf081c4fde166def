// Arguments of the influence kernels, free of torch: filled by binding.cpp, read by cpu.cpp and launch.cu.
//
// Legend: T tokens, n documents, K probes, din/dout width of a linear layer's input/output.
//   a [T, din]          inputs of the layer                          elements of a row side by side, rows a_stride apart
//   b [T, dout]         gradients of the loss at its output          as a
//   g [K, dout, din]    probe gradients of its weight                elements of a row side by side
//   main_grad [dout, din]  += b^T a
//   scores [n, K]       = sum over o, i of g[k, o, i] * (sum over the tokens t of a document of b[t, o] a[t, i]); contiguous
// All strides count elements. Everything that is summed is summed in fp32 (fp64 when a, b are fp64).
#pragma once

#include <cstdint>

#include "mr1/types.h"

namespace mr1 {

struct WgradDotArgs {
  const void* a = nullptr;
  const void* b = nullptr;
  const void* g = nullptr;
  // First token of each document, then T: n + 1 numbers, checked (from 0, never decreasing, to T). Documents may be empty.
  const int64_t* cu_host = nullptr;
  const int32_t* cu_device = nullptr;  // the same on the GPU; null for the CPU
  void* main_grad = nullptr;           // null: scores only
  void* scores = nullptr;              // every element is written, also those of empty documents (0)
  void* workspace = nullptr;           // as many bytes as the kernel's ..._workspace says, aligned to 256
  int64_t tokens = 0, din = 0, dout = 0, probes = 0, documents = 0;
  int64_t a_stride = 0, b_stride = 0;        // between tokens
  int64_t g_stride = 0, g_probe_stride = 0;  // between rows, between probes
  int64_t main_grad_stride = 0;              // between rows
  DType dtype = DType::f32;                  // of a and b
  DType g_dtype = DType::f32;                // a's or f32 (f64 for f64)
  DType main_grad_dtype = DType::f32;        // f32 or f64
  DType scores_dtype = DType::f32;           // f32 (f64 when dtype is f64)
};

// One block of rows of one document's weight gradient: main_grad += block; scores[k] += <block, g[k]> for all K, in one pass.
struct AddAndDotArgs {
  const void* block = nullptr;  // [rows, cols], block_dtype
  const void* g = nullptr;      // [K, rows, cols]: the same rows of every probe
  void* main_grad = nullptr;    // [rows, cols]; null: scores only
  void* scores = nullptr;       // [K] side by side
  void* workspace = nullptr;    // GPU: add_and_dot_workspace(args) bytes, aligned to 256
  int64_t rows = 0, cols = 0, probes = 0;
  int64_t block_stride = 0, g_stride = 0, g_probe_stride = 0, main_grad_stride = 0;
  DType block_dtype = DType::f32;  // GPU: f32 or f64, as scores_dtype; CPU: bf16 too
  DType g_dtype = DType::f32, main_grad_dtype = DType::f32, scores_dtype = DType::f32;
};

// scores[d] = sum over the tokens t of document d of <x[t], y[t]>: one probe's scores, where x or y went through the probe.
struct RowDotArgs {
  const void* x = nullptr;             // [tokens, width]
  const void* y = nullptr;             // [tokens, width]
  const int32_t* cu_device = nullptr;  // [documents + 1]
  void* scores = nullptr;              // [documents], score_stride apart; every element is written
  void* workspace = nullptr;           // row_dot_workspace(args) bytes, aligned to 256
  int64_t tokens = 0, width = 0, documents = 0, x_stride = 0, y_stride = 0, score_stride = 1;
  DType x_dtype = DType::f32, y_dtype = DType::f32;  // y: x's or f32 (f64 for f64); scores: f32 (f64 for f64)
};

// --- GPU, in launch.cu; every function returns null or a static sentence about what went wrong (a CUDA error at launch) ------

// One fused pass (wgmma + TMA) on a GPU of compute capability 9.0. False for sizes, strides, alignments or dtypes it does not take.
bool wgrad_dot_sm90_supported(const WgradDotArgs& args);
int64_t wgrad_dot_sm90_workspace(const WgradDotArgs& args);
const char* wgrad_dot_sm90(const WgradDotArgs& args, void* stream);

// The step after each product of the plain GPU path. The order of summation is fixed: the same bits every time.
int64_t add_and_dot_workspace(const AddAndDotArgs& args);
const char* add_and_dot(const AddAndDotArgs& args, void* stream);

int64_t row_dot_workspace(const RowDotArgs& args);
const char* row_dot(const RowDotArgs& args, void* stream);

}  // namespace mr1
