// Runs CUDA kernels on a CPU: every CUDA thread is a fiber (fiber.h), one OS thread runs them all, block after block.
//
// A fiber runs until it meets others (barrier, warp operation), waits or ends; which goes on next is drawn from a seed.
// So two threads' code between two meetings never interleaves, but whole stretches come in every order, and a barrier
// that is missing shows as a wrong result for some seed. docs/emulator.md says what this proves and what it can not.
//
// Kernels need only platform.cuh's list. Bodies for what has no CUDA C++ name (PTX wrappers) are built on these:
//
//   mr1_emu::wait_until([&] { return barrier->phase != parity; }, "mbarrier full[0]");
//       goes on when the predicate holds. If every thread of the block waits and no predicate holds, the run ends with
//       an error that lists who waits for what. The predicate must only read. (A third argument: see races.h.)
//
//   struct Lane { float in, out; } lane{x, 0.f};                       // each of the mask's lanes has its own
//   mr1_emu::warp_rendezvous(mask, &lane, "my_op", [](void* const* lanes) {   // indexed by lane; null outside the mask
//     static_cast<Lane*>(lanes[0])->out = static_cast<Lane*>(lanes[31])->in;
//   });
//   mr1_emu::warpgroup_rendezvous(&fragment, "wgmma", [&](void* const* threads) {...});   // 128 entries
//       the threads meet; the last to come runs the function once, with every thread's pointer; then all go on.
//
//   auto ticket = mr1_emu::async("TMA load", [=] { memcpy(...); arrive(...); }, queue);
//       runs the function later: at once, at the very last moment or at a random one, as the seed has it. Entries of
//       one queue (a number >= 0) run in order, those of queue -1 in any. async_done(ticket) asks; async_finish(ticket)
//       runs everything up to it. A block that ends before its async work has run is an error.
//
//   mr1_emu::thread(), lane(), warp(), warpgroup(), block_threads(): linear numbers of the running thread and its block.
//   mr1_emu::fail("...", printf arguments): ends the program with the kernel, block and thread in front.
#pragma once

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <link.h>

#include "fiber.h"
#include "races.h"

// ---------------------------------------------------------------------------------------------- CUDA's own types

#define MR1_EMU_VEC1(T, name, A) struct alignas(A) name##1 { T x; }; inline name##1 make_##name##1(T x) { return {x}; }
#define MR1_EMU_VEC2(T, name, A) \
  struct alignas(A) name##2 { T x, y; }; inline name##2 make_##name##2(T x, T y) { return {x, y}; }
#define MR1_EMU_VEC3(T, name, A) \
  struct alignas(A) name##3 { T x, y, z; }; inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }
#define MR1_EMU_VEC4(T, name, A) \
  struct alignas(A) name##4 { T x, y, z, w; }; inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
#define MR1_EMU_VEC(T, name, A1, A2, A4) \
  MR1_EMU_VEC1(T, name, A1) MR1_EMU_VEC2(T, name, A2) MR1_EMU_VEC3(T, name, A1) MR1_EMU_VEC4(T, name, A4)
// Alignments as in CUDA's vector_types.h: a vector load at less is an error there and (by UBSan) here.
MR1_EMU_VEC(signed char, char, 1, 2, 4)
MR1_EMU_VEC(unsigned char, uchar, 1, 2, 4)
MR1_EMU_VEC(short, short, 2, 4, 8)
MR1_EMU_VEC(unsigned short, ushort, 2, 4, 8)
MR1_EMU_VEC(int, int, 4, 8, 16)
MR1_EMU_VEC(unsigned int, uint, 4, 8, 16)
MR1_EMU_VEC(float, float, 4, 8, 16)
MR1_EMU_VEC(long long, longlong, 8, 16, 16)
MR1_EMU_VEC(unsigned long long, ulonglong, 8, 16, 16)
MR1_EMU_VEC(double, double, 8, 16, 16)
#undef MR1_EMU_VEC
#undef MR1_EMU_VEC1
#undef MR1_EMU_VEC2
#undef MR1_EMU_VEC3
#undef MR1_EMU_VEC4

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

// ---------------------------------------------------------------------------------------------- The emulator

namespace mr1_emu {

// Where in the source a thread meets or waits: the default argument is filled in at the caller's line.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
  std::string text() const {
    const char* base = std::strrchr(file, '/');
    return std::string(base ? base + 1 : file) + ":" + std::to_string(line);
  }
};

struct Options {
  uint64_t seed = 1;
  int multiprocessors = 3;             // what cudaDeviceGetAttribute says: small, so that loops over blocks are walked
  size_t shared_limit = 232448;        // bytes of shared memory a block can have (sm_90: 227 KiB)
  size_t shared_without_asking = 49152;  // beyond this a kernel needs cudaFuncSetAttribute
};
inline Options options;

inline constexpr unsigned kMaxThreads = 1024;
inline constexpr unsigned kMaxBarriers = 16;
enum class Status : uint8_t { runnable, blocked, polling, exited };

struct Fiber {
  Context context;
  unsigned linear = 0;
  uint3 index{};
  Status status = Status::exited;
  std::string (*describe)(const Fiber&) = nullptr;  // what it waits for, for error messages
  const char* what = "";
  Site site{"", 0};
  int barrier = -1;
  unsigned mask = 0;
  bool (*predicate)(const void*) = nullptr;
  const void* predicate_of = nullptr;
};

// Threads on their way to meet. `args` are indexed by the thread's place in the group.
template <unsigned N>
struct Meeting {
  unsigned expected = 0, arrived = 0, mask = 0;
  const char* what = "";
  void* args[N] = {};
  Fiber* members[N] = {};
};

