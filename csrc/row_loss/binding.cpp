// torch's side of the row-loss kernels: schemas, what memory safety needs of the arguments, and the way to CPU or GPU.
#include "mr1/torch_glue.h"
#include "row_loss/args.h"

namespace mr1 {
namespace {

// z [n, V] and, if there is one, the teacher's logits beside it.
void expect_logits(const Tensor& z, const std::optional<Tensor>& teacher, double inv_temperature) {
  expect_dim(z, 2, "z", "[rows, vocabulary]");
  expect_unit_stride(z, "z");
  const DType type = dtype_of(z, "z");
  MR1_EXPECT(z.size(1) > 0, "z", "at least one column", "shape " << shape(z), "pass logits of a vocabulary");
  MR1_EXPECT(inv_temperature > 0 && inv_temperature <= std::numeric_limits<float>::max(), "inv_temperature", "a positive finite number",
             inv_temperature, "pass 1 / temperature");
  if (!teacher) return;
  expect_dim(*teacher, 2, "teacher", "[rows, vocabulary]");
  expect_size(*teacher, 0, z.size(0), "teacher", "rows");
  expect_size(*teacher, 1, z.size(1), "teacher", "the vocabulary");
  expect_unit_stride(*teacher, "teacher");
  expect_same_device(*teacher, z, "teacher", "z");
  const DType other = dtype_of(*teacher, "teacher");
  MR1_EXPECT((type == DType::f64) == (other == DType::f64), "teacher", "float64 exactly when z is float64",
             dtype_name(teacher->scalar_type()) << " beside " << dtype_name(z.scalar_type()), "convert one of them");
}

ScalarType wide_type(const Tensor& z) { return z.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// Rows a thread takes at least: enough to be worth waking it.
int64_t grain(const Tensor& z) { return std::max<int64_t>(1, 32768 / z.size(1)); }

RowStatsArgs stats_args(const Tensor& z, const std::optional<Tensor>& teacher, double inv_temperature, bool hard, const Tensor& out) {
  RowStatsArgs a;
  a.z = z.data_ptr();
  a.out = out.data_ptr();
  a.rows = z.size(0);
  a.columns = z.size(1);
  a.z_stride = z.stride(0);
  a.z_type = dtype_of(z, "z");
  if (teacher) {
    a.t = teacher->data_ptr();
    a.t_stride = teacher->stride(0);
    a.t_type = dtype_of(*teacher, "teacher");
  }
  a.inv_temperature = inv_temperature;
  a.hard = hard;
  return a;
}

SoftmaxGradArgs grad_args(const Tensor& z, const Tensor& numbers, const std::optional<Tensor>& teacher, const std::optional<Tensor>& labels,
                          double inv_temperature, bool hard) {
  expect_logits(z, teacher, inv_temperature);
  MR1_EXPECT(z.size(0) <= 1 || z.stride(0) >= z.size(1), "z", "rows that do not overlap",
             "stride " << z.stride(0) << " between rows of " << z.size(1), "call .contiguous() first");
  expect_dim(numbers, 2, "numbers", "[rows, 6]");
  expect_size(numbers, 0, z.size(0), "numbers", "rows");
  expect_size(numbers, 1, ROW_NUMBERS, "numbers", "numbers per row");
  MR1_EXPECT(numbers.is_contiguous() && numbers.scalar_type() == wide_type(z), "numbers", "contiguous " << dtype_name(wide_type(z)),
             dtype_name(numbers.scalar_type()) << (numbers.is_contiguous() ? "" : ", not contiguous"), "convert it first");
  expect_same_device(numbers, z, "numbers", "z");
  SoftmaxGradArgs a;
  if (labels) {
    expect_dim(*labels, 1, "labels", "[rows]");
    expect_size(*labels, 0, z.size(0), "labels", "rows");
    MR1_EXPECT(labels->scalar_type() == ScalarType::Long && labels->is_contiguous(), "labels", "contiguous int64",
               dtype_name(labels->scalar_type()) << (labels->is_contiguous() ? "" : ", not contiguous"), "convert it first");
    expect_same_device(*labels, z, "labels", "z");
    a.labels = static_cast<const int64_t*>(labels->data_ptr());
  }
  a.z = z.data_ptr();
  a.numbers = numbers.data_ptr();
  a.rows = z.size(0);
  a.columns = z.size(1);
  a.z_stride = z.stride(0);
  a.z_type = dtype_of(z, "z");
  if (teacher) {
    a.t = teacher->data_ptr();
    a.t_stride = teacher->stride(0);
    a.t_type = dtype_of(*teacher, "teacher");
  }
  a.inv_temperature = inv_temperature;
  a.hard = hard;
  return a;
}

Tensor new_stats(const Tensor& z) { return torch::stable::new_empty(z, {z.size(0), ROW_STATS}, wide_type(z)); }

Tensor stats_on_cpu(const Tensor& z, const std::optional<Tensor>& teacher, double inv_temperature, bool hard) {
  expect_logits(z, teacher, inv_temperature);
  Tensor out = new_stats(z);
  const RowStatsArgs a = stats_args(z, teacher, inv_temperature, hard, out);
  torch::stable::parallel_for(0, a.rows, grain(z), [&](int64_t begin, int64_t end) { row_stats_cpu(a, begin, end); });
  return out;
}

void grad_on_cpu(Tensor z, const Tensor& numbers, const std::optional<Tensor>& teacher, const std::optional<Tensor>& labels, double inv_temperature,
                 bool hard) {
  const SoftmaxGradArgs a = grad_args(z, numbers, teacher, labels, inv_temperature, hard);
  torch::stable::parallel_for(0, a.rows, grain(z), [&](int64_t begin, int64_t end) { softmax_grad_cpu(a, begin, end); });
}

#ifdef MR1_WITH_CUDA
void expect_launched(const char* wrong, const char* op) {
  MR1_EXPECT(wrong == nullptr, op, "a kernel that launches", wrong, "set MEGATRON_R1_OPS=row_stats=plain,softmax_grad=plain to go on without it, and report this");
}

Tensor stats_on_cuda(const Tensor& z, const std::optional<Tensor>& teacher, double inv_temperature, bool hard) {
  expect_logits(z, teacher, inv_temperature);
  const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  Tensor out = new_stats(z);
  expect_launched(row_stats_cuda(stats_args(z, teacher, inv_temperature, hard, out), current_cuda_stream(z.get_device_index())), "row_stats");
  return out;
}

void grad_on_cuda(Tensor z, const Tensor& numbers, const std::optional<Tensor>& teacher, const std::optional<Tensor>& labels, double inv_temperature,
                  bool hard) {
  const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  const SoftmaxGradArgs a = grad_args(z, numbers, teacher, labels, inv_temperature, hard);
  expect_launched(softmax_grad_cuda(a, current_cuda_stream(z.get_device_index())), "softmax_grad_");
}
#endif

}  // namespace
}  // namespace mr1

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_r1, m) {
  m.def("row_stats(Tensor z, Tensor? teacher, float inv_temperature, bool hard) -> Tensor");
  m.def("softmax_grad_(Tensor(z!) z, Tensor numbers, Tensor? teacher, Tensor? labels, float inv_temperature, bool hard) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_r1, CPU, m) {
  m.impl("row_stats", TORCH_BOX(&mr1::stats_on_cpu));
  m.impl("softmax_grad_", TORCH_BOX(&mr1::grad_on_cpu));
}

#ifdef MR1_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(megatron_r1, CUDA, m) {
  m.impl("row_stats", TORCH_BOX(&mr1::stats_on_cuda));
  m.impl("softmax_grad_", TORCH_BOX(&mr1::grad_on_cuda));
}
#endif
