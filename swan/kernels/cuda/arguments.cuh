// The structs that the kernels of attend.cu take.
#pragma once

#include "layout.cuh"

using Number = DTYPE;

// Tensors [batch, heads, tokens, bytes]. Tokens of a plane follow each other and fill a multiple of 64; its strides, in
// bytes, are multiples of 16.
struct Plane {
  const uint8_t* data;
  int64_t batch, head;
};
struct Planes {
  Plane codes, scales, whole;  // bytes of codes, a byte for each group's scale, groups of 16 bits
};

// Recent keys or values, finite also where no row sees them; strides in bytes, multiples of 16, of a token below 2^31.
struct Dense {
  const uint8_t* data;
  int64_t batch, head, token;
};

// Booleans [batch, heads, queries, tokens], or null; a stride is 0 where all have the same.
struct Mask {
  const uint8_t* data;
  int64_t batch, head, query, token;
};

struct AttendArguments {
  const Number* q;  // [batch, heads, queries, D]; strides in numbers, even
  int64_t q_batch, q_head, q_query;
  const Number* k_mix;  // [D, D], or null
  Planes k, v;
  Dense recent_k, recent_v;
  Mask mask, recent_mask;
  const int64_t* first;  // [batch]: the first packed token that a sequence sees; or null
  const int64_t* end;    // [queries]: packed tokens before it are seen; or null
  float* partial;        // [batch * kv_heads, parts, rows, DV], values in mixed coordinates but in the recent part
  float* lse;            // [batch * kv_heads, parts, rows], in base 2
  int tokens, recent, splits, span;  // span: tokens of a split, a multiple of 32
  int kv_heads, groups, queries;     // groups: query heads of a KV head
  float scale;
};

struct MergeArguments {
  const float *partial, *lse;  // as attend leaves them
  const Number* v_mix;         // [DV, DV], or null
  void* out;                   // [batch, heads, queries, DV], float32 or the dtype
  float* out_lse;              // [batch, heads, queries], natural
  int splits, parts, rows;     // parts: splits, and one more if there are recent tokens
};
