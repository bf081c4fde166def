// wgrad_dot on Hopper: the weight-gradient product D = b^T a, one document after another, whose accumulators are multiplied with the
// probe gradients before they are added up. One pass over a and b gives the exact score of every document and the ordinary gradient.
//
// Legend: T tokens, n documents, K probes; M = dout, N = din; a [T, N], b [T, M], g [K, M, N], main_grad [M, N], scores [n, K].
//
// One block of threads makes one 128 x 128 tile of D over a range of tokens (a "unit"). The token is the summed index, so both operands lie
// in memory with M (or N) side by side: TMA copies boxes of 64 columns x 64 tokens under the 128-byte swizzle, which is exactly the
// layout wgmma reads as "MN-major". A ring of four stages (64 tokens of both operands, 32 KB) is filled by one thread
// and used by two warpgroups of 64 x 128 each. Per thread: 64 accumulators of the current document, 64 of the total.
//
// A document starts at any token. Its boxes start at its own first token; what its last box holds of the next document is
// overwritten with zeros in shared memory. In both operands: 0 * NaN is NaN, and a neighbour's NaN must not leak. (The zeros
// are multiplied too, 32 tokens' worth in the mean of a document. Leaving out steps of 16 needs branches around wgmma, and then ptxas runs
// every product of the kernel on its own, warning C7515.)
//
// A thread multiplies its accumulators with its own elements of the probes only, so each thread brings those to its own places in shared
// memory, in the order of its accumulators: no barrier, no bank conflict.
//
// Which unit a block does next is fixed by its number alone, and so are the order and the place of every sum: the same bits every
// time, whatever the GPU does first. Units go through the grid in the order of their numbers: tiles that run side by side share
// rows of a and b at the same tokens, so that most reads hit the L2 cache. When the last round of tiles would leave multiprocessors idle
// (1536 x 1536 is 144 tiles, an H200 has 132), those tiles are cut into parts along the tokens; the first part adds to main_grad,
// the others to a workspace which add_parts folds in, in order. (Cutting everything evenly, "stream-K", would balance as well, but
// blocks would then stand at different tokens all the time, and reading b would need more than the memory's bandwidth.)
//
// Roofline (estimates from counted work, H200 at 1.75 GHz; nothing here was measured): a step of 64 tokens is 8 wgmma of 64 x 128 x 16, 64
// cycles each: 512 cycles. It reads 48 KB of shared memory for wgmma (96 of 128 bytes per cycle) and 32 KB from L2 (64 bytes per
// cycle and multiprocessor: close to what L2 gives, the first limit one would meet; a tile of 128 x 192 or multicast would
// lower it). At a document's end each warpgroup waits for its own product, then spends per thread 64 multiply-adds, 64 additions, 64
// conversions and 8 16-byte loads from shared memory: about 250 cycles for its four warps, 500 when both do it at once. That is
// 1/32 of a document of 2048 tokens (16,400 cycles), 1/8 of one of 512. It is partly hidden, because the other warpgroup, half a
// step behind, still multiplies; two tiles in flight per multiprocessor, which would hide it fully, do not fit (registers).
#pragma once

#include "mr1/sm90.cuh"
#include "mr1/types.h"

