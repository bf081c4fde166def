// One instance of wgrad_dot_sm90 (bf16, probes in shared memory): compiled in a moment, for tests that compile many mutants of it.
// Takes and gives what run_influence does for wgrad_dot.
#include "blob.h"
#include "influence/wgrad_dot_sm90.cuh"

int main(int argc, char** argv) {
  mr1_emu::Blobs blobs(argc, argv);
  const auto p = blobs.take<int64_t>();
  const auto a = blobs.take<uint16_t>(), b = blobs.take<uint16_t>();
  const auto g = blobs.take<mr1::bf16>();
  const auto cu = blobs.take<int32_t>();
  auto main_grad = blobs.take<float>();
  const int multiprocessors = static_cast<int>(p[10]);
  const auto plan = mr1::wgrad_plan(p[1], p[3], p[2], p[4], p[5], multiprocessors);
  auto scores = mr1_emu::output<float>(static_cast<size_t>(p[5] * p[4]));
  auto partial = mr1_emu::output<float>(static_cast<size_t>(mr1::partial_floats(plan)));
  auto rest = mr1_emu::output<float>(static_cast<size_t>(mr1::rest_floats(plan)));
  const mr1::sm90::TensorMap map_a{a.data(), p[2], p[1], p[6], 64, mr1::kStepTokens}, map_b{b.data(), p[3], p[1], p[7], 64, mr1::kStepTokens};
  const mr1::WgradPointers at{cu.data(), g.data(), p[2], p[2] * p[3], p[11] ? main_grad.data() : nullptr, p[2], partial.data(), rest.data()};
  const auto kernel = mr1::wgrad_dot_kernel<mr1::bf16, mr1::bf16, true>;
  const int bytes = mr1::shared_bytes(plan, sizeof(mr1::bf16));
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  MR1_LAUNCH(kernel, min(plan.units, multiprocessors), mr1::kWgradThreads, bytes, nullptr, map_a, map_b, plan, at);
  if (plan.split > 0 && at.main_grad != nullptr) MR1_LAUNCH(mr1::add_parts_kernel<>, plan.split * 16, mr1::kConsumerThreads, 0, nullptr, plan, at);
  MR1_LAUNCH(mr1::sum_scores_kernel<>, plan.documents * plan.probes, 256, 0, nullptr, plan, cu.data(), static_cast<const float*>(partial.data()), scores.data());
  auto supported = mr1_emu::output<int64_t>(1);
  supported[0] = 1;
  blobs.give(supported);
  blobs.give(scores);
  blobs.give(main_grad);
  return blobs.done();
}
