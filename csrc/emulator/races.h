// Which memory accesses of a block are unordered, whatever order this run happened to have.
//
// With -DMR1_EMU_RACES the harness is compiled with -fsanitize=thread for its instrumentation alone: the compiler calls
// a function at every load and store, and those functions are here instead of in the sanitizer's library. Every thread
// carries a vector clock; barriers, __syncwarp, release/acquire pairs and asynchronous work pass clocks on. Two accesses
// to the same bytes, one of them a write, neither ordered before the other by clocks, are a race: an error that names both
// places. (Algorithm: Flanagan and Freund, "FastTrack: Efficient and Precise Dynamic Race Detection", 2009.)
//
// Watched: shared memory, the arrays of blob.h and cudaMalloc's. Shuffles and votes order nothing (CUDA promises that
// for __syncwarp only). Atomics do not race with atomics. Blocks of one launch are unordered with each other, except that
// a block which has done an atomic operation and then __threadfence() may read what earlier blocks wrote.
//
// For wrappers with an emulated body (mbarrier and the like), all of them empty in an ordinary build:
//   mr1_emu::Untracked guard;     what the body does to its own bookkeeping in shared memory is no access of the kernel's
//   mr1_emu::release(object);     everything this thread (or asynchronous work) did is ordered before ...
//   mr1_emu::acquire(object);     ... what a thread does after this; wait_until(predicate, what, object) ends with it.
//                                 wait_until without an object acquires everything anybody did so far.
//   mr1_emu::accesses(p, bytes, write)   reports an access made by code that is not instrumented.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mr1_emu {
struct Fiber;
}

#if !defined(MR1_EMU_RACES)

namespace mr1_emu {
struct Untracked {
  Untracked() {}  // so that the guard is no unused variable
};
inline void release(const void*) {}
inline void acquire(const void*) {}
inline void accesses(const void*, size_t, bool) {}

namespace races {
struct Clock {};
inline void watch(const void*, size_t, bool, const char*) {}
inline void unwatch(const void*) {}
inline void start_launch(unsigned) {}
inline void start_block() {}
inline void start_thread(unsigned) {}
inline void nobody() {}
inline void arrive(Clock&) {}
inline void arrive_for(unsigned, Clock&) {}
inline void depart(unsigned, const Clock&) {}
inline void reset(Clock&) {}
inline void acquire_everything() {}
inline void fence() {}
inline void atomic_access(const void*, size_t) {}
inline void issue(uint64_t) {}
struct Running {
  Running(uint64_t, int) {}
};
inline void finished(uint64_t) {}
}  // namespace races
}  // namespace mr1_emu

#else

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

