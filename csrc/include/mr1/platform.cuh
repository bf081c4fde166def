// The platform a kernel.cuh is compiled for: nvcc and a GPU, or g++ and the emulator (csrc/emulator, -DMR1_EMULATE).
//
// Kernels are written in plain CUDA; the emulator gives the same names a CPU body. Beyond plain CUDA, use:
//
//   MR1_SHARED(T, name, N)             static shared memory; like `__shared__ T name[N]`, which also works. Prefer the
//                                      macro: under the emulator each array then has its own allocation, so that the
//                                      address sanitizer sees an access one element off. (Plain __shared__ arrays are
//                                      poisoned too, but only indexing them directly is bounds-checked.)
//   MR1_SHARED_ALIGNED(T, name, N, A)  the same, aligned to A bytes. An array read by 16-byte vectors needs A >= 16:
//                                      otherwise it has T's alignment only, here as there.
//   MR1_DYNAMIC_SHARED(T, name)        T* name: the launch's dynamic shared memory, aligned to 1024 bytes.
//   mr1::bar_sync(id, threads)         named barrier, id 1..15 (0 is __syncthreads), threads a multiple of 32.
//   mr1::bar_arrive(id, threads)       count at it without waiting.
//   MR1_LAUNCH(kernel, grid, block, shared_bytes, stream, args...)
//                                      a template's commas need brackets: MR1_LAUNCH((k<float, 4>), grid, ...).
//
// What the emulator refuses although some GPUs would let it pass: __syncthreads met from two different lines, a warp
// operation whose mask names a lane that has exited or never existed (launch whole warps), lanes that disagree about
// the mask, a shuffle from a lane outside the mask.
#pragma once

#include "types.h"

#if defined(MR1_EMULATE)
#include "../../emulator/cuda_emu.h"
#elif defined(__CUDACC__)
#include <cuda_runtime.h>

#define MR1_SHARED(T, name, N) __shared__ T name[N]
#define MR1_SHARED_ALIGNED(T, name, N, A) __shared__ __align__(A) T name[N]
// One name for every kernel: extern arrays of different types under one name would be a redefinition.
#define MR1_DYNAMIC_SHARED(T, name)                                  \
  extern __shared__ __align__(1024) unsigned char mr1_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(mr1_dynamic_shared)
#define MR1_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)

namespace mr1 {
__device__ __forceinline__ void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
}  // namespace mr1
#else
#error "platform.cuh is for nvcc, or for g++ with -DMR1_EMULATE"
#endif
