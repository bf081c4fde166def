// CUDA kernels of qk_norm_rope. Two pairs of them:
//
// forward_kernel, backward_kernel: head sizes 64 and 128, 16-byte accesses only. A group of lanes owns a token (or some heads of
//   one): it reads the token's cosines and sines once and walks over heads, several of them in flight. A lane holds one vector of a
//   head's first half and the same one of its second half, so that the two numbers of a pair are always in one lane, whichever
//   way heads are rotated.
// plain_forward_kernel, plain_backward_kernel: any even head size, any alignment, partial rotation, fp64, parity. One warp per head,
//   reading every element twice.
//
// Which one, and how many blocks: dispatch.cuh. All of them: a token whose position lies outside the table gets NaN.
//
// The gains' gradients: every thread adds up its own columns over all the heads it sees, a block adds its threads in a fixed order
// into partials[block], and gain_kernel adds the blocks in a fixed order. No atomics: equal bits for an equal grid.
//
// Legend: args.h. Heads in memory order: per group its queries, keys, values.
#pragma once

#include "mr1/platform.cuh"
#include "mr1/vec.cuh"
#include "qk_norm_rope/args.h"

namespace mr1 {
namespace qknr {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ float reciprocal_root(float x) { return 1.0f / sqrtf(x); }
__device__ __forceinline__ double reciprocal_root(double x) { return 1.0 / sqrt(x); }

// 1 / the norm of a head whose squares sum to `squares`.
template <class W>
__device__ __forceinline__ W inverse_norm(W squares, const QkNormRopeArgs& a) {
  if (a.norm == qk_norm_none) return W(1);
  return reciprocal_root((a.norm == qk_norm_rms ? squares / static_cast<W>(a.head_dim) : squares) + static_cast<W>(a.eps));
}

// One of a token's heads.
struct Head {
  int group, index;  // index < queries: a query; < queries + keys: a key; else a value

  __device__ __forceinline__ bool query(const QkNormRopeArgs& a) const { return index < a.group_queries; }
  __device__ __forceinline__ bool value(const QkNormRopeArgs& a) const { return index >= a.group_queries + a.group_keys; }
  // Where it begins in the token's qkv.
  __device__ __forceinline__ int64_t offset(const QkNormRopeArgs& a) const {
    return static_cast<int64_t>(group * (a.group_queries + 2 * a.group_keys) + index) * a.head_dim;
  }
  // Its number among the queries, the keys or the values.
  __device__ __forceinline__ int number(const QkNormRopeArgs& a) const {
    if (query(a)) return group * a.group_queries + index;
    return group * a.group_keys + index - a.group_queries - (value(a) ? a.group_keys : 0);
  }
};

// Walks over the heads of a token, `per_group` of every group.
struct Walk {
  Head head;
  int per_group;

  __device__ __forceinline__ Walk(int first, int per) : head{first / per, first % per}, per_group(per) {}
  __device__ __forceinline__ void next() {
    if (++head.index == per_group) {
      head.index = 0;
      ++head.group;
    }
  }
};

struct Token {
  int64_t s, b;
};

__device__ __forceinline__ Token token_of(const QkNormRopeArgs& a, unsigned t) {
  const unsigned b = static_cast<unsigned>(a.b), s = t / b;
  return {s, t - s * b};
}

// The token's row of the table, or -1.
__device__ __forceinline__ int64_t row_of(const QkNormRopeArgs& a, Token at) {
  const int64_t p = a.positions[at.s * a.position_stride_s + at.b * a.position_stride_b];
  return p >= 0 && p < a.table_rows ? p : -1;
}

template <class T>
__device__ __forceinline__ const T* head_of(const HeadsView& v, Token at, int number) {
  return static_cast<const T*>(v.data) + at.s * v.stride_s + at.b * v.stride_b + number * v.stride_head;
}

template <class T>
__device__ __forceinline__ T* output_of(const QkNormRopeArgs& a, unsigned t, Head head) {
  const int64_t heads = static_cast<int64_t>(a.groups) * (head.query(a) ? a.group_queries : a.group_keys);
  return static_cast<T*>(head.query(a) ? a.q : a.k) + (t * heads + head.number(a)) * a.head_dim;
}

template <class T>
__device__ __forceinline__ T* gradient_of(const QkNormRopeArgs& a, unsigned t, Head head) {
  const int64_t row = static_cast<int64_t>(a.groups) * (a.group_queries + 2 * a.group_keys) * a.head_dim;
  return static_cast<T*>(a.dqkv) + t * row + head.offset(a);
}

// ------------------------------------------------------------------------------------------------ 16 bytes at a time

template <class T, int H, bool Interleaved>
struct Lanes {
  static constexpr int V = kVec<T>;
  static constexpr int kCount = H / (2 * V);  // lanes of a head
  static_assert(kCount >= 1 && kCount <= 32 && (kCount & (kCount - 1)) == 0, "a head is shared by 1 to 32 lanes");

