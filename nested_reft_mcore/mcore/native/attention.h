// Rotary embedding, attention over cached keys and values, and what is done number by number.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "products.h"
#include "records.h"

namespace {

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