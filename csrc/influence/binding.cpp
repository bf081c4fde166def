// torch.ops.megatron_r1.{wgrad_dot_, grad_dot, grad_project}: per-document scores of one linear layer. Legend and formulas: args.h.
//
// Numbers on the CPU. Products are made by torch's BLAS. fp32 and fp64: in their own precision. bf16: by oneDNN in bf16, each
// document's gradient rounded to bf16 once (as `b.T @ a` in torch is), where the CPU multiplies bf16 in hardware: four times the
// speed of fp32; elsewhere, and for fp16, which CPUs multiply many times slower than fp32, a and b are widened to fp32 first.
// Whatever is summed over documents, tiles and probes is summed in fp32 or wider.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <array>
#include <functional>

#include "influence/cpu.h"
#include "mr1/torch_glue.h"

namespace mr1 {
namespace {

using torch::stable::Device;
using torch::stable::detail::from;

ScalarType scalar_type(DType t) {
  switch (t) {
    case DType::bf16: return ScalarType::BFloat16;
    case DType::f16: return ScalarType::Half;
    case DType::f64: return ScalarType::Double;
    default: return ScalarType::Float;
  }
}

int64_t row_stride(const Tensor& t, int64_t axis) { return t.size(axis) > 1 ? t.stride(axis) : t.size(t.dim() - 1); }

Tensor converted(const Tensor& t, ScalarType dtype) { return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype); }

// --- Arguments ------------------------------------------------------------------------------------------------------------------

void expect_dtype(const Tensor& t, const char* argument, std::initializer_list<ScalarType> allowed, const char* why) {
  std::string names;
  for (ScalarType type : allowed) names += (names.empty() ? "" : " or ") + std::string(dtype_name(type));
  MR1_EXPECT(std::find(allowed.begin(), allowed.end(), t.scalar_type()) != allowed.end(), argument, names << " " << why,
             dtype_name(t.scalar_type()), "convert it first");
}

// Layer inputs and output gradients: two matrices with as many rows.
void expect_tokens(const Tensor& a, const Tensor& b) {
  dtype_of(a, "a");
  expect_dim(a, 2, "a", "[T, din]");
  expect_countable(a, "a");
  expect_dim(b, 2, "b", "[T, dout]");
  expect_size(b, 0, a.size(0), "b", "as many tokens as a");
  expect_dtype(b, "b", {a.scalar_type()}, "(a's dtype)");
  expect_same_device(b, a, "b", "a");
  expect_unit_stride(a, "a");
  expect_unit_stride(b, "b");
  expect_countable(b, "b");
}

void expect_probes(const Tensor& a, const Tensor& b, const Tensor& g) {
  expect_dim(g, 3, "g", "[K, dout, din]");
  expect_size(g, 1, b.size(1), "g", "rows, the layer's outputs,");
  expect_size(g, 2, a.size(1), "g", "columns, the layer's inputs,");
  expect_dtype(g, "g", {a.scalar_type(), a.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float}, "(a's, or wider)");
  expect_same_device(g, a, "g", "a");
  expect_unit_stride(g, "g");
  expect_countable(g, "g");
}

// First and past-the-last byte of what a tensor's elements span.
std::pair<const char*, const char*> span_of(const Tensor& t) {
  const char* begin = static_cast<const char*>(t.const_data_ptr());
  if (t.numel() == 0) return {begin, begin};
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  return {begin, begin + (last + 1) * static_cast<int64_t>(t.element_size())};
}

void expect_main_grad(const Tensor& a, const Tensor& b, const Tensor& g, const Tensor& main_grad) {
  expect_dim(main_grad, 2, "main_grad", "[dout, din]");
  expect_size(main_grad, 0, b.size(1), "main_grad", "rows, the layer's outputs,");
  expect_size(main_grad, 1, a.size(1), "main_grad", "columns, the layer's inputs,");
  expect_dtype(main_grad, "main_grad", {a.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float},
               "(gradients are summed wide)");
  expect_same_device(main_grad, a, "main_grad", "a");
  expect_unit_stride(main_grad, "main_grad");
  expect_countable(main_grad, "main_grad");
  MR1_EXPECT(main_grad.size(0) <= 1 || main_grad.stride(0) >= main_grad.size(1), "main_grad", "rows that do not share memory",
             "stride " << main_grad.stride(0) << " for rows of " << main_grad.size(1), "pass a tensor that was not expanded");
  const auto [begin, end] = span_of(main_grad);
  const std::array<std::pair<const Tensor*, const char*>, 3> inputs{{{&a, "a"}, {&b, "b"}, {&g, "g"}}};
  for (const auto& [input, name] : inputs) {
    const auto [first, last] = span_of(*input);
    MR1_EXPECT(end <= first || last <= begin || begin == end || first == last, "main_grad", "memory of its own", "memory shared with " << name,
               "pass a copy of " << name);
  }
}

// Document borders as int64 on the host; a copy that waits for the GPU when they lie there.
std::vector<int64_t> borders_of(const Tensor& cu_seqlens, int64_t tokens) {
  expect_dim(cu_seqlens, 1, "cu_seqlens", "[n + 1]");
  expect_dtype(cu_seqlens, "cu_seqlens", {ScalarType::Int, ScalarType::Long}, "");
  const int64_t count = cu_seqlens.size(0);
  MR1_EXPECT(count >= 1, "cu_seqlens", "at least one number, 0", "none", "pass [0] for no documents");
  const Tensor host = cu_seqlens.is_cpu() ? cu_seqlens : torch::stable::to(cu_seqlens, Device(torch::headeronly::DeviceType::CPU));
  std::vector<int64_t> borders(static_cast<size_t>(count));
  const int64_t step = count > 1 ? host.stride(0) : 1;
  const bool wide = host.scalar_type() == ScalarType::Long;
  const void* data = host.const_data_ptr();
  for (int64_t i = 0; i < count; ++i)
    borders[i] = wide ? static_cast<const int64_t*>(data)[i * step] : static_cast<const int32_t*>(data)[i * step];
  MR1_EXPECT(borders[0] == 0, "cu_seqlens", "to start at 0", borders[0], "pass the first token of each document, then T");
  for (int64_t i = 1; i < count; ++i)
    MR1_EXPECT(borders[i] >= borders[i - 1], "cu_seqlens", "numbers that never decrease",
               borders[i - 1] << " before " << borders[i] << " at position " << i, "pass the first token of each document, then T");
  MR1_EXPECT(borders[count - 1] == tokens, "cu_seqlens", "to end at the number of tokens, " << tokens, borders[count - 1],
             "add the tokens that are missing, or cut a and b");
  return borders;
}

Tensor new_scores(const Tensor& a, int64_t documents, int64_t probes) {
  MR1_EXPECT(probes == 0 || documents <= std::numeric_limits<int32_t>::max() / probes, "cu_seqlens", "at most 2^31 - 1 scores",
             documents << " documents and " << probes << " probes", "score fewer documents at a time");
  return torch::stable::new_empty(a, {documents, probes}, a.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
}

WgradDotArgs arguments(const Tensor& a, const Tensor& b, const Tensor& g, const std::vector<int64_t>& borders, const Tensor* main_grad,
                       const Tensor& scores) {
  WgradDotArgs p;
  p.a = a.const_data_ptr(), p.b = b.const_data_ptr(), p.g = g.const_data_ptr();
  p.cu_host = borders.data();
  p.scores = scores.mutable_data_ptr();
  p.tokens = a.size(0), p.din = a.size(1), p.dout = b.size(1), p.probes = g.size(0);
  p.documents = static_cast<int64_t>(borders.size()) - 1;
  p.a_stride = row_stride(a, 0), p.b_stride = row_stride(b, 0), p.g_stride = row_stride(g, 1);
  p.g_probe_stride = p.probes > 1 ? g.stride(0) : p.g_stride * p.dout;
  p.dtype = dtype_of(a, "a"), p.g_dtype = dtype_of(g, "g"), p.scores_dtype = dtype_of(scores, "scores");
  if (main_grad != nullptr) {
    p.main_grad = main_grad->mutable_data_ptr();
    p.main_grad_stride = row_stride(*main_grad, 0);
    p.main_grad_dtype = dtype_of(*main_grad, "main_grad");
  }
  return p;
}

// --- CPU ------------------------------------------------------------------------------------------------------------------------

Tensor view_of(const Matrix& m, bool transpose) {
  const std::array<int64_t, 2> sizes{transpose ? m.cols : m.rows, transpose ? m.rows : m.cols};
  const std::array<int64_t, 2> strides{transpose ? 1 : m.stride, transpose ? m.stride : 1};
  return torch::stable::from_blob(const_cast<void*>(m.data), {sizes.data(), 2}, {strides.data(), 2}, Device(torch::headeronly::DeviceType::CPU),
                                  scalar_type(m.dtype));
}

// Straight to the CPU kernel, past the dispatcher: no autograd, and no mode of the caller sees the parts of one operator.
void product(const Matrix& out, const Matrix& x, bool transpose_x, const Matrix& y, bool transpose_y, bool accumulate) {
  const Tensor c = view_of(out, false), l = view_of(x, transpose_x), r = view_of(y, transpose_y);
  STABLE_TORCH_ERROR_CODE_CHECK(accumulate ? aoti_torch_cpu_addmm_out(c.get(), c.get(), l.get(), r.get(), 1.0, 1.0)
                                           : aoti_torch_cpu_mm_out(c.get(), l.get(), r.get()));
}

// A range of two at least: a range of one would run outside a parallel region, where BLAS may split a product over threads,
// and with it change the order of its sums.
void parallel(int64_t tasks, const std::function<void(int64_t)>& task) {
  torch::stable::parallel_for(0, std::max<int64_t>(tasks, 2), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < std::min(end, tasks); ++i) task(i);
  });
}

