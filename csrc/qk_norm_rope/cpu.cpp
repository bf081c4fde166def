// CPU kernels of qk_norm_rope.
//
// The usual head sizes (64 and 128; fully rotated; fp32, bf16, fp16) are compiled with the size known, as two arrays a and b of
// h/2 numbers each, a[j] and b[j] being the pair that is rotated together: then there is no shuffle left but the one in loading
// and storing, and for 16-bit types not even that, because both halves of a 32-bit word are taken where they lie. Everything else
// (any even size, partial rotation, fp64, parity) goes through one plain version, two to three times slower.
#include <cmath>

#include "mr1/cpu.h"
#include "qk_norm_rope/args.h"

namespace mr1 {
namespace {

struct Token {
  int64_t s, b;
};

MR1_INLINE Token token(const QkNormRopeArgs& a, int64_t t) {
  const int64_t s = t / a.b;
  return {s, t - s * a.b};
}

MR1_INLINE int64_t position(const QkNormRopeArgs& a, Token at) {
  return a.positions[at.s * a.position_stride_s + at.b * a.position_stride_b];
}

template <class T>
MR1_INLINE T* at_token(const HeadsView& v, Token at, T* = nullptr) {
  return static_cast<T*>(const_cast<void*>(v.data)) + at.s * v.stride_s + at.b * v.stride_b;
}

// A gain as W, or ones.
template <class T, class W>
MR1_INLINE W gain_at(const void* weight, DType type, int i) {
  if (!weight) return W(1);
  return type == DType::f32 ? W(static_cast<const float*>(weight)[i]) : W(to_float(static_cast<const T*>(weight)[i]));
}

template <class T>
MR1_INLINE void copy_heads(const T* from, int64_t from_stride, T* to, int heads, int h) {
  for (int i = 0; i < heads; ++i) std::memcpy(to + int64_t(i) * h, from + i * from_stride, sizeof(T) * h);
}

// ---------------------------------------------------------------------------------------------------- size known

// How a head of H elements becomes the arrays a and b, and back. `element_a(j)`, `element_b(j)`: where a[j] and b[j] lie in the head.
template <class T, int H, bool Interleaved>
struct Halves {
  static constexpr int P = H / 2;
  static constexpr bool kWords = sizeof(T) == 2;

  // Which entry of a row of cos a[j], b[j] are turned by.
  static MR1_INLINE constexpr int angle(int j) { return kWords && !Interleaved ? (j < P / 2 ? 2 * j : 2 * (j - P / 2) + 1) : j; }
  static MR1_INLINE constexpr int element_a(int j) { return Interleaved ? 2 * j : angle(j); }
  static MR1_INLINE constexpr int element_b(int j) { return Interleaved ? 2 * j + 1 : P + angle(j); }
  static constexpr bool kAnglesInOrder = Interleaved || !kWords;

  static MR1_INLINE void load(const T* x, float* a, float* b) {
    if constexpr (!kWords) {
      for (int j = 0; j < P; ++j) {
        a[j] = x[Interleaved ? 2 * j : j];
        b[j] = x[Interleaved ? 2 * j + 1 : P + j];
      }
    } else if constexpr (Interleaved) {
      for (int j = 0; j < P; ++j) {
        uint32_t word;
        std::memcpy(&word, x + 2 * j, 4);
        a[j] = Half16<T>::low(word);
        b[j] = Half16<T>::high(word);
      }
    } else {
      for (int j = 0; j < P / 2; ++j) {
        uint32_t one, two;
        std::memcpy(&one, x + 2 * j, 4);
        std::memcpy(&two, x + P + 2 * j, 4);
        a[j] = Half16<T>::low(one);
        a[P / 2 + j] = Half16<T>::high(one);
        b[j] = Half16<T>::low(two);
        b[P / 2 + j] = Half16<T>::high(two);
      }
    }
  }