namespace mr1_emu {

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

namespace races {

inline constexpr unsigned kAgents = 16;  // what asynchronous work is counted as: thread numbers beyond the block's
inline constexpr size_t kGranule = 2;    // bytes a cell stands for

using Clock = std::vector<uint32_t>;

struct Access {
  uint32_t block = 0;  // 0: none. Counted over the program, so that a new block or launch starts afresh
  uint32_t clock = 0;
  uint32_t pc = 0;
  uint16_t slot = 0;
  uint8_t bytes = 0;  // which of the cell's
  bool atomic = false;
};

struct Cell {
  Access write, read, elsewhere;  // elsewhere: a read by another block
  bool more = false;              // further reads, unordered with `read`, are in `reads`
};

struct Region {
  const char* begin;
  size_t bytes;
  bool shared;
  const char* name;
  uint32_t launch = 0;
  std::vector<Cell> cells;
};

struct Actor {
  unsigned slot = 0;
  Clock clock;
  int untracked = 0;
  bool did_atomic = false;
};

struct Tracker {
  std::vector<Region> regions;
  size_t last = 0;
  std::unordered_map<const Cell*, std::vector<Access>> reads;
  std::vector<Actor> threads;
  Actor agents[kAgents];
  std::map<uint64_t, Clock> issued;
  std::map<int, Clock> queues;
  std::map<const void*, Clock> objects;
  Actor* actor = nullptr;
  unsigned width = 0;
  uint32_t block = 0, first_block_of_launch = 1, launch = 0;
  bool block_has_acquired = false;
  bool busy = false;
};
inline Tracker tracker;

// The tracker is itself instrumented code: what it does is nobody's access.
struct Busy {
  bool before;
  __attribute__((no_sanitize("thread"))) Busy() : before(tracker.busy) { tracker.busy = true; }
  __attribute__((no_sanitize("thread"))) ~Busy() { tracker.busy = before; }
};

// The busiest loop there is, at every barrier once for each pair of threads: kept free of instrumentation.
__attribute__((no_sanitize("thread"), noinline, optimize("O3"))) inline void raise(uint32_t* into, const uint32_t* from, size_t n) {
  for (size_t i = 0; i < n; ++i) into[i] = into[i] < from[i] ? from[i] : into[i];
}
inline void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  raise(into.data(), from.data(), from.size());
}

inline void watch(const void* p, size_t bytes, bool shared, const char* name) {
  Busy busy;
  if (!bytes) return;
  for (const Region& r : tracker.regions) {
    if (r.begin == p && r.bytes == bytes) return;
  }
  tracker.regions.push_back({static_cast<const char*>(p), bytes, shared, name, 0, {}});
}
inline void unwatch(const void* p) {
  Busy busy;
  tracker.reads.clear();
  tracker.last = 0;
  std::erase_if(tracker.regions, [&](const Region& r) { return r.begin == p; });
}

inline void start_launch(unsigned threads) {
  Busy busy;
  tracker.width = threads + kAgents;
  tracker.threads.assign(threads, {});
  ++tracker.launch;
  tracker.first_block_of_launch = tracker.block + 1;
  tracker.reads.clear();
}
inline void start_block() {
  Busy busy;
  ++tracker.block;
  for (unsigned i = 0; i < tracker.width; ++i) {
    Actor& a = i + kAgents < tracker.width ? tracker.threads[i] : tracker.agents[i + kAgents - tracker.width];
    a.slot = i;
    a.clock.assign(tracker.width, 0);
    a.clock[i] = 1;
    a.did_atomic = false;
  }
  tracker.objects.clear();
  tracker.queues.clear();
  tracker.block_has_acquired = false;
}
inline void start_thread(unsigned t) { tracker.actor = &tracker.threads[t]; }
inline void nobody() { tracker.actor = nullptr; }

inline void arrive(Clock& c) {
  Busy busy;
  join(c, tracker.actor->clock);
  ++tracker.actor->clock[tracker.actor->slot];
}
inline void arrive_for(unsigned thread, Clock& c) {
  Busy busy;
  join(c, tracker.threads[thread].clock);
  ++tracker.threads[thread].clock[thread];
}
inline void depart(unsigned thread, const Clock& c) {
  Busy busy;
  join(tracker.threads[thread].clock, c);
}
inline void reset(Clock& c) { c.clear(); }

inline void acquire_everything() {
  Busy busy;
  for (const Actor& a : tracker.threads) join(tracker.actor->clock, a.clock);
  for (const Actor& a : tracker.agents) join(tracker.actor->clock, a.clock);
  // Others' present times are not over: what they do from here on must not count as seen.
  for (Actor& a : tracker.threads) ++a.clock[a.slot];
  for (Actor& a : tracker.agents) ++a.clock[a.slot];
}

inline void fence() {
  if (tracker.actor && tracker.actor->did_atomic) tracker.block_has_acquired = true;
}

inline void issue(uint64_t ticket) {
  Busy busy;
  tracker.issued[ticket] = tracker.actor->clock;
  ++tracker.actor->clock[tracker.actor->slot];
}
// While asynchronous work runs, it is the one who accesses.
struct Running {
  Actor* before;
  int queue;
  Running(uint64_t ticket, int queue_) : before(tracker.actor), queue(queue_) {
    Busy busy;
    Actor& a = tracker.agents[ticket % kAgents];
    const uint32_t own = a.clock[a.slot] + 1;
    a.clock = tracker.issued[ticket];
    tracker.issued.erase(ticket);
    if (queue >= 0) join(a.clock, tracker.queues[queue]);
    a.clock[a.slot] = std::max(own, a.clock[a.slot]);
    tracker.actor = &a;
  }
  ~Running() {
    Busy busy;
    if (queue >= 0) tracker.queues[queue] = tracker.actor->clock;
    tracker.actor = before;
  }
};
inline void finished(uint64_t ticket) {
  Busy busy;
  if (tracker.actor) join(tracker.actor->clock, tracker.agents[ticket % kAgents].clock);
}

inline std::string source_line(uint32_t pc) {
  char exe[4096], command[5000], line[1024] = "";
  const ssize_t n = readlink("/proc/self/exe", exe, sizeof exe - 1);
  if (n <= 0) return "?";
  exe[n] = 0;
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%x 2>/dev/null", exe, pc - 1);
  std::FILE* pipe = popen(command, "r");
  if (!pipe) return "?";
  std::string text;
  // The innermost line first; then where it was called from, which says more if that is a helper of the kernel's.
  while (std::fgets(line, sizeof line, pipe)) {
    std::string one(line);
    one.erase(one.find_last_not_of('\n') + 1);
    if (const size_t note = one.find(" (disc"); note != std::string::npos) one.resize(note);
    if (one.find("/c++/") != std::string::npos || one.find("/cuda_emu.h") != std::string::npos) continue;
    if (const size_t slash = one.rfind('/'); slash != std::string::npos) one.erase(0, slash + 1);
    text += (text.empty() ? "" : " called from ") + one;
  }
  pclose(pipe);
  return text.empty() ? "?" : text;
}

inline std::string who(const Access& a) {
  const unsigned threads = tracker.width - kAgents;
  std::string text = a.slot < threads ? "thread " + std::to_string(a.slot) : std::string("asynchronous work");
  if (a.block != tracker.block) text += " of another block";
  return text + " (" + source_line(a.pc) + ")";
}

[[noreturn]] inline void report(const Region& r, size_t offset, const char* now, const char* then, const Access& here, const Access& other) {
  fail("race: %s %s byte %zu of %s (%zu bytes), which %s %s; nothing orders the two", who(here).c_str(), now, offset, r.name, r.bytes, who(other).c_str(), then);
}

inline bool ordered(const Region& r, const Access& a) {
  if (a.block == tracker.block) return tracker.actor->clock[a.slot] >= a.clock;
  return r.shared || a.block < tracker.first_block_of_launch || tracker.block_has_acquired;
}

inline void access_cell(Region& r, size_t index, const Access& a, bool write) {
  Cell& cell = r.cells[index];
  const size_t offset = index * kGranule;
  if (cell.write.block && (cell.write.bytes & a.bytes) && !(a.atomic && cell.write.atomic) && !ordered(r, cell.write)) {
    report(r, offset, write ? "writes" : "reads", cell.write.atomic ? "changes atomically" : "writes", a, cell.write);
  }
  if (!write) {
    if (cell.read.block != a.block) {
      cell.elsewhere = cell.read;
      cell.read = a;
      if (cell.more) tracker.reads.erase(&cell);
      cell.more = false;
    } else if (cell.read.slot == a.slot || tracker.actor->clock[cell.read.slot] >= cell.read.clock) {
      // The earlier read is ordered before this one, so a write that is ordered after this one is after both.
      const uint8_t both = static_cast<uint8_t>(cell.read.bytes | a.bytes);
      cell.read = a;
      cell.read.bytes = both;
    } else {
      std::vector<Access>& more = tracker.reads[&cell];
      cell.more = true;
      for (Access& m : more) {
        if (m.slot == a.slot) {
          m = a;
          return;
        }
      }
      more.push_back(a);
    }
    return;
  }
  auto check = [&](const Access& read) {
    if (read.block && (read.bytes & a.bytes) && !ordered(r, read)) report(r, offset, a.atomic ? "changes atomically" : "writes", "reads", a, read);
  };
  check(cell.read);
  check(cell.elsewhere);
  if (cell.more) {
    for (const Access& m : tracker.reads[&cell]) check(m);
    tracker.reads.erase(&cell);
    cell.more = false;
  }
  cell.write = a;
}

inline void access(const void* p, size_t bytes, bool write, bool atomic, const void* pc) {
  const char* at = static_cast<const char*>(p);
  auto inside = [&](const Region& r) { return at >= r.begin && at < r.begin + r.bytes; };
  if (tracker.last >= tracker.regions.size() || !inside(tracker.regions[tracker.last])) {
    size_t i = 0;
    while (i < tracker.regions.size() && !inside(tracker.regions[i])) ++i;
    if (i == tracker.regions.size()) return;
    tracker.last = i;
  }
  Region& r = tracker.regions[tracker.last];
  if (r.launch != tracker.launch) {
    r.launch = tracker.launch;
    r.cells.assign((r.bytes + kGranule - 1) / kGranule, {});
  }
  const size_t first = static_cast<size_t>(at - r.begin), last = std::min(first + bytes, r.bytes) - 1;
  for (size_t c = first / kGranule; c <= last / kGranule; ++c) {
    Access a;
    a.block = tracker.block;
    a.clock = tracker.actor->clock[tracker.actor->slot];
    a.pc = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pc));
    a.slot = static_cast<uint16_t>(tracker.actor->slot);
    a.atomic = atomic;
    for (size_t b = 0; b < kGranule; ++b) {
      if (c * kGranule + b >= first && c * kGranule + b <= last) a.bytes = static_cast<uint8_t>(a.bytes | 1u << b);
    }
    access_cell(r, c, a, write);
  }
}

