// Bodies for include/mr1/sm90.cuh under the emulator: what Hopper's asynchronous instructions do to memory, one step at a time.
//
// What is real: TMA writes the 128-byte swizzle pattern, fills what lies outside the matrix with zeros and counts bytes at the mbarrier
// when it is done, which is whenever the scheduler's seed says. wgmma decodes its 64-bit descriptors and reads shared memory through
// them, so that a wrong one gives wrong numbers; it reads and writes at any moment between its issue and the wait for its group, so
// that a stage refilled too early, or accumulators read too early, show. Each warp multiplies its own 16 rows on its own: warps of
// a warpgroup may be far apart, which is more than a GPU would allow and hides no missing barrier. A store that wgmma will read
// (store_zero_16) stays out of its sight until the storing thread's fence_proxy_async.
// What is not: the order of ordinary memory operations (threads here see each other's writes at once), the arithmetic of the tensor cores
// (here: fp32, one product after the other; there: several products per rounding), time. A wgmma_fence is only asked for
// (before each group), its absence has no other effect here.
#pragma once

#include <map>
#include <utility>
#include <vector>

#include "cuda_emu.h"
#include "mr1/types.h"

namespace mr1::sm90 {

// A matrix of 16-bit elements and the box that is copied out of it.
struct TensorMap {
  const uint16_t* data = nullptr;
  int64_t columns = 0, rows = 0, row_stride = 0;  // elements
  int box_columns = 0, box_rows = 0;
};

}  // namespace mr1::sm90

namespace mr1_emu::sm90 {

constexpr uint32_t kWindow = 1024;  // shared address of the first byte of dynamic shared memory

struct TransactionBarrier {
  int expected = 0, pending = 0;
  int64_t bytes = 0;  // still to come; below 0 while copies are ahead of the announcement
  uint32_t phase = 0;
};

struct WarpProducts {
  bool fenced = false;
  std::vector<uint64_t> open;                 // tickets not yet committed
  std::vector<std::vector<uint64_t>> groups;  // committed, not yet waited for
  size_t issued = 0;
};

struct Block {
  uint64_t number = ~uint64_t{0};
  std::map<const void*, TransactionBarrier> barriers;
  std::map<unsigned, WarpProducts> warps;
  std::map<unsigned, std::vector<std::pair<uint64_t, uint64_t>>> descriptors;  // of each warpgroup, in order of issue
  std::map<unsigned, std::pair<uint64_t, std::vector<void*>>> stores;          // of each thread, not yet fenced
  struct Copy {
    void* to;
    const void* from;  // null: zeros
    size_t bytes;
  };
  std::map<unsigned, std::pair<uint64_t, std::vector<Copy>>> copies;  // of each thread, not yet waited for
};
inline Block& block() {
  static Block b;
  if (b.number != state.block_number) b = Block{}, b.number = state.block_number;
  return b;
}

inline TransactionBarrier& barrier(const void* at, const char* what) {
  const auto found = block().barriers.find(at);
  if (found == block().barriers.end()) fail("%s: no mbarrier has been initialised there", what);
  return found->second;
}
inline void settle(TransactionBarrier& b) {
  if (b.pending == 0 && b.bytes == 0) b.phase ^= 1, b.pending = b.expected;
}
inline void arrive(uint64_t* at, int64_t bytes, const char* what) {
  TransactionBarrier& b = barrier(at, what);
  release(at);
  if (b.pending == 0) fail("%s: more arrivals than the mbarrier counts", what);
  b.bytes += bytes;
  --b.pending;
  settle(b);
}

inline uint32_t address(const void* p) {
  const auto* at = static_cast<const unsigned char*>(p);
  if (at < state.dynamic_shared || at > state.dynamic_shared + state.dynamic_bytes) fail("shared_address: not in dynamic shared memory");
  return static_cast<uint32_t>(at - state.dynamic_shared) + kWindow;
}
inline unsigned char* at_address(uint32_t address, uint32_t bytes, const char* what) {
  if (address < kWindow || address - kWindow + bytes > state.dynamic_bytes) fail("%s: shared address 0x%x is outside the block's shared memory", what, address);
  return state.dynamic_shared + (address - kWindow);
}
inline uint32_t swizzle_128b(uint32_t address) { return address ^ (address >> 7 & 7u) << 4; }

// Element (mn, k) of an MN-major operand of 16-bit elements under the 128-byte swizzle.
template <class T>
float operand(uint64_t descriptor, uint32_t mn, uint32_t k) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const uint32_t at = field(0) + mn % 64 * 2 + mn / 64 * field(16) + k % 8 * 128 + k / 8 * field(32);
  T element;
  std::memcpy(&element, at_address(swizzle_128b(at), sizeof element, "wgmma"), sizeof element);
  return mr1::to_float(element);
}