struct Barrier {
  unsigned expected = 0, arrived = 0;
  bool everyone = false;  // __syncthreads: as many as have not exited
  Site site{"", 0};
  std::vector<Fiber*> waiting;
  std::vector<uint8_t> came;  // per thread, in this phase
  races::Clock clock;
};

struct AsyncWork {
  uint64_t ticket;
  int queue;
  const char* what;
  std::function<void()> run;
};

struct Warp {
  unsigned live = 0;          // lanes that exist and have not exited
  unsigned meeting_lanes = 0;  // lanes named by an open meeting's mask
  Meeting<32> meetings[32];   // by the mask's lowest lane: disjoint masks differ in it
};

struct State {
  Context main;
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber* current = nullptr;
  std::vector<Fiber*> runnable, polling;
  std::vector<std::vector<Fiber*>> ready;  // in a launch by priority: what can run, by warp
  size_t ready_count = 0;
  std::vector<Warp> warps;
  std::vector<Meeting<128>> warpgroups;
  Barrier barriers[kMaxBarriers];
  std::deque<AsyncWork> work;
  uint64_t tickets = 0;
  unsigned threads = 0, live = 0;
  uint64_t random = 0;
  uint64_t seeded_with = 0;
  bool by_priority = false;  // this block: the first warp that can, runs far ahead, instead of all in turn
  int async_policy = 0;      // this block: 0 any time, 1 soon, 2 as late as possible
  std::vector<unsigned> order;  // of the warps, where priority counts
  uint64_t block_number = 0;  // counts blocks of the whole program: static shared memory is renewed when it changes
  size_t static_shared = 0;
  const char* kernel = "";
  void (*body)(const void*) = nullptr;
  const void* body_of = nullptr;
  unsigned char* dynamic_shared = nullptr;
  size_t dynamic_bytes = 0;
  std::map<const void*, int> dynamic_allowed;
  bool running = false;
};
inline State state;

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  std::fflush(stdout);
  std::fprintf(stderr, "emulator: ");
  if (state.running) {
    std::fprintf(stderr, "%s block (%u, %u, %u)", state.kernel, blockIdx.x, blockIdx.y, blockIdx.z);
    if (state.current) std::fprintf(stderr, " thread %u (%u, %u, %u)", state.current->linear, threadIdx.x, threadIdx.y, threadIdx.z);
    std::fprintf(stderr, ": ");
  }
  va_list args;
  va_start(args, format);
  std::vfprintf(stderr, format, args);
  va_end(args);
  std::fprintf(stderr, "\n");
  std::fflush(stderr);
  std::_Exit(70);
}

// The same with the place in the source in front. (Messages are put together here and not in templates: those are
// compiled once for each use, and under sanitizers at length.)
[[noreturn]] __attribute__((format(printf, 2, 3), noinline)) inline void fail_at(Site site, const char* format, ...) {
  char text[1024];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  fail("at %s: %s", site.text().c_str(), text);
}

inline uint64_t random_bits() {  // xorshift64*
  uint64_t& x = state.random;
  x ^= x >> 12;
  x ^= x << 25;
  x ^= x >> 27;
  return x * 0x2545f4914f6cdd1dull;
}
inline size_t random_below(size_t n) { return static_cast<size_t>((random_bits() >> 33) % n); }

inline Fiber& self(const char* what) {
  if (!state.current) fail("%s called outside a kernel", what);
  return *state.current;
}
inline unsigned thread() { return self("thread()").linear; }
inline unsigned lane() { return self("lane()").linear & 31u; }
inline unsigned warp() { return self("warp()").linear >> 5; }
inline unsigned warpgroup() { return self("warpgroup()").linear >> 7; }
inline unsigned block_threads() { return state.threads; }

inline void make_runnable(Fiber* f) {
  f->status = Status::runnable;
  if (state.by_priority) {
    state.ready[f->linear >> 5].push_back(f);
    ++state.ready_count;
  } else {
    state.runnable.push_back(f);
  }
}

inline void switch_to_scheduler() {
  Fiber* f = state.current;
  switch_context(f->context, state.main);
}

// Lets any other thread go on first.
inline void yield() {
  make_runnable(&self("yield"));
  switch_to_scheduler();
}

inline std::string thread_ranges(const std::vector<unsigned>& sorted) {
  std::string out;
  for (size_t i = 0; i < sorted.size();) {
    size_t j = i;
    while (j + 1 < sorted.size() && sorted[j + 1] == sorted[j] + 1) ++j;
    out += (out.empty() ? "" : ",") + std::to_string(sorted[i]) + (j > i ? "-" + std::to_string(sorted[j]) : "");
    i = j + 1;
  }
  return out;
}

[[noreturn]] inline void deadlock() {
  std::map<std::string, std::vector<unsigned>> groups;
  for (unsigned t = 0; t < state.threads; ++t) {
    const Fiber& f = *state.fibers[t];
    groups[f.status == Status::exited ? "have exited" : "wait at " + f.describe(f)].push_back(t);
  }
  std::string text;
  for (const auto& [key, members] : groups) text += "\n  threads " + thread_ranges(members) + " " + key;
  state.current = nullptr;
  fail("deadlock: no thread can go on%s", text.c_str());
}

// Blocks the running thread until another makes it runnable.
inline void block_on(const char* what, Site site, std::string (*describe)(const Fiber&)) {
  Fiber& f = *state.current;
  f.status = Status::blocked;
  f.what = what;
  f.site = site;
  f.describe = describe;
  switch_to_scheduler();
}

inline void wait_until(bool (*predicate)(const void*), const void* predicate_of, const char* what, const void* object, Site site) {
  Fiber& f = self(what);
  Untracked untracked;
  if (!predicate(predicate_of)) {
    f.status = Status::polling;
    f.what = what;
    f.site = site;
    f.describe = [](const Fiber& me) { return std::string(me.what) + " (" + me.site.text() + ")"; };
    f.predicate = predicate;
    f.predicate_of = predicate_of;
    state.polling.push_back(&f);
    switch_to_scheduler();
  } else if (random_below(4) == 0) {
    yield();  // even so, others may come first
  }
  if (object) {
    acquire(object);
  } else {
    races::acquire_everything();
  }
}