  // A lane's share of a head: elements lane * V + i and H / 2 + lane * V + i.
  struct Share {
    float a[V], b[V];
  };
  struct Raw {
    uint4 a, b;
  };
  struct Angles {
    float c[V], s[V];
  };

  static __device__ __forceinline__ Raw load(const T* head, int lane) { return {load16(head + lane * V), load16(head + H / 2 + lane * V)}; }

  static __device__ __forceinline__ void store(T* head, int lane, Raw raw) {
    store16(head + lane * V, raw.a);
    store16(head + H / 2 + lane * V, raw.b);
  }

  static __device__ __forceinline__ Share unpack(Raw raw) {
    Share x;
    unpack16<T>(raw.a, x.a);
    unpack16<T>(raw.b, x.b);
    return x;
  }

  static __device__ __forceinline__ Raw pack(const Share& x) { return {pack16<T>(x.a), pack16<T>(x.b)}; }

  // The share of a gain, which is of T or fp32.
  static __device__ __forceinline__ Share gain(const void* weight, DType type, int lane) {
    Share x;
    if (type != DType::f32 || sizeof(T) == 4) return unpack(load(static_cast<const T*>(weight), lane));
    const float* w = static_cast<const float*>(weight);
    load_floats<V>(w + lane * V, x.a);
    load_floats<V>(w + H / 2 + lane * V, x.b);
    return x;
  }

  static __device__ __forceinline__ void angles_of(const float* row, int lane, float (&x)[V]) {
    if constexpr (!Interleaved) {
      load_floats<V>(row + lane * V, x);
    } else if constexpr (V == 4) {
      const float2 one = *reinterpret_cast<const float2*>(row + lane * 2), two = *reinterpret_cast<const float2*>(row + H / 4 + lane * 2);
      x[0] = one.x;
      x[1] = one.y;
      x[2] = two.x;
      x[3] = two.y;
    } else {
      const float4 one = *reinterpret_cast<const float4*>(row + lane * 4), two = *reinterpret_cast<const float4*>(row + H / 4 + lane * 4);
      x[0] = one.x;
      x[1] = one.y;
      x[2] = one.z;
      x[3] = one.w;
      x[4] = two.x;
      x[5] = two.y;
      x[6] = two.z;
      x[7] = two.w;
    }
  }

  static __device__ __forceinline__ Angles angles(const QkNormRopeArgs& args, int64_t row, int lane) {
    Angles t;
    if (row >= 0) {
      angles_of(static_cast<const float*>(args.cos) + row * (H / 2), lane, t.c);
      angles_of(static_cast<const float*>(args.sin) + row * (H / 2), lane, t.s);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) t.c[i] = t.s[i] = __builtin_nanf("");
    }
    return t;
  }

  // Rotate by the angle, or back.
  template <bool Back>
  static __device__ __forceinline__ void turn(Share& x, const Angles& t) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      float& e = Interleaved ? (i < V / 2 ? x.a[(2 * i) % V] : x.b[(2 * i) % V]) : x.a[i];
      float& o = Interleaved ? (i < V / 2 ? x.a[(2 * i + 1) % V] : x.b[(2 * i + 1) % V]) : x.b[i];
      const float c = t.c[i], s = Back ? -t.s[i] : t.s[i], was = e;
      e = was * c - o * s;
      o = was * s + o * c;
    }
  }
};

// One item: the heads [piece * heads_per_item, ...) of one token. `items` of them, items_per_token to a token.
struct Items {
  unsigned items, items_per_token;
  int heads_per_item;
};

// Whole warps walk together (shuffles need all lanes); `there` says whether this group of lanes has an item.
struct Item {
  bool there;
  unsigned token;
  int first;

