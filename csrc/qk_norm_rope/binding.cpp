// torch's side of qk_norm_rope: schemas, everything memory safety needs of the arguments, and the way to CPU or GPU.
#include <cmath>

#include "mr1/torch_glue.h"
#include "qk_norm_rope/args.h"

namespace mr1 {
namespace {

// Tokens a thread takes at least, and chunks likewise: some tens of microseconds of work.
constexpr int64_t kGrainTokens = 64;

struct Call {
  const Tensor& qkv;
  const std::optional<Tensor>& q_weight;
  const std::optional<Tensor>& k_weight;
  const Tensor& cos;
  const Tensor& sin;
  const Tensor& positions;
  int64_t num_heads, num_kv_heads, head_dim, norm;
  double eps;
  bool interleaved, grouped, parity;
};

ScalarType wide_type(const Tensor& t) { return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

void expect_weight(const std::optional<Tensor>& weight, const Call& call, const char* name) {
  if (!weight) return;
  MR1_EXPECT(call.norm != qk_norm_none, name, "none, because there is no norm", "a tensor", "pass a norm or no gain");
  MR1_EXPECT(!(call.parity && call.interleaved), name, "none with parity and interleaved pairs", "a tensor", "pass parity=False or no gain");
  expect_dim(*weight, 1, name, "[head_dim]");
  expect_size(*weight, 0, call.head_dim, name, "a gain for every element of a head");
  expect_unit_stride(*weight, name);
  MR1_EXPECT(weight->scalar_type() == call.qkv.scalar_type() || weight->scalar_type() == wide_type(call.qkv), name,
             dtype_name(call.qkv.scalar_type()) << " like qkv, or float32", dtype_name(weight->scalar_type()), "convert it");
  expect_same_device(*weight, call.qkv, name, "qkv");
}

void expect_table(const Tensor& t, const Call& call, const char* name) {
  expect_dim(t, 2, name, "[positions, rotated elements / 2]");
  MR1_EXPECT(2 * t.size(1) <= call.head_dim, name, "at most head_dim / 2 = " << call.head_dim / 2 << " columns", "shape " << shape(t),
             "pass the table of this head size");
  MR1_EXPECT(t.scalar_type() == wide_type(call.qkv), name, dtype_name(wide_type(call.qkv)) << " for qkv of " << dtype_name(call.qkv.scalar_type()),
             dtype_name(t.scalar_type()), "convert it");
  MR1_EXPECT(t.is_contiguous(), name, "a contiguous tensor", "strides with gaps", "call .contiguous() first");
  expect_same_device(t, call.qkv, name, "qkv");
}

// Everything but outputs, checked.
QkNormRopeArgs arguments(const Call& call) {
  QkNormRopeArgs a;
  const Tensor& qkv = call.qkv;
  expect_dim(qkv, 3, "qkv", "[s, b, packed heads]");
  a.type = dtype_of(qkv, "qkv");
  MR1_EXPECT(call.head_dim > 0 && call.head_dim % 2 == 0 && call.head_dim <= QKNR_MAX_HEAD, "head_dim",
             "an even number from 2 to " << QKNR_MAX_HEAD, call.head_dim, "pass the size of one head");
  MR1_EXPECT(call.num_kv_heads > 0 && call.num_heads > 0 && call.num_heads % call.num_kv_heads == 0 && call.num_heads < (1 << 20), "num_heads",
             "a multiple of num_kv_heads, both positive", call.num_heads << " and " << call.num_kv_heads, "correct them");
  expect_size(qkv, 2, (call.num_heads + 2 * call.num_kv_heads) * call.head_dim, "qkv", "(num_heads + 2 num_kv_heads) * head_dim");
  expect_unit_stride(qkv, "qkv");
  expect_countable(qkv, "qkv");
  MR1_EXPECT(call.norm >= 0 && call.norm <= 2, "norm", "0 (none), 1 (RMS) or 2 (L2)", call.norm, "correct it");
  MR1_EXPECT(std::isfinite(call.eps) && call.eps >= 0, "eps", "a finite number, not negative", call.eps, "correct it");
  MR1_EXPECT(!(call.parity && call.norm == qk_norm_l2), "norm", "0 (none) or 1 (RMS) with parity", "2 (L2)", "pass parity=False");
  expect_weight(call.q_weight, call, "q_weight");
  expect_weight(call.k_weight, call, "k_weight");
  expect_table(call.cos, call, "cos");
  expect_table(call.sin, call, "sin");
  expect_size(call.sin, 0, call.cos.size(0), "sin", "as many positions as cos");
  expect_size(call.sin, 1, call.cos.size(1), "sin", "as many angles as cos");
  const Tensor& positions = call.positions;
  MR1_EXPECT(positions.scalar_type() == ScalarType::Long, "positions", "int64", dtype_name(positions.scalar_type()), "convert it");
  MR1_EXPECT(positions.dim() == 1 || positions.dim() == 2, "positions", "[s] or [s, b]", "shape " << shape(positions), "one position per token");
  expect_size(positions, 0, qkv.size(0), "positions", "tokens");
  if (positions.dim() == 2) expect_size(positions, 1, qkv.size(1), "positions", "rows");
  expect_same_device(positions, qkv, "positions", "qkv");

  a.s = qkv.size(0);
  a.b = qkv.size(1);
  a.groups = call.grouped ? static_cast<int>(call.num_kv_heads) : 1;
  a.group_queries = static_cast<int>(call.num_heads / a.groups);
  a.group_keys = static_cast<int>(call.num_kv_heads / a.groups);
  a.head_dim = static_cast<int>(call.head_dim);
  a.qkv = qkv.data_ptr();
  a.stride_s = qkv.stride(0);
  a.stride_b = qkv.stride(1);
  if (call.q_weight) {
    a.q_weight = call.q_weight->data_ptr();
    a.q_weight_type = dtype_of(*call.q_weight, "q_weight");
  }
  if (call.k_weight) {
    a.k_weight = call.k_weight->data_ptr();
    a.k_weight_type = dtype_of(*call.k_weight, "k_weight");
  }
  a.cos = call.cos.data_ptr();
  a.sin = call.sin.data_ptr();
  a.table_rows = call.cos.size(0);
  a.half = static_cast<int>(call.cos.size(1));
  a.positions = static_cast<const int64_t*>(positions.data_ptr());
  a.position_stride_s = positions.stride(0);
  a.position_stride_b = positions.dim() == 2 ? positions.stride(1) : 0;
  a.norm = static_cast<int>(call.norm);
  a.eps = call.eps;
  a.interleaved = call.interleaved;
  a.parity = call.parity;
  return a;
}

void expect_positions_in_table(const QkNormRopeArgs& a) {
  const int64_t rows = a.position_stride_b || a.b == 0 ? a.b : 1;
  for (int64_t s = 0; s < a.s; ++s)
    for (int64_t b = 0; b < rows; ++b) {
      const int64_t p = a.positions[s * a.position_stride_s + b * a.position_stride_b];
      MR1_EXPECT(p >= 0 && p < a.table_rows, "positions", "each from 0 to " << a.table_rows - 1 << ", the rows of cos",
                 p << " at token " << s, "make a longer table or correct it");
    }
}

HeadsView heads_view(const Tensor& t, const Call& call, int64_t heads, const char* name) {
  expect_dim(t, 4, name, "[s, b, heads, head_dim]");
  expect_size(t, 0, call.qkv.size(0), name, "tokens");
  expect_size(t, 1, call.qkv.size(1), name, "rows");
  expect_size(t, 2, heads, name, "heads");
  expect_size(t, 3, call.head_dim, name, "elements of a head");
  MR1_EXPECT(t.scalar_type() == call.qkv.scalar_type(), name, dtype_name(call.qkv.scalar_type()) << " like qkv", dtype_name(t.scalar_type()),
             "convert it");
  expect_unit_stride(t, name);
  expect_same_device(t, call.qkv, name, "qkv");
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

std::tuple<Tensor, Tensor> forward_outputs(const Call& call, QkNormRopeArgs& a) {
  Tensor q = torch::stable::new_empty(call.qkv, {a.s, a.b, call.num_heads, call.head_dim});
  Tensor k = torch::stable::new_empty(call.qkv, {a.s, a.b, call.num_kv_heads, call.head_dim});
  a.q = q.data_ptr();
  a.k = k.data_ptr();
  return {q, k};
}

std::tuple<Tensor, Tensor, Tensor> backward_outputs(const Tensor& dq, const Tensor& dk, const Tensor& dv, const Call& call, QkNormRopeArgs& a) {
  a.dq = heads_view(dq, call, call.num_heads, "dq");
  a.dk = heads_view(dk, call, call.num_kv_heads, "dk");
  a.dv = heads_view(dv, call, call.num_kv_heads, "dv");
  Tensor dqkv = torch::stable::new_empty(call.qkv, {a.s, a.b, call.qkv.size(2)});
  a.dqkv = dqkv.data_ptr();
  const ScalarType wide = wide_type(call.qkv);
  Tensor dq_weight = torch::stable::new_empty(call.qkv, {call.q_weight ? call.head_dim : 0}, wide);
  Tensor dk_weight = torch::stable::new_empty(call.qkv, {call.k_weight ? call.head_dim : 0}, wide);
  return {dqkv, dq_weight, dk_weight};
}

#define MR1_QKNR_PARAMETERS                                                                                                             \
  const Tensor &qkv, const std::optional<Tensor>&q_weight, const std::optional<Tensor>&k_weight, const Tensor &cos, const Tensor &sin,  \
      const Tensor &positions, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t norm, double eps, bool interleaved, \
      bool grouped, bool parity
#define MR1_QKNR_CALL \
  { qkv, q_weight, k_weight, cos, sin, positions, num_heads, num_kv_heads, head_dim, norm, eps, interleaved, grouped, parity }

std::tuple<Tensor, Tensor> forward_on_cpu(MR1_QKNR_PARAMETERS) {
  const Call call = MR1_QKNR_CALL;
  QkNormRopeArgs a = arguments(call);
  expect_positions_in_table(a);
  auto outputs = forward_outputs(call, a);
  torch::stable::parallel_for(0, a.s * a.b, kGrainTokens, [&](int64_t begin, int64_t end) { qk_norm_rope_forward_cpu(a, begin, end); });
  return outputs;
}

std::tuple<Tensor, Tensor, Tensor> backward_on_cpu(const Tensor& dq, const Tensor& dk, const Tensor& dv, MR1_QKNR_PARAMETERS) {
  const Call call = MR1_QKNR_CALL;
  QkNormRopeArgs a = arguments(call);
  expect_positions_in_table(a);
  auto outputs = backward_outputs(dq, dk, dv, call, a);
  const int64_t chunks = ceil_div(a.s * a.b, QKNR_CHUNK);
  std::optional<Tensor> partials;
  if (q_weight || k_weight) {
    partials = torch::stable::new_empty(qkv, {chunks, 2, head_dim}, wide_type(qkv));
    a.partials = partials->data_ptr();
  }
  torch::stable::parallel_for(0, chunks, kGrainTokens / QKNR_CHUNK,
                              [&](int64_t begin, int64_t end) { qk_norm_rope_backward_cpu(a, begin, end); });
  if (q_weight) qk_norm_rope_gain_cpu(a, chunks, 0, std::get<1>(outputs).data_ptr());
  if (k_weight) qk_norm_rope_gain_cpu(a, chunks, 1, std::get<2>(outputs).data_ptr());
  return outputs;
}

#ifdef MR1_WITH_CUDA
void expect_launched(const char* wrong) {
  MR1_EXPECT(wrong == nullptr, "qk_norm_rope", "a kernel that launches", wrong, "set MEGATRON_R1_OPS=qk_norm_rope=analytic to go on, and report this");
}

std::tuple<Tensor, Tensor> forward_on_cuda(MR1_QKNR_PARAMETERS) {
  const Call call = MR1_QKNR_CALL;
  QkNormRopeArgs a = arguments(call);
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  auto outputs = forward_outputs(call, a);
  expect_launched(qk_norm_rope_forward_cuda(a, current_cuda_stream(qkv.get_device_index())));
  return outputs;
}

std::tuple<Tensor, Tensor, Tensor> backward_on_cuda(const Tensor& dq, const Tensor& dk, const Tensor& dv, MR1_QKNR_PARAMETERS) {
  const Call call = MR1_QKNR_CALL;
  QkNormRopeArgs a = arguments(call);
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  auto outputs = backward_outputs(dq, dk, dv, call, a);
  std::optional<Tensor> sums;
  int64_t partials = 0;
  if (q_weight || k_weight) {
    partials = qk_norm_rope_partials_cuda(a);
    sums = torch::stable::new_empty(qkv, {partials, 2, head_dim}, wide_type(qkv));
    a.partials = sums->data_ptr();
  }
  expect_launched(qk_norm_rope_backward_cuda(a, partials, q_weight ? std::get<1>(outputs).data_ptr() : nullptr,
                                             k_weight ? std::get<2>(outputs).data_ptr() : nullptr, current_cuda_stream(qkv.get_device_index())));
  return outputs;
}
#endif

}  // namespace
}  // namespace mr1

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_r1, m) {
  m.def(
      "qk_norm_rope_fwd(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, Tensor positions, int num_heads, "
      "int num_kv_heads, int head_dim, int norm, float eps, bool interleaved, bool grouped, bool parity) -> (Tensor q, Tensor k)");
  m.def(
      "qk_norm_rope_bwd(Tensor dq, Tensor dk, Tensor dv, Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, "
      "Tensor positions, int num_heads, int num_kv_heads, int head_dim, int norm, float eps, bool interleaved, bool grouped, "
      "bool parity) -> (Tensor dqkv, Tensor dq_weight, Tensor dk_weight)");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_r1, CPU, m) {
  m.impl("qk_norm_rope_fwd", TORCH_BOX(&mr1::forward_on_cpu));
  m.impl("qk_norm_rope_bwd", TORCH_BOX(&mr1::backward_on_cpu));
}

#ifdef MR1_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(megatron_r1, CUDA, m) {
  m.impl("qk_norm_rope_fwd", TORCH_BOX(&mr1::forward_on_cuda));
  m.impl("qk_norm_rope_bwd", TORCH_BOX(&mr1::backward_on_cuda));
}
#endif
