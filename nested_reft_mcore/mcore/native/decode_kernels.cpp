// Decoding on x86 CPUs with AVX2 and FMA, in float32: one call for each half of a layer.
//
// Outside, activations are rows, [tokens, features]. A product weight @ activations reads weights
// once, where they lie, and wants activations as columns: at most 64 tokens at a time are turned
// into panels, [features][8, 16 or 24 tokens], and results back into rows. Every number is summed
// in an order that only its position in its own sequence decides, so what a token gets does not
// depend on who shares its pass.
//
// Plain C interface, called by ctypes: native/__init__.py has the same structures.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

struct Layer {
  const float *attention_norm, *qkv, *qkv_bias, *query_norm, *key_norm, *projection;
  const float *mlp_norm, *gate_and_up, *down;
};

struct Pass {
  int64_t hidden_size, groups, heads_per_group, head_dim, ffn_size, threads;
  int64_t num_tokens, num_runs;    // whose keys and values are written
  int64_t num_queries, num_query_runs;  // the first of them, which go on
  int64_t num_copies, length;      // length: positions of a slot
  int64_t accumulate;              // add to output, instead of overwriting it
  const int64_t *runs;             // [num_runs, 4]: first token, tokens, slot, first position
  const int64_t *copies;           // [num_copies, 3]: source slot, target slot, positions
  const float *cosine, *sine;      // [positions, head_dim / 2]
  float *hidden, *output;          // [num_tokens, hidden_size]
  float *qkv, *context;            // room: [num_tokens, qkv features], [num_tokens, heads * head_dim]
  float *columns, *activations;    // room: 64 tokens of the widest input; of ffn_size features
  double epsilon;
};

#if defined(__x86_64__)

extern "C" int decode_kernels_supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

// Not -mavx2 for the whole file: what is built on one machine must load on any other.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include <immintrin.h>

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

// ---- matrix products ----

// y[R][8 C] = weight rows @ panel; sums of kChain products in order of k, added in that order.
template <int R, int C>
inline void tile(const float *w, int64_t ldw, const float *x, float *y, int64_t ldy, int64_t depth) {
  for (int64_t start = 0; start < depth; start += kChain) {
    const int64_t end = least(start + kChain, depth);
    __m256 sum[R][C];
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int c = 0; c < C; ++c) sum[r][c] = _mm256_setzero_ps();
    for (int64_t k = start; k < end; ++k) {
      __m256 b[C];
      UNROLL for (int c = 0; c < C; ++c) b[c] = _mm256_loadu_ps(x + k * 8 * C + 8 * c);
      UNROLL for (int r = 0; r < R; ++r) {
        const __m256 a = _mm256_broadcast_ss(w + r * ldw + k);
        UNROLL for (int c = 0; c < C; ++c) sum[r][c] = _mm256_fmadd_ps(a, b[c], sum[r][c]);
      }
    }
    UNROLL for (int r = 0; r < R; ++r) UNROLL for (int c = 0; c < C; ++c) {
      float *to = y + r * ldy + 8 * c;
      _mm256_storeu_ps(to, start ? _mm256_add_ps(_mm256_loadu_ps(to), sum[r][c]) : sum[r][c]);
    }
  }
}

template <int C>
void multiply_panel(const float *w, int64_t rows, int64_t depth, const float *x, float *y, int64_t ldy) {
  constexpr int R = 12 / C;  // twelve sums: enough to hide latency, few enough for registers
  int64_t r = 0;
  for (; r + R <= rows; r += R) tile<R, C>(w + r * depth, depth, x, y + r * ldy, ldy, depth);
  for (; r + 4 <= rows; r += 4) tile<4, C>(w + r * depth, depth, x, y + r * ldy, ldy, depth);
  for (; r < rows; ++r) tile<1, C>(w + r * depth, depth, x, y + r * ldy, ldy, depth);
}

inline int64_t panel_width(int64_t left) { return left == 24 ? 24 : left >= 16 ? 16 : 8; }

// y[rows][columns] = weight rows @ the block's panels.
void multiply(const float *w, int64_t rows, int64_t depth, const float *x, int64_t columns, float *y) {
  for (int64_t c = 0; c < columns;) {
    const int64_t width = panel_width(columns - c);
    const float *panel = x + c * depth;
    if (width == 24) multiply_panel<3>(w, rows, depth, panel, y + c, columns);
    else if (width == 16) multiply_panel<2>(w, rows, depth, panel, y + c, columns);
    else multiply_panel<1>(w, rows, depth, panel, y + c, columns);
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

// ---- elementwise ----

// e to the x, within two units in the last place; NaN stays NaN.
inline __m256 exponential(__m256 x) {
  // The second operand is the result where one is NaN.
  x = _mm256_max_ps(_mm256_set1_ps(-87.3f), _mm256_min_ps(_mm256_set1_ps(88.3f), x));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
  p = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0f));
  const __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(power, 23)));
}

