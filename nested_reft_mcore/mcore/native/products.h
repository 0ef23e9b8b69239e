// Products weight @ activations, and the way of activations from rows to columns and back.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>

#define UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr int64_t kBlock = 64;      // tokens whose panels stay in the L2 cache
constexpr int64_t kTaskRows = 48;   // weight rows of one task: a multiple of 12 and of 8
constexpr int64_t kChain = 96;      // products added one after the other: longer ones round worse
constexpr int64_t kKeyChunk = 64;   // keys that all queries of a task look at in turn

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Blocks of equal size: a short last one would stream all weights for a few tokens.
struct Blocks {
  int64_t tokens, size;
  explicit Blocks(int64_t n) : tokens(n), size(8) {
    int64_t count = (n + kBlock - 1) / kBlock;
    if (count > 0) size = round_up((n + count - 1) / count, 8);
  }
};

// y[R][8 C] = weight rows @ panel; sums of kChain products in order of k, added in that order. With
// `ahead` it asks for the rows behind its own, since rows are too short for the processor to foresee
// them.
template <int R, int C, bool ahead>
inline void tile(const float *w, int64_t ldw, const float *x, float *y, int64_t ldy, int64_t depth) {
  for (int64_t chain = 0; chain < depth; chain += kChain) {
    const int64_t stop = least(chain + kChain, depth);
    __m256 sum[R][C];
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int c = 0; c < C; ++c) sum[r][c] = _mm256_setzero_ps();
    for (int64_t start = chain; start < stop; start += 16) {
      if (ahead) UNROLL for (int r = 0; r < R; ++r)
        _mm_prefetch(reinterpret_cast<const char *>(w + (R + r) * ldw + start), _MM_HINT_T0);
      const int64_t end = least(start + 16, stop);
      for (int64_t k = start; k < end; ++k) {
        __m256 b[C];
        UNROLL for (int c = 0; c < C; ++c) b[c] = _mm256_loadu_ps(x + k * 8 * C + 8 * c);
        UNROLL for (int r = 0; r < R; ++r) {
          const __m256 a = _mm256_broadcast_ss(w + r * ldw + k);
          UNROLL for (int c = 0; c < C; ++c) sum[r][c] = _mm256_fmadd_ps(a, b[c], sum[r][c]);
        }
      }
    }
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int c = 0; c < C; ++c) {
      float *to = y + r * ldy + 8 * c;
      _mm256_storeu_ps(to, chain ? _mm256_add_ps(_mm256_loadu_ps(to), sum[r][c]) : sum[r][c]);
    }
  }
}

template <int C, bool ahead>
void multiply_panel(const float *w, int64_t rows, int64_t depth, const float *x, float *y, int64_t ldy) {
  constexpr int R = 12 / C;  // twelve sums: enough to hide latency, few enough for registers
  int64_t r = 0;
  for (; r + R <= rows; r += R) tile<R, C, ahead>(w + r * depth, depth, x, y + r * ldy, ldy, depth);
  for (; r + 4 <= rows; r += 4) tile<4, C, ahead>(w + r * depth, depth, x, y + r * ldy, ldy, depth);
  for (; r < rows; ++r) tile<1, C, ahead>(w + r * depth, depth, x, y + r * ldy, ldy, depth);
}

inline int64_t panel_width(int64_t left) { return left == 24 ? 24 : left >= 16 ? 16 : 8; }

// y[rows][columns] = weight rows @ the block's panels.
void multiply(const float *w, int64_t rows, int64_t depth, const float *x, int64_t columns, float *y) {
  for (int64_t c = 0; c < columns;) {
    const int64_t width = panel_width(columns - c);
    const auto product = c == 0 ? (width == 24   ? multiply_panel<3, true>
                                   : width == 16 ? multiply_panel<2, true>
                                                 : multiply_panel<1, true>)
                                : (width == 24   ? multiply_panel<3, false>
                                   : width == 16 ? multiply_panel<2, false>
                                                 : multiply_panel<1, false>);
    product(w, rows, depth, x + c * depth, y + c, columns);
    c += width;
  }
}

// Where 8 columns from `column` on lie in a block's panels, and how far apart features are.
struct Place {
  float *start;
  int64_t stride;
};

Place place_of(float *panels, int64_t depth, int64_t columns, int64_t column) {
  int64_t c = 0;
  for (;;) {
    const int64_t width = panel_width(columns - c);
    if (column < c + width) return {panels + c * depth + (column - c), width};
    c += width;
  }
}