  static MR1_INLINE void store(const float* a, const float* b, T* y) {
    if constexpr (!kWords) {
      for (int j = 0; j < P; ++j) {
        y[Interleaved ? 2 * j : j] = a[j];
        y[Interleaved ? 2 * j + 1 : P + j] = b[j];
      }
    } else if constexpr (Interleaved) {
      for (int j = 0; j < P; ++j) {
        const uint32_t word = Half16<T>::pack(a[j], b[j]);
        std::memcpy(y + 2 * j, &word, 4);
      }
    } else {
      for (int j = 0; j < P / 2; ++j) {
        const uint32_t one = Half16<T>::pack(a[j], a[P / 2 + j]), two = Half16<T>::pack(b[j], b[P / 2 + j]);
        std::memcpy(y + 2 * j, &one, 4);
        std::memcpy(y + P + 2 * j, &two, 4);
      }
    }
  }
};

MR1_INLINE float inverse_norm(float squares, const QkNormRopeArgs& a) {
  if (a.norm == qk_norm_none) return 1.0f;
  return 1.0f / std::sqrt((a.norm == qk_norm_rms ? squares / static_cast<float>(a.head_dim) : squares) + static_cast<float>(a.eps));
}

template <class T, int H, bool Interleaved>
struct Sized {
  using Layout = Halves<T, H, Interleaved>;
  static constexpr int P = H / 2;

  // The gain in the order of a and b.
  struct Gain {
    bool given;
    alignas(64) float a[P], b[P];

    MR1_INLINE Gain(const void* weight, DType type) : given(weight != nullptr) {
      for (int j = 0; j < P; ++j) {
        a[j] = gain_at<T, float>(weight, type, Layout::element_a(j));
        b[j] = gain_at<T, float>(weight, type, Layout::element_b(j));
      }
    }
  };

  // A token's cosines and sines in the order of a and b: the table's own row where that is the order.
  struct Angles {
    alignas(64) float store_c[Layout::kAnglesInOrder ? 1 : P], store_s[Layout::kAnglesInOrder ? 1 : P];
    const float* c;
    const float* s;

    MR1_INLINE void take(const QkNormRopeArgs& args, int64_t row) {
      c = static_cast<const float*>(args.cos) + row * P;
      s = static_cast<const float*>(args.sin) + row * P;
      if constexpr (!Layout::kAnglesInOrder) {
        for (int j = 0; j < P / 2; ++j) {
          store_c[j] = c[2 * j];
          store_c[P / 2 + j] = c[2 * j + 1];
          store_s[j] = s[2 * j];
          store_s[P / 2 + j] = s[2 * j + 1];
        }
        c = store_c;
        s = store_s;
      }
    }
  };

  static MR1_INLINE void forward_head(const QkNormRopeArgs& args, const T* x, T* y, const Gain& gain, const float* c, const float* s) {
    alignas(64) float a[P], b[P];
    Layout::load(x, a, b);
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int j = 0; j < P; ++j) squares += a[j] * a[j] + b[j] * b[j];
    const float r = inverse_norm(squares, args);
    if (gain.given) {
      for (int j = 0; j < P; ++j) {
        a[j] *= gain.a[j];
        b[j] *= gain.b[j];
      }
    }
    for (int j = 0; j < P; ++j) {
      const float n = a[j] * r, m = b[j] * r;
      a[j] = n * c[j] - m * s[j];
      b[j] = n * s[j] + m * c[j];
    }
    Layout::store(a, b, y);
  }

  static MR1_INLINE void forward(const QkNormRopeArgs& args, int64_t begin, int64_t end) {
    const Gain q_gain(args.q_weight, args.q_weight_type), k_gain(args.k_weight, args.k_weight_type);
    const int queries = args.group_queries, keys = args.group_keys;
    T* q = static_cast<T*>(args.q) + begin * args.groups * queries * H;
    T* k = static_cast<T*>(args.k) + begin * args.groups * keys * H;
    Angles angles;
    for (int64_t t = begin; t < end; ++t) {
      const Token at = token(args, t);
      angles.take(args, position(args, at));
      const T* x = static_cast<const T*>(args.qkv) + at.s * args.stride_s + at.b * args.stride_b;
      for (int g = 0; g < args.groups; ++g, x += keys * H) {
        for (int i = 0; i < queries; ++i, x += H, q += H) forward_head(args, x, q, q_gain, angles.c, angles.s);
        for (int i = 0; i < keys; ++i, x += H, k += H) forward_head(args, x, k, k_gain, angles.c, angles.s);
      }
    }
  }

