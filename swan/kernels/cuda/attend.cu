// Attention of few query rows over a packed history, and over recent tokens that are dense, in one pass over the bytes.
//
// `attend`: a program (block) has a span of the history, or the recent tokens, of one KV head, for up to 8 query rows
// of it. Each warp streams tiles of 32 tokens of its own (cp.async) with its own running softmax; warps merge at the
// end. The parts of programs are merged by the last program that writes one, or by a second kernel, `merge`.
// The reference of the softmax moves only when a score exceeds it by more than 8 (in base 2), which is rare.
//
// Macros: K_GROUPS, V_GROUPS, D, DV (layout.cuh); DTYPE, bfloat16 or float16, of queries, recent tokens and groups of
// 16 bits, and of outputs; WARPS and STAGES of a program, and PROGRAMS on a processor.

#include "merge.cuh"
#include "products.cuh"

#ifndef WARPS
#define WARPS 4
#endif
#ifndef STAGES
#define STAGES 3
#endif
#ifndef PROGRAMS
#define PROGRAMS (D + DV > 256 ? 2 : 4)  // what registers allow
#endif

constexpr int TILE = 32;   // tokens
constexpr int RECENT_TILE = 16;  // these go to registers at once
constexpr int EARLY = 8;   // by how much a score exceeds the reference of the softmax before that moves
constexpr float LOG2_E = 1.44269504f;
constexpr int Q_ROW = D + 4;  // floats of a query row in shared memory: rows are in different banks

// Planes of a tile in shared memory, one after the other. Stages of all warps are together: the last ones, which are
// filled last, hold the queries before.
constexpr int K_CODES = 0, V_CODES = K_CODES + TILE * Keys::layout.row, K_NUMBERS = V_CODES + TILE * Values::layout.row;
constexpr int V_NUMBERS = K_NUMBERS + TILE * Keys::layout.whole_row;
constexpr int K_SCALES = V_NUMBERS + TILE * Values::layout.whole_row;
constexpr int V_SCALES = K_SCALES + TILE * Keys::layout.scales;
constexpr int STAGE = V_SCALES + TILE * Values::layout.scales;
constexpr int SCALES = TILE * (Keys::layout.scales + Values::layout.scales);  // decoded ones of a warp, floats

// The tokens that query rows see.
struct Sight {
  const Mask& mask;
  int first, end;  // no row sees others
  bool ends;       // queries may have ends of their own
  int all_until;   // if there is no mask, all rows see the tokens from the first to before it
};

struct Place {
  int batch, kv_head, first_row, rows;  // rows: of the program
  int64_t head;                         // batch * kv_heads + kv_head
};

// A tile of a plane in shared memory, and the last token that is there; scales are decoded.
template <class L>
struct PackedTile {
  const uint8_t *codes, *numbers;
  const float* scales;
  int last;

  // Row i + j: what the lane adds first, then what the compiler knows, which is part of the loads' instructions.
  __device__ __forceinline__ const uint8_t* code_row(uint32_t i, int j) const {
    return codes + i * L::layout.row + j * L::layout.row;
  }
  // Behind the last token there may be numbers that are not finite, where codes are always finite.
  __device__ __forceinline__ const uint8_t* number_row(int i) const {
    return numbers + min(i, last) * L::layout.whole_row;
  }
  __device__ __forceinline__ float scale(uint32_t i, int j, int n) const {
    return (scales + i * L::layout.scales)[j * L::layout.scales + n];
  }
};

// A tile of recent tokens, in global memory.
struct DenseTile {
  const uint8_t* data;
  int stride, last;

  __device__ __forceinline__ const uint8_t* code_row(uint32_t, int) const { return nullptr; }
  __device__ __forceinline__ const uint8_t* number_row(int i) const { return data + int64_t(min(i, last)) * stride; }
  __device__ __forceinline__ float scale(uint32_t, int, int) const { return 1; }
};

// Rows of a product of 16 tokens: row r is token r / 2 + 4 (r % 2) of each 8. Then a lane's four tokens as the inner
// axis of the product with values, pairs of rows, are t, t + 4, t + 8, t + 12: lanes read rows that follow each other.
__device__ __forceinline__ int token_of_row(int g) { return (g >> 1) + 4 * (g & 1); }

