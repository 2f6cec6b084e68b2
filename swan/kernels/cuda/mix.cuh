// Vectors in shared memory, and their mix: a product with a matrix that is block diagonal by groups.
#pragma once

#include "layout.cuh"
#include "numbers.cuh"

constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int THREADS = (2 * larger(D, DV) + 31) / 32 * 32, WARPS = THREADS / 32;

// Calls a function with each group of few bits: what it reads of it are constants in the code that results.
template <class L, typename Function>
__device__ __forceinline__ void each_coded(const Function& function) {
  unrolled<L::layout.count>([&](auto n) {
    constexpr Span span = L::layout.spans[n];
    if constexpr (span.coded()) function(span);
  });
}

// A thread mixes `width` columns, and every `slices`-th row of them: that makes 2 d threads.
template <class L>
struct Columns {
  static constexpr int d = L::layout.d, width = d % 4 == 0 ? 4 : d % 2 == 0 ? 2 : 1, slices = 2 * width;
};

extern __shared__ __align__(16) uint8_t shared[];

// Shared memory, for N vectors.
template <class L, int N>
struct Memory {
  static constexpr int vectors = N * L::layout.d * 4, sums = vectors * Columns<L>::slices;

  // Coordinate i of vector n, before the mix: those of one coordinate lie together.
  __device__ static float* vector(int i, int n = 0) { return reinterpret_cast<float*>(shared) + i * N + n; }
  // The sum of a slice of rows of the mix for coordinate i of vector n.
  __device__ static float* sum(int slice, int n, int i) {
    return reinterpret_cast<float*>(shared + vectors) + (slice * N + n) * L::layout.d + i;
  }
  __device__ static uint8_t* code(int n, int i = 0) { return shared + vectors + sums + n * L::layout.d + i; }
};

// A thread's part of the mix: some columns, and every so many of the rows that these depend on. Its numbers are asked
// for before the vectors are there, many at a time, because they come from far.
template <class L, int N>
class Mix {
  using C = Columns<L>;

 public:
  __device__ explicit Mix(const Number* matrix) : matrix_(matrix) {
    const int block = threadIdx.x % (L::layout.d / C::width), slice = threadIdx.x / (L::layout.d / C::width);
    column_ = block * C::width, slice_ = slice;
    int first = L::layout.d;
    if (matrix && slice < C::slices) {
      each_coded<L>([&](const Span& group) {
        if (column_ + C::width <= group.start || group.start + group.size <= column_) return;
        first = min(first, group.start), stop_ = group.start + group.size;
      });
    }
    row_ = first + slice;
    load();
  }

  // Adds up rows of all vectors, and leaves the sums in shared memory.
  __device__ void multiply() {
    if (!matrix_ || slice_ >= C::slices) return;
    float sums[N][C::width] = {};
    for (; row_ < stop_; row_ += AHEAD * C::slices, load()) {
#pragma unroll
      for (int a = 0; a < AHEAD; ++a) {
        if (row_ + a * C::slices < stop_) add(ahead_[a], row_ + a * C::slices, sums);
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      Some<float, C::width> some;
#pragma unroll
      for (int w = 0; w < C::width; ++w) some.at[w] = sums[n][w];
      *reinterpret_cast<Some<float, C::width>*>(Memory<L, N>::sum(slice_, n, column_)) = some;
    }
  }

 private:
  using Numbers = Some<Number, C::width>;
  static constexpr int AHEAD = (N == 1 ? 32 : 16) / sizeof(Number);

  __device__ void load() {
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      const int row = row_ + a * C::slices;
      if (row < stop_) ahead_[a] = *reinterpret_cast<const Numbers*>(matrix_ + row * L::layout.d + column_);
    }
  }

  __device__ static void add(const Numbers& numbers, int row, float (&sums)[N][C::width]) {
    constexpr int AT_ONCE = N < 4 ? N : 4;
#pragma unroll
    for (int n = 0; n < N; n += AT_ONCE) {
      const auto x = *reinterpret_cast<const Some<float, AT_ONCE>*>(Memory<L, N>::vector(row, n));
#pragma unroll
      for (int m = 0; m < AT_ONCE; ++m)
#pragma unroll
        for (int w = 0; w < C::width; ++w) sums[n + m][w] += x.at[m] * to_float(numbers.at[w]);
    }
  }

  const Number* matrix_;
  int column_, slice_, row_, stop_ = 0;
  Numbers ahead_[AHEAD];
};

// Coordinate i of vector n, mixed.
template <class L, int N>
__device__ float mixed(bool mix, int n, int i) {
  if (!mix) return *Memory<L, N>::vector(i, n);
  float sum = 0;
#pragma unroll
  for (int slice = 0; slice < Columns<L>::slices; ++slice) sum += *Memory<L, N>::sum(slice, n, i);
  return sum;
}