  // sum: where this head's share of the gain's gradient is added, in the order of a and b; null without a gain.
  static MR1_INLINE void backward_head(const QkNormRopeArgs& args, const T* x, const T* dy, T* dx, const Gain& gain, const float* c,
                                       const float* s, float* sum) {
    alignas(64) float a[P], b[P], u[P], v[P];
    Layout::load(x, a, b);
    Layout::load(dy, u, v);
    for (int j = 0; j < P; ++j) {
      const float e = u[j], o = v[j];
      u[j] = e * c[j] + o * s[j];
      v[j] = o * c[j] - e * s[j];
    }
    if (args.norm == qk_norm_none) {
      Layout::store(u, v, dx);
      return;
    }
    float squares = 0, product = 0;
    if (gain.given) {
#pragma omp simd reduction(+ : squares)
      for (int j = 0; j < P; ++j) squares += a[j] * a[j] + b[j] * b[j];
    }
    if (gain.given) {
      const float r = inverse_norm(squares, args);
      for (int j = 0; j < P; ++j) {
        sum[j] += a[j] * r * u[j];
        sum[P + j] += b[j] * r * v[j];
        u[j] *= gain.a[j];
        v[j] *= gain.b[j];
      }
#pragma omp simd reduction(+ : product)
      for (int j = 0; j < P; ++j) product += a[j] * u[j] + b[j] * v[j];
    } else {
#pragma omp simd reduction(+ : squares, product)
      for (int j = 0; j < P; ++j) {
        squares += a[j] * a[j] + b[j] * b[j];
        product += a[j] * u[j] + b[j] * v[j];
      }
    }
    const float r = inverse_norm(squares, args);
    // mean(n * d) for RMS, sum(n * d) for L2; dx = r * (d - n * that). n is formed first: r * r alone can leave fp32's range.
    const float shared = product * r / (args.norm == qk_norm_rms ? static_cast<float>(H) : 1.0f);
    for (int j = 0; j < P; ++j) {
      a[j] = r * (u[j] - a[j] * r * shared);
      b[j] = r * (v[j] - b[j] * r * shared);
    }
    Layout::store(a, b, dx);
  }

  static MR1_INLINE void backward(const QkNormRopeArgs& args, int64_t begin, int64_t end) {
    const Gain q_gain(args.q_weight, args.q_weight_type), k_gain(args.k_weight, args.k_weight_type);
    const int queries = args.group_queries, keys = args.group_keys;
    const int64_t tokens = args.s * args.b;
    Angles angles;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      alignas(64) float sums[2][H] = {};
      const int64_t last = (chunk + 1) * QKNR_CHUNK < tokens ? (chunk + 1) * QKNR_CHUNK : tokens;
      T* dx = static_cast<T*>(args.dqkv) + chunk * QKNR_CHUNK * args.groups * (queries + 2 * keys) * H;
      for (int64_t t = chunk * QKNR_CHUNK; t < last; ++t) {
        // Sums of sums: over a token's heads, then over the chunk's tokens. Fewer roundings than one long sum.
        alignas(64) float of_token[2][H] = {};
        const Token at = token(args, t);
        angles.take(args, position(args, at));
        const T* x = static_cast<const T*>(args.qkv) + at.s * args.stride_s + at.b * args.stride_b;
        const T* dq = at_token<T>(args.dq, at);
        const T* dk = at_token<T>(args.dk, at);
        const T* dv = at_token<T>(args.dv, at);
        for (int g = 0; g < args.groups; ++g, x += keys * H, dx += keys * H) {
          for (int i = 0; i < queries; ++i, x += H, dx += H, dq += args.dq.stride_head)
            backward_head(args, x, dq, dx, q_gain, angles.c, angles.s, of_token[0]);
          for (int i = 0; i < keys; ++i, x += H, dx += H, dk += args.dk.stride_head)
            backward_head(args, x, dk, dx, k_gain, angles.c, angles.s, of_token[1]);
          copy_heads(dv, args.dv.stride_head, dx, keys, H);
          dv += keys * args.dv.stride_head;
        }
        if (args.partials)
          for (int j = 0; j < 2 * H; ++j) (&sums[0][0])[j] += (&of_token[0][0])[j];
      }
      if (args.partials) {
        float* out = static_cast<float*>(args.partials) + chunk * 2 * H;
        for (int row = 0; row < 2; ++row)
          for (int j = 0; j < P; ++j) {
            out[row * H + Layout::element_a(j)] = sums[row][j];
            out[row * H + Layout::element_b(j)] = sums[row][P + j];
          }
      }
    }
  }
};

// ------------------------------------------------------------------------------------------------- any even size