template <class Predicate>
void wait_until(const Predicate& predicate, const char* what, const void* object = nullptr, Site site = Site::here()) {
  wait_until([](const void* p) { return static_cast<bool>((*static_cast<const Predicate*>(p))()); }, &predicate, what, object, site);
}

// ---- Asynchronous work

inline void run_work(size_t i) {
  AsyncWork entry = std::move(state.work[i]);
  state.work.erase(state.work.begin() + static_cast<std::ptrdiff_t>(i));
  races::Running running(entry.ticket, entry.queue);
  entry.run();
}

inline uint64_t async(const char* what, std::function<void()> run, int queue = -1) {
  self(what);
  state.work.push_back({++state.tickets, queue, what, std::move(run)});
  races::issue(state.tickets);
  return state.tickets;
}

inline bool async_done(uint64_t ticket) {
  const bool done = std::none_of(state.work.begin(), state.work.end(), [&](const AsyncWork& w) { return w.ticket == ticket; });
  if (done) races::finished(ticket);
  return done;
}

// Runs the entry, and before it everything its queue holds ahead of it.
inline void async_finish(uint64_t ticket) {
  auto find = [&] { return std::find_if(state.work.begin(), state.work.end(), [&](const AsyncWork& w) { return w.ticket == ticket; }); };
  for (auto mine = find(); mine != state.work.end(); mine = find()) {
    const int queue = mine->queue;
    const auto first = queue < 0 ? mine : std::find_if(state.work.begin(), state.work.end(), [&](const AsyncWork& w) { return w.queue == queue; });
    run_work(static_cast<size_t>(first - state.work.begin()));
  }
  races::finished(ticket);
}

inline void run_random_work() {
  size_t i = random_below(state.work.size());
  if (state.work[i].queue >= 0) {  // the first of its queue
    const int queue = state.work[i].queue;
    for (i = 0; state.work[i].queue != queue; ++i) {
    }
  }
  Fiber* const before = std::exchange(state.current, nullptr);
  run_work(i);
  state.current = before;
}

// ---- Meetings

// What the last to come runs: a function and what it refers to, so that meeting itself is no template over it.
struct Action {
  void (*call)(const void*, void* const*);
  const void* of;
  template <class Function>
  static Action from(const Function& function) {
    return {[](const void* f, void* const* args) { (*static_cast<const Function*>(f))(args); }, &function};
  }
};

template <unsigned N>
void meet(Meeting<N>& m, unsigned place, void* arg, const char* what, Site site, std::string (*describe)(const Fiber&), Action action) {
  Fiber& f = *state.current;
  if (m.arrived == 0) m.what = what;
  if (std::strcmp(m.what, what) != 0) fail_at(site, "%s, while other threads of its group are at %s", what, m.what);
  m.args[place] = arg;
  m.members[m.arrived++] = &f;
  if (m.arrived < m.expected) {
    block_on(what, site, describe);
    return;
  }
  action.call(action.of, m.args);
  for (unsigned i = 0; i < m.arrived; ++i) make_runnable(m.members[i]);
  std::fill_n(m.args, N, nullptr);
  m.arrived = 0;
  m.mask = 0;
  switch_to_scheduler();  // this thread is among the runnable, too: it need not be the first to go on
}

inline void warp_rendezvous(unsigned mask, void* arg, const char* what, Action action, Site site) {
  Fiber& f = self(what);
  const unsigned my_lane = f.linear & 31u;
  Warp& w = state.warps[f.linear >> 5];
  if (!(mask >> my_lane & 1u)) fail_at(site, "%s: lane %u is not in the mask 0x%08x it gives", what, my_lane, mask);
  if (mask & ~w.live) fail_at(site, "%s: the mask 0x%08x names lanes 0x%08x, which have exited or never existed", what, mask, mask & ~w.live);
  Meeting<32>& m = w.meetings[__builtin_ctz(mask)];
  if (m.mask != mask) {
    if (w.meeting_lanes & mask) fail_at(site, "%s: mask 0x%08x, but lanes of it are awaited with another mask", what, mask);
    m.mask = mask;
    m.expected = static_cast<unsigned>(__builtin_popcount(mask));
    w.meeting_lanes |= mask;
  }
  f.mask = mask;
  auto describe = [](const Fiber& me) {
    char hex[16];
    std::snprintf(hex, sizeof hex, "0x%08x", me.mask);
    return std::string(me.what) + " mask " + hex + " (" + me.site.text() + ")";
  };
  auto act = [&](void* const* args) {
    w.meeting_lanes &= ~mask;
    action.call(action.of, args);
  };
  meet(m, my_lane, arg, what, site, describe, Action::from(act));
}

template <class Function>
void warp_rendezvous(unsigned mask, void* arg, const char* what, const Function& function, Site site = Site::here()) {
  warp_rendezvous(mask, arg, what, Action::from(function), site);
}

inline void warpgroup_rendezvous(void* arg, const char* what, Action action, Site site) {
  Fiber& f = self(what);
  const unsigned group = f.linear >> 7;
  if ((group + 1) * 128 > state.threads) fail_at(site, "%s: warpgroup %u has no 128 threads", what, group);
  for (unsigned w = 4 * group; w < 4 * group + 4; ++w) {
    if (state.warps[w].live != 0xffffffffu) fail_at(site, "%s: a thread of warpgroup %u has exited", what, group);
  }
  Meeting<128>& m = state.warpgroups[group];
  m.expected = 128;
  auto describe = [](const Fiber& me) { return std::string(me.what) + " of its warpgroup (" + me.site.text() + ")"; };
  meet(m, f.linear & 127u, arg, what, site, describe, action);
}