bool takes_fused_cpu_op(Tensor, Tensor, Tensor, Tensor, std::optional<Tensor>) { return false; }

bool multiplies_bf16() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

// What products of a and b are made in: see the head of this file.
ScalarType product_type(const Tensor& a) {
  const ScalarType own = a.scalar_type();
  return own == ScalarType::Half || (own == ScalarType::BFloat16 && !multiplies_bf16()) ? ScalarType::Float : own;
}

Matrix matrix_of(const Tensor& t) { return {t.const_data_ptr(), dtype_of(t, "a"), t.size(0), t.size(1), row_stride(t, 0)}; }

Tensor score_cpu(const Tensor& a, const Tensor& b, const Tensor& g, const Tensor& cu_seqlens, const Tensor* main_grad, int64_t rows_below) {
  expect_tokens(a, b);
  expect_probes(a, b, g);
  if (main_grad != nullptr) expect_main_grad(a, b, g, *main_grad);
  MR1_EXPECT(rows_below >= 0, "rows_below", "a number of tokens", rows_below, "pass 0 to score every document by its gradient");
  const std::vector<int64_t> borders = borders_of(cu_seqlens, a.size(0));
  const Tensor scores = new_scores(a, static_cast<int64_t>(borders.size()) - 1, g.size(0));
  const Tensor x = converted(a, product_type(a)), y = converted(b, product_type(b));
  WgradDotCpu call;
  call.args = arguments(x, y, g, borders, main_grad, scores);
  call.rows_below = rows_below;
  bool by_rows = false;
  for (size_t i = 1; i < borders.size(); ++i) by_rows |= borders[i] - borders[i - 1] < rows_below && borders[i] > borders[i - 1];
  Tensor x_rows = x, y_rows = y, g_rows = g;
  if (by_rows && x.scalar_type() != g.scalar_type()) {
    // One of the two is fp32 already.
    x_rows = converted(x, ScalarType::Float), y_rows = converted(y, ScalarType::Float), g_rows = converted(g, ScalarType::Float);
  }
  call.a_rows = matrix_of(x_rows), call.b_rows = matrix_of(y_rows), call.g_rows = g_rows.const_data_ptr();
  call.rows_dtype = dtype_of(x_rows, "a"), call.g_rows_stride = row_stride(g_rows, 1);
  call.g_rows_probe_stride = g_rows.size(0) > 1 ? g_rows.stride(0) : 0;
  wgrad_dot_cpu(call, {product, parallel});
  return scores;
}