namespace mr1 {

constexpr int kTile = 128;          // rows and columns of D per block
constexpr int kStepTokens = 64;     // tokens per stage
constexpr int kStages = 4;
constexpr int kConsumerThreads = 256;
constexpr int kWgradThreads = kConsumerThreads + 128;
constexpr int kChunkBytes = kStepTokens * 128;         // 64 columns of 64 tokens, 16-bit elements
constexpr int kStageBytes = 2 * (kTile / 64) * kChunkBytes;
constexpr int kRingBytes = kStages * kStageBytes;
constexpr int kConsumerWarps = kConsumerThreads / 32;
constexpr int kSharedLimit = 227 * 1024;               // a block's most on compute capability 9.0

// How the work is cut. Made on the host, read by every kernel below.
struct WgradPlan {
  int tokens, rows, columns, probes, documents;  // T, M, N, K, n
  int tiles_m, tiles_n;
  int whole;        // tiles made in one unit each
  int split;        // tiles after those, made in `parts` units each
  int parts;
  int part_tokens;  // tokens of a part, a multiple of kStepTokens
  int units;        // whole + split * parts
};

// multiprocessors: blocks that run side by side.
inline WgradPlan wgrad_plan(int64_t tokens, int64_t rows, int64_t columns, int64_t probes, int64_t documents, int multiprocessors) {
  WgradPlan plan{};
  plan.tokens = static_cast<int>(tokens), plan.rows = static_cast<int>(rows), plan.columns = static_cast<int>(columns);
  plan.probes = static_cast<int>(probes), plan.documents = static_cast<int>(documents);
  plan.tiles_m = static_cast<int>(ceil_div(rows, kTile)), plan.tiles_n = static_cast<int>(ceil_div(columns, kTile));
  const int tiles = plan.tiles_m * plan.tiles_n;
  const int last = tiles % multiprocessors;
  // Time of the last round in tokens; a unit costs about 300 tokens' worth beside its product (filling the ring, writing its result).
  constexpr int64_t overhead = 300, shortest = 256;
  plan.parts = 1;
  int64_t best = tokens + overhead;
  for (int parts = 2; last > 0 && parts <= 16 && tokens / parts >= shortest; ++parts) {
    const int64_t time = ceil_div(static_cast<int64_t>(last) * parts, multiprocessors) * (ceil_div(tokens, parts) + overhead);
    if (time < best) best = time, plan.parts = parts;
  }
  plan.split = plan.parts > 1 ? last : 0;
  plan.whole = tiles - plan.split;
  plan.part_tokens = static_cast<int>(ceil_div(ceil_div(tokens, plan.parts), kStepTokens) * kStepTokens);
  plan.units = plan.whole + plan.split * plan.parts;
  return plan;
}

struct WgradPointers {
  const int32_t* cu;     // [n + 1]
  const void* g;
  int64_t g_stride, g_probe_stride;
  float* main_grad;      // null: scores only
  int64_t main_grad_stride;
  float* partial;        // [n, K, units, kConsumerWarps]: what each warp found; only the units that meet the document are written
  float* rest;           // [parts - 1, split, 16, 256] float4: totals of the parts after the first, in fragment order
};

inline int64_t partial_floats(const WgradPlan& plan) {
  return static_cast<int64_t>(plan.documents) * plan.probes * plan.units * kConsumerWarps;
}
inline int64_t rest_floats(const WgradPlan& plan) { return static_cast<int64_t>(plan.parts - 1) * plan.split * kTile * kTile; }

// Probe tiles are kept in shared memory when all fit beside the ring, else read again (from L2) at every document's end.
inline int64_t probe_bytes(const WgradPlan& plan, int64_t element) { return static_cast<int64_t>(plan.probes) * kTile * kTile * element; }
inline bool probes_fit(const WgradPlan& plan, int64_t element) { return kRingBytes + probe_bytes(plan, element) + 256 <= kSharedLimit; }
inline int shared_bytes(const WgradPlan& plan, int64_t element) {
  return static_cast<int>(kRingBytes + (probes_fit(plan, element) ? probe_bytes(plan, element) : 0) + 256);
}

struct WgradUnit {
  int m, n;         // first row and column of the tile
  int begin, end;   // tokens
  int part, index;  // of the split tiles: which part, which tile
};

// The tile's place: down columns of at most 12 tiles, so that about 12 x 11 tiles, nearly square, run side by side.
__device__ __forceinline__ void tile_place(const WgradPlan& plan, int tile, int& m, int& n) {
  constexpr int group = 12;
  const int per_group = group * plan.tiles_n;
  const int first = tile / per_group * group;
  const int height = min(group, plan.tiles_m - first);
  const int within = tile % per_group;
  m = (first + within % height) * kTile;
  n = within / height * kTile;
}

__device__ __forceinline__ WgradUnit wgrad_unit(const WgradPlan& plan, int number) {
  WgradUnit unit{};
  int tile = number;
  unit.end = plan.tokens;
  if (number >= plan.whole) {
    unit.part = (number - plan.whole) / plan.split;
    unit.index = (number - plan.whole) % plan.split;
    tile = plan.whole + unit.index;
    unit.begin = min(unit.part * plan.part_tokens, plan.tokens);  // a late part may have no tokens
    unit.end = min(unit.begin + plan.part_tokens, plan.tokens);
  }
  tile_place(plan, tile, unit.m, unit.n);
  return unit;
}

// The first document that ends after `token`.
__device__ __forceinline__ int document_at(const int32_t* cu, int documents, int token) {
  int low = 0, high = documents;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (__ldg(cu + middle + 1) > token) high = middle;
    else low = middle + 1;
  }
  return low;
}

