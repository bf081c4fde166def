// Hopper's own instructions (compute capability 9.0, target sm_90a) as functions: mbarrier, bulk tensor copies (TMA), wgmma,
// setmaxnreg. Each has a second body for the emulator (csrc/emulator/sm90_emu.h), so that a kernel written with them runs on a CPU.
//
// Facts are from NVIDIA's "Parallel Thread Execution ISA"; the section's title stands at each. Section numbers move between
// releases, titles do not.
//
// Two "proxies" touch shared memory: ordinary loads and stores go through the generic proxy, TMA and wgmma through the async
// proxy ("Memory Consistency Model", "Proxies"). What one wrote, the other sees only after a fence: TMA's writes are seen by
// whoever waited on the mbarrier they complete on; a thread's own stores are seen by wgmma only after fence_proxy_async() in
// the storing thread and a barrier between it and the reader.
#pragma once

#include "mr1/platform.cuh"

#if defined(MR1_EMULATE)
#define MR1_GRID_CONSTANT
#include "../../emulator/sm90_emu.h"
#elif defined(__CUDACC__)
#include <cuda.h>  // CUtensorMap: the type only, nothing of libcuda is linked
#define MR1_GRID_CONSTANT __grid_constant__
#endif

// The target-specific instructions exist in code for sm_90a only; a kernel that uses them is empty elsewhere (see
// MR1_HAS_SM90A) and its host side refuses to launch it there.
#if defined(MR1_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MR1_HAS_SM90A 1
#else
#define MR1_HAS_SM90A 0
#endif

namespace mr1::sm90 {

// --- wgmma's view of shared memory ------------------------------------------------------------------------------------------

// "Asynchronous Warpgroup Level Matrix Shared Memory Layout", "Matrix Descriptor Format": bits 0-13 start address, 16-29
// leading-dimension byte offset, 32-45 stride-dimension byte offset, each without its lowest four bits; 49-51 base offset (0 when
// the swizzle's pattern starts at a multiple of 1024 bytes, as here); 62-63 swizzle, 1 = 128 bytes.
//
// For an operand that is stored with M (or N) side by side ("MN-major") in 16-bit elements under the 128-byte swizzle, the
// canonical layout is made of atoms of 64 (M or N) x 8 (K): rows of 128 bytes, one for each k, 1024 bytes in all. `leading` is
// the distance from an atom to the next 64 of M or N, `stride` from an atom to the next 8 of K ("Strides"). Within an atom the 16-byte
// piece p of row r stands at piece p ^ r: address bits 4-6 XOR bits 7-9, which is what TMA writes with its own 128-byte swizzle.
__device__ __forceinline__ uint64_t descriptor_128b(uint32_t shared_address, uint32_t leading, uint32_t stride) {
  return static_cast<uint64_t>((shared_address & 0x3ffff) >> 4) | static_cast<uint64_t>((leading & 0x3ffff) >> 4) << 16 |
         static_cast<uint64_t>((stride & 0x3ffff) >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}

// "Register Fragments", accumulator of wgmma.m64nNk16: element i of a thread stands in this row and column of the 64 x N tile.
// thread: 0..127 within the warpgroup.
__device__ __forceinline__ int fragment_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + (i / 2 % 2) * 8; }
__device__ __forceinline__ int fragment_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

#if !defined(MR1_EMULATE)

using TensorMap = CUtensorMap;

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// --- mbarrier ("Parallel Synchronization and Communication Instructions: mbarrier") --------------------------------------------

// One thread initialises; then fence_barrier_init() in it and __syncthreads() before anybody else uses the barrier.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes the initialised barriers visible to the async proxy too.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// One arrival, and the phase does not end before `bytes` more bytes have been copied.
__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Waits until the phase of this parity is complete. A new barrier is in phase 0: waiting for parity 1 returns at once.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}

// --- TMA ("cp.async.bulk.tensor") ----------------------------------------------------------------------------------------------

__device__ __forceinline__ void tma_prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies the map's box whose first element is at (x, y), x along the row, to shared memory; counts its bytes (all of the box: what lies
// outside the matrix arrives as zeros and counts too) at the barrier. To be called by one thread.
__device__ __forceinline__ void tma_load_2d(void* destination, const TensorMap* map, uint64_t* barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(destination)),
      "l"(map), "r"(x), "r"(y), "r"(shared_address(barrier))
      : "memory");
}

