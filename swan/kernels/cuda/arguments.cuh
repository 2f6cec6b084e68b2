// The struct that both kernels of attend.cu take.
#pragma once

#include "layout.cuh"
#include "numbers.cuh"

// Tokens of a page, a multiple of a tile, where sequences share pages; 0: the tokens of a sequence lie in one piece.
#ifndef PAGE
#define PAGE 0
#endif

// Tensors [batch, heads, tokens, bytes]. Tokens of a plane follow each other and fill a multiple of 64; its strides, in
// bytes, are multiples of 16. Where there are pages, these are its first axis, and what they are apart is below 2^31.
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

// Where the tokens of sequences are, if PAGE is not 0.
struct Pages {
  const int64_t* table;             // pages of each sequence [batch, pages]; those behind all that is seen are not read
  int64_t table_batch, end_batch;  // strides, of `end` too
  int begin;                       // the first packed token that queries see
};

struct AttendArguments {
  const Number* q;                   // [batch, heads, queries, D]
  int64_t q_batch, q_head, q_query;  // strides in numbers, even
  const Number *k_mix, *v_mix;       // [D, D] and [DV, DV], or null
  Planes k, v;
  Dense recent_k, recent_v;
  Mask mask, recent_mask;
  // Columns: of the first packed token that a sequence sees, [batch], and before which queries see packed tokens,
  // [queries], or [batch, queries] where there are pages. Each may be null.
  const int64_t *first, *end;
  int64_t end_query, origin;  // stride of `end` between queries (0: one for all); the column of packed token 0
  // What programs find, [batch * kv_heads, parts, rows, DV] and [batch * kv_heads, parts, rows]. A part is a split, or
  // the recent tokens; values are in mixed coordinates but in that one. Logarithms are in base 2.
  float *partial, *lse;
  Number* out;     // [batch, heads, queries, DV], contiguous
  float* out_lse;  // [batch, heads, queries], natural logarithm
  // [eighths of rows, batch * kv_heads]: programs of these rows that have written their part, the last of which merges
  // all; zeros before and after a launch. If it is null, `merge` is launched after `attend`.
  uint32_t* arrived;
  int tokens, recent, splits;
  int kv_heads, groups, queries;  // groups: query heads of a KV head
  float scale;
  Pages pages;

  __device__ int parts() const { return splits + (recent > 0); }
  __device__ int rows() const { return groups * queries; }  // of a KV head
};