// One warp's 16 rows. d: the lanes' accumulators.
template <class T, int N>
void multiply(int quarter, float* const (&d)[32], uint64_t a, uint64_t b, bool add) {
  static float left[16][16], right[16][N];
  for (uint32_t k = 0; k < 16; ++k) {
    for (uint32_t m = 0; m < 16; ++m) left[m][k] = operand<T>(a, static_cast<uint32_t>(quarter) * 16 + m, k);
    for (uint32_t n = 0; n < N; ++n) right[k][n] = operand<T>(b, n, k);
  }
  for (int m = 0; m < 16; ++m) {
    float row[N];
    for (int n = 0; n < N; ++n) row[n] = add ? d[m % 8 * 4 + n % 8 / 2][n / 8 * 4 + m / 8 * 2 + n % 2] : 0.0f;
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < N; ++n) row[n] += left[m][k] * right[k][n];
    }
    for (int n = 0; n < N; ++n) d[m % 8 * 4 + n % 8 / 2][n / 8 * 4 + m / 8 * 2 + n % 2] = row[n];
  }
}

template <class T, int N>
void issue(float* d, uint64_t a, uint64_t b, bool add, Site site) {
  struct Lane {
    float* d;
    uint64_t a, b;
    bool add;
  } mine{d, a, b, add};
  warp_rendezvous(
      0xffffffffu, &mine, "wgmma",
      [&](void* const* lanes) {
        const unsigned w = warp();
        WarpProducts& products = block().warps[w];
        if (!products.fenced) fail("at %s: wgmma without a wgmma_fence since the last group was committed", site.text().c_str());
        if (a >> 62 != 1 || (a >> 49 & 7) || b >> 62 != 1 || (b >> 49 & 7)) fail("at %s: wgmma: the emulator knows the 128-byte swizzle without base offset only", site.text().c_str());
        std::vector<std::pair<uint64_t, uint64_t>>& order = block().descriptors[w / 4];
        if (products.issued == order.size()) order.emplace_back(a, b);
        if (order[products.issued++] != std::make_pair(a, b)) fail("at %s: wgmma: the warps of a warpgroup do not give the same descriptors", site.text().c_str());
        float* accumulators[32];
        for (int l = 0; l < 32; ++l) {
          const Lane& lane = *static_cast<const Lane*>(lanes[l]);
          if (lane.a != a || lane.b != b || lane.add != add) fail("at %s: wgmma: the lanes do not agree", site.text().c_str());
          accumulators[l] = lane.d;
        }
        products.open.push_back(async(
            "wgmma", [=] { multiply<T, N>(static_cast<int>(w % 4), accumulators, a, b, add); }, static_cast<int>(w)));
      },
      site);
}

}  // namespace mr1_emu::sm90