Tensor wgrad_dot_cpu_op(Tensor a, Tensor b, Tensor g, Tensor cu_seqlens, Tensor main_grad, int64_t rows_below, bool) {
  return score_cpu(a, b, g, cu_seqlens, &main_grad, rows_below);
}

Tensor grad_dot_cpu_op(Tensor a, Tensor b, Tensor g, Tensor cu_seqlens, int64_t rows_below, bool) {
  return score_cpu(a, b, g, cu_seqlens, nullptr, rows_below);
}

// Projections of the two sides: pa of one layer input, pb of one output gradient.
void expect_projection(const Tensor& x, const Tensor& p, const char* argument, const char* of) {
  const std::string legend = std::string("[r, width of ") + of + "]";
  expect_dim(p, 2, argument, legend.c_str());
  expect_size(p, 1, x.size(1), argument, legend.c_str());
  expect_dtype(p, argument, {x.scalar_type(), x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float}, "(a's, or wider)");
  expect_same_device(p, x, argument, of);
  expect_unit_stride(p, argument);
  expect_countable(p, argument);
}

void expect_results(int64_t documents, int64_t ra, int64_t rb) {
  MR1_EXPECT(ra == 0 || rb == 0 || documents <= std::numeric_limits<int32_t>::max() / ra / rb, "cu_seqlens", "at most 2^31 - 1 results",
             documents << " documents of " << rb << " x " << ra, "project fewer documents at a time");
}

