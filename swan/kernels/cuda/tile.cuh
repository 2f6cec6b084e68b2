// A tile of tokens: scores, the running softmax, and sums of values.
//
// Values' scales multiply weights, which become half precision: 11 bits, where bfloat16 has 8, but of small range. So
// both factors are held below a power of two: weights by the reference of the softmax, scales by a bias. Both move
// rarely.
#pragma once

#include "queries.cuh"
#include "sight.cuh"

constexpr int EARLY = 8;          // by how much a score exceeds the reference of the softmax before that moves
constexpr float MOST = 7;         // the exponent of the largest scale: times weights it is 2^15 at most
constexpr float LOWEST = -1e30f;  // the reference of rows that have seen nothing: finite, so that differences are

struct RecentKeys {
  static constexpr Group groups[] = {{D, 16}};
  static constexpr auto layout = layout_of(groups);
};
struct RecentValues {
  static constexpr Group groups[] = {{DV, 16}};
  static constexpr auto layout = layout_of(groups);
};

// A tile of a plane in shared memory, and the last token that is there; scales are decoded, [scales, 8, 4].
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
  // Of tokens i, i + 8, i + 16 and i + 24.
  __device__ __forceinline__ Some<float, 4> group_scales(int n, int i) const {
    return reinterpret_cast<const Some<float, 4>*>(scales)[n * 8 + i];
  }
};

// A tile of recent tokens, in global memory.
struct DenseTile {
  const uint8_t* data;
  int stride, last;

  __device__ __forceinline__ const uint8_t* code_row(uint32_t, int) const { return nullptr; }
  __device__ __forceinline__ const uint8_t* number_row(int i) const { return data + int64_t(min(i, last)) * stride; }
  __device__ __forceinline__ Some<float, 4> group_scales(int, int) const { return {}; }
};

// What a warp has found so far: sums of codes in tiles of 16 coordinates; of weights times scales, from which the part
// of the middle code is known at the end; the reference of the softmax and the sum of weights of columns 2t and 2t + 1.
template <class L>
struct Running {
  static constexpr int SCALES = L::layout.scales ? L::layout.scales : 1;

  float o[L::layout.stored / 16][4] = {}, w[SCALES][4] = {};
  float reference[2] = {LOWEST, LOWEST}, total[2] = {0, 0};
  float bias = MOST;  // a scale is 2^(byte / 8 + bias)

  __device__ __forceinline__ void move_reference(float top0, float top1) {
#pragma unroll
    for (int x = 4; x < 32; x *= 2) {
      top0 = fmaxf(top0, __shfl_xor_sync(~0u, top0, x));
      top1 = fmaxf(top1, __shfl_xor_sync(~0u, top1, x));
    }
    top0 = fmaxf(top0, reference[0]), top1 = fmaxf(top1, reference[1]);
    const float f0 = exp2_(reference[0] - top0), f1 = exp2_(reference[1] - top1);
    reference[0] = top0, reference[1] = top1;
    total[0] *= f0, total[1] *= f1;
#pragma unroll
    for (auto& x : o) x[0] *= f0, x[1] *= f1, x[2] *= f0, x[3] *= f1;
#pragma unroll
    for (auto& x : w) x[0] *= f0, x[1] *= f1, x[2] *= f0, x[3] *= f1;
  }

  // Lowers the exponents of a tile's scales, one of each group in each lane, to MOST or less, and all that was summed.
  // Those of tokens that are not `there` may stay above: their weights are 0.
  __device__ __forceinline__ void move_bias(float (&exponents)[SCALES], bool there) {
    float top = MOST;
#pragma unroll
    for (float x : exponents) top = there ? fmaxf(top, x) : top;
#pragma unroll
    for (int x = 1; x < 32; x *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, x));
    const float by = ceilf(top - MOST), factor = exp2_(-by);
    bias -= by;
#pragma unroll
    for (float& x : exponents) x -= by;
#pragma unroll
    for (auto& sums : w)
#pragma unroll
      for (float& x : sums) x *= factor;
    unrolled<L::layout.count>([&](auto n) {
      constexpr Span span = L::layout.spans[n];
#pragma unroll
      for (int i = 0; span.coded() && i < span.size / 16; ++i)
#pragma unroll
        for (float& x : o[span.stored / 16 + i]) x *= factor;
    });
  }
};

