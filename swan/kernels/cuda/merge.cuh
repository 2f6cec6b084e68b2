// Merging the parts of query rows: the last program of `attend` does it, or the kernel `merge`.
#pragma once

#include "program.cuh"

constexpr float LN_2 = 0.693147181f;

// What `attend` wrote of some rows of a KV head.
struct Parts {
  const AttendArguments& a;
  int64_t head;  // batch * kv_heads + kv_head
  int first_row;

  __device__ __forceinline__ int64_t row(int part, int row) const {
    return (head * a.parts() + part) * a.rows() + first_row + row;
  }
  __device__ __forceinline__ float lse(int part, int r) const { return a.lse[row(part, r)]; }
  __device__ __forceinline__ const float* sums(int part, int r) const { return a.partial + row(part, r) * DV; }
};

// The largest log-sum-exp of a row's parts, and the sum of their weights, which are relative to that.
struct Weights {
  float top, total;

  __device__ __forceinline__ float zero() const { return top == NOTHING ? 0 : top; }
  __device__ __forceinline__ Weights of_lane(int lane) const {
    return {__shfl_sync(~0u, top, lane), __shfl_sync(~0u, total, lane)};
  }
};

// Of N rows, of which `rows` are there: lane r has those of row r % N.
template <int N>
__device__ __forceinline__ Weights weights_of(const Parts& parts, int rows, int lane) {
  const int row = lane % N, count = row < rows ? parts.a.parts() : 0;
  Weights x{NOTHING, 0};
  for (int i = lane / N; i < count; i += 32 / N) x.top = fmaxf(x.top, parts.lse(i, row));
#pragma unroll
  for (int other = N; other < 32; other *= 2) x.top = fmaxf(x.top, __shfl_xor_sync(~0u, x.top, other));
  for (int i = lane / N; i < count; i += 32 / N) x.total += exp2_(parts.lse(i, row) - x.zero());
#pragma unroll
  for (int other = N; other < 32; other *= 2) x.total += __shfl_xor_sync(~0u, x.total, other);
  return x;
}

// Adds up the splits of a row for CHUNK coordinates from c on, by a warp: lanes with other coordinates are neighbours,
// and groups of lanes have splits of their own, many of which are asked for at once, because they come from far.
constexpr int CHUNK = DV % 32 ? 16 : 32;
__device__ __forceinline__ void add_splits(const Parts& parts, int row, int c, float zero, float* to, int lane) {
  constexpr int LANES = CHUNK / 4, STEP = 32 / LANES, AHEAD = 8;
  const int begin = lane / LANES, splits = parts.a.splits;
  c += lane % LANES * 4;
  float sum[4] = {};
  for (int first = begin; first < splits; first += AHEAD * STEP) {
    float4 x[AHEAD];
    float weight[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int split = first + i * STEP;
      weight[i] = NOTHING, x[i] = float4{0, 0, 0, 0};
      if (split >= splits) continue;
      weight[i] = parts.lse(split, row);
      x[i] = *reinterpret_cast<const float4*>(parts.sums(split, row) + c);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const float w = exp2_(weight[i] - zero);
      sum[0] += w * x[i].x, sum[1] += w * x[i].y, sum[2] += w * x[i].z, sum[3] += w * x[i].w;
    }
  }
#pragma unroll
  for (int other = LANES; other < 32; other *= 2)
#pragma unroll
    for (float& x : sum) x += __shfl_xor_sync(~0u, x, other);
  if (begin == 0) *reinterpret_cast<float4*>(to + c) = float4{sum[0], sum[1], sum[2], sum[3]};
}

// Lanes of four have a coordinate together, and neighbours read neighbouring pieces of a row of the mix.
constexpr int TEAM = 4;