__attribute__((no_sanitize("thread"))) inline void hook(const void* p, size_t bytes, bool write, const void* pc) {
  if (tracker.busy || !tracker.actor || tracker.actor->untracked || !bytes) return;
  tracker.busy = true;
  access(p, bytes, write, false, pc);
  tracker.busy = false;
}

__attribute__((noinline)) inline void atomic_access(const void* p, size_t bytes) {
  Busy busy;
  if (!tracker.actor || tracker.actor->untracked) return;
  tracker.actor->did_atomic = true;
  access(p, bytes, true, true, __builtin_return_address(0));
}

}  // namespace races

// What follows in this thread is no access of the kernel's. (Belongs to the thread: others are watched meanwhile.)
struct Untracked {
  races::Actor* actor;
  Untracked() : actor(races::tracker.actor) {
    if (actor) ++actor->untracked;
  }
  ~Untracked() {
    if (actor) --actor->untracked;
  }
  Untracked(const Untracked&) = delete;
};

inline void release(const void* object) {
  races::Busy busy;
  if (races::tracker.actor) races::arrive(races::tracker.objects[object]);
}
inline void acquire(const void* object) {
  races::Busy busy;
  if (races::tracker.actor) races::join(races::tracker.actor->clock, races::tracker.objects[object]);
}
__attribute__((noinline)) inline void accesses(const void* p, size_t bytes, bool write) {
  races::hook(p, bytes, write, __builtin_return_address(0));
}

}  // namespace mr1_emu

