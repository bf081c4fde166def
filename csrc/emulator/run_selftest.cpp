// Harness of selftest.cuh: the first array is [which kernel, numbers it needs...].
#include "blob.h"
#include "selftest.cuh"

using namespace mr1::selftest;

namespace {

// Kernels that only the emulator knows: its own primitives, on which PTX wrappers are built.

// A chain: thread t waits for thread t + 1, the last for nobody. y[t] = number of threads that came before.
void chain(int* y, int* turn) {
  const int t = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  mr1_emu::wait_until([&] { return *turn == n - 1 - t; }, "my turn");  // [mutant] nobody's turn
  y[t] = (*turn)++;
}

// Each warpgroup exchanges its values: y[t] = sum over the group.
void group_sums(long long* y, const int* x) {
  struct Piece {
    int in;
    long long out;
  } piece{x[threadIdx.x], 0};
  if (threadIdx.x == 200) mr1_emu::yield();  // [mutant] a thread that leaves
  mr1_emu::warpgroup_rendezvous(&piece, "group sum", [](void* const* threads) {
    long long sum = 0;
    for (int i = 0; i < 128; ++i) sum += static_cast<Piece*>(threads[i])->in;
    for (int i = 0; i < 128; ++i) static_cast<Piece*>(threads[i])->out = sum;
  });
  y[threadIdx.x] = piece.out;
}

// Copies that complete some time later, in order within a queue. A phase number as an mbarrier has it.
void copies(int* y, const int* x, int n) {
  MR1_SHARED(int, tile_array, 64);
  MR1_SHARED(int, done_array, 2);
  int *tile = tile_array, *done = done_array;  // a lambda copies pointers, but would copy arrays too
  if (threadIdx.x == 0) done[0] = done[1] = 0;
  __syncthreads();
  for (int step = 0; step < n; ++step) {
    if (threadIdx.x == 0) {
      for (int half = 0; half < 2; ++half) {
        mr1_emu::async("copy", [=] {
          for (int i = 0; i < 32; ++i) tile[32 * half + i] = x[64 * step + 32 * half + i];
          mr1_emu::Untracked untracked;
          mr1_emu::release(&done[half]);
          ++done[half];
        });
      }
    }
    const int half = static_cast<int>(threadIdx.x) / 32;
    mr1_emu::wait_until([&] { return done[half] > step; }, "copy", &done[half]);  // [mutant] wait for the copy
    y[64 * step + threadIdx.x] = tile[threadIdx.x];
    __syncthreads();  // [mutant] the tile may be overwritten
  }
}

// A queue keeps its order, and async_finish(ticket) runs all up to the ticket.
void queue_order(int* y, int n) {
  int count = 0;
  uint64_t ticket = 0;
  for (int i = 0; i < n; ++i) ticket = mr1_emu::async("entry", [&count, y, i] { y[i] = count++; }, 7);
  if (!mr1_emu::async_done(ticket)) mr1_emu::async_finish(ticket);
}

}  // namespace