template <class W>
MR1_INLINE W plain_inverse_norm(W squares, const QkNormRopeArgs& a) {
  if (a.norm == qk_norm_none) return W(1);
  return W(1) / std::sqrt((a.norm == qk_norm_rms ? squares / static_cast<W>(a.head_dim) : squares) + static_cast<W>(a.eps));
}

template <class T>
struct Plain {
  using W = typename Wide<T>::type;

  static MR1_INLINE W rounded(W x) { return to_float(Round<T>::from(x)); }

  // Sum of squares in the order torch's CPU kernel makes it: 32 bytes of lanes, four running sums (equal bits up to h = 512).
  static MR1_INLINE W squares_like_torch(const W* x, int h) {
    constexpr int lanes = 32 / sizeof(W);
    W part[4][lanes] = {};
    const int rows = h / lanes, fours = rows / 4;
    for (int i = 0; i < rows; ++i) {
      const int at = i < 4 * fours ? i % 4 : 0;
      for (int l = 0; l < lanes; ++l) part[at][l] += x[i * lanes + l] * x[i * lanes + l];
    }
    for (int at = 1; at < 4; ++at)
      for (int l = 0; l < lanes; ++l) part[0][l] += part[at][l];
    W sum = 0;
    for (int i = rows * lanes; i < h; ++i) sum += x[i] * x[i];
    for (int l = 0; l < lanes; ++l) sum += part[0][l];
    return sum;
  }