template <class Function>
void warpgroup_rendezvous(void* arg, const char* what, const Function& function, Site site = Site::here()) {
  warpgroup_rendezvous(arg, what, Action::from(function), site);
}

// ---- Block barriers

inline std::string describe_barrier(const Fiber& me) {
  const Barrier& b = state.barriers[me.barrier];
  return std::string(me.what) + " " + std::to_string(me.barrier) + " (" + me.site.text() + "), " + std::to_string(b.arrived) + " of " +
         std::to_string(b.everyone ? state.live : b.expected) + " have come";
}

inline bool release_if_complete(Barrier& b) {
  if (b.arrived == 0 || b.arrived < (b.everyone ? state.live : b.expected)) return false;
  if (!b.everyone) {  // bar.sync counts warps: a warp comes as a whole
    for (unsigned t = 0; t < state.threads; ++t) {
      if (!b.came[t]) continue;
      const unsigned first = t & ~31u;
      for (unsigned u = first; u < std::min(first + 32, state.threads); ++u) {
        if (!b.came[u] && (state.warps[t >> 5].live >> (u & 31u) & 1u)) fail("named barrier %d: thread %u came, thread %u of the same warp did not", static_cast<int>(&b - state.barriers), t, u);
      }
    }
  }
  for (Fiber* f : b.waiting) {
    races::depart(f->linear, b.clock);
    make_runnable(f);
  }
  races::reset(b.clock);
  b.waiting.clear();
  b.arrived = 0;
  b.expected = 0;
  b.everyone = false;
  std::fill(b.came.begin(), b.came.end(), uint8_t{0});
  return true;
}

inline void barrier(int id, int threads, bool everyone, bool wait, const char* what, Site site) {
  Fiber& f = self(what);
  if (id < 0 || id >= static_cast<int>(kMaxBarriers)) fail_at(site, "%s %d: barriers are numbered 0 to 15", what, id);
  Barrier& b = state.barriers[id];
  if (!everyone && (threads <= 0 || threads % 32 != 0 || threads > static_cast<int>(kMaxThreads))) fail_at(site, "%s %d: %d threads, not a multiple of 32 up to 1024", what, id, threads);
  if (b.arrived == 0) {
    b.everyone = everyone;
    b.expected = static_cast<unsigned>(threads);
    b.site = site;
  } else if (b.everyone != everyone) {
    fail_at(site, "barrier %d is used as __syncthreads by some threads and as a named barrier by others (%s)", id, b.site.text().c_str());
  } else if (!everyone && b.expected != static_cast<unsigned>(threads)) {
    fail_at(site, "%s %d for %d threads, but others came for %u (%s)", what, id, threads, b.expected, b.site.text().c_str());
  } else if (everyone && !(b.site == site)) {
    fail("divergent barrier: this thread is at __syncthreads in %s, others are at the one in %s", site.text().c_str(), b.site.text().c_str());
  }
  if (b.came[f.linear]) fail_at(site, "%s %d: comes twice in one phase", what, id);
  b.came[f.linear] = 1;
  ++b.arrived;
  races::arrive(b.clock);
  f.barrier = id;
  if (!wait) {
    release_if_complete(b);
    return;
  }
  b.waiting.push_back(&f);
  if (!release_if_complete(b)) {
    block_on(what, site, describe_barrier);
  } else {
    switch_to_scheduler();
  }
}

// ---- Shared memory

// Plain `__shared__` is thread-local storage, whose extent in memory the loader tells: so it can be poisoned whole.
inline std::pair<unsigned char*, size_t> thread_local_block() {
  std::pair<unsigned char*, size_t> found{nullptr, 0};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          if (info->dlpi_phdr[i].p_type == PT_TLS) {
            *static_cast<std::pair<unsigned char*, size_t>*>(out) = {static_cast<unsigned char*>(info->dlpi_tls_data), info->dlpi_phdr[i].p_memsz};
          }
        }
        return 1;  // the program itself comes first, and only it holds kernels
      },
      &found);
  return found;
}

// One MR1_SHARED array: memory of its own, poisoned anew for each block.
struct SharedArray {
  const char* name;
  size_t bytes, align;
  unsigned char* data = nullptr;
  uint64_t block = 0;
  SharedArray(const char* name_, size_t bytes_, size_t align_) : name(name_), bytes(bytes_), align(align_) {}
  void* get() {
    if (block == state.block_number) return data;
    block = state.block_number;
    if (!data) {
      // Aligned to `align` and to no more, so that a vector access which needs more is misaligned here too. (8 at
      // least: the address sanitizer's granule, in front of which it can mark memory as forbidden.)
      const size_t offset = std::max<size_t>(align, 8), whole = std::max<size_t>(2 * offset, 256);
      auto* memory = static_cast<unsigned char*>(std::aligned_alloc(whole, (offset + bytes + whole - 1) / whole * whole));
      if (!memory) fail("no memory for shared array %s", name);
      data = memory + offset;
#if defined(MR1_EMU_ASAN)
      __asan_poison_memory_region(memory, offset);
      __asan_poison_memory_region(data + bytes, (offset + bytes + whole - 1) / whole * whole - offset - bytes);
#endif
    }
    Untracked untracked;
    races::watch(data, bytes, true, name);
    std::memset(data, 0xff, bytes);
    state.static_shared += bytes;
    if (state.static_shared > options.shared_without_asking) fail("static shared memory: more than %zu bytes (at %s)", options.shared_without_asking, name);
    return data;
  }
};

// ---- Launch

inline Fiber* take(std::vector<Fiber*>& from, size_t i) {
  Fiber* f = from[i];
  from[i] = from.back();
  from.pop_back();
  return f;
}