// What the compiler calls. One source file makes a program, so these can be ordinary definitions.
#define MR1_EMU_HOOK(name, bytes, write)                                                          \
  extern "C" __attribute__((no_sanitize("thread"), noinline, used)) void name(void* p) {          \
    mr1_emu::races::hook(p, bytes, write, __builtin_return_address(0));                           \
  }
#define MR1_EMU_HOOKS(n)                                  \
  MR1_EMU_HOOK(__tsan_read##n, n, false)                  \
  MR1_EMU_HOOK(__tsan_write##n, n, true)                  \
  MR1_EMU_HOOK(__tsan_unaligned_read##n, n, false)        \
  MR1_EMU_HOOK(__tsan_unaligned_write##n, n, true)
MR1_EMU_HOOKS(1)
MR1_EMU_HOOKS(2)
MR1_EMU_HOOKS(4)
MR1_EMU_HOOKS(8)
MR1_EMU_HOOKS(16)
#undef MR1_EMU_HOOKS
#undef MR1_EMU_HOOK
extern "C" {
#define MR1_EMU_PLAIN __attribute__((no_sanitize("thread"), noinline, used))
MR1_EMU_PLAIN void __tsan_init() {}
MR1_EMU_PLAIN void __tsan_func_entry(void*) {}
MR1_EMU_PLAIN void __tsan_func_exit() {}
MR1_EMU_PLAIN void __tsan_vptr_update(void**, void*) {}
MR1_EMU_PLAIN void __tsan_vptr_read(void**) {}
MR1_EMU_PLAIN void __tsan_read_range(void* p, size_t n) { mr1_emu::races::hook(p, n, false, __builtin_return_address(0)); }
MR1_EMU_PLAIN void __tsan_write_range(void* p, size_t n) { mr1_emu::races::hook(p, n, true, __builtin_return_address(0)); }
// The linker's --wrap brings calls of memcpy and its like here (the compiler instruments no calls).
void* __real_memcpy(void*, const void*, size_t);
void* __real_memmove(void*, const void*, size_t);
void* __real_memset(void*, int, size_t);
MR1_EMU_PLAIN void* __wrap_memcpy(void* to, const void* from, size_t n) {
  mr1_emu::races::hook(from, n, false, __builtin_return_address(0));
  mr1_emu::races::hook(to, n, true, __builtin_return_address(0));
  return __real_memcpy(to, from, n);
}
MR1_EMU_PLAIN void* __wrap_memmove(void* to, const void* from, size_t n) {
  mr1_emu::races::hook(from, n, false, __builtin_return_address(0));
  mr1_emu::races::hook(to, n, true, __builtin_return_address(0));
  return __real_memmove(to, from, n);
}
MR1_EMU_PLAIN void* __wrap_memset(void* to, int value, size_t n) {
  mr1_emu::races::hook(to, n, true, __builtin_return_address(0));
  return __real_memset(to, value, n);
}
#undef MR1_EMU_PLAIN
}

#endif