// A thread's own part of a probe's tile: `vectors` times 16 bytes in the order of its accumulators, that is 8 v to 8 v + 7 in vector v for
// 16-bit elements and 4 v to 4 v + 3 for 32-bit ones. Two neighbours of a row are one access. What lies outside the matrix is 0.
template <class G>
struct ProbePart {
  static constexpr int width = 16 / sizeof(G), vectors = 64 / width, pairs = width / 2;

  // The place of pair p of vector v; null outside.
  static __device__ __forceinline__ const G* place(const WgradPlan& plan, const G* g, int64_t stride, int row, int column, int v, int p) {
    const int i = (v * pairs + p) * 2;  // accumulator
    const int r = row + (i / 2 % 2) * 8, c = column + i / 4 * 8;
    return r < plan.rows && c < plan.columns ? g + r * stride + c : nullptr;
  }

  static __device__ __forceinline__ uint4 read(const WgradPlan& plan, const G* g, int64_t stride, int row, int column, int v) {
    unsigned words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int p = 0; p < pairs; ++p) {
      const G* const at = place(plan, g, stride, row, column, v, p);
      if (at == nullptr) continue;
      if constexpr (sizeof(G) == 2) {
        words[p] = __ldg(reinterpret_cast<const unsigned*>(at));
      } else {
        const uint2 both = __ldg(reinterpret_cast<const uint2*>(at));
        words[2 * p] = both.x, words[2 * p + 1] = both.y;
      }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }

  // All vectors to `to`, kConsumerThreads apart, on their own until copy_wait.
  static __device__ __forceinline__ void copy(const WgradPlan& plan, const G* g, int64_t stride, int row, int column, uint4* to) {
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
#pragma unroll
      for (int p = 0; p < pairs; ++p) {
        const G* const at = place(plan, g, stride, row, column, v, p);
        sm90::copy_async<2 * sizeof(G)>(reinterpret_cast<G*>(to + v * kConsumerThreads) + 2 * p, at == nullptr ? g : at, at == nullptr);
      }
    }
  }
};

constexpr uint32_t kStageStep = kStageBytes >> 4, kTokensStep = (16 * 128) >> 4;  // a stage, 16 tokens: in a descriptor's 16-byte units

// A group of products: D (+)= 16 * Steps tokens of both operands.
template <class T, int Steps>
__device__ __forceinline__ void multiply(float (&d)[64], uint64_t a, uint64_t b, int add) {
  sm90::wgmma_fence(d);
#pragma unroll
  for (int k = 0; k < Steps; ++k) sm90::wgmma_64_128_16<T>(d, a + k * kTokensStep, b + k * kTokensStep, k > 0 || add);
  sm90::wgmma_commit();
}

