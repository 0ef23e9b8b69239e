// Decoding on x86 CPUs with AVX2 and FMA, in float32: one call for each half of a layer.
//
// Outside, activations are rows, [tokens, features]. A product weight @ activations reads weights
// once, where they lie, and wants activations as columns: at most 64 tokens at a time are turned
// into panels, [features][8, 16 or 24 tokens], and results back into rows. Every number is summed
// in an order that only its position in its own sequence decides, so what a token gets does not
// depend on who shares its pass.
//
// Plain C interface, called by ctypes.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "records.h"

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

#include "attention.h"
#include "products.h"

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

// Whether a pass stays inside a cache of so many slots; written elsewhere, numbers would be lost.
extern "C" int decode_fits(const Pass *pass_pointer, int64_t num_slots) {
  const Pass &p = *pass_pointer;
  const auto is_slot = [&](int64_t slot) { return slot >= 0 && slot < num_slots; };
  for (int64_t r = 0; r < p.num_runs; ++r) {
    const int64_t *run = p.runs + 4 * r;
    if (!is_slot(run[2]) || run[3] < 0 || run[3] + run[1] > p.length) return 0;
  }
  for (int64_t i = 0; i < p.num_copies; ++i) {
    const int64_t *copy = p.copies + 3 * i;
    if (!is_slot(copy[0]) || !is_slot(copy[1]) || copy[2] > p.length) return 0;
  }
  return 1;
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else  // not x86

extern "C" int decode_kernels_supported() { return 0; }
extern "C" int decode_fits(const Pass *, int64_t) { return 0; }
extern "C" void decode_attention(const Layer *, const Pass *, float *, float *) {}
extern "C" void decode_mlp(const Layer *, const Pass *) {}
extern "C" void decode_linear(const float *, const float *, const float *, float *, float *, int64_t,
                              int64_t, int64_t, double, int64_t) {}

#endif