// Queries ------------------------------------------------------------------------------------------------------------

// Queries as operands, for keys of a layout. A row is divided by a power of two, so that its largest number is 1 to 2.
template <class L>
struct Queries {
  uint32_t pairs[L::layout.stored / 8];
  const float* shared;  // [1 + scales, ROWS] from column 2t on; registers are scarce

  __device__ __forceinline__ float2 factors() const { return *reinterpret_cast<const float2*>(shared); }  // of scores
  // What sums of a coded group begin with, so that the middle code is 0.
  __device__ __forceinline__ float2 middles(int n) const {
    return *reinterpret_cast<const float2*>(shared + (1 + n) * ROWS);
  }

  // From floats in shared memory; `scale` is that of the scores. One warp writes what all need: `writes`.
  __device__ __forceinline__ void load(const float* floats, float* place, bool writes, float scale, int g,
                                       int t) {
    const float* row = floats + g * Q_ROW;
    shared = place + 2 * t;
    uint32_t peak = 0;  // magnitudes of floats are in the order of their bits, and what is not finite above all
    for (int i = t; i < D; i += 4) peak = max(peak, __float_as_uint(row[i]) & 0x7fffffffu);
    peak = max(peak, __shfl_xor_sync(~0u, peak, 1));
    peak = max(peak, __shfl_xor_sync(~0u, peak, 2));
    const bool finite = peak < 0x7f800000u;
    const uint32_t exponent = min(max(peak >> 23, 1u), 253u);
    const float down = scale == 0 ? 0 : __uint_as_float((254 - exponent) << 23), sign = scale < 0 ? -down : down;
    const float up = fmaxf(fabsf(scale) * LOG2_E * __uint_as_float(exponent << 23), 1e-37f);
    const float factor = finite ? up : __uint_as_float(0x7fc00000);  // then the outputs are no numbers either
    const bool own = writes && t == 0;
    if (own) place[g] = factor;
    unrolled<L::layout.count>([&](auto i) { load_group<i>(row, place + ROWS + g, own, finite ? sign : 0, finite, t); });
  }

 private:
  template <int G>
  __device__ __forceinline__ void load_group(const float* row, float* middle, bool writes, float by, bool finite,
                                             int t) {
    constexpr Span span = L::layout.spans[G];
    const float* x = row + span.start + t * (span.size / 4);
    const auto number = [&](int i) { return finite ? x[i] * by : 0; };
    uint32_t* to = pairs + span.stored / 8;
    if constexpr (!span.coded()) {
#pragma unroll
      for (int i = 0; i < span.size / 8; ++i) to[i] = Number::pack(number(2 * i), number(2 * i + 1));
    } else {
      float sum = 0;  // of the rounded numbers
      pairs_of(span.size, [&](int i, int first, int second, int j) {
        to[i] = pack2_half(number(first), number(second));
        sum += (from_half(to[i]) + from_half(to[i] >> 16)) * middle_half(span, j);
      });
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (writes) middle[span.scale * ROWS] = -sum;
    }
  }
};

__device__ __forceinline__ const uint32_t* query_row(const AttendArguments& a, const Place& at, int i) {
  const int row = at.first_row + i;
  const int64_t head = at.kv_head * a.groups + row / a.queries;
  const Number* x = a.q + at.batch * a.q_batch + head * a.q_head + row % a.queries * a.q_query;
  return reinterpret_cast<const uint32_t*>(x);
}

// Query rows as floats [ROWS, Q_ROW]; zeros where there are none.
__device__ __forceinline__ void copy_queries(const AttendArguments& a, const Place& at, float* to) {
  for (int i = threadIdx.x; i < ROWS * (D / 2); i += WARPS * 32) {
    const int row = i / (D / 2), pair = i % (D / 2);
    const uint32_t x = row < at.rows ? query_row(a, at, row)[pair] : 0;
    to[row * Q_ROW + 2 * pair] = Number::low(x), to[row * Q_ROW + 2 * pair + 1] = Number::high(x);
  }
}