  __device__ __forceinline__ Item(const Items& of, unsigned number) : there(number < of.items), token(0), first(0) {
    if (there) {
      token = number / of.items_per_token;
      first = static_cast<int>(number - token * of.items_per_token) * of.heads_per_item;
    }
  }
};

template <class T, int H, bool Interleaved, int InFlight>
__global__ void __launch_bounds__(kThreads) forward_kernel(const QkNormRopeArgs a, const Items of) {
  using L = Lanes<T, H, Interleaved>;
  const int lane = threadIdx.x % L::kCount;
  const unsigned in_warp = (threadIdx.x % 32) / L::kCount;
  const unsigned per_warp = 32 / L::kCount, groups = gridDim.x * kWarps * per_warp;
  const int per_group = a.group_queries + a.group_keys, heads = a.groups * per_group;
  for (unsigned base = (blockIdx.x * kWarps + threadIdx.x / 32) * per_warp; base < of.items; base += groups) {
    const Item item(of, base + in_warp);
    const Token at = token_of(a, item.token);
    typename L::Angles angles = L::angles(a, item.there ? row_of(a, at) : -1, lane);
    const T* qkv = static_cast<const T*>(a.qkv) + at.s * a.stride_s + at.b * a.stride_b;
    Walk walk(item.first, per_group);
    const int last = min(item.first + of.heads_per_item, heads);
    for (int n = 0; n < of.heads_per_item; n += InFlight) {
      typename L::Raw raw[InFlight];
      T* out[InFlight];
      bool query[InFlight];
#pragma unroll
      for (int u = 0; u < InFlight; ++u) {
        raw[u] = {};
        out[u] = nullptr;
        query[u] = walk.head.query(a);
        if (item.there && item.first + n + u < last) {
          raw[u] = L::load(qkv + walk.head.offset(a), lane);
          out[u] = output_of<T>(a, item.token, walk.head);
          walk.next();
        }
      }
#pragma unroll
      for (int u = 0; u < InFlight; ++u) {
        typename L::Share x = L::unpack(raw[u]);
        float squares = 0;
#pragma unroll
        for (int i = 0; i < L::V; ++i) squares += x.a[i] * x.a[i] + x.b[i] * x.b[i];
        squares = group_sum<L::kCount>(squares);
        const float r = inverse_norm(squares, a);
#pragma unroll
        for (int i = 0; i < L::V; ++i) {
          x.a[i] *= r;
          x.b[i] *= r;
        }
        const void* weight = query[u] ? a.q_weight : a.k_weight;
        if (weight) {
          const typename L::Share w = L::gain(weight, query[u] ? a.q_weight_type : a.k_weight_type, lane);
#pragma unroll
          for (int i = 0; i < L::V; ++i) {
            x.a[i] *= w.a[i];
            x.b[i] *= w.b[i];
          }
        }
        L::template turn<false>(x, angles);
        if (out[u]) L::store(out[u], lane, L::pack(x));
      }
    }
  }
}