constexpr int64_t kTokensAtOnce = 256;

// x p^T in the product's dtype, then in the dtype of the result (fp32 or fp64).
Tensor projected_cpu(const Tensor& x, const Tensor& p, ScalarType result) {
  const ScalarType type = x.scalar_type() == p.scalar_type() ? product_type(x) : ScalarType::Float;
  const Tensor l = converted(x, type), r = converted(p, type);
  const Tensor out = torch::stable::new_empty(x, {x.size(0), p.size(0)}, type);
  const Matrix whole = matrix_of(l), to = matrix_of(out);
  const int64_t width = static_cast<int64_t>(l.element_size());
  if (out.numel() > 0 && x.size(1) == 0) torch::stable::zero_(const_cast<Tensor&>(out));
  if (out.numel() > 0 && x.size(1) > 0)
    parallel(ceil_div(x.size(0), kTokensAtOnce), [&](int64_t i) {
      const int64_t begin = i * kTokensAtOnce, rows = std::min(kTokensAtOnce, x.size(0) - begin);
      const auto rows_of = [&](const Matrix& m) {
        return Matrix{static_cast<const char*>(m.data) + begin * m.stride * width, m.dtype, rows, m.cols, m.stride};
      };
      product(rows_of(to), rows_of(whole), false, matrix_of(r), true, false);
    });
  return converted(out, result);
}

Tensor grad_project_cpu_op(Tensor a, Tensor b, Tensor pa, Tensor pb, Tensor cu_seqlens) {
  expect_tokens(a, b);
  expect_projection(a, pa, "pa", "a");
  expect_projection(b, pb, "pb", "b");
  const std::vector<int64_t> borders = borders_of(cu_seqlens, a.size(0));
  const int64_t documents = static_cast<int64_t>(borders.size()) - 1, ra = pa.size(0), rb = pb.size(0);
  const ScalarType wide = a.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  expect_results(documents, ra, rb);
  Tensor out = torch::stable::new_empty(a, {documents, rb, ra}, wide);
  if (out.numel() == 0) return out;
  const Tensor l = projected_cpu(b, pb, wide), r = projected_cpu(a, pa, wide);
  const Matrix x = matrix_of(l), y = matrix_of(r);
  const int64_t width = static_cast<int64_t>(out.element_size());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  parallel(documents, [&](int64_t d) {
    const int64_t begin = borders[d], tokens = borders[d + 1] - begin;
    char* place = to + d * rb * ra * width;
    if (tokens == 0) {
      std::fill_n(place, rb * ra * width, 0);
      return;
    }
    const auto rows_of = [&](const Matrix& m) {
      return Matrix{static_cast<const char*>(m.data) + begin * m.stride * width, m.dtype, tokens, m.cols, m.stride};
    };
    product({place, x.dtype, rb, ra, ra}, rows_of(x), true, rows_of(y), false, false);
  });
  return out;
}

// --- GPU ------------------------------------------------------------------------------------------------------------------------

#ifdef MR1_WITH_CUDA
// The largest transient block of a document's weight gradient.
constexpr int64_t kBlockBytes = int64_t{256} << 20;

void expect_launched(const char* error, const char* kernel) { MR1_EXPECT(error == nullptr, kernel, "the kernel to run", error, "report this"); }