// The same, mixed: (q mix)^T = mix^T q^T, 16 coordinates of a group at a time.
__device__ __forceinline__ void mix_queries(const AttendArguments& a, const Place& at, float* to, int warp, int g,
                                            int t) {
  const uint32_t* row = g < at.rows ? query_row(a, at, g) : nullptr;
  const auto entries = [&](int k, int c) {
    return a.k_mix[k * D + c].bits | static_cast<uint32_t>(a.k_mix[(k + 1) * D + c].bits) << 16;
  };
  unrolled<Keys::layout.count>([&](auto i) {
    constexpr Span span = Keys::layout.spans[i];
    for (int c = span.start + 16 * warp; c < span.start + span.size; c += 16 * WARPS) {
      float sums[4] = {};
      for (int k = span.start; k < span.start + span.size; k += 16) {
        const int low = k + 2 * t, high = low + 8;
        const uint32_t m[4] = {entries(low, c + g), entries(low, c + g + 8), entries(high, c + g),
                               entries(high, c + g + 8)};
        Number::multiply(sums, m, row ? row[low / 2] : 0, row ? row[high / 2] : 0);
      }
      to[2 * t * Q_ROW + c + g] = sums[0], to[(2 * t + 1) * Q_ROW + c + g] = sums[1];
      to[2 * t * Q_ROW + c + g + 8] = sums[2], to[(2 * t + 1) * Q_ROW + c + g + 8] = sums[3];
    }
  });
}

// A tile --------------------------------------------------------------------------------------------------------------

// What a warp has found so far: sums of values in tiles of 16 coordinates; of weights times scales, whose part in the
// values' constants is taken off at the end; the reference of the softmax and the sum of weights of columns 2t, 2t + 1.
template <class L>
struct Running {
  float o[L::layout.stored / 16][4] = {}, w[some(L::layout.scales)][4] = {};
  float reference[2] = {NOTHING, NOTHING}, total[2] = {0, 0};

  __device__ __forceinline__ void move_reference(float top0, float top1) {
#pragma unroll
    for (int x = 4; x < 32; x *= 2) {
      top0 = fmaxf(top0, __shfl_xor_sync(~0u, top0, x));
      top1 = fmaxf(top1, __shfl_xor_sync(~0u, top1, x));
    }
    top0 = fmaxf(top0, reference[0]), top1 = fmaxf(top1, reference[1]);
    const float f0 = top0 == NOTHING ? 1 : exp2_(reference[0] - top0);
    const float f1 = top1 == NOTHING ? 1 : exp2_(reference[1] - top1);
    reference[0] = top0, reference[1] = top1;
    total[0] *= f0, total[1] *= f1;
#pragma unroll
    for (auto& x : o) x[0] *= f0, x[1] *= f1, x[2] *= f0, x[3] *= f1;
#pragma unroll
    for (auto& x : w) x[0] *= f0, x[1] *= f1, x[2] *= f0, x[3] *= f1;
  }
};

// Scores of 16 tokens from row `base` of a tile on, without their factors.
template <class L, class Tile>
__device__ __forceinline__ void score(float (&scores)[4], const Tile& tile, int base, const Queries<L>& q, int g,
                                      int t) {
  const int i = token_of_row(g);
  scores[0] = scores[1] = scores[2] = scores[3] = 0;
  unrolled<L::layout.count>([&](auto n) {
    constexpr int G = n;
    constexpr Span span = L::layout.spans[G];
    const uint32_t* pairs = q.pairs + span.stored / 8;
    if constexpr (span.coded()) {
      const float2 begin = q.middles(span.scale);
      float sums[4] = {begin.x, begin.y, begin.x, begin.y};
      const uint8_t* const rows[2] = {tile.code_row(i, base), tile.code_row(i, base + 8)};
      unrolled<span.parts()>([&](auto part) { add_key_part<L, G, part>(sums, rows, t, pairs); });
      const float s0 = tile.scale(i, base, span.scale), s1 = tile.scale(i, base + 8, span.scale);
      scores[0] += s0 * sums[0], scores[1] += s0 * sums[1], scores[2] += s1 * sums[2], scores[3] += s1 * sums[3];
    } else {
      const uint8_t* const rows[2] = {tile.number_row(base + i), tile.number_row(base + i + 8)};
      add_whole_keys<Number, L, G>(scores, rows, t, pairs);
    }
  });
}

