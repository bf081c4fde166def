// Scores and weight gradient on the CPU. See cpu.h and args.h.
//
// The weight gradient is cut into tiles of at most 256 x 512, so that the product of one document and one tile stays in the L2
// cache while it is added to main_grad and multiplied with the probes; all documents pass through a tile before the next one,
// so that main_grad and the probes are read from memory once per call where they fit the caches, not once per document.
// Tiles, and with them every order of summation, depend on sizes alone: the result has the same bits on any number of threads.
#include "influence/cpu.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "mr1/cpu.h"

namespace mr1 {
namespace {

constexpr int64_t kTileRows = 256, kTileCols = 512;
// With many probes it is they that are read from memory again and again: four documents are then scored at each reading.
constexpr int64_t kManyProbes = 8;
constexpr int64_t kDocumentsAtOnce = 4;
constexpr int64_t kTokensAtOnce = 256;
constexpr int64_t kPartialBytes = 32 << 20;

int64_t width(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

const char* at(const void* data, DType t, int64_t element) { return static_cast<const char*>(data) + element * width(t); }

Matrix part(const Matrix& m, int64_t row, int64_t rows, int64_t col, int64_t cols) {
  return {at(m.data, m.dtype, row * m.stride + col), m.dtype, rows, cols, m.stride};
}

// n cut into equal pieces of at most `most`, multiples of 16 but for the last.
struct Cut {
  int64_t n, piece, count;
  Cut(int64_t n, int64_t most) : n(n) {
    const int64_t pieces = std::max<int64_t>(ceil_div(n, most), 1);
    piece = std::min(ceil_div(ceil_div(n, pieces), 16) * 16, most);
    count = ceil_div(n, piece);
  }
  int64_t begin(int64_t i) const { return i * piece; }
  int64_t size(int64_t i) const { return std::min(piece, n - i * piece); }
};

// --- Arithmetic of one row --------------------------------------------------------------------------------------------------

template <class T>
MR1_INLINE typename Wide<T>::type wide(T x) {
  if constexpr (std::is_same_v<T, f16>) {  // the compiler's own conversion is one number at a time
    uint16_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return Half16<f16>::widen(bits);
  } else {
    return to_float(x);
  }
}

// sums[d] += <block_d, g>, for D rows of n <= kTileCols numbers: few enough for single partial sums in fp32; whatever is added
// up beyond a row is added in fp64.
template <int D, class B, class G>
MR1_INLINE void dot_rows(const B* block, int64_t between, const G* g, int64_t n, double* sums, int64_t sums_between) {
  using S = typename Wide<B>::type;
  if constexpr (D == 4) {
    const B *x0 = block, *x1 = block + between, *x2 = block + 2 * between, *x3 = block + 3 * between;
    S s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t i = 0; i < n; ++i) {
      const S y = wide(g[i]);
      s0 += wide(x0[i]) * y;
      s1 += wide(x1[i]) * y;
      s2 += wide(x2[i]) * y;
      s3 += wide(x3[i]) * y;
    }
    sums[0] += s0;
    sums[sums_between] += s1;
    sums[2 * sums_between] += s2;
    sums[3 * sums_between] += s3;
  } else {
    for (int d = 0; d < D; ++d) {
      const B* x = block + d * between;
      S s = 0;
#pragma omp simd reduction(+ : s)
      for (int64_t i = 0; i < n; ++i) s += wide(x[i]) * static_cast<S>(wide(g[i]));
      sums[d * sums_between] += s;
    }
  }
}

template <class B, class M>
MR1_INLINE void add_row(const B* block, M* sum, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sum[i] += wide(block[i]);
}

// D documents' blocks: sums[d * K + k] += <block_d, g_k>; main_grad += their sum, one document after the other.
template <int D, class B, class G, class M>
MR1_INLINE void add_and_dot_rows(const AddAndDotArgs& p, int64_t between, double* sums) {
  const B* block = static_cast<const B*>(p.block);
  const G* g = static_cast<const G*>(p.g);
  M* main_grad = static_cast<M*>(p.main_grad);
  for (int64_t r = 0; r < p.rows; ++r) {
    const B* x = block + r * p.block_stride;
    if (main_grad != nullptr)
      for (int d = 0; d < D; ++d) add_row(x + d * between, main_grad + r * p.main_grad_stride, p.cols);
    for (int64_t k = 0; k < p.probes; ++k)
      dot_rows<D>(x, between, g + k * p.g_probe_stride + r * p.g_stride, p.cols, sums + k, p.probes);
  }
}

#define MR1_ADD_AND_DOT(name, B, G, M)                                                      \
  MR1_CLONES void name(const AddAndDotArgs& p, int64_t documents, int64_t between, double* sums) { \
    if (documents == 4) add_and_dot_rows<4, B, G, M>(p, between, sums);                     \
    else                                                                                    \
      for (int64_t d = 0; d < documents; ++d) {                                             \
        AddAndDotArgs one = p;                                                              \
        one.block = static_cast<const B*>(p.block) + d * between;                           \
        add_and_dot_rows<1, B, G, M>(one, 0, sums + d * p.probes);                          \
      }                                                                                     \
  }
MR1_ADD_AND_DOT(add_and_dot_f32_f32, float, float, float)
MR1_ADD_AND_DOT(add_and_dot_f32_bf16, float, bf16, float)
MR1_ADD_AND_DOT(add_and_dot_f32_f16, float, f16, float)
MR1_ADD_AND_DOT(add_and_dot_bf16_f32, bf16, float, float)
MR1_ADD_AND_DOT(add_and_dot_bf16_bf16, bf16, bf16, float)
MR1_ADD_AND_DOT(add_and_dot_f64_f64, double, double, double)
#undef MR1_ADD_AND_DOT

void add_and_dot_cpu(const AddAndDotArgs& p, int64_t documents, int64_t between, double* sums) {
  if (p.block_dtype == DType::f64) return add_and_dot_f64_f64(p, documents, between, sums);
  if (p.block_dtype == DType::bf16)
    return (p.g_dtype == DType::bf16 ? add_and_dot_bf16_bf16 : add_and_dot_bf16_f32)(p, documents, between, sums);
  if (p.g_dtype == DType::bf16) return add_and_dot_f32_bf16(p, documents, between, sums);
  if (p.g_dtype == DType::f16) return add_and_dot_f32_f16(p, documents, between, sums);
  add_and_dot_f32_f32(p, documents, between, sums);
}

// sums[t * between] = <x_t, y_t>, cut into pieces like the rows of a tile.
template <class T>
MR1_INLINE void row_dots(const Matrix& x, const Matrix& y, double* sums, int64_t between) {
  for (int64_t t = 0; t < x.rows; ++t) {
    double sum = 0;
    for (int64_t c = 0; c < x.cols; c += kTileCols)
      dot_rows<1>(static_cast<const T*>(x.data) + t * x.stride + c, 0, static_cast<const T*>(y.data) + t * y.stride + c,
                  std::min(kTileCols, x.cols - c), &sum, 0);
    sums[t * between] = sum;
  }
}

MR1_CLONES void row_dots_f32(const Matrix& x, const Matrix& y, double* sums, int64_t between) { row_dots<float>(x, y, sums, between); }
MR1_CLONES void row_dots_bf16(const Matrix& x, const Matrix& y, double* sums, int64_t between) { row_dots<bf16>(x, y, sums, between); }
MR1_CLONES void row_dots_f64(const Matrix& x, const Matrix& y, double* sums, int64_t between) { row_dots<double>(x, y, sums, between); }

void row_dots_cpu(const Matrix& x, const Matrix& y, double* sums, int64_t between) {
  (x.dtype == DType::f64 ? row_dots_f64 : x.dtype == DType::bf16 ? row_dots_bf16 : row_dots_f32)(x, y, sums, between);
}

// --- Documents ----------------------------------------------------------------------------------------------------------------

// Neighbouring documents that share a product: one long document, or a run of short ones that are scored by rows.
struct Run {
  int64_t first_document, documents, begin, end;  // tokens [begin, end)
  bool by_rows;
};

std::vector<Run> runs_of(const WgradDotArgs& p, int64_t rows_below) {
  std::vector<Run> runs;
  for (int64_t d = 0; d < p.documents; ++d) {
    const int64_t begin = p.cu_host[d], end = p.cu_host[d + 1];
    if (begin == end) continue;
    // Without probes nothing is scored: one product for all.
    const bool by_rows = end - begin < rows_below || p.probes == 0;
    if (by_rows && !runs.empty() && runs.back().by_rows) {
      runs.back().documents = d + 1 - runs.back().first_document;
      runs.back().end = end;
    } else {
      runs.push_back({d, 1, begin, end, by_rows});
    }
  }
  return runs;
}

// Uninitialised memory: pages that are not touched cost nothing.
struct Buffer {
  explicit Buffer(int64_t bytes) : data(new char[static_cast<size_t>(bytes)]) {}
  std::unique_ptr<char[]> data;
};

// One tile of the weight gradient, all documents. sums [n, K]: this tile's part of the scores.
void tile_pass(const WgradDotArgs& p, const std::vector<Run>& runs, const CpuTools& tools, int64_t row, int64_t rows, int64_t col,
               int64_t cols, double* sums) {
  const Matrix a{p.a, p.dtype, p.tokens, p.din, p.a_stride}, b{p.b, p.dtype, p.tokens, p.dout, p.b_stride};
  const int64_t at_once = p.probes >= kManyProbes ? kDocumentsAtOnce : 1, block = rows * cols;
  Buffer blocks(at_once * block * width(p.dtype));
  AddAndDotArgs q;
  q.block = blocks.data.get();
  q.g = p.g == nullptr ? nullptr : at(p.g, p.g_dtype, row * p.g_stride + col);
  q.main_grad = p.main_grad == nullptr ? nullptr : const_cast<char*>(at(p.main_grad, p.main_grad_dtype, row * p.main_grad_stride + col));
  q.rows = rows, q.cols = cols, q.block_stride = cols;
  q.g_stride = p.g_stride, q.g_probe_stride = p.g_probe_stride, q.main_grad_stride = p.main_grad_stride;
  q.block_dtype = p.dtype, q.g_dtype = p.g_dtype, q.main_grad_dtype = p.main_grad_dtype, q.scores_dtype = p.scores_dtype;

  std::vector<double> found(static_cast<size_t>(at_once * p.probes));
  std::vector<int64_t> waiting;  // documents whose blocks are made and not yet used
  const auto use = [&] {
    if (waiting.empty()) return;
    std::fill(found.begin(), found.end(), 0.0);
    q.probes = p.probes;
    add_and_dot_cpu(q, static_cast<int64_t>(waiting.size()), block, found.data());
    for (size_t i = 0; i < waiting.size(); ++i)
      for (int64_t k = 0; k < p.probes; ++k) sums[waiting[i] * p.probes + k] = found[i * p.probes + k];
    waiting.clear();
  };
  for (const Run& run : runs) {
    if (run.by_rows && p.main_grad == nullptr) continue;
    const Matrix x = part(b, run.begin, run.end - run.begin, row, rows), y = part(a, run.begin, run.end - run.begin, col, cols);
    if (run.by_rows) {
      use();  // keeps the order of additions to main_grad that of the documents
      if (p.dtype == p.main_grad_dtype) {
        tools.product({q.main_grad, p.dtype, rows, cols, p.main_grad_stride}, x, true, y, false, true);
      } else {
        tools.product({q.block, p.dtype, rows, cols, cols}, x, true, y, false, false);
        q.probes = 0;
        add_and_dot_cpu(q, 1, 0, nullptr);
      }
      continue;
    }
    tools.product({at(q.block, p.dtype, static_cast<int64_t>(waiting.size()) * block), p.dtype, rows, cols, cols}, x, true, y, false, false);
    waiting.push_back(run.first_document);
    if (static_cast<int64_t>(waiting.size()) == at_once) use();
  }
  use();
}

void score_by_tiles(const WgradDotArgs& p, const std::vector<Run>& runs, const CpuTools& tools, double* scores) {
  const Cut down(p.dout, kTileRows), across(p.din, kTileCols);
  const int64_t tiles = down.count * across.count, size = p.documents * p.probes;
  // Each tile has its own partial scores, added in the order of the tiles; so many tiles at a time as keeps them small.
  const int64_t wave = std::clamp<int64_t>(kPartialBytes / std::max<int64_t>(size * 8, 1), 16, std::max<int64_t>(tiles, 16));
  std::vector<double> partial;
  for (int64_t begin = 0; begin < tiles; begin += wave) {
    const int64_t count = std::min(wave, tiles - begin);
    partial.assign(static_cast<size_t>(count * size), 0.0);
    tools.parallel(count, [&](int64_t i) {
      const int64_t r = (begin + i) / across.count, c = (begin + i) % across.count;
      tile_pass(p, runs, tools, down.begin(r), down.size(r), across.begin(c), across.size(c), partial.data() + i * size);
    });
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < size; ++j) scores[j] += partial[i * size + j];
  }
}

// Scores of a run of short documents: token t contributes <b_t, G a_t> = <G^T b_t, a_t>, whichever of the two is narrower.
void score_by_rows(const WgradDotCpu& call, const Run& run, const CpuTools& tools, double* scores) {
  const WgradDotArgs& p = call.args;
  const bool from_a = p.dout <= p.din;
  const int64_t narrow = std::min(p.din, p.dout), tiles = ceil_div(run.end - run.begin, kTokensAtOnce);
  const int64_t wave = std::clamp<int64_t>(kPartialBytes / (kTokensAtOnce * p.probes * 8), 16, std::max<int64_t>(tiles, 16));
  std::vector<double> partial;
  int64_t document = run.first_document;
  for (int64_t first = 0; first < tiles; first += wave) {
    const int64_t count = std::min(wave, tiles - first), begin = run.begin + first * kTokensAtOnce;
    const int64_t end = std::min(run.end, begin + count * kTokensAtOnce);
    partial.resize(static_cast<size_t>((end - begin) * p.probes));
    tools.parallel(count, [&](int64_t i) {
      const int64_t token = begin + i * kTokensAtOnce, tokens = std::min(kTokensAtOnce, end - token);
      Buffer product(tokens * narrow * width(call.rows_dtype));
      const Matrix u{product.data.get(), call.rows_dtype, tokens, narrow, narrow};
      const Matrix x = part(call.a_rows, token, tokens, 0, p.din), y = part(call.b_rows, token, tokens, 0, p.dout);
      for (int64_t k = 0; k < p.probes; ++k) {
        const Matrix g{at(call.g_rows, call.rows_dtype, k * call.g_rows_probe_stride), call.rows_dtype, p.dout, p.din, call.g_rows_stride};
        tools.product(u, from_a ? x : y, false, g, from_a, false);
        row_dots_cpu(u, from_a ? y : x, partial.data() + i * kTokensAtOnce * p.probes + k, p.probes);
      }
    });
    for (int64_t t = begin; t < end; ++t) {
      while (p.cu_host[document + 1] <= t) ++document;
      for (int64_t k = 0; k < p.probes; ++k) scores[document * p.probes + k] += partial[(t - begin) * p.probes + k];
    }
  }
}

}  // namespace

void wgrad_dot_cpu(const WgradDotCpu& call, const CpuTools& tools) {
  const WgradDotArgs& p = call.args;
  const int64_t size = p.documents * p.probes;
  std::vector<double> scores(static_cast<size_t>(size), 0.0);
  const std::vector<Run> runs = runs_of(p, call.rows_below);
  if (p.din > 0 && p.dout > 0) {
    const bool tiles = p.main_grad != nullptr || std::any_of(runs.begin(), runs.end(), [](const Run& run) { return !run.by_rows; });
    if (tiles && !runs.empty()) score_by_tiles(p, runs, tools, scores.data());
    for (const Run& run : runs)
      if (run.by_rows && p.probes > 0) score_by_rows(call, run, tools, scores.data());
  }
  if (p.scores_dtype == DType::f64)
    std::copy(scores.begin(), scores.end(), static_cast<double*>(p.scores));
  else
    std::transform(scores.begin(), scores.end(), static_cast<float*>(p.scores), [](double x) { return static_cast<float>(x); });
}

}  // namespace mr1