inline size_t count_runnable() { return state.by_priority ? state.ready_count : state.runnable.size(); }

inline Fiber* take_runnable() {
  if (!state.by_priority) return take(state.runnable, random_below(state.runnable.size()));
  if (random_below(256) == 0) std::swap(state.order[random_below(state.order.size())], state.order[random_below(state.order.size())]);
  for (unsigned w : state.order) {
    if (state.ready[w].empty()) continue;
    --state.ready_count;
    return take(state.ready[w], random_below(state.ready[w].size()));
  }
  fail("the emulator lost a thread");
}

inline Fiber* next_fiber() {
  state.current = nullptr;
  for (;;) {
    if (state.async_policy == 1 && !state.work.empty() && random_below(2) == 0) run_random_work();
    if (count_runnable() > 0 && state.polling.empty() && state.work.empty()) return take_runnable();
    for (int attempt = 0; attempt < 4 && count_runnable() > 0; ++attempt) {
      const size_t now = count_runnable(), some = state.async_policy != 2 && !state.work.empty() ? 1 : 0;
      const size_t i = random_below(now + state.polling.size() + some);
      if (i < now) return take_runnable();
      if (i < now + state.polling.size()) {
        const size_t p = i - now;
        if (state.polling[p]->predicate(state.polling[p]->predicate_of)) return take(state.polling, p);
      } else {
        run_random_work();
      }
    }
    if (count_runnable() > 0) return take_runnable();
    if (!state.polling.empty()) {
      const size_t start = random_below(state.polling.size());
      for (size_t k = 0; k < state.polling.size(); ++k) {
        const size_t p = (start + k) % state.polling.size();
        if (state.polling[p]->predicate(state.polling[p]->predicate_of)) return take(state.polling, p);
      }
    }
    if (state.work.empty()) deadlock();
    run_random_work();
  }
}

inline void thread_exits() {
  Fiber& f = *state.current;
  f.status = Status::exited;
  Warp& w = state.warps[f.linear >> 5];
  const unsigned bit = 1u << (f.linear & 31u);
  if (w.meeting_lanes & bit) fail("exits, while lanes of its warp wait for it in a warp operation");
  w.live &= ~bit;
  --state.live;
  for (Barrier& b : state.barriers) {
    if (b.everyone && b.arrived) release_if_complete(b);
  }
}

// What every fiber runs, for ever: one thread of one block after another.
inline void fiber_main() {
  enter_context(state.main);
  for (;;) {
    state.body(state.body_of);
    thread_exits();
    switch_to_scheduler();
  }
}

inline void run_block() {
  ++state.block_number;
  state.static_shared = 0;
  state.live = state.threads;
  state.by_priority = random_below(2) == 0;
  state.async_policy = static_cast<int>(random_below(3));
  for (size_t i = state.order.size(); i > 1; --i) std::swap(state.order[i - 1], state.order[random_below(i)]);
  for (Barrier& b : state.barriers) {
    b.arrived = b.expected = 0;
    b.everyone = false;
    b.waiting.clear();
    races::reset(b.clock);
    b.came.assign(state.threads, 0);
  }
  for (unsigned t = 0; t < state.threads; ++t) {
    Fiber& f = *state.fibers[t];
    f.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
    make_runnable(&f);
  }
  for (size_t w = 0; w < state.warps.size(); ++w) {
    const unsigned lanes = std::min(32u, state.threads - 32 * static_cast<unsigned>(w));
    state.warps[w].live = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
    state.warps[w].meeting_lanes = 0;
    for (auto& m : state.warps[w].meetings) m.arrived = m.mask = 0;
  }
  for (auto& m : state.warpgroups) m.arrived = 0;
  const auto [tls, tls_bytes] = thread_local_block();
  if (tls_bytes) std::memset(tls, 0xff, tls_bytes);
  races::watch(tls, tls_bytes, true, "plain __shared__ memory");
  races::start_block();
  if (state.dynamic_bytes) std::memset(state.dynamic_shared, 0xff, state.dynamic_bytes);
  while (state.live > 0) {
    Fiber* f = next_fiber();
    f->status = Status::runnable;
    state.current = f;
    threadIdx = f->index;
    races::start_thread(f->linear);
    switch_context(state.main, f->context);
    races::nobody();
  }
  state.current = nullptr;
  if (!state.work.empty()) fail("the block ends before its asynchronous work (%s) was waited for", state.work.front().what);
  if (state.static_shared + state.dynamic_bytes + tls_bytes > options.shared_limit) fail("shared memory: %zu bytes, more than %zu", state.static_shared + state.dynamic_bytes + tls_bytes, options.shared_limit);
}