inline __m256 silu(__m256 x) {
  const __m256 one = _mm256_set1_ps(1.0f);
  const __m256 e = exponential(_mm256_sub_ps(_mm256_setzero_ps(), x));
  return _mm256_div_ps(x, _mm256_add_ps(one, e));
}

// Norm, where there is one, and rotary embedding of one head, in place.
void prepare_head(float *head, int64_t size, const float *norm, double epsilon, const float *cosine,
                  const float *sine) {
  if (norm) {
    const float scale = inverse_rms(head, size, epsilon);
    for (int64_t d = 0; d < size; ++d) head[d] = head[d] * scale * norm[d];
  }
  const int64_t half = size / 2;
  for (int64_t d = 0; d < half; ++d) {
    const float a = head[d], b = head[d + half];
    head[d] = a * cosine[d] - b * sine[d];
    head[d + half] = b * cosine[d] + a * sine[d];
  }
}

// ---- attention ----

inline __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// Products of a query with `count` (1 to 8) keys; more than `count` numbers may be written.
inline void score8(const float *query, const float *keys, int64_t size, int64_t count, float scale,
                   float *scores) {
  const float *k[8];
  UNROLL for (int i = 0; i < 8; ++i) k[i] = keys + (i < count ? i : count - 1) * size;
  __m256 sum[8];
  UNROLL for (int i = 0; i < 8; ++i) sum[i] = _mm256_setzero_ps();
  int64_t d = 0;
  for (; d + 8 <= size; d += 8) {
    const __m256 q = _mm256_loadu_ps(query + d);
    UNROLL for (int i = 0; i < 8; ++i) sum[i] = _mm256_fmadd_ps(q, _mm256_loadu_ps(k[i] + d), sum[i]);
  }
  if (d < size) {
    const __m256i mask = first_lanes(size - d);
    const __m256 q = _mm256_maskload_ps(query + d, mask);
    UNROLL for (int i = 0; i < 8; ++i) sum[i] = _mm256_fmadd_ps(q, _mm256_maskload_ps(k[i] + d, mask), sum[i]);
  }
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(sum[0], sum[1]), _mm256_hadd_ps(sum[2], sum[3]));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(sum[4], sum[5]), _mm256_hadd_ps(sum[6], sum[7]));
  const __m256 all = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  _mm256_storeu_ps(scores, _mm256_mul_ps(all, _mm256_set1_ps(scale)));
}

// Scores to weights, not yet divided by their sum, which is returned. There is room to a multiple
// of 8.
inline float soften(float *scores, int64_t count) {
  for (int64_t i = count; i < round_up(count, 8); ++i) scores[i] = -INFINITY;
  __m256 most = _mm256_set1_ps(-INFINITY);
  for (int64_t i = 0; i < count; i += 8) most = _mm256_max_ps(most, _mm256_loadu_ps(scores + i));
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, most);
  float top = lanes[0];
  for (int i = 1; i < 8; ++i) top = lanes[i] > top ? lanes[i] : top;
  __m256 sum = _mm256_setzero_ps();
  for (int64_t i = 0; i < count; i += 8) {
    const __m256 weight = exponential(_mm256_sub_ps(_mm256_loadu_ps(scores + i), _mm256_set1_ps(top)));
    _mm256_storeu_ps(scores + i, weight);
    sum = _mm256_add_ps(sum, weight);
  }
  return sum8(sum);
}

// out[8 V] += weights[count] @ values[count, size].
template <int V>
void weigh(const float *weights, const float *values, int64_t size, int64_t count, float *out) {
  __m256 sum[V];
  UNROLL for (int v = 0; v < V; ++v) sum[v] = _mm256_loadu_ps(out + 8 * v);
  for (int64_t t = 0; t < count; ++t) {
    const __m256 w = _mm256_broadcast_ss(weights + t);
    UNROLL for (int v = 0; v < V; ++v)
      sum[v] = _mm256_fmadd_ps(w, _mm256_loadu_ps(values + t * size + 8 * v), sum[v]);
  }
  UNROLL for (int v = 0; v < V; ++v) _mm256_storeu_ps(out + 8 * v, sum[v]);
}

