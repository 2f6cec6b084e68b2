// A tile of tokens: scores, the running softmax, and sums of values.
#pragma once

#include "queries.cuh"
#include "sight.cuh"

constexpr int EARLY = 8;  // by how much a score exceeds the reference of the softmax before that moves

struct RecentKeys {
  static constexpr Group groups[] = {{D, 16}};
  static constexpr auto layout = layout_of(groups);
};
struct RecentValues {
  static constexpr Group groups[] = {{DV, 16}};
  static constexpr auto layout = layout_of(groups);
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
    return numbers + min(i, last) * (2 * L::layout.whole);
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

// What a warp has found so far: sums of values in tiles of 16 coordinates; of weights times scales, whose part in the
// values' constants is taken off at the end; the reference of the softmax and the sum of weights of columns 2t, 2t + 1.
template <class L>
struct Running {
  float o[L::layout.stored / 16][4] = {}, w[L::layout.scales ? L::layout.scales : 1][4] = {};
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
      add_whole_keys<L, G>(scores, rows, t, pairs);
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
      const uint32_t b0 = transpose8(Whole::pack(p[0], p[1])), b1 = transpose8(Whole::pack(p[2], p[3]));
      const uint8_t* const rows[4] = {tile.number_row(j), tile.number_row(j + 4), tile.number_row(j + 8),
                                      tile.number_row(j + 12)};
      add_whole_values<L, G>(o, rows, g, b0, b1);
    }
  });
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