inline void launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*), const void* body_of) {
  if (state.running) fail("a kernel launched from a kernel");
  if (state.random == 0 || state.seeded_with != options.seed) {
    state.seeded_with = options.seed;
    state.random = options.seed * 0x9e3779b97f4a7c15ull + 0x632be59bd9b4e019ull;
    if (state.random == 0) state.random = 1;
    for (int i = 0; i < 8; ++i) random_bits();
  }
  const uint64_t threads = uint64_t{block.x} * block.y * block.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  state.kernel = name;
  if (threads == 0 || threads > kMaxThreads || block.z > 64) fail("%s: invalid block (%u, %u, %u)", name, block.x, block.y, block.z);
  if (blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) fail("%s: invalid grid (%u, %u, %u)", name, grid.x, grid.y, grid.z);
  const auto allowed = state.dynamic_allowed.find(kernel);
  const size_t limit = std::max(options.shared_without_asking, allowed == state.dynamic_allowed.end() ? 0 : static_cast<size_t>(allowed->second));
  if (shared_bytes > limit) fail("%s: %zu bytes of dynamic shared memory, but cudaFuncSetAttribute allowed %zu", name, shared_bytes, limit);
  state.body = body;
  state.body_of = body_of;
  state.threads = static_cast<unsigned>(threads);
  gridDim = grid;
  blockDim = block;
  while (state.fibers.size() < state.threads) {
    auto f = std::make_unique<Fiber>();
    f->linear = static_cast<unsigned>(state.fibers.size());
    make_context(f->context, fiber_main);
    state.fibers.push_back(std::move(f));
  }
  state.warps.resize((state.threads + 31) / 32);
  state.warpgroups.resize((state.threads + 127) / 128);
  state.ready.resize(state.warps.size());
  state.order.resize(state.warps.size());
  for (size_t w = 0; w < state.order.size(); ++w) state.order[w] = static_cast<unsigned>(w);
  void* memory = nullptr;
  if (shared_bytes && posix_memalign(&memory, 1024, shared_bytes) != 0) fail("no memory for dynamic shared memory");
  state.dynamic_shared = static_cast<unsigned char*>(memory);
  state.dynamic_bytes = shared_bytes;
  state.running = true;
  races::start_launch(state.threads);
  races::watch(memory, shared_bytes, true, "dynamic shared memory");
  // Blocks run in no promised order: a random one, unless there are so many that the list itself would be large.
  std::vector<uint32_t> order;
  if (blocks <= (1u << 20)) {
    order.resize(blocks);
    for (uint32_t i = 0; i < blocks; ++i) order[i] = i;
    for (size_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  }
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t b = order.empty() ? i : order[i];
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y), static_cast<unsigned>(b / (uint64_t{grid.x} * grid.y))};
    run_block();
  }
  state.running = false;
  state.body = nullptr;
  races::unwatch(memory);
  std::free(memory);
  state.dynamic_shared = nullptr;
}

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, const void* /*stream*/, Args&&... args) {
  // Parameters are copied once, as a launch does; each thread then has its own copy, as by-value parameters are.
  std::tuple<std::remove_cv_t<std::remove_reference_t<Params>>...> params(std::forward<Args>(args)...);
  auto body = [&] { std::apply(kernel, params); };
  launch(name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, [](const void* b) { (*static_cast<const decltype(body)*>(b))(); }, &body);
}

template <class T>
T* dynamic_shared() {
  self("MR1_DYNAMIC_SHARED");
  if (!state.dynamic_shared) fail("MR1_DYNAMIC_SHARED in a launch with 0 bytes of dynamic shared memory");
  return reinterpret_cast<T*>(state.dynamic_shared);
}

}  // namespace mr1_emu

// ---------------------------------------------------------------------------------------------- CUDA's names

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
// One block runs at a time, on one OS thread: the block's memory can be the thread's.
#define __shared__ static thread_local