// Coordinate c of N sums over the history, x [N, DV], with the mix taken off: x mix^T.
template <int N>
__device__ __forceinline__ void unmix(float (&sums)[N], const float* x, const Number* mix, int c, int member) {
#pragma unroll
  for (int r = 0; r < N; ++r) sums[r] = x[r * DV + c];
  if (!mix) return;
  unrolled<Values::layout.count>([&](auto n) {
    constexpr Span span = Values::layout.spans[n];
    if (!span.coded() || c < span.start || c >= span.start + span.size) return;
#pragma unroll
    for (float& sum : sums) sum = 0;
    constexpr int PIECE = 16 / sizeof(Number);
    for (int i = span.start + member * PIECE; i < span.start + span.size; i += TEAM * PIECE) {
      const auto m = *reinterpret_cast<const Some<Number, PIECE>*>(mix + c * DV + i);
#pragma unroll
      for (int r = 0; r < N; ++r)
#pragma unroll
        for (int j = 0; j < PIECE; j += 4) {
          const float4 y = *reinterpret_cast<const float4*>(x + r * DV + i + j);
          sums[r] += y.x * to_float(m.at[j]) + y.y * to_float(m.at[j + 1]);
          sums[r] += y.z * to_float(m.at[j + 2]) + y.w * to_float(m.at[j + 3]);
        }
    }
#pragma unroll
    for (float& sum : sums)
#pragma unroll
      for (int other = 1; other < TEAM; other *= 2) sum += __shfl_xor_sync(~0u, sum, other);
  });
}

constexpr int LINE = 128 / sizeof(Number);  // of the cache

// Merges N rows, of which `rows` are there, by a program of whole warps; N DV floats of shared memory.
template <int N>
__device__ __forceinline__ void merge_rows(const AttendArguments& a, int64_t head, int first_row, int rows,
                                           float* history, int warps) {
  const Parts parts{a, head, first_row};
  const int lane = lane_id(), warp = threadIdx.x / 32, member = lane % TEAM;
  if (a.v_mix)  // it comes from far too
    for (int i = threadIdx.x * LINE; i < DV * DV; i += warps * 32 * LINE) prefetch(a.v_mix + i);
  const Weights weights = weights_of<N>(parts, rows, lane);
  for (int i = warp; i < N * (DV / CHUNK); i += warps) {
    const int row = i / (DV / CHUNK), c = i % (DV / CHUNK) * CHUNK;
    const float zero = weights.of_lane(row).zero();
    if (row < rows) add_splits(parts, row, c, zero, history + row * DV, lane);
    else if (lane < CHUNK) history[row * DV + c + lane] = 0;
  }
  __syncthreads();
  for (int c = threadIdx.x / TEAM; c < DV; c += warps * 32 / TEAM) {
    float sums[N];
    unmix(sums, history, a.v_mix, c, member);
#pragma unroll
    for (int r = 0; r < N; ++r) {
      const Weights w = weights.of_lane(r);
      if (r >= rows || r % TEAM != member) continue;
      if (a.recent) sums[r] += exp2_(parts.lse(a.splits, r) - w.zero()) * parts.sums(a.splits, r)[c];
      const int64_t row = head * a.rows() + first_row + r;
      a.out[row * DV + c] = Number::of(sums[r] / (w.total == 0 ? 1 : w.total));
      if (c == 0) a.out_lse[row] = (w.top + log2f(w.total)) * LN_2;
    }
  }
}

// Whether a program is the last one of its rows that has written its part; it sees then what the others wrote.
__device__ __forceinline__ bool is_last(const AttendArguments& a, uint32_t* shared) {
  __syncthreads();  // all threads have written
  if (threadIdx.x == 0) {
    uint32_t* arrived = a.arrived + blockIdx.z * gridDim.y + blockIdx.y;
    __threadfence();  // what the program wrote is there before the counter says so
    const bool last = atomicAdd(arrived, 1) == gridDim.x - 1;
    __threadfence();  // and is read after it
    if (last) *arrived = 0;
    *shared = last;
  }
  __syncthreads();
  return *shared;
}