  static MR1_INLINE W squares(const W* x, int h) {
    W sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < h; ++i) sum += x[i] * x[i];
    return sum;
  }

  // x turned by the angle (or back, with sign -1), pairs as the layout says.
  static MR1_INLINE void turn(const QkNormRopeArgs& a, W* x, const W* c, const W* s, W sign) {
    const int step = a.interleaved ? 2 : 1, other = a.interleaved ? 1 : a.half;
    for (int j = 0; j < a.half; ++j) {
      const W e = x[step * j], o = x[step * j + other];
      x[step * j] = e * c[j] - o * (sign * s[j]);
      x[step * j + other] = e * (sign * s[j]) + o * c[j];
    }
  }

  static MR1_INLINE void forward_head(const QkNormRopeArgs& a, const T* from, T* y, const void* weight, DType weight_type, const W* c, const W* s) {
    const int h = a.head_dim;
    W x[QKNR_MAX_HEAD];
    for (int i = 0; i < h; ++i) x[i] = to_float(from[i]);
    if (a.parity && a.interleaved) {
      turn(a, x, c, s, W(1));
      for (int i = 0; i < h; ++i) x[i] = rounded(x[i]);
      const W r = plain_inverse_norm(squares_like_torch(x, h), a);
      for (int i = 0; i < h; ++i) y[i] = Round<T>::from(x[i] * r);
      return;
    }
    if (a.parity) {
      const W r = plain_inverse_norm(squares_like_torch(x, h), a);
      for (int i = 0; i < h; ++i) x[i] = rounded(x[i] * r);
      if (weight)
        for (int i = 0; i < h; ++i) x[i] = rounded(x[i] * rounded(gain_at<T, W>(weight, weight_type, i)));
      for (int j = 0; j < a.half; ++j) {
        const W e = x[j], o = x[j + a.half];
        x[j] = rounded(e * c[j]) + rounded(-o * s[j]);
        x[j + a.half] = rounded(o * c[j]) + rounded(e * s[j]);
      }
    } else {
      const W r = plain_inverse_norm(squares(x, h), a);
      for (int i = 0; i < h; ++i) x[i] *= r * gain_at<T, W>(weight, weight_type, i);
      turn(a, x, c, s, W(1));
    }
    for (int i = 0; i < h; ++i) y[i] = Round<T>::from(x[i]);
  }

  // A token's cosines and sines: rounded to T where Hugging Face's are.
  static MR1_INLINE void angles(const QkNormRopeArgs& a, int64_t row, W* c, W* s) {
    const W* from_c = static_cast<const W*>(a.cos) + row * a.half;
    const W* from_s = static_cast<const W*>(a.sin) + row * a.half;
    const bool round = a.parity && !a.interleaved;
    for (int j = 0; j < a.half; ++j) {
      c[j] = round ? rounded(from_c[j]) : from_c[j];
      s[j] = round ? rounded(from_s[j]) : from_s[j];
    }
  }

  static MR1_INLINE void forward(const QkNormRopeArgs& a, int64_t begin, int64_t end) {
    const int h = a.head_dim, queries = a.group_queries, keys = a.group_keys;
    T* q = static_cast<T*>(a.q) + begin * a.groups * queries * h;
    T* k = static_cast<T*>(a.k) + begin * a.groups * keys * h;
    W c[QKNR_MAX_HEAD / 2], s[QKNR_MAX_HEAD / 2];
    for (int64_t t = begin; t < end; ++t) {
      const Token at = token(a, t);
      angles(a, position(a, at), c, s);
      const T* x = static_cast<const T*>(a.qkv) + at.s * a.stride_s + at.b * a.stride_b;
      for (int g = 0; g < a.groups; ++g, x += keys * h) {
        for (int i = 0; i < queries; ++i, x += h, q += h) forward_head(a, x, q, a.q_weight, a.q_weight_type, c, s);
        for (int i = 0; i < keys; ++i, x += h, k += h) forward_head(a, x, k, a.k_weight, a.k_weight_type, c, s);
      }
    }
  }

  static MR1_INLINE void backward_head(const QkNormRopeArgs& a, const T* from, const T* dy, T* dx, const void* weight, DType weight_type,
                                       const W* c, const W* s, W* sum) {
    const int h = a.head_dim;
    W n[QKNR_MAX_HEAD], u[QKNR_MAX_HEAD];
    for (int i = 0; i < h; ++i) {
      n[i] = to_float(from[i]);
      u[i] = to_float(dy[i]);
    }
    turn(a, u, c, s, W(-1));
    if (a.norm != qk_norm_none) {
      const W r = plain_inverse_norm(squares(n, h), a);
      for (int i = 0; i < h; ++i) n[i] *= r;
      if (weight)
        for (int i = 0; i < h; ++i) {
          sum[i] += n[i] * u[i];
          u[i] *= gain_at<T, W>(weight, weight_type, i);
        }
      W product = 0;
#pragma omp simd reduction(+ : product)
      for (int i = 0; i < h; ++i) product += n[i] * u[i];
      const W shared = a.norm == qk_norm_rms ? product / static_cast<W>(h) : product;
      for (int i = 0; i < h; ++i) u[i] = r * (u[i] - n[i] * shared);
    }
    for (int i = 0; i < h; ++i) dx[i] = Round<T>::from(u[i]);
  }

  static MR1_INLINE void backward(const QkNormRopeArgs& a, int64_t begin, int64_t end) {
    const int h = a.head_dim, queries = a.group_queries, keys = a.group_keys;
    const int64_t tokens = a.s * a.b;
    W c[QKNR_MAX_HEAD / 2], s[QKNR_MAX_HEAD / 2];
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      W sums[2 * QKNR_MAX_HEAD];
      for (int i = 0; i < 2 * h; ++i) sums[i] = 0;
      const int64_t last = (chunk + 1) * QKNR_CHUNK < tokens ? (chunk + 1) * QKNR_CHUNK : tokens;
      T* dx = static_cast<T*>(a.dqkv) + chunk * QKNR_CHUNK * a.groups * (queries + 2 * keys) * h;
      for (int64_t t = chunk * QKNR_CHUNK; t < last; ++t) {
        W of_token[2 * QKNR_MAX_HEAD];
        for (int i = 0; i < 2 * h; ++i) of_token[i] = 0;
        const Token at = token(a, t);
        angles(a, position(a, at), c, s);
        const T* x = static_cast<const T*>(a.qkv) + at.s * a.stride_s + at.b * a.stride_b;
        const T* dq = at_token<T>(a.dq, at);
        const T* dk = at_token<T>(a.dk, at);
        const T* dv = at_token<T>(a.dv, at);
        for (int g = 0; g < a.groups; ++g, x += keys * h, dx += keys * h) {
          for (int i = 0; i < queries; ++i, x += h, dx += h, dq += a.dq.stride_head)
            backward_head(a, x, dq, dx, a.q_weight, a.q_weight_type, c, s, of_token);
          for (int i = 0; i < keys; ++i, x += h, dx += h, dk += a.dk.stride_head)
            backward_head(a, x, dk, dx, a.k_weight, a.k_weight_type, c, s, of_token + h);
          copy_heads(dv, a.dv.stride_head, dx, keys, h);
          dv += keys * a.dv.stride_head;
        }
        for (int i = 0; i < 2 * h; ++i) sums[i] += of_token[i];
      }
      if (a.partials) {
        W* out = static_cast<W*>(a.partials) + chunk * 2 * h;
        for (int i = 0; i < 2 * h; ++i) out[i] = sums[i];
      }
    }
  }
};