// T: bf16 or f16; G: T or float; Resident: the probes' tiles fit in shared memory. map_a, map_b: boxes of 64 columns x kStepTokens tokens.
// Launch: min(units, multiprocessors) blocks of kWgradThreads, shared_bytes(plan, sizeof(G)).
template <class T, class G, bool Resident>
__global__ void __launch_bounds__(kWgradThreads, 1)
    wgrad_dot_kernel(const MR1_GRID_CONSTANT sm90::TensorMap map_a, const MR1_GRID_CONSTANT sm90::TensorMap map_b, const WgradPlan plan,
                     const WgradPointers at) {
#if MR1_HAS_SM90A
  MR1_DYNAMIC_SHARED(unsigned char, shared);
  unsigned char* const ring = shared;
  // Each thread's own elements of the probes: [K][vector][thread].
  uint4* const probes = reinterpret_cast<uint4*>(shared + kRingBytes);
  constexpr int vectors = ProbePart<G>::vectors;
  uint64_t* const full = reinterpret_cast<uint64_t*>(shared + kRingBytes + (Resident ? plan.probes * vectors * kConsumerThreads * 16 : 0));
  uint64_t* const empty = full + kStages;

  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      sm90::barrier_init(full + s, 1);
      sm90::barrier_init(empty + s, kConsumerWarps);
    }
    sm90::fence_barrier_init();
  }
  __syncthreads();

  int stage = 0;
  uint32_t phase = 0;  // of the barriers of `stage`; flips each time round the ring

  if (threadIdx.x >= kConsumerThreads) {
    sm90::registers_give<40>();
    if (threadIdx.x == kConsumerThreads) {
      sm90::tma_prefetch(&map_a);
      sm90::tma_prefetch(&map_b);
      for (int number = blockIdx.x; number < plan.units; number += gridDim.x) {
        const WgradUnit unit = wgrad_unit(plan, number);
        for (int d = document_at(at.cu, plan.documents, unit.begin); d < plan.documents; ++d) {
          const int from = max(__ldg(at.cu + d), unit.begin), to = min(__ldg(at.cu + d + 1), unit.end);
          if (from >= unit.end) break;
          for (int t = from; t < to; t += kStepTokens) {
            sm90::barrier_wait(empty + stage, phase ^ 1);
            unsigned char* const to_b = ring + stage * kStageBytes;
            unsigned char* const to_a = to_b + (kTile / 64) * kChunkBytes;
            sm90::barrier_arrive_expect(full + stage, kStageBytes);
#pragma unroll
            for (int c = 0; c < kTile / 64; ++c) {
              sm90::tma_load_2d(to_b + c * kChunkBytes, &map_b, full + stage, unit.m + c * 64, t);
              sm90::tma_load_2d(to_a + c * kChunkBytes, &map_a, full + stage, unit.n + c * 64, t);
            }
            if (++stage == kStages) stage = 0, phase ^= 1;
          }
        }
      }
    }
  } else {
    sm90::registers_take<232>();
    const int thread = threadIdx.x % 128, group = threadIdx.x / 128, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t ring_address = sm90::shared_address(ring);
    // A is b's tile: this warpgroup's 64 rows of D are one chunk. B is a's tile: chunks of 64 columns, kChunkBytes apart. Eight tokens are
    // one atom of 1024 bytes.
    const uint64_t first_a = sm90::descriptor_128b(ring_address + group * kChunkBytes, kChunkBytes, 1024);
    const uint64_t first_b = sm90::descriptor_128b(ring_address + (kTile / 64) * kChunkBytes, kChunkBytes, 1024);

    float document[64], total[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) document[i] = 0;

    for (int number = blockIdx.x; number < plan.units; number += gridDim.x) {
      const WgradUnit unit = wgrad_unit(plan, number);
      const int row = unit.m + group * 64 + sm90::fragment_row(thread, 0), column = unit.n + sm90::fragment_column(thread, 0);
      const bool edge = unit.m + kTile > plan.rows || unit.n + kTile > plan.columns;
      const G* const g = static_cast<const G*>(at.g);
      if constexpr (Resident) {
        // Not waited for here: the first product runs meanwhile.
        for (int k = 0; k < plan.probes; ++k)
          ProbePart<G>::copy(plan, g + k * at.g_probe_stride, at.g_stride, row, column, probes + k * vectors * kConsumerThreads + threadIdx.x);
      }
#pragma unroll
      for (int i = 0; i < 64; ++i) total[i] = 0;

      for (int d = document_at(at.cu, plan.documents, unit.begin); d < plan.documents; ++d) {
        const int from = max(__ldg(at.cu + d), unit.begin), to = min(__ldg(at.cu + d + 1), unit.end);
        if (from >= unit.end) break;
        if (from >= to) continue;

        int held = -1;  // the stage whose product is under way
        for (int t = from; t < to; t += kStepTokens) {
          sm90::barrier_wait(full + stage, phase);
          const int tokens = to - t;
          if (tokens < kStepTokens) {
            // All chunks of both operands, by all consumers: each warpgroup reads all of a's chunks. The swizzle moves pieces within a
            // row only, so whole rows can be zeroed without undoing it.
            const int pieces = (kStepTokens - tokens) * 8;  // of a chunk, 16 bytes each
            for (int piece = threadIdx.x; piece < 2 * (kTile / 64) * pieces; piece += kConsumerThreads)
              sm90::store_zero_16(ring + stage * kStageBytes + piece / pieces * kChunkBytes + tokens * 128 + piece % pieces * 16);
            sm90::fence_proxy_async();
            bar_sync(1, kConsumerThreads);
          }
          multiply<T, kStepTokens / 16>(document, first_a + stage * kStageStep, first_b + stage * kStageStep, t != from);
          // One product stays under way; the one before it has ended, so its stage can be filled again.
          sm90::wgmma_wait<1>(document);
          if (held >= 0 && lane == 0) sm90::barrier_arrive(empty + held);
          held = stage;
          if (++stage == kStages) stage = 0, phase ^= 1;
        }
        sm90::wgmma_wait<0>(document);
        if (lane == 0) sm90::barrier_arrive(empty + held);

        if (edge) {  // outside the matrix TMA's zeros may have met an infinity
#pragma unroll
          for (int i = 0; i < 64; ++i)
            if (row + (i / 2 % 2) * 8 >= plan.rows || column + i / 4 * 8 >= plan.columns) document[i] = 0;
        }
        if constexpr (Resident) sm90::copy_wait();
        for (int k = 0; k < plan.probes; ++k) {
          float sum[4] = {0, 0, 0, 0};
#pragma unroll
          for (int v = 0; v < vectors; ++v) {
            uint4 raw;
            if constexpr (Resident) raw = probes[(k * vectors + v) * kConsumerThreads + threadIdx.x];
            else raw = ProbePart<G>::read(plan, g + k * at.g_probe_stride, at.g_stride, row, column, v);
            constexpr int width = ProbePart<G>::width;
            G element[width];
            memcpy(element, &raw, sizeof raw);
#pragma unroll
            for (int e = 0; e < width; ++e) sum[e % 4] += to_float(element[e]) * document[v * width + e];
          }
          float score = (sum[0] + sum[1]) + (sum[2] + sum[3]);
#pragma unroll
          for (int apart = 16; apart > 0; apart /= 2) score += __shfl_xor_sync(0xffffffffu, score, apart);
          if (lane == 0)
            at.partial[((static_cast<int64_t>(d) * plan.probes + k) * plan.units + number) * kConsumerWarps + warp] = score;
        }
#pragma unroll
        for (int i = 0; i < 64; ++i) total[i] += document[i];
      }
      if constexpr (Resident) sm90::copy_wait();  // a unit without tokens: the next one's copies go to the same places

      if (at.main_grad != nullptr && unit.begin < unit.end) {
        if (unit.part == 0) {
          // All reads before the first write: the compiler must take them for the same memory, and would wait for each.
          float old[64];
#pragma unroll
          for (int i = 0; i < 64; i += 2) {
            const int r = row + (i / 2 % 2) * 8, c = column + i / 4 * 8;
            const bool inside = r < plan.rows && c < plan.columns;
            const float2 both = inside ? *reinterpret_cast<const float2*>(at.main_grad + r * at.main_grad_stride + c) : make_float2(0, 0);
            old[i] = both.x, old[i + 1] = both.y;
          }
#pragma unroll
          for (int i = 0; i < 64; i += 2) {
            const int r = row + (i / 2 % 2) * 8, c = column + i / 4 * 8;
            if (r < plan.rows && c < plan.columns)
              *reinterpret_cast<float2*>(at.main_grad + r * at.main_grad_stride + c) = make_float2(old[i] + total[i], old[i + 1] + total[i + 1]);
          }
        } else {
          float4* const where = reinterpret_cast<float4*>(at.rest) +
                                (static_cast<int64_t>(unit.part - 1) * plan.split + unit.index) * (kTile * kTile / 4) + threadIdx.x;
#pragma unroll
          for (int i = 0; i < 16; ++i)
            where[i * kConsumerThreads] = make_float4(total[4 * i], total[4 * i + 1], total[4 * i + 2], total[4 * i + 3]);
        }
      }
    }
  }