void weigh_all(const float *weights, const float *values, int64_t size, int64_t count, float *out) {
  int64_t d = 0;
  for (; d + 64 <= size; d += 64) weigh<8>(weights, values + d, size, count, out + d);
  for (; d + 32 <= size; d += 32) weigh<4>(weights, values + d, size, count, out + d);
  for (; d + 8 <= size; d += 8) weigh<1>(weights, values + d, size, count, out + d);
  for (; d < size; ++d)
    for (int64_t t = 0; t < count; ++t) out[d] = std::fma(weights[t], values[t * size + d], out[d]);
}

// One run's queries of one group; each reads the places up to its own and nothing else.
void attend(const Pass &p, const int64_t *run, int64_t group, const float *keys, const float *values) {
  const int64_t size = p.head_dim, heads = p.heads_per_group, count = run[1] * heads;
  const int64_t row_size = p.groups * (heads + 2) * size, start = run[3], span = start + run[1];
  const int64_t room = round_up(span, 8) + 8;
  static thread_local std::vector<float> scores, sums;
  if (int64_t(scores.size()) < count * room) scores.resize(count * room);
  if (int64_t(sums.size()) < count) sums.resize(count);
  const int64_t offset = (run[2] * p.groups + group) * p.length * size;
  const float scale = 1.0f / std::sqrt(float(size));
  keys += offset;
  values += offset;
  const auto query = [&](int64_t q) {
    return p.qkv + (run[0] + q / heads) * row_size + (group * (heads + 2) + q % heads) * size;
  };
  const auto out = [&](int64_t q) {
    return p.context + ((run[0] + q / heads) * p.groups * heads + group * heads + q % heads) * size;
  };
  for (int64_t c = 0; c < span; c += kKeyChunk)
    for (int64_t q = 0; q < count; ++q) {
      const int64_t end = least(c + kKeyChunk, start + q / heads + 1);
      for (int64_t t = c; t < end; t += 8)
        score8(query(q), keys + t * size, size, least(8, end - t), scale, &scores[q * room + t]);
    }
  for (int64_t q = 0; q < count; ++q) {
    sums[q] = soften(&scores[q * room], start + q / heads + 1);
    std::memset(out(q), 0, size * sizeof(float));
  }
  for (int64_t c = 0; c < span; c += kKeyChunk)
    for (int64_t q = 0; q < count; ++q) {
      const int64_t end = least(c + kKeyChunk, start + q / heads + 1);
      if (end > c) weigh_all(&scores[q * room + c], values + c * size, size, end - c, out(q));
    }
  for (int64_t q = 0; q < count; ++q)
    for (int64_t d = 0; d < size; ++d) out(q)[d] /= sums[q];
}

// Rotates a run's queries and keys; puts its keys and values into the cache.
void store_run(const Layer &layer, const Pass &p, const int64_t *run, float *keys, float *values) {
  const int64_t size = p.head_dim, heads = p.heads_per_group;
  for (int64_t j = 0; j < run[1]; ++j) {
    const int64_t position = run[3] + j;
    const float *cosine = p.cosine + position * (size / 2), *sine = p.sine + position * (size / 2);
    for (int64_t group = 0; group < p.groups; ++group) {
      float *head = p.qkv + ((run[0] + j) * p.groups + group) * (heads + 2) * size;
      for (int64_t h = 0; h < heads; ++h, head += size)
        prepare_head(head, size, layer.query_norm, p.epsilon, cosine, sine);
      prepare_head(head, size, layer.key_norm, p.epsilon, cosine, sine);
      const int64_t to = ((run[2] * p.groups + group) * p.length + position) * size;
      std::memcpy(keys + to, head, size * sizeof(float));
      std::memcpy(values + to, head + size, size * sizeof(float));
    }
  }
}

}  // namespace

