// Harness of qk_norm_rope: the kernels and the choice among them (dispatch.cuh), forward and backward.
//
// First array, int64: type, s, b, groups, group_queries, group_keys, head_dim, stride_s, stride_b, table_rows, half,
//   position_stride_s, position_stride_b, norm, interleaved, parity, backward, blocks that run at once, element qkv begins at,
//   q_weight given, k_weight given, weights are fp32, then for dq, dk, dv: stride_s, stride_b, stride_head.
// Then: eps (float64), qkv, q_weight, k_weight, cos, sin, positions; for the backward dq, dk, dv.
// Gives: which kernel (1: 16-byte accesses), and q, k or dqkv, dq_weight, dk_weight.
#include "blob.h"
#include "qk_norm_rope/dispatch.cuh"

using namespace mr1;

namespace {

using Bytes = mr1_emu::Array<unsigned char>;

template <class Run>
void by_type(DType type, const Run& run) {
  switch (type) {
    case DType::bf16: return run(bf16());
#ifndef MR1_QKNR_ONE
    case DType::f32: return run(float());
    case DType::f16: return run(f16());
    case DType::f64: return run(double());
#endif
    default: mr1_emu::fail("type %d is not in this build", static_cast<int>(type));
  }
}

}  // namespace

int main(int argc, char** argv) {
  mr1_emu::Blobs blobs(argc, argv);
  const auto n = blobs.take<int64_t>();
  const auto eps = blobs.take<double>();
  QkNormRopeArgs a;
  a.type = static_cast<DType>(n[0]);
  a.s = n[1];
  a.b = n[2];
  a.groups = static_cast<int>(n[3]);
  a.group_queries = static_cast<int>(n[4]);
  a.group_keys = static_cast<int>(n[5]);
  a.head_dim = static_cast<int>(n[6]);
  a.stride_s = n[7];
  a.stride_b = n[8];
  a.table_rows = n[9];
  a.half = static_cast<int>(n[10]);
  a.position_stride_s = n[11];
  a.position_stride_b = n[12];
  a.norm = static_cast<int>(n[13]);
  a.interleaved = n[14];
  a.parity = n[15];
  const bool backward = n[16];
  const int at_once = static_cast<int>(n[17]);
  a.eps = eps[0];
  const int64_t size = qknr::bytes_of(a.type);
  const Bytes qkv = blobs.take<unsigned char>();
  a.qkv = qkv.data() + n[18] * size;
  const Bytes q_weight = blobs.take<unsigned char>(), k_weight = blobs.take<unsigned char>();
  if (n[19]) a.q_weight = q_weight.data();
  if (n[20]) a.k_weight = k_weight.data();
  a.q_weight_type = a.k_weight_type = n[21] ? DType::f32 : a.type;
  const Bytes cos = blobs.take<unsigned char>(), sin = blobs.take<unsigned char>();
  a.cos = cos.data();
  a.sin = sin.data();
  const auto positions = blobs.take<int64_t>();
  a.positions = positions.data();
  const int64_t tokens = a.s * a.b, queries = a.groups * a.group_queries, keys = a.groups * a.group_keys;
  const auto resident = [&](auto, unsigned, size_t) { return at_once; };

  mr1_emu::Array<int64_t> which(1);
  if (!backward) {
    Bytes q = mr1_emu::output<unsigned char>(tokens * queries * a.head_dim * size), k = mr1_emu::output<unsigned char>(tokens * keys * a.head_dim * size);
    a.q = q.data();
    a.k = k.data();
    which[0] = qknr::fits_vectors(a, false);
    if (tokens) by_type(a.type, [&](auto t) { qknr::forward<decltype(t)>(a, nullptr, resident); });
    blobs.give(which);
    blobs.give(q);
    blobs.give(k);
    return blobs.done();
  }
  const Bytes dq = blobs.take<unsigned char>(), dk = blobs.take<unsigned char>(), dv = blobs.take<unsigned char>();
  a.dq = {dq.data(), n[22], n[23], n[24]};
  a.dk = {dk.data(), n[25], n[26], n[27]};
  a.dv = {dv.data(), n[28], n[29], n[30]};
  Bytes dqkv = mr1_emu::output<unsigned char>(tokens * (queries + 2 * keys) * a.head_dim * size);
  a.dqkv = dqkv.data();
  which[0] = qknr::fits_vectors(a, true);
  const int64_t wide = a.type == DType::f64 ? 8 : 4;
  int64_t blocks = 0;
  if (a.q_weight || a.k_weight) by_type(a.type, [&](auto t) { blocks = qknr::backward<decltype(t), true>(a, false, nullptr, resident); });
  Bytes partials = mr1_emu::output<unsigned char>(blocks * 2 * a.head_dim * wide);
  if (blocks) a.partials = partials.data();
  Bytes dq_weight = mr1_emu::output<unsigned char>(n[19] ? a.head_dim * wide : 0), dk_weight = mr1_emu::output<unsigned char>(n[20] ? a.head_dim * wide : 0);
  if (tokens || a.partials)
    by_type(a.type, [&](auto t) { qknr::backward_and_sum<decltype(t)>(a, blocks, dq_weight.data(), dk_weight.data(), nullptr, resident); });
  blobs.give(which);
  blobs.give(dqkv);
  blobs.give(dq_weight);
  blobs.give(dk_weight);
  return blobs.done();
}