#endif
}

// main_grad += the parts after the first of every split tile, in order. Launch: `split` x 16 blocks of kConsumerThreads.
template <class Unused = void>
__global__ void add_parts_kernel(const WgradPlan plan, const WgradPointers at) {
  const int index = blockIdx.x / 16, vector = blockIdx.x % 16;
  const WgradUnit unit = wgrad_unit(plan, plan.whole + index);
  const int row = unit.m + threadIdx.x / 128 * 64 + sm90::fragment_row(threadIdx.x % 128, 0);
  const int column = unit.n + sm90::fragment_column(threadIdx.x % 128, 4 * vector);
  if (column >= plan.columns) return;
  float sum[4] = {0, 0, 0, 0};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + half * 8 < plan.rows) {
      const float2 old = *reinterpret_cast<const float2*>(at.main_grad + (row + half * 8) * at.main_grad_stride + column);
      sum[2 * half] = old.x, sum[2 * half + 1] = old.y;
    }
  }
  for (int part = 1; part < plan.parts && part * plan.part_tokens < plan.tokens; ++part) {
    const float4 more = reinterpret_cast<const float4*>(
        at.rest)[(static_cast<int64_t>(part - 1) * plan.split + index) * (kTile * kTile / 4) + vector * kConsumerThreads + threadIdx.x];
    sum[0] += more.x, sum[1] += more.y, sum[2] += more.z, sum[3] += more.w;
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + half * 8 < plan.rows)
      *reinterpret_cast<float2*>(at.main_grad + (row + half * 8) * at.main_grad_stride + column) = make_float2(sum[2 * half], sum[2 * half + 1]);
  }
}

// scores[d, k] = what the units that meet document d found, in a fixed order; 0 for an empty document. Launch: n * K blocks of 256 threads.
template <class Unused = void>
__global__ void sum_scores_kernel(const WgradPlan plan, const int32_t* cu, const float* partial, float* scores) {
  MR1_SHARED(float, sums, 256);
  const int document = blockIdx.x / plan.probes;
  const int from = __ldg(cu + document), to = __ldg(cu + document + 1);
  const float* const own = partial + static_cast<int64_t>(blockIdx.x) * plan.units * kConsumerWarps;
  float sum = 0;
  if (from < to) {
    for (int i = threadIdx.x; i < plan.whole * kConsumerWarps; i += 256) sum += own[i];
    const int first = plan.whole + from / plan.part_tokens * plan.split;
    const int last = plan.whole + ((to - 1) / plan.part_tokens + 1) * plan.split;
    for (int i = first * kConsumerWarps + threadIdx.x; i < last * kConsumerWarps; i += 256) sum += own[i];
  }
  sums[threadIdx.x] = sum;
  for (int half = 128; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) scores[blockIdx.x] = sums[0];
}

}  // namespace mr1