// Adds 16 tokens' values with their weights p.
template <class L, class Tile>
__device__ __forceinline__ void add_values(Running<L>& run, const Tile& tile, int base, const float (&p)[4], int g,
                                           int t) {
  const int i = token_of_row(g), j = base + t;
  unrolled<L::layout.count>([&](auto n) {
    constexpr int G = n;
    constexpr Span span = L::layout.spans[G];
    float(*o)[4] = run.o + span.stored / 16;
    if constexpr (span.coded()) {
      const float s0 = tile.scale(i, base, span.scale), s1 = tile.scale(i, base + 8, span.scale);
      const uint32_t b0 = transpose8(pack2(s0 * p[0], s0 * p[1])), b1 = transpose8(pack2(s1 * p[2], s1 * p[3]));
      const uint32_t ones[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
      mma(run.w[span.scale], ones, b0, b1);
      const uint8_t* const rows[4] = {tile.code_row(t, base), tile.code_row(t, base + 4), tile.code_row(t, base + 8),
                                      tile.code_row(t, base + 12)};
      unrolled<span.parts()>([&](auto part) { add_value_part<L, G, part>(o, rows, g, b0, b1); });
    } else {
      const uint32_t b0 = transpose8(Number::pack(p[0], p[1])), b1 = transpose8(Number::pack(p[2], p[3]));
      const uint8_t* const rows[4] = {tile.number_row(j), tile.number_row(j + 4), tile.number_row(j + 8),
                                      tile.number_row(j + 12)};
      add_whole_values<Number, L, G>(o, rows, g, b0, b1);
    }
  });
}

// The packed token of a column; 0 or `stop` if it is before or behind those.
__device__ __forceinline__ int token_of(const AttendArguments& a, int64_t column, int stop) {
  return static_cast<int>(min(max(column - a.origin, int64_t(0)), int64_t(stop)));
}

// Which of a lane's scores of column 2t + c are of tokens that the row sees: bit i is token_of_row(g) + 8 i.
__device__ __forceinline__ uint32_t seen_by(const Sight& sight, const AttendArguments& a, const Place& at, int token,
                                            int column, int count) {
  if (column >= at.rows) return ~0u;
  const int row = at.first_row + column, query = row % a.queries, head = at.kv_head * a.groups + row / a.queries;
  const int end = sight.ends ? token_of(a, a.end[query * a.end_query], sight.end) : sight.end;
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
                                     const Place& at, int token, int g, int t) {
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

// A tile of 16 N tokens from `token` on.
template <int N, class KL, class VL, class KTile, class VTile>
__device__ __forceinline__ void add_tile(Running<VL>& run, const KTile& keys, const VTile& values, const Queries<KL>& q,
                                         const Sight& sight, const AttendArguments& a, const Place& at, int token,
                                         int g, int t) {
  float scores[N][4];
#pragma unroll
  for (int h = 0; h < N; ++h) score<KL>(scores[h], keys, 16 * h, q, g, t);
  const bool all_see = token >= sight.first && token + 16 * N <= sight.all_until && !sight.mask.data;
  if (!all_see) hide(scores, sight, a, at, token, g, t);
  float top0 = NOTHING, top1 = NOTHING;
#pragma unroll
  for (auto& x : scores) top0 = fmaxf(top0, fmaxf(x[0], x[2])), top1 = fmaxf(top1, fmaxf(x[1], x[3]));
  const float2 factors = q.factors();
  top0 *= factors.x, top1 *= factors.y;
  const bool moves = top0 > run.reference[0] + EARLY || top1 > run.reference[1] + EARLY;
  if (__any_sync(~0u, moves)) run.move_reference(top0, top1);
  const float m0 = run.reference[0] == NOTHING ? 0 : run.reference[0];
  const float m1 = run.reference[1] == NOTHING ? 0 : run.reference[1];
#pragma unroll
  for (int h = 0; h < N; ++h) {
    const float(&x)[4] = scores[h];
    const float p[4] = {exp2_(fmaf(x[0], factors.x, -m0)), exp2_(fmaf(x[1], factors.y, -m1)),
                        exp2_(fmaf(x[2], factors.x, -m0)), exp2_(fmaf(x[3], factors.y, -m1))};
    run.total[0] += p[0] + p[2], run.total[1] += p[1] + p[3];
    add_values<VL>(run, values, 16 * h, p, g, t);
  }
}

// The end of a program ------------------------------------------------------------------------------------------------

template <class L>
__device__ __forceinline__ void take_off_middles(Running<L>& run) {
  unrolled<L::layout.count>([&](auto n) {
    constexpr Span span = L::layout.spans[n];
    if constexpr (span.coded()) {
#pragma unroll
      for (int i = 0; i < span.size / 16; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) run.o[span.stored / 16 + i][j] -= middle_bf16(span) * run.w[span.scale][j];
    }
  });
}

// Merges the warps' sums, in shared memory, and writes the program's output and log-sum-exp.
template <class L>
__device__ __forceinline__ void write_part(Running<L>& run, const AttendArguments& a, const Place& at, int part,
                                           uint8_t* shared, int warp, int g, int t) {
  take_off_middles(run);
#pragma unroll
  for (int x = 4; x < 32; x *= 2) {
    run.total[0] += __shfl_xor_sync(~0u, run.total[0], x);
    run.total[1] += __shfl_xor_sync(~0u, run.total[1], x);
  }
  float* references = reinterpret_cast<float*>(shared);  // [WARPS, ROWS]
  float *totals = references + WARPS * ROWS, *sums = totals + WARPS * ROWS;  // and [WARPS, DV, ROWS]
  __syncthreads();  // nobody reads tiles any more
  if (g == 0) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      references[warp * ROWS + 2 * t + c] = run.reference[c];
      totals[warp * ROWS + 2 * t + c] = run.total[c];
    }
  }
  for (int i = threadIdx.x; L::layout.stored < DV && i < WARPS * DV * ROWS; i += WARPS * 32) sums[i] = 0;
  __syncthreads();
  float top[2], total[2], factor[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int row = 2 * t + c;
    top[c] = NOTHING, total[c] = 0;
    for (int k = 0; k < WARPS; ++k) top[c] = fmaxf(top[c], references[k * ROWS + row]);
    const float m = top[c] == NOTHING ? 0 : top[c];
    for (int k = 0; k < WARPS; ++k) total[c] += totals[k * ROWS + row] * exp2_(references[k * ROWS + row] - m);
    factor[c] = exp2_(run.reference[c] - m) / (total[c] == 0 ? 1 : total[c]);
  }
  unrolled<L::layout.count>([&](auto n) {
    constexpr Span span = L::layout.spans[n];
#pragma unroll
    for (int i = 0; i < span.size / 16; ++i) {
      const float(&o)[4] = run.o[span.stored / 16 + i];
      float* to = sums + (warp * DV + span.start + g * (span.size / 8) + 2 * i) * ROWS + 2 * t;
      to[0] = o[0] * factor[0], to[1] = o[1] * factor[1];
      to[ROWS] = o[2] * factor[0], to[ROWS + 1] = o[3] * factor[1];
    }
  });
  __syncthreads();
  const int64_t to = (at.head * a.parts() + part) * a.rows() + at.first_row;
  for (int i = threadIdx.x; i < at.rows * DV; i += WARPS * 32) {
    float x = 0;
    for (int k = 0; k < WARPS; ++k) x += sums[(k * DV + i % DV) * ROWS + i / DV];
    a.partial[to * DV + i] = x;
  }
  if (warp == 0 && g == 0) {
#pragma unroll
    for (int c = 0; c < 2; ++c)
      if (2 * t + c < at.rows) a.lse[to + 2 * t + c] = top[c] + log2f(total[c]);
  }
}