template <class T, int H, bool Interleaved, bool Gain, int InFlight>
__global__ void __launch_bounds__(kThreads) backward_kernel(const QkNormRopeArgs a, const Items of) {
  using L = Lanes<T, H, Interleaved>;
  constexpr int V = L::V;
  const int lane = threadIdx.x % L::kCount;
  const unsigned in_warp = (threadIdx.x % 32) / L::kCount;
  const unsigned per_warp = 32 / L::kCount, groups = gridDim.x * kWarps * per_warp;
  const int per_group = a.group_queries + 2 * a.group_keys, heads = a.groups * per_group;
  typename L::Share sum[2] = {};  // of the gains' gradients: queries, keys
  for (unsigned base = (blockIdx.x * kWarps + threadIdx.x / 32) * per_warp; base < of.items; base += groups) {
    const Item item(of, base + in_warp);
    const Token at = token_of(a, item.token);
    typename L::Angles angles = L::angles(a, item.there ? row_of(a, at) : -1, lane);
    const T* qkv = static_cast<const T*>(a.qkv) + at.s * a.stride_s + at.b * a.stride_b;
    Walk walk(item.first, per_group);
    const int last = min(item.first + of.heads_per_item, heads);
    for (int n = 0; n < of.heads_per_item; n += InFlight) {
      typename L::Raw raw_x[InFlight], raw_dy[InFlight];
      T* out[InFlight];
      bool query[InFlight], value[InFlight];
#pragma unroll
      for (int u = 0; u < InFlight; ++u) {
        raw_x[u] = raw_dy[u] = {};
        out[u] = nullptr;
        query[u] = walk.head.query(a);
        value[u] = walk.head.value(a);
        if (item.there && item.first + n + u < last) {
          const HeadsView& view = query[u] ? a.dq : value[u] ? a.dv : a.dk;
          raw_dy[u] = L::load(head_of<T>(view, at, walk.head.number(a)), lane);
          if (!value[u]) raw_x[u] = L::load(qkv + walk.head.offset(a), lane);
          out[u] = gradient_of<T>(a, item.token, walk.head);
          walk.next();
        }
      }
#pragma unroll
      for (int u = 0; u < InFlight; ++u) {
        const typename L::Share x = L::unpack(raw_x[u]);
        typename L::Share d = L::unpack(raw_dy[u]);
        L::template turn<true>(d, angles);
        const typename L::Share before = d;
        const void* weight = query[u] ? a.q_weight : a.k_weight;
        if (Gain && weight) {
          const typename L::Share w = L::gain(weight, query[u] ? a.q_weight_type : a.k_weight_type, lane);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            d.a[i] *= w.a[i];
            d.b[i] *= w.b[i];
          }
        }
        float squares = 0, product = 0;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          squares += x.a[i] * x.a[i] + x.b[i] * x.b[i];
          product += x.a[i] * d.a[i] + x.b[i] * d.b[i];
        }
        squares = group_sum<L::kCount>(squares);
        product = group_sum<L::kCount>(product);
        const float r = inverse_norm(squares, a);
        if (Gain && out[u] && !value[u]) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const float one = x.a[i] * r * before.a[i], two = x.b[i] * r * before.b[i];
            // Both sums, one of them with nothing: registers can not be indexed.
            sum[0].a[i] += query[u] ? one : 0.0f;
            sum[0].b[i] += query[u] ? two : 0.0f;
            sum[1].a[i] += query[u] ? 0.0f : one;
            sum[1].b[i] += query[u] ? 0.0f : two;
          }
        }
        if (a.norm != qk_norm_none) {
          const float shared = product * r / (a.norm == qk_norm_rms ? static_cast<float>(H) : 1.0f);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            d.a[i] = r * (d.a[i] - x.a[i] * r * shared);
            d.b[i] = r * (d.b[i] - x.b[i] * r * shared);
          }
        }
        if (out[u]) L::store(out[u], lane, value[u] ? raw_dy[u] : L::pack(d));
      }
    }
  }
  if constexpr (Gain) {
    MR1_SHARED(float, by_warp, kWarps * 2 * H);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        // Over the groups of the warp: lanes with the same columns.
        float one = sum[row].a[i], two = sum[row].b[i];
#pragma unroll
        for (int step = 16; step >= L::kCount; step /= 2) {
          one += __shfl_xor_sync(0xffffffffu, one, step);
          two += __shfl_xor_sync(0xffffffffu, two, step);
        }
        if (in_warp == 0) {
          float* to = &by_warp[((threadIdx.x / 32) * 2 + row) * H];
          to[lane * V + i] = one;
          to[H / 2 + lane * V + i] = two;
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * H; i += kThreads) {
      float total = 0;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) total += by_warp[warp * 2 * H + i];
      static_cast<float*>(a.partials)[static_cast<int64_t>(blockIdx.x) * 2 * H + i] = total;
    }
  }
}

// --------------------------------------------------------------------------------------------------- anything else

// A head as pairs p = 0 .. h/2 - 1: the rotated ones first.
struct Pair {
  int e, o;

  __device__ __forceinline__ Pair(const QkNormRopeArgs& a, int p)
      : e(a.interleaved || p >= a.half ? 2 * p : p), o(a.interleaved || p >= a.half ? 2 * p + 1 : p + a.half) {}
};

template <class T>
struct Plain {
  using W = typename Wide<T>::type;

  static __device__ __forceinline__ W rounded(W x) { return to_float(Round<T>::from(x)); }

  static __device__ __forceinline__ W gain(const void* weight, DType type, int i) {
    if (!weight) return W(1);
    return type == DType::f32 ? W(static_cast<const float*>(weight)[i]) : W(to_float(static_cast<const T*>(weight)[i]));
  }

