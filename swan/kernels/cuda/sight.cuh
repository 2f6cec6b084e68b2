// Which tokens query rows see.
#pragma once

#include "program.cuh"

struct Sight {
  const Mask& mask;
  int first, end;  // no row sees others
  bool ends;       // queries may have ends of their own
  int all_until;   // all rows see the tokens from the first to before it
};

// The packed token of a column; 0 or `stop` if it is before or behind those.
__device__ __forceinline__ int token_of(const AttendArguments& a, int64_t column, int stop) {
  return static_cast<int>(min(max(column - a.origin, int64_t(0)), int64_t(stop)));
}

// The packed token before which those end that a query sees.
__device__ __forceinline__ int end_of(const AttendArguments& a, const Place& at, int query, int stop) {
  const int64_t* end = PAGE ? a.end + at.batch * a.pages.end_batch : a.end;
  return token_of(a, end[query * a.end_query], stop);
}

// What rows see of the packed tokens. Those behind the last that some row sees are not read.
__device__ __forceinline__ Sight sight_of_history(const AttendArguments& a, const Place& at) {
  const int first = a.first ? token_of(a, a.first[at.batch], a.tokens) : PAGE ? a.pages.begin : 0;
  int least = a.tokens, most = a.end ? 0 : a.tokens;
  for (int i = 0; a.end && i < at.rows; ++i) {
    const int end = end_of(a, at, (at.first_row + i) % a.queries, a.tokens);
    least = min(least, end), most = max(most, end);
  }
  return {a.mask, first, most, a.end != nullptr, a.mask.data ? 0 : least};
}

// Which of a lane's scores of column 2t + c are of tokens that the row sees: bit i is token_of_row(g) + 8 i.
__device__ __forceinline__ uint32_t seen_by(const Sight& sight, const AttendArguments& a, const Place& at, int token,
                                            int column, int count) {
  if (column >= at.rows) return ~0u;
  const int row = at.first_row + column, query = row % a.queries, head = at.kv_head * a.groups + row / a.queries;
  const int end = sight.ends ? end_of(a, at, query, sight.end) : sight.end;
  const Mask& m = sight.mask;
  const uint8_t* mask = m.data + at.batch * m.batch + head * m.head + query * m.query;
  uint32_t seen = 0;
#pragma unroll 1  // small, as it is rare
  for (int i = 0; i < count; ++i, token += 8) {
    const bool sees = token >= sight.first && token < end && (!m.data || mask[token * m.token]);
    seen |= static_cast<uint32_t>(sees) << i;
  }
  return seen;
}

template <int N>
__device__ __forceinline__ void hide(float (&scores)[N][4], const Sight& sight, const AttendArguments& a,
                                     int token, int g, int t) {
  const Place at = place_of_program(a);
#pragma unroll 1
  for (int c = 0; c < 2; ++c) {
    const uint32_t seen = seen_by(sight, a, at, token + token_of_row(g), 2 * t + c, 2 * N);
#pragma unroll
    for (int i = 0; i < 2 * N; ++i)
#pragma unroll
      for (int k = 0; k < 2; ++k)
        if (k == c && !(seen >> i & 1)) scores[i / 2][i % 2 * 2 + k] = NOTHING;
  }
}