// --- ordinary stores which wgmma reads -------------------------------------------------------------------------------------------

__device__ __forceinline__ void store_zero_16(void* shared) { *static_cast<uint4*>(shared) = make_uint4(0, 0, 0, 0); }

// This thread's stores to shared memory, before anything the async proxy does after the next barrier.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- copies by single threads ("cp.async", also on older GPUs) -----------------------------------------------------------------------

// Copies Bytes (4 or 8, both addresses aligned to them) from global to shared memory, or writes zeros there, while the thread goes on.
template <int Bytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool zeros) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(Bytes), "r"(zeros ? 0 : Bytes) : "memory");
}
// This thread's copies have ended, and this thread (not yet others) may read them.
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// --- wgmma ("Asynchronous Warpgroup Level Matrix Instructions") -------------------------------------------------------------------

// An empty statement for each: the compiler has the accumulators in their registers here, and moves no use of them across.
template <int R>
__device__ __forceinline__ void wgmma_hold(float (&accumulator)[R]) {
#pragma unroll
  for (int i = 0; i < R; ++i) asm volatile("" : "+f"(accumulator[i])::"memory");
}

// Before the first wgmma, and before every wgmma whose accumulators other instructions have touched.
template <int R>
__device__ __forceinline__ void wgmma_fence(float (&accumulator)[R]) {
  wgmma_hold(accumulator);  // else the compiler may set them between the fence and the product, and ptxas then runs products one by one
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `Pending` of the committed groups are not complete. Accumulators may be read after Pending = 0.
template <int Pending, int R>
__device__ __forceinline__ void wgmma_wait(float (&accumulator)[R]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
  wgmma_hold(accumulator);
}

#define MR1_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MR1_F16(i) MR1_F4(i), MR1_F4(i + 4), MR1_F4(i + 8), MR1_F4(i + 12)
#define MR1_F64 MR1_F16(0), MR1_F16(16), MR1_F16(32), MR1_F16(48)
#define MR1_P64                                                                                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                                   \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                                         \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                                         \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// "wgmma.mma_async": D = A B + scale-d D. Operands after the descriptors: scale-d (a predicate: false means D = A B, whatever D
// held), sign of A, sign of B, then 1 = A is M-major, 1 = B is N-major.
#define MR1_WGMMA_64_128_16(TYPE)                                                                                            \
  asm volatile(                                                                                                              \
      "{\n"                                                                                                                  \
      ".reg .pred add;\n"                                                                                                    \
      "setp.ne.b32 add, %66, 0;\n"                                                                                           \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" MR1_P64 "}, %64, %65, add, 1, 1, 1, 1;\n"            \
      "}\n"                                                                                                                  \
      : MR1_F64                                                                                                              \
      : "l"(a), "l"(b), "r"(add))

// D[64, 128] = A[64, 16] B[16, 128] (+ D when `add`), A and B from shared memory through descriptors, both MN-major.
template <class T>
__device__ __forceinline__ void wgmma_64_128_16(float (&d)[64], uint64_t a, uint64_t b, int add);
template <>
__device__ __forceinline__ void wgmma_64_128_16<bf16>(float (&d)[64], uint64_t a, uint64_t b, int add) {
  MR1_WGMMA_64_128_16("bf16");
}
template <>
__device__ __forceinline__ void wgmma_64_128_16<f16>(float (&d)[64], uint64_t a, uint64_t b, int add) {
  MR1_WGMMA_64_128_16("f16");
}
#undef MR1_WGMMA_64_128_16
#undef MR1_P64
#undef MR1_F64
#undef MR1_F16
#undef MR1_F4

// --- registers ("setmaxnreg") -----------------------------------------------------------------------------------------------------

// Every warp of a warpgroup must call it. Takes effect only in a kernel with __launch_bounds__.
template <int Registers>
__device__ __forceinline__ void registers_give() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void registers_take() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

#endif  // !MR1_EMULATE

}  // namespace mr1::sm90