  static __device__ __forceinline__ void angle(const QkNormRopeArgs& a, int64_t row, int p, W& c, W& s) {
    if (row < 0) {
      c = s = __builtin_nan("");
      return;
    }
    c = static_cast<const W*>(a.cos)[row * a.half + p];
    s = static_cast<const W*>(a.sin)[row * a.half + p];
    if (a.parity && !a.interleaved) {
      c = rounded(c);
      s = rounded(s);
    }
  }

  static __device__ __forceinline__ void turn(const QkNormRopeArgs& a, int64_t row, int p, bool back, W& e, W& o) {
    if (p >= a.half) return;
    W c, s;
    angle(a, row, p, c, s);
    s = back ? -s : s;
    const W was = e;
    e = was * c - o * s;
    o = was * s + o * c;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) plain_forward_kernel(const QkNormRopeArgs a, const unsigned items) {
  using P = Plain<T>;
  using W = typename P::W;
  const int lane = threadIdx.x % 32;
  const int per_group = a.group_queries + a.group_keys;
  const unsigned heads = a.groups * per_group, warps = blockDim.x / 32;
  for (unsigned item = blockIdx.x * warps + threadIdx.x / 32; item < items; item += gridDim.x * warps) {
    const unsigned t = item / heads;
    const Token at = token_of(a, t);
    const int64_t row = row_of(a, at);
    const Head head = Walk(static_cast<int>(item - t * heads), per_group).head;
    const T* x = static_cast<const T*>(a.qkv) + at.s * a.stride_s + at.b * a.stride_b + head.offset(a);
    T* y = output_of<T>(a, t, head);
    const void* weight = head.query(a) ? a.q_weight : a.k_weight;
    const DType type = head.query(a) ? a.q_weight_type : a.k_weight_type;
    const bool turn_first = a.parity && a.interleaved;  // Llama 4's order
    W squares = 0;
    for (int p = lane; p < a.head_dim / 2; p += 32) {
      const Pair at_pair(a, p);
      W e = to_float(x[at_pair.e]), o = to_float(x[at_pair.o]);
      if (turn_first) {
        P::turn(a, row, p, false, e, o);
        e = P::rounded(e);
        o = P::rounded(o);
      }
      squares += e * e + o * o;
    }
    const W r = inverse_norm(group_sum<32>(squares), a);
    for (int p = lane; p < a.head_dim / 2; p += 32) {
      const Pair at_pair(a, p);
      W e = to_float(x[at_pair.e]), o = to_float(x[at_pair.o]);
      if (turn_first) {
        P::turn(a, row, p, false, e, o);
        e = P::rounded(e) * r;
        o = P::rounded(o) * r;
      } else if (a.parity) {
        e = P::rounded(e * r);
        o = P::rounded(o * r);
        if (weight) {
          e = P::rounded(e * P::rounded(P::gain(weight, type, at_pair.e)));
          o = P::rounded(o * P::rounded(P::gain(weight, type, at_pair.o)));
        }
        if (p < a.half) {
          W c, s;
          P::angle(a, row, p, c, s);
          const W was = e;
          e = P::rounded(was * c) + P::rounded(-o * s);
          o = P::rounded(o * c) + P::rounded(was * s);
        }
      } else {
        e *= r * P::gain(weight, type, at_pair.e);
        o *= r * P::gain(weight, type, at_pair.o);
        P::turn(a, row, p, false, e, o);
      }
      y[at_pair.e] = Round<T>::from(e);
      y[at_pair.o] = Round<T>::from(o);
    }
  }
}

// Dynamic shared memory: [warps, 2, h] of W where there are gains, else none.
template <class T, bool Gain>
__global__ void __launch_bounds__(kThreads) plain_backward_kernel(const QkNormRopeArgs a, const unsigned items) {
  using P = Plain<T>;
  using W = typename P::W;
  const int lane = threadIdx.x % 32, h = a.head_dim;
  const int per_group = a.group_queries + 2 * a.group_keys;
  const unsigned heads = a.groups * per_group, warps = blockDim.x / 32;
  W* sums = nullptr;
  W* mine = nullptr;  // this warp's; a lane touches its own pairs only
  if constexpr (Gain) {
    MR1_DYNAMIC_SHARED(W, memory);
    sums = memory;
    mine = sums + (threadIdx.x / 32) * 2 * h;
    for (int p = lane; p < h / 2; p += 32) {
      const Pair at_pair(a, p);
      mine[at_pair.e] = mine[at_pair.o] = mine[h + at_pair.e] = mine[h + at_pair.o] = 0;
    }
  }
  for (unsigned item = blockIdx.x * warps + threadIdx.x / 32; item < items; item += gridDim.x * warps) {
    const unsigned t = item / heads;
    const Token at = token_of(a, t);
    const int64_t row = row_of(a, at);
    const Head head = Walk(static_cast<int>(item - t * heads), per_group).head;
    const bool query = head.query(a);
    T* dx = gradient_of<T>(a, t, head);
    const T* dy = head_of<T>(query ? a.dq : head.value(a) ? a.dv : a.dk, at, head.number(a));
    if (head.value(a)) {
      for (int i = lane; i < h; i += 32) dx[i] = dy[i];
      continue;
    }
    const T* x = static_cast<const T*>(a.qkv) + at.s * a.stride_s + at.b * a.stride_b + head.offset(a);
    const void* weight = query ? a.q_weight : a.k_weight;
    const DType type = query ? a.q_weight_type : a.k_weight_type;
    W squares = 0, product = 0;
    for (int p = lane; p < h / 2; p += 32) {
      const Pair at_pair(a, p);
      const W e = to_float(x[at_pair.e]), o = to_float(x[at_pair.o]);
      W u = to_float(dy[at_pair.e]), v = to_float(dy[at_pair.o]);
      P::turn(a, row, p, true, u, v);
      squares += e * e + o * o;
      product += e * u * P::gain(weight, type, at_pair.e) + o * v * P::gain(weight, type, at_pair.o);
    }
    const W r = inverse_norm(group_sum<32>(squares), a);
    const W shared = group_sum<32>(product) * r / (a.norm == qk_norm_rms ? static_cast<W>(h) : W(1));
    for (int p = lane; p < h / 2; p += 32) {
      const Pair at_pair(a, p);
      const W e = to_float(x[at_pair.e]), o = to_float(x[at_pair.o]);
      W u = to_float(dy[at_pair.e]), v = to_float(dy[at_pair.o]);
      P::turn(a, row, p, true, u, v);
      if constexpr (Gain) {
        mine[(query ? 0 : h) + at_pair.e] += e * r * u;
        mine[(query ? 0 : h) + at_pair.o] += o * r * v;
      }
      if (a.norm != qk_norm_none) {
        u = r * (u * P::gain(weight, type, at_pair.e) - e * r * shared);
        v = r * (v * P::gain(weight, type, at_pair.o) - o * r * shared);
      }
      dx[at_pair.e] = Round<T>::from(u);
      dx[at_pair.o] = Round<T>::from(v);
    }
  }
  if constexpr (Gain) {
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * h; i += blockDim.x) {
      W total = 0;
      for (unsigned warp = 0; warp < warps; ++warp) total += sums[warp * 2 * h + i];
      static_cast<W*>(a.partials)[static_cast<int64_t>(blockIdx.x) * 2 * h + i] = total;
    }
  }
}

// The sum over the blocks' partials [partials, 2, h], in fp64 and a fixed order, rounded once. One block for 32 columns; its 32 x 8
// threads take every eighth partial.
constexpr int kSlices = 8;
template <class W>
__global__ void __launch_bounds__(32 * kSlices) gain_kernel(const W* partials, int64_t count, int h, W* dq_weight, W* dk_weight) {
  MR1_SHARED(double, slices, 32 * kSlices);
  const int column = blockIdx.x * 32 + threadIdx.x % 32, slice = threadIdx.x / 32;
  double sum = 0;
  if (column < 2 * h) {
#pragma unroll 4
    for (int64_t p = slice; p < count; p += kSlices) sum += partials[p * 2 * h + column];
  }
  slices[threadIdx.x] = sum;
  __syncthreads();
  if (slice == 0 && column < 2 * h) {
    for (int other = 1; other < kSlices; ++other) sum += slices[other * 32 + threadIdx.x];
    W* out = column < h ? dq_weight : dk_weight;
    if (out) out[column < h ? column : column - h] = static_cast<W>(sum);
  }
}

}  // namespace qknr
}  // namespace mr1
