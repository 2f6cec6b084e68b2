// Queries: copied to shared memory as floats, mixed as keys are, and made operands of the products with keys.
#pragma once

#include "products.cuh"
#include "program.cuh"

constexpr float LOG2_E = 1.44269504f;
constexpr int Q_ROW = D + 4;  // floats of a query row in shared memory: rows are in different banks

// Queries as operands, for keys of a layout. A row is divided by a power of two, so that its largest number is 1 to 2.
template <class L>
struct Queries {
  uint32_t pairs[L::layout.stored / 8];
  // Factors of scores, [ROWS]; then what sums of coded groups begin with, so that the middle code is 0, as products
  // have them: [scales, 4, 4], twice rows 2t and 2t + 1. Registers are scarce.
  const float* shared;

  __device__ __forceinline__ float2 factors(int t) const { return reinterpret_cast<const float2*>(shared)[t]; }
  __device__ __forceinline__ float4 middles(int n, int t) const {
    return reinterpret_cast<const float4*>(shared + ROWS)[4 * n + t];
  }

  // From floats in shared memory; `scale` is that of the scores. One warp writes what all need: `writes`.
  __device__ __forceinline__ void load(const float* floats, float* place, bool writes, float scale, int g,
                                       int t) {
    const float* row = floats + g * Q_ROW;
    shared = place;
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
    float* middle = place + ROWS + g / 2 * 4 + g % 2;
    unrolled<L::layout.count>([&](auto i) { load_group<i>(row, middle, own, finite ? sign : 0, finite, t); });
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
      for (int i = 0; i < span.size / 8; ++i) to[i] = Whole::pack(number(2 * i), number(2 * i + 1));
    } else {
      float sum = 0;  // of the rounded numbers
      each_pair<L, G>([&](int i, int first, int second, int j) {
        to[i] = pack2_half(number(first), number(second));
        sum += (from_half(to[i]) + from_half(to[i] >> 16)) * middle_key(span, j);
      });
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (writes) middle[span.scale * 16] = middle[span.scale * 16 + 2] = -sum;
    }
  }
};

__device__ __forceinline__ const Number* query_row(const AttendArguments& a, const Place& at, int i) {
  const int row = at.first_row + i;
  const int64_t head = at.kv_head * a.groups + row / a.queries;
  return a.q + at.batch * a.q_batch + head * a.q_head + row % a.queries * a.q_query;
}

// Query rows as floats [ROWS, Q_ROW]; zeros where there are none.
__device__ __forceinline__ void copy_queries(const AttendArguments& a, const Place& at, float* to) {
  for (int i = threadIdx.x; i < ROWS * (D / 2); i += WARPS * 32) {
    const int row = i / (D / 2), c = i % (D / 2) * 2;
    Some<float, 2> x{};
    if (row < at.rows) {
      const auto numbers = *reinterpret_cast<const Some<Number, 2>*>(query_row(a, at, row) + c);
      x = {to_float(numbers.at[0]), to_float(numbers.at[1])};
    }
    *reinterpret_cast<Some<float, 2>*>(to + row * Q_ROW + c) = x;
  }
}

// Mixes the rows, 16 columns c of a group at a time: (q mix)^T = mix^T q^T. Lanes read pieces of rows of the mix, of
// which `transpose8` makes operands; so row g of the product is a column among those 16 that is not g.
__device__ __forceinline__ void mix_by_products(const AttendArguments& a, const Place& at, float* to, int warp, int g,
                                                int t) {
  const uint32_t* row = g < at.rows ? reinterpret_cast<const uint32_t*>(query_row(a, at, g)) : nullptr;
  const int column = g / 2 * 4 + g % 2;
  unrolled<Keys::layout.count>([&](auto i) {
    constexpr Span span = Keys::layout.spans[i];
    for (int c = span.start + 16 * warp; c < span.start + span.size; c += 16 * WARPS) {
      const auto piece = [&](int k) { return *reinterpret_cast<const uint2*>(a.k_mix + (k + g) * D + c + 4 * t); };
      float sums[4] = {};
#pragma unroll 4
      for (int k = span.start; k < span.start + span.size; k += 16) {
        const uint2 low = piece(k), high = piece(k + 8);
        const uint32_t m[4] = {transpose8(low.x), transpose8(low.y), transpose8(high.x), transpose8(high.y)};
        Whole::multiply(sums, m, row ? row[k / 2 + t] : 0, row ? row[k / 2 + t + 4] : 0);
      }
      float* place = to + 2 * t * Q_ROW + c + column;
      place[0] = sums[0], place[Q_ROW] = sums[1], place[2] = sums[2], place[Q_ROW + 2] = sums[3];
    }
  });
}

// The same for numbers of four bytes: a column of the mix in each thread.
__device__ __forceinline__ void mix_by_sums(const AttendArguments& a, const Place& at, float* to) {
  for (int c = threadIdx.x; c < D; c += WARPS * 32) {
    unrolled<Keys::layout.count>([&](auto i) {
      constexpr Span span = Keys::layout.spans[i];
      if (c < span.start || c >= span.start + span.size) return;
      float sums[ROWS] = {};
      for (int k = span.start; k < span.start + span.size; ++k) {
        const float m = to_float(a.k_mix[k * D + c]);
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
          if (r < at.rows) sums[r] += m * to_float(query_row(a, at, r)[k]);
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) to[r * Q_ROW + c] = sums[r];
    });
  }
}

__device__ __forceinline__ void mix_queries(const AttendArguments& a, const Place& at, float* to, int warp, int g,
                                            int t) {
  if constexpr (sizeof(Number) == 2) mix_by_products(a, at, to, warp, g, t);
  else mix_by_sums(a, at, to);
}