#define MR1_SHARED(T, name, N) MR1_SHARED_ALIGNED(T, name, N, alignof(T))
#define MR1_SHARED_ALIGNED(T, name, N, A)                                          \
  static ::mr1_emu::SharedArray name##_memory(#name, sizeof(T) * (N), (A));        \
  T(&name)[N] = *reinterpret_cast<T(*)[N]>(name##_memory.get())
#define MR1_DYNAMIC_SHARED(T, name) T* const name = ::mr1_emu::dynamic_shared<T>()
#define MR1_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::mr1_emu::launch(#kernel, kernel, (grid), (block), (shared_bytes), (stream)__VA_OPT__(, ) __VA_ARGS__)

namespace mr1 {
inline void bar_sync(int id, int threads, mr1_emu::Site site = mr1_emu::Site::here()) {
  mr1_emu::barrier(id, threads, false, true, "bar_sync", site);
}
inline void bar_arrive(int id, int threads, mr1_emu::Site site = mr1_emu::Site::here()) {
  mr1_emu::barrier(id, threads, false, false, "bar_arrive", site);
}
}  // namespace mr1

inline void __syncthreads(mr1_emu::Site site = mr1_emu::Site::here()) {
  mr1_emu::barrier(0, 0, true, true, "__syncthreads", site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, mr1_emu::Site site = mr1_emu::Site::here()) {
  mr1_emu::warp_rendezvous(
      mask, mr1_emu::state.current, "__syncwarp",
      [](void* const* lanes) {
        mr1_emu::races::Clock clock;
        for (int l = 0; l < 32; ++l) {
          if (lanes[l]) mr1_emu::races::arrive_for(static_cast<mr1_emu::Fiber*>(lanes[l])->linear, clock);
        }
        for (int l = 0; l < 32; ++l) {
          if (lanes[l]) mr1_emu::races::depart(static_cast<mr1_emu::Fiber*>(lanes[l])->linear, clock);
        }
      },
      site);
}
inline void __threadfence() { mr1_emu::races::fence(); }
inline void __threadfence_block() {}
inline void __threadfence_system() { mr1_emu::races::fence(); }
inline void __nanosleep(unsigned) { mr1_emu::yield(); }

namespace mr1_emu {

// What the warp's registers exchange: in from each lane, out to each.
struct Exchange {
  uint64_t in;
  int source;  // the lane asked for
  uint64_t out;
};

inline uint64_t shuffle_bits(unsigned mask, uint64_t value, int source, const char* what, Site site) {
  Exchange mine{value, source, 0};
  warp_rendezvous(
      mask, &mine, what,
      [&](void* const* lanes) {
        for (int l = 0; l < 32; ++l) {
          if (!lanes[l]) continue;
          auto* e = static_cast<Exchange*>(lanes[l]);
          if (!lanes[e->source]) fail_at(site, "%s: lane %d reads lane %d, which is not in the mask 0x%08x", what, l, e->source, mask);
          e->out = static_cast<Exchange*>(lanes[e->source])->in;
        }
      },
      site);
  return mine.out;
}

// source -1: the lane keeps its own value.
template <class T>
T shuffle(unsigned mask, T value, int source, const char* what, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 2, 4 and 8 byte numbers");
  static_assert(!std::is_integral_v<T> || sizeof(T) >= 4, "CUDA has no shuffle of short integers");
  uint64_t wide = 0;
  std::memcpy(&wide, &value, sizeof value);
  wide = shuffle_bits(mask, wide, source < 0 ? static_cast<int>(lane()) : source, what, site);
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

inline void check_width(int width, const char* what, Site site) {
  if (width < 1 || width > 32 || (width & (width - 1))) fail_at(site, "%s: width %d is not a power of two up to 32", what, width);
}

}  // namespace mr1_emu

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, mr1_emu::Site site = mr1_emu::Site::here()) {
  mr1_emu::check_width(width, "__shfl_sync", site);
  const int me = static_cast<int>(mr1_emu::lane());
  return mr1_emu::shuffle(mask, value, (me & ~(width - 1)) | (source & (width - 1)), "__shfl_sync", site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, mr1_emu::Site site = mr1_emu::Site::here()) {
  mr1_emu::check_width(width, "__shfl_xor_sync", site);
  const int me = static_cast<int>(mr1_emu::lane());
  const int source = (me ^ lane_mask) & 31;  // a lower group's lane can be read, a higher one's can not
  return mr1_emu::shuffle(mask, value, source <= (me | (width - 1)) ? source : -1, "__shfl_xor_sync", site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, mr1_emu::Site site = mr1_emu::Site::here()) {
  mr1_emu::check_width(width, "__shfl_down_sync", site);
  const int me = static_cast<int>(mr1_emu::lane()), source = me + static_cast<int>(delta & 31u);
  return mr1_emu::shuffle(mask, value, source <= (me | (width - 1)) ? source : -1, "__shfl_down_sync", site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, mr1_emu::Site site = mr1_emu::Site::here()) {
  mr1_emu::check_width(width, "__shfl_up_sync", site);
  const int me = static_cast<int>(mr1_emu::lane()), source = me - static_cast<int>(delta & 31u);
  return mr1_emu::shuffle(mask, value, source >= (me & ~(width - 1)) ? source : -1, "__shfl_up_sync", site);
}

namespace mr1_emu {
inline unsigned ballot(unsigned mask, int predicate, const char* what, Site site) {
  Exchange mine{predicate != 0, 0, 0};
  warp_rendezvous(
      mask, &mine, what,
      [&](void* const* lanes) {
        uint64_t votes = 0;
        for (unsigned l = 0; l < 32; ++l) {
          if (lanes[l]) votes |= static_cast<Exchange*>(lanes[l])->in << l;
        }
        for (unsigned l = 0; l < 32; ++l) {
          if (lanes[l]) static_cast<Exchange*>(lanes[l])->out = votes;
        }
      },
      site);
  return static_cast<unsigned>(mine.out);
}

// Combines one number of every lane.
template <class T, class Op>
T reduce(unsigned mask, T value, Op op, const char* what, Site site) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4, "CUDA reduces 32-bit integers");
  struct Piece {
    T in, out;
  } mine{value, value};
  warp_rendezvous(
      mask, &mine, what,
      [&](void* const* lanes) {
        T sum = static_cast<Piece*>(lanes[__builtin_ctz(mask)])->in;
        for (int l = __builtin_ctz(mask) + 1; l < 32; ++l) {
          if (lanes[l]) sum = op(sum, static_cast<Piece*>(lanes[l])->in);
        }
        for (int l = 0; l < 32; ++l) {
          if (lanes[l]) static_cast<Piece*>(lanes[l])->out = sum;
        }
      },
      site);
  return mine.out;
}
}  // namespace mr1_emu

inline unsigned __ballot_sync(unsigned mask, int predicate, mr1_emu::Site site = mr1_emu::Site::here()) {
  return mr1_emu::ballot(mask, predicate, "__ballot_sync", site);
}
inline int __any_sync(unsigned mask, int predicate, mr1_emu::Site site = mr1_emu::Site::here()) {
  return mr1_emu::ballot(mask, predicate, "__any_sync", site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, mr1_emu::Site site = mr1_emu::Site::here()) {
  return mr1_emu::ballot(mask, predicate, "__all_sync", site) == mask;
}
template <class T>
T __reduce_add_sync(unsigned mask, T value, mr1_emu::Site site = mr1_emu::Site::here()) {
  return mr1_emu::reduce(mask, value, [](T a, T b) { return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b)); }, "__reduce_add_sync", site);
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, mr1_emu::Site site = mr1_emu::Site::here()) {
  return mr1_emu::reduce(mask, value, [](T a, T b) { return a > b ? a : b; }, "__reduce_max_sync", site);
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, mr1_emu::Site site = mr1_emu::Site::here()) {
  return mr1_emu::reduce(mask, value, [](T a, T b) { return a < b ? a : b; }, "__reduce_min_sync", site);
}

// Atomics: no thread comes between two meetings, so plain code is atomic here.
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long> || std::is_same_v<T, float> || std::is_same_v<T, double>, "CUDA has no such atomicAdd");
  mr1_emu::races::atomic_access(p, sizeof(T));
  mr1_emu::Untracked untracked;
  const T old = *p;
  *p = old + v;
  return old;
}
#define MR1_EMU_ATOMIC(name, expression)                 \
  template <class T>                                     \
  T name(T* p, std::type_identity_t<T> v) {              \
    static_assert(std::is_integral_v<T> && sizeof(T) >= 4, "CUDA has no such " #name); \
    mr1_emu::races::atomic_access(p, sizeof(T));         \
    mr1_emu::Untracked untracked;                        \
    const T old = *p;                                    \
    *p = (expression);                                   \
    return old;                                          \
  }
MR1_EMU_ATOMIC(atomicSub, old - v)
MR1_EMU_ATOMIC(atomicMax, old > v ? old : v)
MR1_EMU_ATOMIC(atomicMin, old < v ? old : v)
MR1_EMU_ATOMIC(atomicOr, old | v)
MR1_EMU_ATOMIC(atomicAnd, old& v)
MR1_EMU_ATOMIC(atomicXor, old ^ v)
#undef MR1_EMU_ATOMIC
template <class T>
T atomicExch(T* p, std::type_identity_t<T> v) {
  static_assert(sizeof(T) >= 4);
  mr1_emu::races::atomic_access(p, sizeof(T));
  mr1_emu::Untracked untracked;
  return std::exchange(*p, v);
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
  static_assert(std::is_integral_v<T> && sizeof(T) >= 2);
  mr1_emu::races::atomic_access(p, sizeof(T));
  mr1_emu::Untracked untracked;
  const T old = *p;
  if (old == expected) *p = v;
  return old;
}

// Cache hints do nothing here.
#define MR1_EMU_LOAD(name) \
  template <class T>       \
  T name(const T* p) {     \
    return *p;             \
  }
MR1_EMU_LOAD(__ldg)
MR1_EMU_LOAD(__ldcg)
MR1_EMU_LOAD(__ldca)
MR1_EMU_LOAD(__ldcs)
MR1_EMU_LOAD(__ldlu)
MR1_EMU_LOAD(__ldcv)
#undef MR1_EMU_LOAD
#define MR1_EMU_STORE(name)                       \
  template <class T>                              \
  void name(T* p, std::type_identity_t<T> v) {    \
    *p = v;                                       \
  }
MR1_EMU_STORE(__stwb)
MR1_EMU_STORE(__stcg)
MR1_EMU_STORE(__stcs)
MR1_EMU_STORE(__stwt)
#undef MR1_EMU_STORE

// Arithmetic. The approximate functions are exact here: tolerances must come from elsewhere.
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __fma_rn(double x, double y, double z) { return std::fma(x, y, z); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wattributes"
inline float mr1_emu_expf(float x) { return std::exp(x); }
#pragma GCC diagnostic pop
#define __expf mr1_emu_expf
inline float mr1_emu_logf(float x) { return std::log(x); }
#define __logf mr1_emu_logf
inline float mr1_emu_log2f(float x) { return std::log2(x); }
#define __log2f mr1_emu_log2f
inline float mr1_emu_exp10f(float x) { return std::pow(10.0f, x); }
#define __exp10f mr1_emu_exp10f
inline float mr1_emu_powf(float x, float y) { return std::pow(x, y); }
#define __powf mr1_emu_powf
inline float mr1_emu_sinf(float x) { return std::sin(x); }
#define __sinf mr1_emu_sinf
inline float mr1_emu_cosf(float x) { return std::cos(x); }
#define __cosf mr1_emu_cosf

namespace mr1_emu {
template <class To, class From>
To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
}  // namespace mr1_emu
inline int __float_as_int(float x) { return mr1_emu::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return mr1_emu::bits<unsigned>(x); }
inline float __int_as_float(int x) { return mr1_emu::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return mr1_emu::bits<float>(x); }
inline long long __double_as_longlong(double x) { return mr1_emu::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return mr1_emu::bits<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __mul24(int x, int y) { return x * y; }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>(uint64_t{x} * y >> 32); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
  const uint64_t both = uint64_t{y} << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<unsigned>(both >> (8 * (s >> (4 * i) & 7u)) & 0xffu) << (8 * i);
  return out;
}
// min and max of mixed integer types convert as the usual arithmetic conversions do; of floats they drop a NaN.
template <class A, class B, std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, int> = 0>
auto min(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>) {
    return std::fmin(static_cast<C>(a), static_cast<C>(b));
  } else {
    return static_cast<C>(a) < static_cast<C>(b) ? static_cast<C>(a) : static_cast<C>(b);
  }
}
template <class A, class B, std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, int> = 0>
auto max(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>) {
    return std::fmax(static_cast<C>(a), static_cast<C>(b));
  } else {
    return static_cast<C>(a) > static_cast<C>(b) ? static_cast<C>(a) : static_cast<C>(b);
  }
}
using std::isfinite;
using std::isinf;
using std::isnan;
#define CUDART_INF_F (__builtin_inff())
#define CUDART_NAN_F (__builtin_nanf(""))
#define CUDART_INF (__builtin_inf())

