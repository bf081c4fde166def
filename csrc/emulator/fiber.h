// Fibers: many stacks on one OS thread, each switched to and from by hand.
//
// x86-64 switches in a dozen instructions; other machines go through ucontext (which asks the kernel about signal masks
// at every switch: slower, same meaning; -DMR1_EMU_UCONTEXT chooses it anywhere). Stacks come from mmap with an unreadable page below each, so that running off
// a stack is a fault and not another fiber's data. A stack is used again by the next block, never given back.
// Under the address sanitizer every switch is announced, so that it knows which stack is the current one.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__x86_64__) && !defined(MR1_EMU_UCONTEXT)
#define MR1_EMU_X86 1
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define MR1_EMU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MR1_EMU_ASAN 1
#endif
#endif
#if defined(MR1_EMU_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(MR1_EMU_X86)
extern "C" void mr1_emu_switch(void** save, void* load);
// Weak and in a group of its own: the header may be included by several source files of one program.
asm(R"(
.pushsection .text.mr1_emu_switch,"axG",@progbits,mr1_emu_switch,comdat
.weak mr1_emu_switch
.type mr1_emu_switch, @function
mr1_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mr1_emu_switch, .-mr1_emu_switch
.popsection
)");
#endif

namespace mr1_emu {

#if defined(MR1_EMU_ASAN)
inline constexpr size_t kStackBytes = 512 * 1024;  // redzones around locals; pages untouched cost nothing
#else
inline constexpr size_t kStackBytes = 128 * 1024;
#endif

// A stack with the registers to go on with. `main` has no stack of its own: it is the thread's.
struct Context {
  char* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // the address sanitizer's, while switched out
#if defined(MR1_EMU_X86)
  void* sp = nullptr;
#else
  ucontext_t uc;
#endif
};

// Leaves `from`, goes on in `to`, returns when something switches back to `from`.
inline void switch_context(Context& from, Context& to) {
#if defined(MR1_EMU_ASAN)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(MR1_EMU_X86)
  mr1_emu_switch(&from.sp, to.sp);
#else
  swapcontext(&from.uc, &to.uc);
#endif
#if defined(MR1_EMU_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// To be called first thing on a new stack: tells the sanitizer that it is there, and learns the stack of `main`.
inline void enter_context(Context& main) {
#if defined(MR1_EMU_ASAN)
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  main.stack = static_cast<char*>(const_cast<void*>(bottom));
  main.stack_bytes = size;
#else
  (void)main;
#endif
}

// A new stack on which `entry`, which must never return, starts at the first switch.
inline void make_context(Context& c, void (*entry)()) {
  constexpr size_t page = 4096;
  void* base = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED || mprotect(base, page, PROT_NONE) != 0) {
    std::perror("emulator: no memory for a fiber's stack");
    std::_Exit(70);
  }
  c.stack = static_cast<char*>(base) + page;
  c.stack_bytes = kStackBytes;
#if defined(MR1_EMU_X86)
  void** top = reinterpret_cast<void**>(c.stack + kStackBytes);
  *--top = nullptr;  // entry's return address: none, so that unwinding ends here
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  c.sp = top;
#else
  getcontext(&c.uc);
  c.uc.uc_stack.ss_sp = c.stack;
  c.uc.uc_stack.ss_size = c.stack_bytes;
  c.uc.uc_link = nullptr;
  makecontext(&c.uc, entry, 0);
#endif
}

}  // namespace mr1_emu
