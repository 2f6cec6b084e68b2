// What a program found, from its warps' sums to memory.
#pragma once

#include "tile.cuh"

// From sums of codes to sums of values: takes the middle code off, and multiplies by what places of codes in mantissas
// and the biases of scales left out. Values count steps of 2^(1 - bits).
template <class L>
__device__ __forceinline__ void finish(Running<L>& run) {
  unrolled<L::layout.count>([&](auto n) {
    constexpr Span span = L::layout.spans[n];
    if constexpr (span.coded()) {
      const float factor = exp2_(-15.0f - span.bits - run.bias);
      unrolled<span.size / 8>([&](auto c) {
        constexpr float step = 1 << (24 - place_of_value(span, c));
        float* o = run.o[span.stored / 16 + c / 2] + c % 2 * 2;
        const float* w = run.w[span.scale] + c % 2 * 2;
#pragma unroll
        for (int j = 0; j < 2; ++j) o[j] = (o[j] * step - ones(span.bits) * 0.5f * w[j]) * factor;
      });
    }
  });
}

// Merges the warps' sums, in shared memory, and writes the program's output and log-sum-exp.
template <class L>
__device__ __forceinline__ void write_part(Running<L>& run, const AttendArguments& a, uint8_t* shared) {
  finish(run);
  const Place at = place_of_program(a);
  const int lane = lane_id(), warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
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
    top[c] = LOWEST, total[c] = 0;
    for (int k = 0; k < WARPS; ++k) top[c] = fmaxf(top[c], references[k * ROWS + row]);
    for (int k = 0; k < WARPS; ++k) total[c] += totals[k * ROWS + row] * exp2_(references[k * ROWS + row] - top[c]);
    factor[c] = exp2_(run.reference[c] - top[c]) / (total[c] == 0 ? 1 : total[c]);
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
  const int64_t to = (at.head * a.parts() + blockIdx.x) * a.rows() + at.first_row;
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
