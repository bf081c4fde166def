// QK-norm and RoPE over packed qkv: what host code hands to the CPU and CUDA kernels. Free of torch.
//
// Legend: s tokens, b rows, T = s * b pairs of them in order [s, b], h head size, rot = 2 * half rotated elements of a head.
// Heads in a token's qkv: `groups` times (queries per group, keys per group, values per group). The grouped layout has one group
// per key/value head; the flat layout is one group.
//
//   y = R(position) (w * n),  n = x * r,  r = 1 / sqrt(sum x^2 / (h or 1) + eps)
#pragma once

#include "mr1/types.h"

namespace mr1 {

enum QkNorm : int { qk_norm_none = 0, qk_norm_rms = 1, qk_norm_l2 = 2 };

// A [s, b, heads, h] tensor with neighbouring elements side by side; strides in elements.
struct HeadsView {
  const void* data = nullptr;
  int64_t stride_s = 0, stride_b = 0, stride_head = 0;
};

struct QkNormRopeArgs {
  DType type = DType::f32;
  int64_t s = 0, b = 0;
  int groups = 1, group_queries = 0, group_keys = 0;
  int head_dim = 0;
  const void* qkv = nullptr;
  int64_t stride_s = 0, stride_b = 0;  // elements
  const void* q_weight = nullptr;      // [h] or null, of `type` or fp32
  const void* k_weight = nullptr;
  DType q_weight_type = DType::f32, k_weight_type = DType::f32;
  const void* cos = nullptr;  // [table_rows, half], fp32 (fp64 for fp64)
  const void* sin = nullptr;
  int64_t table_rows = 0;
  int half = 0;
  const int64_t* positions = nullptr;
  int64_t position_stride_s = 0, position_stride_b = 0;
  int norm = qk_norm_rms;
  double eps = 0;
  bool interleaved = true, parity = false;

  // forward: contiguous [T, queries, h] and [T, keys, h]
  void* q = nullptr;
  void* k = nullptr;

  // backward: contiguous [T, groups * (queries + 2 keys) * h]
  HeadsView dq, dk, dv;
  void* dqkv = nullptr;
  // Sums of the gains' gradients over one chunk of tokens (CPU) or one block (CUDA): [partials, 2, h], fp32 (fp64 for fp64); row
  // 0 for q_weight, row 1 for k_weight. Null without gains.
  void* partials = nullptr;
};

// CPU. Largest head size (stack buffers), and tokens per chunk: chunks are what threads share out and what gain gradients are
// summed by, so that their bits do not depend on the number of threads.
constexpr int QKNR_MAX_HEAD = 1024;
constexpr int64_t QKNR_CHUNK = 32;
void qk_norm_rope_forward_cpu(const QkNormRopeArgs& a, int64_t first_token, int64_t end_token);
// Chunks [first, end); the last one may be short.
void qk_norm_rope_backward_cpu(const QkNormRopeArgs& a, int64_t first_chunk, int64_t end_chunk);
// out [h] = ordered sum over partials[:, row]: in fp64, rounded once.
void qk_norm_rope_gain_cpu(const QkNormRopeArgs& a, int64_t partials, int row, void* out);

// CUDA (launch.cu). Null when all went well, else what the runtime said.
const char* qk_norm_rope_forward_cuda(const QkNormRopeArgs& a, void* stream);
// How many partials the backward writes on the current device: one for each block.
int64_t qk_norm_rope_partials_cuda(const QkNormRopeArgs& a);
// dq_weight, dk_weight [h] fp32 or null.
const char* qk_norm_rope_backward_cuda(const QkNormRopeArgs& a, int64_t partials, void* dq_weight, void* dk_weight, void* stream);

}  // namespace mr1