// Programs ------------------------------------------------------------------------------------------------------------

// Copies tiles of a plane to shared memory, one after the other; those of other warps are between them.
template <int BYTES>  // of a token
struct Stream {
  const uint8_t* from;

  __device__ __forceinline__ Stream(const Plane& plane, const Place& at, int64_t token, int lane)
      : from(plane.data + at.batch * plane.batch + at.kv_head * plane.head + token * BYTES + lane * 16) {}
  __device__ __forceinline__ void copy_next(Address to, int lane) {
    constexpr int COUNT = TILE * BYTES;
#pragma unroll
    for (int i = 0; i < COUNT; i += 512)
      if (i + 512 <= COUNT || lane * 16 < COUNT - i) copy16(to + i, from + i);
    from += WARPS * COUNT;
  }
};

// Decodes a tile's scale bytes, a token in each lane. Keys and values count steps of 2^(1 - bits).
template <class L>
__device__ __forceinline__ void decode_scales(const uint8_t* bytes, float* to, int lane) {
  constexpr int N = L::layout.scales;
  unrolled<L::layout.count>([&](auto n) {
    constexpr Span span = L::layout.spans[n];
    if constexpr (span.coded())
      to[lane * N + span.scale] = exp2_(fmaf(bytes[lane * N + span.scale], 0.125f, -15.0f - span.bits));
  });
}