// The attention half of a layer: output (+)= projection of the attention of the normed hidden.
extern "C" void decode_attention(const Layer *layer_pointer, const Pass *pass_pointer, float *keys,
                                 float *values) {
  const Layer &layer = *layer_pointer;
  const Pass &p = *pass_pointer;
  const int64_t width = p.groups * p.heads_per_group * p.head_dim;
  const int64_t qkv_width = width + 2 * p.groups * p.head_dim;
  const Blocks all(p.num_tokens), asking(p.num_queries);
#pragma omp parallel num_threads(int(p.threads))
  {
    for (int64_t t = 0; t < p.num_tokens; t += all.size) {
      const int64_t tokens = least(all.size, p.num_tokens - t), columns = round_up(tokens, 8);
      gather(p.hidden + t * p.hidden_size, tokens, p.hidden_size, layer.attention_norm, p.epsilon,
             p.columns, columns);
      project(layer.qkv, qkv_width, p.hidden_size, p.columns, columns, tokens, layer.qkv_bias, false,
              p.qkv + t * qkv_width, p.threads);
    }
#pragma omp for schedule(static)
    for (int64_t r = 0; r < p.num_runs; ++r) store_run(layer, p, p.runs + 4 * r, keys, values);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.num_copies * p.groups; ++i) {
      const int64_t *copy = p.copies + 3 * (i / p.groups), group = i % p.groups;
      const int64_t stride = p.length * p.head_dim, bytes = copy[2] * p.head_dim * sizeof(float);
      const int64_t from = (copy[0] * p.groups + group) * stride;
      const int64_t to = (copy[1] * p.groups + group) * stride;
      std::memcpy(keys + to, keys + from, bytes);
      std::memcpy(values + to, values + from, bytes);
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < p.num_query_runs * p.groups; ++i)
      attend(p, p.runs + 4 * (i / p.groups), i % p.groups, keys, values);
    for (int64_t t = 0; t < p.num_queries; t += asking.size) {
      const int64_t tokens = least(asking.size, p.num_queries - t), columns = round_up(tokens, 8);
      gather(p.context + t * width, tokens, width, nullptr, 0.0, p.columns, columns);
      project(layer.projection, p.hidden_size, width, p.columns, columns, tokens, nullptr,
              p.accumulate != 0, p.output + t * p.hidden_size, p.threads);
    }
  }
}

// The MLP half of a layer: output (+)= down(silu(gate) * up) of the normed hidden.
extern "C" void decode_mlp(const Layer *layer_pointer, const Pass *pass_pointer) {
  const Layer &layer = *layer_pointer;
  const Pass &p = *pass_pointer;
  const Blocks asking(p.num_queries);
  constexpr int64_t unit = kTaskRows / 2;
#pragma omp parallel num_threads(int(p.threads))
  for (int64_t t = 0; t < p.num_queries; t += asking.size) {
    const int64_t tokens = least(asking.size, p.num_queries - t), columns = round_up(tokens, 8);
    gather(p.hidden + t * p.hidden_size, tokens, p.hidden_size, layer.mlp_norm, p.epsilon, p.columns,
           columns);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < p.ffn_size; r += unit) {
      alignas(64) float gate[unit * kBlock], up[unit * kBlock];
      const int64_t rows = least(unit, p.ffn_size - r);
      const float *w = layer.gate_and_up + r * p.hidden_size;
      multiply(w, rows, p.hidden_size, p.columns, columns, gate);
      multiply(w + p.ffn_size * p.hidden_size, rows, p.hidden_size, p.columns, columns, up);
      for (int64_t c = 0; c < columns; c += 8) {
        const Place place = place_of(p.activations, p.ffn_size, columns, c);
        for (int64_t i = 0; i < rows; ++i)
          _mm256_storeu_ps(place.start + (r + i) * place.stride,
                           _mm256_mul_ps(silu(_mm256_loadu_ps(gate + i * columns + c)),
                                         _mm256_loadu_ps(up + i * columns + c)));
      }
    }
    project(layer.down, p.hidden_size, p.ffn_size, p.activations, columns, tokens, nullptr,
            p.accumulate != 0, p.output + t * p.hidden_size, p.threads);
  }
}

// output[tokens, features] = rms_norm(hidden) @ weight.T, without the norm where that is null.
extern "C" void decode_linear(const float *hidden, const float *norm, const float *weight,
                              float *output, float *panels, int64_t tokens, int64_t depth,
                              int64_t features, double epsilon, int64_t threads) {
  const Blocks blocks(tokens);
#pragma omp parallel num_threads(int(threads))
  for (int64_t t = 0; t < tokens; t += blocks.size) {
    const int64_t count = least(blocks.size, tokens - t), columns = round_up(count, 8);
    gather(hidden + t * depth, count, depth, norm, epsilon, panels, columns);
    project(weight, features, depth, panels, columns, count, nullptr, false, output + t * features,
            threads);
  }
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else  // not x86

extern "C" int decode_kernels_supported() { return 0; }
extern "C" void decode_attention(const Layer *, const Pass *, float *, float *) {}
extern "C" void decode_mlp(const Layer *, const Pass *) {}
extern "C" void decode_linear(const float *, const float *, const float *, float *, float *, int64_t,
                              int64_t, int64_t, double, int64_t) {}

#endif