// The host's side, as far as launch code needs it. "Device" memory is the heap: the address sanitizer knows its bounds.
using cudaStream_t = struct mr1_emu_stream*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97, cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76 };
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t e) { return e == cudaSuccess ? "no error" : "error"; }
inline const char* cudaGetErrorName(cudaError_t e) { return e == cudaSuccess ? "cudaSuccess" : "cudaError"; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = mr1_emu::options.multiprocessors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(mr1_emu::options.shared_limit); break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
  }
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || static_cast<size_t>(value) > mr1_emu::options.shared_limit) return cudaErrorInvalidValue;
    mr1_emu::state.dynamic_allowed[reinterpret_cast<const void*>(kernel)] = value;
  }
  return cudaSuccess;
}
inline cudaError_t cudaMalloc(void** p, size_t bytes) {
  if (posix_memalign(p, 256, std::max<size_t>(bytes, 1)) != 0) return cudaErrorMemoryAllocation;
  mr1_emu::races::watch(*p, bytes, false, "global memory");
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* p) {
  mr1_emu::races::unwatch(p);
  std::free(p);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr) { return std::memmove(to, from, bytes), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) { return std::memmove(to, from, bytes), cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) { return std::memset(to, value, bytes), cudaSuccess; }
inline cudaError_t cudaMemset(void* to, int value, size_t bytes) { return std::memset(to, value, bytes), cudaSuccess; }
