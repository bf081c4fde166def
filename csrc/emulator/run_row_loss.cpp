// The row-loss kernels on a CPU: run_row_loss in.bin out.bin seed.
//
// First array: int64 [what, rows, columns, z_stride, t_stride, z_type, t_type (-1: no teacher), hard, with labels, offset of z],
// then double [1 / T]. what 0, row_stats: z, (t) -> stats. what 1, softmax_grad_: z, (t), (labels), numbers -> z.
// launch.cu is compiled in as it is, so its choices and launches are tested too.
#include "blob.h"
#include "row_loss/launch.cu"

int main(int argc, char** argv) {
  mr1_emu::Blobs blobs(argc, argv);
  const auto p = blobs.take<int64_t>();
  const double inv_temperature = blobs.take<double>()[0];
  const auto z_type = static_cast<mr1::DType>(p[5]);
  const bool teacher = p[6] >= 0;
  auto z = blobs.take<unsigned char>();
  auto t = teacher ? blobs.take<unsigned char>() : mr1_emu::Array<unsigned char>(0);
  const auto fill = [&](auto& a) {
    a.z = z.data() + p[9] * mr1::bytes_of(z_type);  // off the 16-byte grid, when asked to
    a.t = teacher ? t.data() : nullptr;
    a.rows = p[1], a.columns = p[2], a.z_stride = p[3], a.t_stride = p[4], a.z_type = z_type;
    a.t_type = teacher ? static_cast<mr1::DType>(p[6]) : z_type;
    a.inv_temperature = inv_temperature, a.hard = p[7] != 0;
  };
  const char* wrong = nullptr;
  if (p[0] == 0) {
    const size_t wide = z_type == mr1::DType::f64 ? 8 : 4;
    auto out = mr1_emu::output<unsigned char>(static_cast<size_t>(p[1]) * mr1::ROW_STATS * wide);
    mr1::RowStatsArgs a;
    fill(a);
    a.out = out.data();
    wrong = mr1::row_stats_cuda(a, nullptr);
    blobs.give(out);
  } else {
    auto labels = p[8] ? blobs.take<int64_t>() : mr1_emu::Array<int64_t>(0);
    auto numbers = blobs.take<unsigned char>();
    mr1::SoftmaxGradArgs a;
    fill(a);
    a.labels = labels.data();
    a.numbers = numbers.data();
    wrong = mr1::softmax_grad_cuda(a, nullptr);
    blobs.give(z);
  }
  if (wrong) mr1_emu::fail("%s", wrong);
  return blobs.done();
}