inline void transpose8(__m256 *v) {
  __m256 a[8], b[8];
  UNROLL for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  UNROLL for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xEE);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xEE);
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

inline float sum8(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}

// One over the root mean square of n numbers.
inline float inverse_rms(const float *x, int64_t n, double epsilon) {
  __m256 s0 = _mm256_setzero_ps(), s1 = s0;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256 a = _mm256_loadu_ps(x + i), b = _mm256_loadu_ps(x + i + 8);
    s0 = _mm256_fmadd_ps(a, a, s0);
    s1 = _mm256_fmadd_ps(b, b, s1);
  }
  double sum = sum8(_mm256_add_ps(s0, s1));
  for (; i < n; ++i) sum += double(x[i]) * x[i];
  return float(1.0 / std::sqrt(sum / n + epsilon));
}

// Rows [tokens, depth] into panels, normalised with `norm` unless that is null. All threads of a
// team call it.
void gather(const float *rows, int64_t tokens, int64_t depth, const float *norm, double epsilon,
            float *panels, int64_t columns) {
#pragma omp for schedule(static)
  for (int64_t c = 0; c < columns; c += 8) {
    const Place place = place_of(panels, depth, columns, c);
    const int64_t count = least(8, tokens - c);
    alignas(32) float scale[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (int64_t t = 0; t < count; ++t)
      scale[t] = norm ? inverse_rms(rows + (c + t) * depth, depth, epsilon) : 1.0f;
    const __m256 scales = _mm256_load_ps(scale);
    int64_t k = 0;
    for (; k + 8 <= depth; k += 8) {
      __m256 v[8];
      UNROLL for (int t = 0; t < 8; ++t)
        v[t] = t < count ? _mm256_loadu_ps(rows + (c + t) * depth + k) : _mm256_setzero_ps();
      transpose8(v);
      UNROLL for (int i = 0; i < 8; ++i) {
        if (norm) v[i] = _mm256_mul_ps(_mm256_mul_ps(v[i], scales), _mm256_broadcast_ss(norm + k + i));
        _mm256_storeu_ps(place.start + (k + i) * place.stride, v[i]);
      }
    }
    for (; k < depth; ++k)
      for (int64_t t = 0; t < 8; ++t)
        place.start[k * place.stride + t] =
            t < count ? rows[(c + t) * depth + k] * scale[t] * (norm ? norm[k] : 1.0f) : 0.0f;
  }
}

// A task's results [rows][columns] into rows of y, whose row is `ldy` long.
void scatter(const float *buffer, int64_t rows, int64_t columns, int64_t tokens, const float *bias,
             bool accumulate, float *y, int64_t ldy) {
  for (int64_t c = 0; c < tokens; c += 8) {
    const int64_t count = least(8, tokens - c);
    int64_t r = 0;
    for (; r + 8 <= rows; r += 8) {
      __m256 v[8];
      UNROLL for (int i = 0; i < 8; ++i) v[i] = _mm256_loadu_ps(buffer + (r + i) * columns + c);
      transpose8(v);
      const __m256 b = bias ? _mm256_loadu_ps(bias + r) : _mm256_setzero_ps();
      UNROLL for (int t = 0; t < 8; ++t) {
        if (t >= count) break;
        float *to = y + (c + t) * ldy + r;
        const __m256 sum = _mm256_add_ps(v[t], b);
        _mm256_storeu_ps(to, accumulate ? _mm256_add_ps(_mm256_loadu_ps(to), sum) : sum);
      }
    }
    for (; r < rows; ++r)
      for (int64_t t = 0; t < count; ++t) {
        const float sum = buffer[r * columns + c + t] + (bias ? bias[r] : 0.0f);
        float *to = y + (c + t) * ldy + r;
        *to = accumulate ? *to + sum : sum;
      }
  }
}

// y[tokens, features] = panels' tokens @ weight.T; all threads of a team call it.
void project(const float *w, int64_t features, int64_t depth, const float *panels, int64_t columns,
             int64_t tokens, const float *bias, bool accumulate, float *y, int64_t threads) {
  const int64_t unit = features >= 4 * kTaskRows * threads ? kTaskRows : kTaskRows / 2;
#pragma omp for schedule(static)
  for (int64_t r = 0; r < features; r += unit) {
    alignas(64) float buffer[kTaskRows * kBlock];
    const int64_t rows = least(unit, features - r);
    multiply(w + r * depth, rows, depth, panels, columns, buffer);
    scatter(buffer, rows, columns, tokens, bias ? bias + r : nullptr, accumulate, y + r, features);
  }
}

}  // namespace
