// What the kernels are handed; native/__init__.py has the same structures.
#pragma once

#include <cstdint>

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