// Adds scores of 16 N tokens, without their factors.
template <int N, class L, class Tile>
__device__ __forceinline__ void add_scores(float (&scores)[N][4], const Tile& tile, const Queries<L>& q, int g, int t) {
  const int i = token_of_row(g);
  unrolled<L::layout.count>([&](auto n) {
    constexpr int G = n;
    constexpr Span span = L::layout.spans[G];
    const uint32_t* pairs = q.pairs + span.stored / 8;
    if constexpr (span.coded()) {
      const auto scale = tile.group_scales(span.scale, i);
#pragma unroll
      for (int h = 0; h < N; ++h) {
        const float4 begin = q.middles(span.scale, t);
        float sums[4] = {begin.x, begin.y, begin.z, begin.w};
        const uint8_t* const rows[2] = {tile.code_row(i, 16 * h), tile.code_row(i, 16 * h + 8)};
        unrolled<span.parts()>([&](auto part) { add_key_part<L, G, part>(sums, rows, t, pairs); });
#pragma unroll
        for (int j = 0; j < 4; ++j) scores[h][j] += scale.at[2 * h + j / 2] * sums[j];
      }
    } else {
#pragma unroll
      for (int h = 0; h < N; ++h) {
        const uint8_t* const rows[2] = {tile.number_row(16 * h + i), tile.number_row(16 * h + i + 8)};
        add_whole_keys<L, G>(scores[h], rows, t, pairs);
      }
    }
  });
}

// Adds values of 16 N tokens with their weights.
template <int N, class L, class Tile>
__device__ __forceinline__ void add_values(Running<L>& run, const Tile& tile, const float (&weights)[N][4], int g,
                                           int t) {
  unrolled<L::layout.count>([&](auto n) {
    constexpr int G = n;
    constexpr Span span = L::layout.spans[G];
    float(*o)[4] = run.o + span.stored / 16;
    const auto scale = tile.group_scales(span.scale, token_of_row(g));
#pragma unroll
    for (int h = 0; h < N; ++h) {
      const float(&p)[4] = weights[h];
      const int j = 16 * h;
      if constexpr (span.coded()) {
        const float s0 = scale.at[2 * h], s1 = scale.at[2 * h + 1];
        const uint32_t b0 = transpose8(pack2_half(s0 * p[0], s0 * p[1]));
        const uint32_t b1 = transpose8(pack2_half(s1 * p[2], s1 * p[3]));
        const uint32_t one[4] = {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00};
        mma_half(run.w[span.scale], one, b0, b1);
        const uint8_t* const rows[4] = {tile.code_row(t, j), tile.code_row(t, j + 4), tile.code_row(t, j + 8),
                                        tile.code_row(t, j + 12)};
        add_coded_values<L, G>(o, rows, g, b0, b1);
      } else {
        const uint32_t b0 = transpose8(Whole::pack(p[0], p[1])), b1 = transpose8(Whole::pack(p[2], p[3]));
        const uint8_t* const rows[4] = {tile.number_row(j + t), tile.number_row(j + t + 4), tile.number_row(j + t + 8),
                                        tile.number_row(j + t + 12)};
        add_whole_values<L, G>(o, rows, g, b0, b1);
      }
    }
  });
}

// A tile of 16 N tokens from `token` on.
template <int N, class KL, class VL, class KTile, class VTile>
__device__ __forceinline__ void add_tile(Running<VL>& run, const KTile& keys, const VTile& values, const Queries<KL>& q,
                                         const Sight& sight, const AttendArguments& a, int token, int g, int t) {
  float x[N][4] = {};  // scores, then weights
  add_scores<N, KL>(x, keys, q, g, t);
  const bool all_see = token >= sight.first && token + 16 * N <= sight.all_until;
  if (!all_see) hide(x, sight, a, token, g, t);
  float top0 = fmaxf(x[0][0], x[0][2]), top1 = fmaxf(x[0][1], x[0][3]);
#pragma unroll
  for (int h = 1; h < N; ++h)
    top0 = fmaxf(top0, fmaxf(x[h][0], x[h][2])), top1 = fmaxf(top1, fmaxf(x[h][1], x[h][3]));
  const float2 factors = q.factors(t);
  top0 *= factors.x, top1 *= factors.y;
  const bool moves = top0 > run.reference[0] + EARLY || top1 > run.reference[1] + EARLY;
  if (__any_sync(~0u, moves)) run.move_reference(top0, top1);
#pragma unroll
  for (int h = 0; h < N; ++h) {
    x[h][0] = exp2_(fmaf(x[h][0], factors.x, -run.reference[0]));
    x[h][1] = exp2_(fmaf(x[h][1], factors.y, -run.reference[1]));
    x[h][2] = exp2_(fmaf(x[h][2], factors.x, -run.reference[0]));
    x[h][3] = exp2_(fmaf(x[h][3], factors.y, -run.reference[1]));
    run.total[0] += x[h][0] + x[h][2], run.total[1] += x[h][1] + x[h][3];
  }
  add_values<N, VL>(run, values, x, g, t);
}