namespace mr1::sm90 {

using mr1_emu::Site;

inline uint32_t shared_address(const void* p) { return mr1_emu::sm90::address(p); }

inline void barrier_init(uint64_t* at, int arrivals) {
  if (reinterpret_cast<uintptr_t>(at) % 8) mr1_emu::fail("barrier_init: not aligned to 8 bytes");
  mr1_emu::Untracked untracked;
  *at = 0;  // the address sanitizer checks the place
  mr1_emu::sm90::block().barriers[at] = {arrivals, arrivals, 0, 0};
}
inline void fence_barrier_init() {}
inline void barrier_arrive(uint64_t* at) { mr1_emu::sm90::arrive(at, 0, "barrier_arrive"); }
inline void barrier_arrive_expect(uint64_t* at, uint32_t bytes) { mr1_emu::sm90::arrive(at, bytes, "barrier_arrive_expect"); }
inline void barrier_wait(uint64_t* at, uint32_t parity, Site site = Site::here()) {
  const mr1_emu::sm90::TransactionBarrier& b = mr1_emu::sm90::barrier(at, "barrier_wait");
  mr1_emu::wait_until([&] { return b.phase != parity; }, "mbarrier", at, site);
}

inline void tma_prefetch(const TensorMap*) {}
inline void tma_load_2d(void* destination, const TensorMap* map, uint64_t* at, int x, int y) {
  namespace emu = mr1_emu::sm90;
  emu::barrier(at, "tma_load_2d");
  const uint32_t to = emu::address(destination);
  if (to % 128) mr1_emu::fail("tma_load_2d: destination not aligned to 128 bytes");
  const TensorMap m = *map;
  mr1_emu::async("TMA copy", [=] {
    for (int r = 0; r < m.box_rows; ++r) {
      for (int c = 0; c < m.box_columns; ++c) {
        const int64_t row = int64_t{y} + r, column = int64_t{x} + c;
        const bool inside = row >= 0 && row < m.rows && column >= 0 && column < m.columns;
        const uint16_t element = inside ? m.data[row * m.row_stride + column] : uint16_t{0};
        const uint32_t linear = to + static_cast<uint32_t>((r * m.box_columns + c) * 2);
        std::memcpy(emu::at_address(emu::swizzle_128b(linear), 2, "TMA copy"), &element, 2);
      }
    }
    emu::TransactionBarrier& b = emu::barrier(at, "TMA copy");
    mr1_emu::release(at);
    b.bytes -= int64_t{m.box_rows} * m.box_columns * 2;
    emu::settle(b);
  });
}

inline void store_zero_16(void* shared) {
  auto& [ticket, places] = mr1_emu::sm90::block().stores[mr1_emu::thread()];
  if (places.empty()) {
    std::vector<void*>* const list = &places;
    ticket = mr1_emu::async("store to shared memory (no fence_proxy_async followed)", [list] {
      for (void* place : *list) std::memset(place, 0, 16);
      list->clear();
    });
  }
  mr1_emu::Untracked untracked;
  *static_cast<volatile unsigned char*>(shared) = *static_cast<volatile unsigned char*>(shared);  // for the address sanitizer
  places.push_back(shared);
}
inline void fence_proxy_async() {
  auto& [ticket, places] = mr1_emu::sm90::block().stores[mr1_emu::thread()];
  if (!places.empty()) mr1_emu::async_finish(ticket);
}

template <int Bytes>
void copy_async(void* shared, const void* global, bool zeros) {
  static_assert(Bytes == 4 || Bytes == 8);
  if (reinterpret_cast<uintptr_t>(shared) % Bytes || (!zeros && reinterpret_cast<uintptr_t>(global) % Bytes)) mr1_emu::fail("copy_async: not aligned to %d bytes", Bytes);
  mr1_emu::sm90::address(shared);
  auto& [ticket, copies] = mr1_emu::sm90::block().copies[mr1_emu::thread()];
  if (copies.empty()) {
    auto* const list = &copies;
    ticket = mr1_emu::async("copy by a thread (no copy_wait followed)", [list] {
      for (const auto& c : *list) {
        if (c.from) std::memcpy(c.to, c.from, c.bytes);
        else std::memset(c.to, 0, c.bytes);
      }
      list->clear();
    });
  }
  copies.push_back({shared, zeros ? nullptr : global, Bytes});
}
inline void copy_wait() {
  auto& [ticket, copies] = mr1_emu::sm90::block().copies[mr1_emu::thread()];
  if (ticket) mr1_emu::async_finish(ticket);
}

template <int R>
void wgmma_fence(float (&)[R], Site site = Site::here()) {
  mr1_emu::warp_rendezvous(0xffffffffu, nullptr, "wgmma_fence", [](void* const*) { mr1_emu::sm90::block().warps[mr1_emu::warp()].fenced = true; }, site);
}
inline void wgmma_commit(Site site = Site::here()) {
  mr1_emu::warp_rendezvous(
      0xffffffffu, nullptr, "wgmma_commit",
      [](void* const*) {
        mr1_emu::sm90::WarpProducts& products = mr1_emu::sm90::block().warps[mr1_emu::warp()];
        products.fenced = false;
        products.groups.push_back(products.open);
        products.open.clear();
      },
      site);
}
template <int Pending, int R>
void wgmma_wait(float (&)[R], Site site = Site::here()) {
  std::vector<uint64_t> ended;  // what must have ended
  mr1_emu::warp_rendezvous(
      0xffffffffu, &ended, "wgmma_wait",
      [](void* const* lanes) {
        std::vector<std::vector<uint64_t>>& groups = mr1_emu::sm90::block().warps[mr1_emu::warp()].groups;
        while (groups.size() > Pending) {
          for (int l = 0; l < 32; ++l) {
            auto& list = *static_cast<std::vector<uint64_t>*>(lanes[l]);
            list.insert(list.end(), groups.front().begin(), groups.front().end());
          }
          groups.erase(groups.begin());
        }
      },
      site);
  for (const uint64_t ticket : ended) mr1_emu::async_finish(ticket);  // in every lane: each waits for itself
}
template <class T>
void wgmma_64_128_16(float (&d)[64], uint64_t a, uint64_t b, int add, Site site = Site::here()) {
  mr1_emu::sm90::issue<T, 128>(d, a, b, add != 0, site);
}

template <int Registers>
void registers_give() {
  static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256);
}
template <int Registers>
void registers_take() {
  registers_give<Registers>();
}

}  // namespace mr1::sm90