Tensor detached(const Tensor& t) {
  std::array<StableIValue, 1> stack{from(t)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::detach", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor turned(const Tensor& t) { return torch::stable::transpose(t, t.dim() - 2, t.dim() - 1); }

Tensor scratch(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {std::max<int64_t>(bytes, 1)}, ScalarType::Byte);
}

// out = x y by cuBLAS; sums in fp32, and rounds only where `out` is narrower.
void product_cuda(const Tensor& out, const Tensor& x, const Tensor& y) {
  if (out.scalar_type() == x.scalar_type()) {
    std::array<StableIValue, 3> stack{from(x), from(y), from(out)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
  } else {
    std::array<StableIValue, 4> stack{from(x), from(y), from(out.scalar_type()), from(out)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
  }
}

Tensor on_gpu(const std::vector<int64_t>& borders, const Tensor& like) {
  // From pinned memory, or the copy would wait for all that the stream has still to do.
  const Tensor host = torch::stable::empty({static_cast<int64_t>(borders.size())}, ScalarType::Int, std::nullopt,
                                           Device(torch::headeronly::DeviceType::CPU), true);
  std::copy(borders.begin(), borders.end(), static_cast<int32_t*>(host.mutable_data_ptr()));
  return torch::stable::to(host, Device(torch::headeronly::DeviceType::CUDA, like.get_device_index()), /*non_blocking=*/true);
}

// Weight gradient of tokens [begin, end), a block of rows at a time: main_grad += it; scores += <it, g> when `scored`.
void stream_cuda(const WgradDotArgs& p, const Tensor& a, const Tensor& b, int64_t begin, int64_t end, const Tensor& scores, int64_t document,
                 bool scored, void* stream) {
  const ScalarType wide = scalar_type(p.scores_dtype);
  const int64_t element = p.scores_dtype == DType::f64 ? 8 : 4;
  const int64_t step = std::clamp<int64_t>(kBlockBytes / (p.din * element), 1, p.dout);
  const Tensor block = torch::stable::new_empty(a, {step, p.din}, wide), x = torch::stable::narrow(const_cast<Tensor&>(a), 0, begin, end - begin);
  Tensor tokens = torch::stable::narrow(const_cast<Tensor&>(b), 0, begin, end - begin);
  Tensor room;
  for (int64_t row = 0; row < p.dout; row += step) {
    const int64_t rows = std::min(step, p.dout - row);
    Tensor whole = block, place = torch::stable::narrow(whole, 0, 0, rows);
    product_cuda(place, turned(torch::stable::narrow(tokens, 1, row, rows)), x);
    AddAndDotArgs q;
    const auto shifted = [&](const void* data, DType dtype, int64_t stride) {
      const int64_t bytes = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
      return data == nullptr ? nullptr : static_cast<const char*>(data) + row * stride * bytes;
    };
    q.block = place.const_data_ptr();
    q.g = shifted(p.g, p.g_dtype, p.g_stride);
    q.main_grad = const_cast<char*>(shifted(p.main_grad, p.main_grad_dtype, p.main_grad_stride));
    q.scores = static_cast<char*>(scores.mutable_data_ptr()) + document * p.probes * element;
    q.rows = rows, q.cols = p.din, q.probes = scored ? p.probes : 0;
    q.block_stride = p.din, q.g_stride = p.g_stride, q.g_probe_stride = p.g_probe_stride, q.main_grad_stride = p.main_grad_stride;
    q.block_dtype = q.scores_dtype = p.scores_dtype, q.g_dtype = p.g_dtype, q.main_grad_dtype = p.main_grad_dtype;
    if (row == 0) room = scratch(a, add_and_dot_workspace(q));
    q.workspace = room.mutable_data_ptr();
    expect_launched(add_and_dot(q, stream), "add_and_dot");
  }
}

// Scores of all documents token by token: <b_t, G a_t> = <G^T b_t, a_t>, whichever is narrower.
void rows_cuda(const WgradDotArgs& p, const Tensor& a, const Tensor& b, const Tensor& g, const Tensor& scores, void* stream) {
  const ScalarType wide = scalar_type(p.scores_dtype);
  const bool same = a.scalar_type() == g.scalar_type(), from_a = p.dout <= p.din;
  const Tensor x = same ? (from_a ? a : b) : converted(from_a ? a : b, wide);  // g may be fp32 where a is not
  const Tensor& y = from_a ? b : a;
  const Tensor u = torch::stable::new_empty(a, {p.tokens, std::min(p.din, p.dout)}, wide);
  RowDotArgs q;
  q.x = y.const_data_ptr(), q.y = u.const_data_ptr();
  q.cu_device = p.cu_device;
  q.tokens = p.tokens, q.width = u.size(1), q.documents = p.documents;
  q.x_stride = row_stride(y, 0), q.y_stride = u.size(1), q.score_stride = p.probes;
  q.x_dtype = dtype_of(y, "a"), q.y_dtype = p.scores_dtype;
  const Tensor room = scratch(a, row_dot_workspace(q));
  q.workspace = room.mutable_data_ptr();
  for (int64_t k = 0; k < p.probes; ++k) {
    const Tensor probe = torch::stable::select(g, 0, k);
    product_cuda(u, x, from_a ? turned(probe) : probe);
    q.scores = static_cast<char*>(scores.mutable_data_ptr()) + k * (p.scores_dtype == DType::f64 ? 8 : 4);
    expect_launched(row_dot(q, stream), "row_dot");
  }
}

Tensor score_cuda(const Tensor& a_, const Tensor& b_, const Tensor& g_, const Tensor& cu_seqlens, const Tensor* main_grad, int64_t rows_below,
                  bool fused) {
  expect_tokens(a_, b_);
  expect_probes(a_, b_, g_);
  if (main_grad != nullptr) expect_main_grad(a_, b_, g_, *main_grad);
  MR1_EXPECT(rows_below >= 0, "rows_below", "a number of tokens", rows_below, "pass 0 to score every document by its gradient");
  const torch::stable::accelerator::DeviceGuard guard(a_.get_device_index());
  void* stream = current_cuda_stream(a_.get_device_index());
  const Tensor a = detached(a_), b = detached(b_), g = detached(g_);
  const std::vector<int64_t> borders = borders_of(cu_seqlens, a.size(0));
  Tensor scores = new_scores(a, static_cast<int64_t>(borders.size()) - 1, g.size(0));
  const Tensor device_borders = on_gpu(borders, a);
  WgradDotArgs p = arguments(a, b, g, borders, main_grad, scores);
  p.cu_device = static_cast<const int32_t*>(device_borders.const_data_ptr());
  if (fused && wgrad_dot_sm90_supported(p)) {
    const Tensor room = scratch(a, wgrad_dot_sm90_workspace(p));
    p.workspace = room.mutable_data_ptr();
    expect_launched(wgrad_dot_sm90(p, stream), "wgrad_dot_sm90");
    return scores;
  }
  torch::stable::zero_(scores);
  if (p.din == 0 || p.dout == 0 || p.tokens == 0) return scores;
  // On a GPU a call is scored one way as a whole: launches cost more than what a mixture would save.
  int64_t longest = 0;
  for (size_t i = 1; i < borders.size(); ++i) longest = std::max(longest, borders[i] - borders[i - 1]);
  if (longest < rows_below || p.probes == 0) {
    if (p.probes > 0) rows_cuda(p, a, b, g, scores, stream);
    if (main_grad != nullptr) stream_cuda(p, a, b, 0, p.tokens, scores, 0, false, stream);
    return scores;
  }
  for (int64_t d = 0; d < p.documents; ++d)
    if (borders[d] < borders[d + 1]) stream_cuda(p, a, b, borders[d], borders[d + 1], scores, d, true, stream);
  return scores;
}

Tensor wgrad_dot_cuda_op(Tensor a, Tensor b, Tensor g, Tensor cu_seqlens, Tensor main_grad, int64_t rows_below, bool fused) {
  return score_cuda(a, b, g, cu_seqlens, &main_grad, rows_below, fused);
}

Tensor grad_dot_cuda_op(Tensor a, Tensor b, Tensor g, Tensor cu_seqlens, int64_t rows_below, bool fused) {
  return score_cuda(a, b, g, cu_seqlens, nullptr, rows_below, fused);
}

bool takes_fused_cuda_op(Tensor a, Tensor b, Tensor g, Tensor cu_seqlens, std::optional<Tensor> main_grad) {
  expect_tokens(a, b);
  expect_probes(a, b, g);
  if (main_grad) expect_main_grad(a, b, g, *main_grad);
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  // Only its being there and its length are looked at.
  const std::vector<int64_t> borders(static_cast<size_t>(std::max<int64_t>(cu_seqlens.numel(), 1)));
  const int32_t stand_in = 0;
  WgradDotArgs p = arguments(a, b, g, borders, main_grad ? &*main_grad : nullptr, g);
  p.scores_dtype = DType::f32;
  p.cu_device = &stand_in;
  return wgrad_dot_sm90_supported(p);
}

Tensor projected_cuda(const Tensor& x, const Tensor& p, ScalarType result) {
  const Tensor out = torch::stable::new_empty(x, {x.size(0), p.size(0)}, result);
  if (out.numel() > 0) product_cuda(out, x.scalar_type() == p.scalar_type() ? x : converted(x, result), turned(p));
  return out;
}

Tensor grad_project_cuda_op(Tensor a_, Tensor b_, Tensor pa, Tensor pb, Tensor cu_seqlens) {
  expect_tokens(a_, b_);
  expect_projection(a_, pa, "pa", "a");
  expect_projection(b_, pb, "pb", "b");
  const torch::stable::accelerator::DeviceGuard guard(a_.get_device_index());
  const std::vector<int64_t> borders = borders_of(cu_seqlens, a_.size(0));
  const int64_t documents = static_cast<int64_t>(borders.size()) - 1, ra = pa.size(0), rb = pb.size(0);
  expect_results(documents, ra, rb);
  const ScalarType wide = a_.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor out = torch::stable::new_zeros(a_, {documents, rb, ra}, wide);
  Tensor x = projected_cuda(detached(b_), detached(pb), wide), y = projected_cuda(detached(a_), detached(pa), wide);
  for (int64_t d = 0; d < documents && out.numel() > 0; ++d) {
    const int64_t begin = borders[d], tokens = borders[d + 1] - begin;
    if (tokens == 0) continue;
    product_cuda(torch::stable::select(out, 0, d), turned(torch::stable::narrow(x, 0, begin, tokens)), torch::stable::narrow(y, 0, begin, tokens));
  }
  return out;
}
#endif  // MR1_WITH_CUDA

}  // namespace
}  // namespace mr1

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_r1, m) {
  // rows_below: documents of fewer tokens are scored token by token (cpu.h). fused: by the one-pass kernel of
  // sm_90a where it takes the arguments (wgrad_dot_takes_fused).
  m.def("wgrad_dot_(Tensor a, Tensor b, Tensor g, Tensor cu_seqlens, Tensor(main_grad!) main_grad, int rows_below=0, bool fused=False) -> Tensor");
  m.def("grad_dot(Tensor a, Tensor b, Tensor g, Tensor cu_seqlens, int rows_below=0, bool fused=False) -> Tensor");
  // Whether the one-pass kernel takes these arguments on the GPU they lie on. Looks at the length of cu_seqlens only.
  m.def("wgrad_dot_takes_fused(Tensor a, Tensor b, Tensor g, Tensor cu_seqlens, Tensor? main_grad) -> bool");
  m.def("grad_project(Tensor a, Tensor b, Tensor pa, Tensor pb, Tensor cu_seqlens) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_r1, CPU, m) {
  m.impl("wgrad_dot_", TORCH_BOX(&mr1::wgrad_dot_cpu_op));
  m.impl("grad_dot", TORCH_BOX(&mr1::grad_dot_cpu_op));
  m.impl("grad_project", TORCH_BOX(&mr1::grad_project_cpu_op));
  m.impl("wgrad_dot_takes_fused", TORCH_BOX(&mr1::takes_fused_cpu_op));
}

#ifdef MR1_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(megatron_r1, CUDA, m) {
  m.impl("wgrad_dot_", TORCH_BOX(&mr1::wgrad_dot_cuda_op));
  m.impl("grad_dot", TORCH_BOX(&mr1::grad_dot_cuda_op));
  m.impl("grad_project", TORCH_BOX(&mr1::grad_project_cuda_op));
  m.impl("wgrad_dot_takes_fused", TORCH_BOX(&mr1::takes_fused_cuda_op));
}
#endif