int main(int argc, char** argv) {
  mr1_emu::Blobs blobs(argc, argv);
  const auto args = blobs.take<int64_t>();
  const auto arg = [&](size_t i) { return static_cast<int>(args[i]); };
  switch (arg(0)) {
    case 0: {
      const auto x = blobs.take<float>();
      auto y = mr1_emu::output<float>(arg(1));
      MR1_LAUNCH((row_sums<128>), arg(3), 128, 0, nullptr, y.data(), x.data(), arg(1), arg(2));
      blobs.give(y);
      break;
    }
    case 1: {
      const auto x = blobs.take<float>();
      auto y = mr1_emu::output<float>(x.size());
      MR1_LAUNCH((neighbours<64>), static_cast<int>(x.size() / 128), 64, 0, nullptr, y.data(), x.data());
      blobs.give(y);
      break;
    }
    case 2: {
      const auto x = blobs.take<int>();
      auto y = mr1_emu::output<int>(4 * 6 * 32 * 32);
      MR1_LAUNCH(shuffles, 1, 32, 0, nullptr, y.data(), x.data());
      blobs.give(y);
      break;
    }
    case 3: {
      const auto x = blobs.take<int>();
      auto y = mr1_emu::output<unsigned>(96);
      MR1_LAUNCH(halves, 1, 32, 0, nullptr, y.data(), x.data());
      blobs.give(y);
      break;
    }
    case 4: {
      const auto x = blobs.take<float>();
      auto y = mr1_emu::output<float>(x.size());
      MR1_LAUNCH(pipeline, 1, 128, 0, nullptr, y.data(), x.data(), static_cast<int>(x.size() / 64));
      blobs.give(y);
      break;
    }
    case 5: {
      const auto x = blobs.take<float>();
      auto y = mr1_emu::output<float>(x.size());
      MR1_LAUNCH(early_exit, 1, 256, x.size() * sizeof(float), nullptr, y.data(), x.data(), static_cast<int>(x.size() / 32));
      blobs.give(y);
      break;
    }
    case 6: {
      const auto x = blobs.take<float>();
      auto y = mr1_emu::output<float>(x.size());
      MR1_LAUNCH(reverse_vectors, 1, static_cast<int>(x.size() / 4), x.size() * sizeof(float), nullptr, y.data(), x.data());
      blobs.give(y);
      break;
    }
    case 7: {
      const auto x = blobs.take<int>();
      auto y = mr1_emu::output<int>(arg(1));
      for (int& v : y) v = 0;
      MR1_LAUNCH(histogram, arg(2), 64, arg(1) * sizeof(int), nullptr, y.data(), x.data(), static_cast<int>(x.size()), arg(1));
      blobs.give(y);
      break;
    }
    case 8: {
      const auto x = blobs.take<int>();
      auto y = mr1_emu::output<int>(128);
      MR1_LAUNCH(warp_mailbox, 1, 128, 0, nullptr, y.data(), x.data());
      blobs.give(y);
      break;
    }
    case 9: {
      auto y = mr1_emu::output<int>(2 * args[1] * args[2] * args[3] * args[4] * args[5] * args[6]);
      MR1_LAUNCH(positions, dim3(args[1], args[2], args[3]), dim3(args[4], args[5], args[6]), 0, nullptr, y.data());
      blobs.give(y);
      break;
    }
    case 10: {
      const auto x = blobs.take<float>();
      auto y = mr1_emu::output<float>(2 * x.size());
      MR1_LAUNCH(round_trip, static_cast<int>((x.size() + 63) / 64), 64, 0, nullptr, y.data(), x.data(), static_cast<int>(x.size()));
      blobs.give(y);
      break;
    }
    case 11: {
      auto y = mr1_emu::output<int>(arg(1));
      auto count = mr1_emu::output<int>(1);
      count[0] = 0;
      MR1_LAUNCH(arrivals, 1, arg(1), 0, nullptr, y.data(), count.data());
      blobs.give(y);
      break;
    }
    case 12: {
      const auto x = blobs.take<int>();
      auto y = mr1_emu::output<int>(1);
      auto partial = mr1_emu::output<int>(x.size() / 32);
      auto finished = mr1_emu::output<unsigned>(1);
      finished[0] = 0;
      MR1_LAUNCH(last_block, static_cast<int>(x.size() / 32), 32, 0, nullptr, y.data(), partial.data(), finished.data(), x.data());
      blobs.give(y);
      break;
    }
    case 13: {
      const auto x = blobs.take<float>();
      auto y = mr1_emu::output<float>(x.size());
      MR1_LAUNCH(hand_over, 1, 64, 0, nullptr, y.data(), x.data());
      blobs.give(y);
      break;
    }
    case 20: {
      auto y = mr1_emu::output<int>(arg(1));
      auto turn = mr1_emu::output<int>(1);
      turn[0] = 0;
      MR1_LAUNCH(chain, 1, arg(1), 0, nullptr, y.data(), turn.data());
      blobs.give(y);
      break;
    }
    case 21: {
      const auto x = blobs.take<int>();
      auto y = mr1_emu::output<long long>(x.size());
      MR1_LAUNCH(group_sums, 1, static_cast<int>(x.size()), 0, nullptr, y.data(), x.data());
      blobs.give(y);
      break;
    }
    case 22: {
      const auto x = blobs.take<int>();
      auto y = mr1_emu::output<int>(x.size());
      MR1_LAUNCH(copies, 1, 64, 0, nullptr, y.data(), x.data(), static_cast<int>(x.size() / 64));
      blobs.give(y);
      break;
    }
    case 23: {
      auto y = mr1_emu::output<int>(arg(1));
      MR1_LAUNCH(queue_order, 1, 1, 0, nullptr, y.data(), arg(1));
      blobs.give(y);
      break;
    }
    case 24: {  // a launch that asks for more shared memory than it may have
      MR1_LAUNCH(histogram, 1, 32, 100 * 1024, nullptr, nullptr, nullptr, 0, 0);
      break;
    }
    default: mr1_emu::fail("no kernel %d", arg(0));
  }
  return blobs.done();
}