// ------------------------------------------------------------------------------- one clonable function for each case

using Run = void (*)(const QkNormRopeArgs&, int64_t, int64_t);

#define MR1_SIZED(name, T, H, interleaved)                                                        \
  MR1_CLONES void forward_##name(const QkNormRopeArgs& a, int64_t begin, int64_t end) {           \
    Sized<T, H, interleaved>::forward(a, begin, end);                                             \
  }                                                                                               \
  MR1_CLONES void backward_##name(const QkNormRopeArgs& a, int64_t begin, int64_t end) {          \
    Sized<T, H, interleaved>::backward(a, begin, end);                                            \
  }
#define MR1_SIZES(name, T)                 \
  MR1_SIZED(name##_64_pairs, T, 64, true)    \
  MR1_SIZED(name##_128_pairs, T, 128, true)  \
  MR1_SIZED(name##_64_split, T, 64, false)   \
  MR1_SIZED(name##_128_split, T, 128, false)
MR1_SIZES(f32, float)
MR1_SIZES(bf16, bf16)
MR1_SIZES(f16, f16)

// Parity repeats another library's bits, so here a multiplication and an addition stay two operations.
#define MR1_PLAIN(name, T)                                                                                                          \
  MR1_CLONES MR1_EXACT void forward_##name(const QkNormRopeArgs& a, int64_t begin, int64_t end) { Plain<T>::forward(a, begin, end); } \
  MR1_CLONES MR1_EXACT void backward_##name(const QkNormRopeArgs& a, int64_t begin, int64_t end) { Plain<T>::backward(a, begin, end); }
MR1_PLAIN(f32, float)
MR1_PLAIN(bf16, bf16)
MR1_PLAIN(f16, f16)
MR1_PLAIN(f64, double)

struct Both {
  Run forward, backward;
};

#define MR1_PICK(name)                                                                                      \
  switch (a.head_dim) {                                                                                     \
    case 64: return a.interleaved ? Both{forward_##name##_64_pairs, backward_##name##_64_pairs}            \
                                  : Both{forward_##name##_64_split, backward_##name##_64_split};           \
    case 128: return a.interleaved ? Both{forward_##name##_128_pairs, backward_##name##_128_pairs}         \
                                   : Both{forward_##name##_128_split, backward_##name##_128_split};        \
    default: break;                                                                                         \
  }

Both pick(const QkNormRopeArgs& a) {
  const bool sized = !a.parity && 2 * a.half == a.head_dim;
  switch (a.type) {
    case DType::f32:
      if (sized) MR1_PICK(f32)
      return {forward_f32, backward_f32};
    case DType::bf16:
      if (sized) MR1_PICK(bf16)
      return {forward_bf16, backward_bf16};
    case DType::f16:
      if (sized) MR1_PICK(f16)
      return {forward_f16, backward_f16};
    default: return {forward_f64, backward_f64};
  }
}

template <class W>
void ordered_sum(const QkNormRopeArgs& a, int64_t partials, int row, W* out) {
  for (int i = 0; i < a.head_dim; ++i) {
    double sum = 0;
    for (int64_t p = 0; p < partials; ++p) sum += static_cast<const W*>(a.partials)[(p * 2 + row) * a.head_dim + i];
    out[i] = static_cast<W>(sum);
  }
}

}  // namespace

void qk_norm_rope_forward_cpu(const QkNormRopeArgs& a, int64_t first_token, int64_t end_token) { pick(a).forward(a, first_token, end_token); }

void qk_norm_rope_backward_cpu(const QkNormRopeArgs& a, int64_t first_chunk, int64_t end_chunk) { pick(a).backward(a, first_chunk, end_chunk); }

void qk_norm_rope_gain_cpu(const QkNormRopeArgs& a, int64_t partials, int row, void* out) {
  if (a.type == DType::f64)
    ordered_sum(a, partials, row, static_cast<double*>(out));
  else
    ordered_sum(a, partials, row, static_cast<float*>(out));
}

}  // namespace mr1