// What rows see of the packed tokens before `stop`. Tokens behind the last that some row sees are not read.
__device__ __forceinline__ Sight sight_of_history(const AttendArguments& a, const Place& at, int stop) {
  const int first = a.first ? token_of(a, a.first[at.batch], stop) : 0;
  int least = stop, most = a.end ? 0 : stop;
  for (int i = 0; a.end && i < at.rows; ++i) {
    const int end = token_of(a, a.end[(at.first_row + i) % a.queries * a.end_query], stop);
    least = min(least, end), most = max(most, end);
  }
  return {a.mask, first, most, a.end != nullptr, least};
}

__device__ __forceinline__ void attend_history(const AttendArguments& a, const Place& at, int split, uint8_t* shared) {
  const int lane = lane_id(), warp = __shfl_sync(~0u, threadIdx.x / 32, 0), g = lane / 4, t = lane % 4;
  const Sight sight = sight_of_history(a, at, min((split + 1) * a.span, a.tokens));
  const int stop = sight.end;
  const int start = max(split * a.span, sight.first / TILE * TILE) + warp * TILE;  // of the warp

  Stream<Keys::layout.row> k_codes(a.k.codes, at, start, lane);
  Stream<Values::layout.row> v_codes(a.v.codes, at, start, lane);
  Stream<Keys::layout.whole_row> k_numbers(a.k.whole, at, start, lane);
  Stream<Values::layout.whole_row> v_numbers(a.v.whole, at, start, lane);
  Stream<Keys::layout.scales> k_scales(a.k.scales, at, start, lane);
  Stream<Values::layout.scales> v_scales(a.v.scales, at, start, lane);
  const Address place = shared_address(shared) + warp * STAGE + lane * 16;
  const auto fetch = [&](int stage, int token) {
    if (token < stop) {
      const Address to = place + stage * (WARPS * STAGE);
      k_codes.copy_next(to + K_CODES, lane), v_codes.copy_next(to + V_CODES, lane);
      k_numbers.copy_next(to + K_NUMBERS, lane), v_numbers.copy_next(to + V_NUMBERS, lane);
      k_scales.copy_next(to + K_SCALES, lane), v_scales.copy_next(to + V_SCALES, lane);
    }
    commit_copies();
  };
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) fetch(stage, start + stage * (WARPS * TILE));

  float* rows = reinterpret_cast<float*>(shared + (STAGES - 1) * WARPS * STAGE);
  copy_queries(a, at, rows);
  if (a.k_mix) {
    __syncthreads();
    mix_queries(a, at, rows, warp, g, t);
  }
  __syncthreads();
  Queries<Keys> q;
  uint8_t* factors = shared + STAGES * WARPS * STAGE;
  q.load(rows, reinterpret_cast<float*>(factors) + WARPS * SCALES, warp == 0, a.scale, g, t);
  __syncthreads();

  Running<Values> run;
  float* k_factors = reinterpret_cast<float*>(factors) + warp * SCALES;
  float* v_factors = k_factors + TILE * Keys::layout.scales;
  int stage = 0;
  for (int token = start; token < stop; token += WARPS * TILE) {
    fetch(stage == 0 ? STAGES - 1 : stage - 1, token + (STAGES - 1) * (WARPS * TILE));
    wait_copies<STAGES - 1>();
    __syncwarp();
    const uint8_t* tile = shared + (stage * WARPS + warp) * STAGE;
    decode_scales<Keys>(tile + K_SCALES, k_factors, lane);
    decode_scales<Values>(tile + V_SCALES, v_factors, lane);
    __syncwarp();
    const int last = stop - 1 - token;
    const PackedTile<Keys> keys{tile + K_CODES, tile + K_NUMBERS, k_factors, last};
    const PackedTile<Values> values{tile + V_CODES, tile + V_NUMBERS, v_factors, last};
    add_tile<TILE / 16, Keys, Values>(run, keys, values, q, sight, a, at, token, g, t);
    __syncwarp();
    stage = stage == STAGES - 1 ? 0 : stage + 1;
  }
  wait_copies<0>();
  write_part(run, a, at, split, shared, warp, g, t);
}

