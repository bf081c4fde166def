// The influence room's GPU sources on a CPU: run_influence in.bin out.bin seed.
//
// First array of the input: int64 [what, ...sizes]. what 0: wgrad_dot_sm90, 1: add_and_dot, 2: row_dot. Then the arrays the case below
// takes. launch.cu is compiled in as it is, so its checks, sizes and launches are tested too.
#include "blob.h"
#include "influence/launch.cu"

namespace {

using mr1_emu::Array;

// Elements of any dtype, as they lie in the file.
struct Any {
  mr1::DType dtype;
  Array<unsigned char> bytes;
  Any(mr1_emu::Blobs& blobs, int64_t dtype_) : dtype(static_cast<mr1::DType>(dtype_)), bytes(blobs.take<unsigned char>()) {}
};

void check(const char* error) {
  if (error) mr1_emu::fail("%s", error);
}

// [0, T, din, dout, K, n, a_stride, b_stride, dtype, g_dtype, multiprocessors, with main_grad]; a, b, g, cu, main_grad -> supported, scores, main_grad
void wgrad_dot(mr1_emu::Blobs& blobs, const Array<int64_t>& p) {
  mr1_emu::options.multiprocessors = static_cast<int>(p[10]);
  Any a(blobs, p[8]), b(blobs, p[8]), g(blobs, p[9]);
  auto cu = blobs.take<int32_t>();
  auto main_grad = blobs.take<float>();
  auto scores = mr1_emu::output<float>(static_cast<size_t>(p[5] * p[4]));
  mr1::WgradDotArgs args;
  args.a = a.bytes.data(), args.b = b.bytes.data(), args.g = g.bytes.data(), args.cu_device = cu.data(), args.scores = scores.data();
  args.main_grad = p[11] ? main_grad.data() : nullptr;
  args.tokens = p[1], args.din = p[2], args.dout = p[3], args.probes = p[4], args.documents = p[5], args.a_stride = p[6], args.b_stride = p[7];
  args.g_stride = p[2], args.g_probe_stride = p[2] * p[3], args.main_grad_stride = p[2];
  args.dtype = a.dtype, args.g_dtype = g.dtype;
  auto supported = mr1_emu::output<int64_t>(1);
  supported[0] = mr1::wgrad_dot_sm90_supported(args);
  auto workspace = mr1_emu::output<unsigned char>(supported[0] ? static_cast<size_t>(mr1::wgrad_dot_sm90_workspace(args)) : 0);
  args.workspace = workspace.data();
  if (supported[0]) check(mr1::wgrad_dot_sm90(args, nullptr));
  else if (!mr1::wgrad_dot_sm90(args, nullptr)) mr1_emu::fail("wgrad_dot_sm90 ran what it does not support");
  blobs.give(supported);
  blobs.give(scores);
  blobs.give(main_grad);
}

// [1, rows, cols, K, dtype, g_dtype, with main_grad]; block, g, main_grad, scores -> main_grad, scores
void add_and_dot(mr1_emu::Blobs& blobs, const Array<int64_t>& p) {
  Any block(blobs, p[4]), g(blobs, p[5]), main_grad(blobs, p[4]), scores(blobs, p[4]);
  mr1::AddAndDotArgs args;
  args.block = block.bytes.data(), args.g = g.bytes.data(), args.scores = scores.bytes.data();
  args.main_grad = p[6] ? main_grad.bytes.data() : nullptr;
  args.rows = p[1], args.cols = p[2], args.probes = p[3];
  args.block_stride = args.g_stride = args.main_grad_stride = p[2], args.g_probe_stride = p[1] * p[2];
  args.block_dtype = args.main_grad_dtype = args.scores_dtype = block.dtype, args.g_dtype = g.dtype;
  auto workspace = mr1_emu::output<unsigned char>(static_cast<size_t>(mr1::add_and_dot_workspace(args)));
  args.workspace = workspace.data();
  check(mr1::add_and_dot(args, nullptr));
  blobs.give(main_grad.bytes);
  blobs.give(scores.bytes);
}

// [2, T, width, n, x_dtype, y_dtype, score_stride]; x, y, cu, scores -> scores
void row_dot(mr1_emu::Blobs& blobs, const Array<int64_t>& p) {
  Any x(blobs, p[4]), y(blobs, p[5]);
  auto cu = blobs.take<int32_t>();
  Any scores(blobs, p[4] == 3 ? 3 : 0);
  mr1::RowDotArgs args;
  args.x = x.bytes.data(), args.y = y.bytes.data(), args.cu_device = cu.data(), args.scores = scores.bytes.data();
  args.tokens = p[1], args.width = p[2], args.documents = p[3], args.x_stride = args.y_stride = p[2], args.score_stride = p[6];
  args.x_dtype = x.dtype, args.y_dtype = y.dtype;
  auto workspace = mr1_emu::output<unsigned char>(static_cast<size_t>(mr1::row_dot_workspace(args)));
  args.workspace = workspace.data();
  check(mr1::row_dot(args, nullptr));
  blobs.give(scores.bytes);
}

}  // namespace

int main(int argc, char** argv) {
  mr1_emu::Blobs blobs(argc, argv);
  const auto sizes = blobs.take<int64_t>();
  if (sizes[0] == 0) wgrad_dot(blobs, sizes);
  else if (sizes[0] == 1) add_and_dot(blobs, sizes);
  else row_dot(blobs, sizes);
  return blobs.done();
}