__device__ __forceinline__ void attend_recent(const AttendArguments& a, const Place& at, uint8_t* shared) {
  const int lane = lane_id(), warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  float* rows = reinterpret_cast<float*>(shared);
  copy_queries(a, at, rows);
  __syncthreads();
  Queries<RecentKeys> q;
  q.load(rows, rows + ROWS * Q_ROW, warp == 0, a.scale, g, t);
  __syncthreads();
  const Sight sight{a.recent_mask, 0, a.recent, false, a.recent};
  const uint8_t* k = a.recent_k.data + at.batch * a.recent_k.batch + at.kv_head * a.recent_k.head;
  const uint8_t* v = a.recent_v.data + at.batch * a.recent_v.batch + at.kv_head * a.recent_v.head;
  Running<RecentValues> run;
  for (int token = warp * RECENT_TILE; token < a.recent; token += WARPS * RECENT_TILE) {
    const int last = a.recent - 1 - token;
    const DenseTile keys{k + token * a.recent_k.token, static_cast<int>(a.recent_k.token), last};
    const DenseTile values{v + token * a.recent_v.token, static_cast<int>(a.recent_v.token), last};
    add_tile<RECENT_TILE / 16, RecentKeys, RecentValues>(run, keys, values, q, sight, a, at, token, g, t);
  }
  write_part(run, a, at, a.splits, shared, warp, g, t);
}

// Grid: splits, and one more if there are recent tokens; batch * kv_heads; eights of query rows.
extern "C" __global__ void __launch_bounds__(WARPS * 32, PROGRAMS) attend(const AttendArguments a) {
  extern __shared__ __align__(16) uint8_t shared[];
  const int head = blockIdx.y, first_row = blockIdx.z * ROWS, rows = min(a.rows() - first_row, ROWS);
  const Place at{head / a.kv_heads, head % a.kv_heads, first_row, rows, head};
  if (static_cast<int>(blockIdx.x) < a.splits)
    attend_history(a, at, blockIdx.x, shared);
  else
    attend_recent(a, at, shared);
  float* history = reinterpret_cast<float*>(shared);
  if (a.arrived && is_last(a, reinterpret_cast<uint32_t*>(history + ROWS * DV)))
    merge_rows<ROWS>(a, head, first_row, rows, history, WARPS);
}

// Grid: batch * kv_heads, query rows; DV threads, rounded up to whole warps.
extern "C" __global__ void merge(const AttendArguments a) {
  extern __shared__ __align__(16) uint8_t shared[];
  merge_rows<1>(a, blockIdx.x, blockIdx.y, 1, reinterpret_cast<float*>(shared), blockDim.x / 32);
}
