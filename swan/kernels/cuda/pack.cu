// Vectors to the bytes of a graded layout, as swan/kernels/cpu/pack.cpp does on a CPU: prompts whole, and new tokens of
// a cache, which push the oldest ones out of the ring into the history.
//
// Macros: D and K_GROUPS, the dimension and the layout of keys, such as 64 and {{16, 5}, {48, 3}}; DV and V_GROUPS,
// those of values, or neither if they are the same; DTYPE, see numbers.cuh.
//
// A program has 2 max(D, DV) threads, rounded up to whole warps, and 37 N max(D, DV) bytes of shared memory for the N
// vectors that it packs at once: 1 in `take_in`, MANY in `take_in_many` and `pack`.
#include "numbers.cuh"

using Number = DTYPE;

struct Group {
  int size, bits;
};

constexpr Group KEYS[] = K_GROUPS;
#ifndef V_GROUPS
#define V_GROUPS K_GROUPS
#define DV D
#endif
constexpr Group VALUES[] = V_GROUPS;

constexpr int larger(int a, int b) { return a > b ? a : b; }

constexpr int MANY = 8;
constexpr int THREADS = (2 * larger(D, DV) + 31) / 32 * 32, WARPS = THREADS / 32;

// Arguments -----------------------------------------------------------------------------------------------------------

// A tensor [batch, heads, tokens, width]; its strides, but that of the last dimension, which is 1, in elements.
template <typename T>
struct Plane {
  T* data;
  int64_t batch, head, token;

  __device__ T* row(int64_t b, int64_t h, int64_t t) const { return data + b * batch + h * head + t * token; }
};

// What a layout stores. A plane that it has not is not looked at.
struct Packed {
  Plane<uint8_t> codes;   // of rows of whole words of four bytes
  Plane<Number> whole;    // coordinates of 16 bits
  Plane<uint8_t> scales;  // a byte for each group of fewer bits
  const Number* matrix;   // the mix [d, d], contiguous, block diagonal by groups, at a multiple of 16 bytes; null: none
  int64_t room;           // tokens that fit; for 0 all else may be null
};

struct PackArguments {
  Plane<const Number> x;
  Packed to;
  int tokens;
  int values;  // whether the layout is that of values
};

// Keys or values of a cache.
struct Side {
  Plane<const Number> x;  // new tokens
  Plane<Number> recent;   // sinks, then the ring
  Packed history;
};

struct TakeInArguments {
  Side keys, values;
  // Counters: tokens seen before, and the oldest column in the ring; pointers where they are tensors, else null.
  const int64_t *length_at, *first_at;
  int64_t length, first;
  const int64_t* padding;  // left padding of each row, or null
  int64_t start;           // the column of the first token of the history
  int tokens;              // new ones
  int size, sinks;         // slots of the ring and of sinks
};

// Layouts -------------------------------------------------------------------------------------------------------------

// Bits of the parts of a code, high bits first: 4, 2 or 1, and what is left.
constexpr int first_part(int bits) { return bits >= 4 ? 4 : bits >= 2 ? 2 : bits; }
constexpr int last_part(int bits) { return bits - first_part(bits); }
constexpr int part_bytes(int size, int part) { return (size * part + 7) / 8; }
constexpr int code_bytes(Group g) {
  return part_bytes(g.size, first_part(g.bits)) + part_bytes(g.size, last_part(g.bits));
}
constexpr bool is_coded(Group g) { return g.bits > 0 && g.bits < 16; }

// A group of few bits: its coordinates, and its place among the groups of few bits.
struct Coded {
  int start, size, bits, scale;
};

template <int DIM, const Group* GROUPS, int COUNT>
struct Layout {
  static constexpr int dim = DIM;
  // A thread mixes `width` columns, and every `slices`-th row of them: that makes 2 dim threads.
  static constexpr int width = DIM % 4 == 0 ? 4 : DIM % 2 == 0 ? 2 : 1, slices = 2 * width;

  static constexpr int coded() {
    int count = 0;
    for (int g = 0; g < COUNT; ++g) count += is_coded(GROUPS[g]);
    return count;
  }
  static constexpr int row_bytes() {
    int bytes = 0;
    for (int g = 0; g < COUNT; ++g) bytes += is_coded(GROUPS[g]) ? code_bytes(GROUPS[g]) : 0;
    return (bytes + 3) / 4 * 4;
  }

  // Calls a function with each group of few bits: indices are constants in the code that results.
  template <typename Function>
  __device__ static void each_coded(const Function& function) {
    int start = 0, scale = 0;
#pragma unroll
    for (int g = 0; g < COUNT; ++g) {
      if (is_coded(GROUPS[g])) function(Coded{start, GROUPS[g].size, GROUPS[g].bits, scale++});
      start += GROUPS[g].size;
    }
  }

  // The place of a coordinate among those of 16 bits, or -1.
  __device__ static int place_of_whole(int coordinate) {
    int start = 0, before = 0, place = -1;
#pragma unroll
    for (int g = 0; g < COUNT; ++g) {
      const int inside = coordinate - start;
      if (GROUPS[g].bits == 16 && inside >= 0 && inside < GROUPS[g].size) place = before + inside;
      before += GROUPS[g].bits == 16 ? GROUPS[g].size : 0;
      start += GROUPS[g].size;
    }
    return place;
  }
};

using Keys = Layout<D, KEYS, sizeof(KEYS) / sizeof(Group)>;
using Values = Layout<DV, VALUES, sizeof(VALUES) / sizeof(Group)>;

// What a program packs ------------------------------------------------------------------------------------------------

extern __shared__ __align__(16) uint8_t shared[];

// Shared memory, for N vectors.
template <class L, int N>
struct Memory {
  static constexpr int vectors = N * L::dim * 4, sums = vectors * L::slices;

  // Coordinate i of vector n, before the mix: those of one coordinate lie together.
  __device__ static float* vector(int i, int n = 0) { return reinterpret_cast<float*>(shared) + i * N + n; }
  // The sum of a slice of rows of the mix for coordinate i of vector n.
  __device__ static float* sum(int slice, int n, int i) {
    return reinterpret_cast<float*>(shared + vectors) + (slice * N + n) * L::dim + i;
  }
  __device__ static uint8_t* code(int n, int i = 0) { return shared + vectors + sums + n * L::dim + i; }
};

// The tokens of a program: `first` is the first of them; those of [begin, end) are stored, token t at place t + offset.
struct Tokens {
  int first, begin, end;
  int64_t offset;

  __device__ bool stored(int n) const { return begin <= first + n && first + n < end; }
  __device__ int64_t place(int n) const { return first + n + offset; }
  __device__ bool any(int count) const { return begin < first + count && first < end && begin < end; }
};

// The mix -------------------------------------------------------------------------------------------------------------

// A thread's part of the mix: some columns, and every so many of the rows that these depend on. Its numbers are asked
// for before the vectors are there, many at a time, because they come from far.
template <class L, int N>
class Mix {
 public:
  __device__ explicit Mix(const Number* matrix) : matrix_(matrix) {
    const int block = threadIdx.x % (L::dim / L::width), slice = threadIdx.x / (L::dim / L::width);
    column_ = block * L::width, slice_ = slice;
    int first = L::dim;
    if (matrix && slice < L::slices) {
      L::each_coded([&](Coded group) {
        if (column_ + L::width <= group.start || group.start + group.size <= column_) return;
        first = min(first, group.start), stop_ = group.start + group.size;
      });
    }
    row_ = first + slice;
    load();
  }

  // Adds up rows of all vectors, and leaves the sums in shared memory.
  __device__ void multiply() {
    if (!matrix_ || slice_ >= L::slices) return;
    float sums[N][L::width] = {};
    for (; row_ < stop_; row_ += AHEAD * L::slices, load()) {
#pragma unroll
      for (int a = 0; a < AHEAD; ++a) {
        if (row_ + a * L::slices < stop_) add(ahead_[a], row_ + a * L::slices, sums);
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      Some<float, L::width> some;
#pragma unroll
      for (int w = 0; w < L::width; ++w) some.at[w] = sums[n][w];
      *reinterpret_cast<Some<float, L::width>*>(Memory<L, N>::sum(slice_, n, column_)) = some;
    }
  }

 private:
  using Numbers = Some<Number, L::width>;
  static constexpr int AHEAD = (N == 1 ? 32 : 16) / sizeof(Number);

  __device__ void load() {
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      const int row = row_ + a * L::slices;
      if (row < stop_) ahead_[a] = *reinterpret_cast<const Numbers*>(matrix_ + row * L::dim + column_);
    }
  }

  __device__ static void add(const Numbers& numbers, int row, float (&sums)[N][L::width]) {
    constexpr int AT_ONCE = N < 4 ? N : 4;
#pragma unroll
    for (int n = 0; n < N; n += AT_ONCE) {
      const auto x = *reinterpret_cast<const Some<float, AT_ONCE>*>(Memory<L, N>::vector(row, n));
#pragma unroll
      for (int m = 0; m < AT_ONCE; ++m)
#pragma unroll
        for (int w = 0; w < L::width; ++w) sums[n + m][w] += x.at[m] * to_float(numbers.at[w]);
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
  for (int slice = 0; slice < L::slices; ++slice) sum += *Memory<L, N>::sum(slice, n, i);
  return sum;
}

// Scales --------------------------------------------------------------------------------------------------------------

// The fraction bits of 2^(n / 8), rounded to a float. (An array that is indexed would lie in slow memory.)
constexpr uint32_t fraction_of_eighths(int n) {
  const uint32_t low = n == 0 ? 0 : n == 1 ? 0x0b95c2 : n == 2 ? 0x1837f0 : 0x25fed7;
  const uint32_t high = n == 4 ? 0x3504f3 : n == 5 ? 0x45672a : n == 6 ? 0x5744fd : 0x6ac0c7;
  return n < 4 ? low : high;
}

// The scale 2^((byte - 128) / 8).
__device__ inline float scale_of(int byte) {
  return __uint_as_float(static_cast<uint32_t>(byte / 8 - 16 + 127) << 23 | fraction_of_eighths(byte % 8));
}

// The byte of the smallest scale that is not below a number: how many scales are below it. 8 for each power of two, and
// those of its own octave.
__device__ inline int scale_byte(float peak) {
  const uint32_t bits = __float_as_uint(peak), fraction = bits & 0x7fffff;
  int byte = (static_cast<int>(bits >> 23) - 127 + 16) * 8;
#pragma unroll
  for (int n = 0; n < 8; ++n) byte += fraction > fraction_of_eighths(n);
  return min(max(byte, 0), 255);
}

// Codes ---------------------------------------------------------------------------------------------------------------

// Codes of a group of a vector, by a warp. Returns the byte of its scale.
template <class L, int N>
__device__ int quantize(const Coded& group, int n, bool mix) {
  using M = Memory<L, N>;
  const int lane = threadIdx.x % 32;
  float peak = 0;
  for (int i = group.start + lane; i < group.start + group.size; i += 32) {
    const float x = mixed<L, N>(mix, n, i);
    *M::sum(0, n, i) = x;  // this lane alone reads it, here and below
    peak = fmaxf(peak, fabsf(x));
  }
  for (int other = 16; other; other /= 2) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, other));
  const int byte = scale_byte(peak);
  const float scale = scale_of(byte), half = 1 << (group.bits - 1), most = (1 << group.bits) - 1;
  for (int i = group.start + lane; i < group.start + group.size; i += 32) {
    const float step = floorf(*M::sum(0, n, i) / scale * half) + half;
    *M::code(n, i) = static_cast<uint8_t>(fminf(fmaxf(step, 0), most));
  }
  return byte;
}

// A byte of a part of the codes of a group: fields of `part` bits that begin at bit `shift` of the codes.
__device__ inline int gather(const uint8_t* codes, int size, int part, int shift, int byte) {
  int fields = 0;
#pragma unroll
  for (int slot = 0; slot < 8 / part; ++slot) {
    const int i = byte * (8 / part) + slot;
    if (i < size) fields |= (codes[i] >> shift & ((1 << part) - 1)) << slot * part;
  }
  return fields;
}

// A byte of the row of a vector. Bytes after the last group are 0.
template <class L>
__device__ uint8_t byte_of_row(const uint8_t* codes, int byte) {
  int result = 0;
  L::each_coded([&](Coded group) {
    const int first = first_part(group.bits), last = last_part(group.bits);
    const int bytes = part_bytes(group.size, first), more = part_bytes(group.size, last);
    if (byte >= 0 && byte < bytes) result = gather(codes + group.start, group.size, first, last, byte);
    byte -= bytes;
    if (last && byte >= 0 && byte < more) result = gather(codes + group.start, group.size, last, 0, byte);
    byte -= more;
  });
  return static_cast<uint8_t>(result);
}

// Stores the N vectors in shared memory that are to be stored; all but their coordinates of 16 bits.
template <class L, int N>
__device__ void store(const Packed& to, int64_t b, int64_t h, const Tokens& tokens, Mix<L, N>& mix) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  mix.multiply();
  __syncthreads();
  for (int n = 0; n < N; ++n) {
    if (!tokens.stored(n)) continue;
    L::each_coded([&](Coded group) {
      if ((n * L::coded() + group.scale) % WARPS != warp) return;
      const int byte = quantize<L, N>(group, n, to.matrix);
      if (lane == 0) to.scales.row(b, h, tokens.place(n))[group.scale] = static_cast<uint8_t>(byte);
    });
  }
  __syncthreads();
  constexpr int ROW = L::row_bytes();
  for (int i = threadIdx.x; i < N * ROW; i += THREADS) {
    const int n = i / ROW, byte = i % ROW;
    if (tokens.stored(n)) to.codes.row(b, h, tokens.place(n))[byte] = byte_of_row<L>(Memory<L, N>::code(n), byte);
  }
}

template <class L, int N>
constexpr int ITEMS = (N * L::dim + THREADS - 1) / THREADS;

// Calls a function for each coordinate that a thread moves: item k of the thread is coordinate i of vector n.
template <class L, int N, typename Function>
__device__ void each_item(const Function& function) {
#pragma unroll
  for (int k = 0; k < ITEMS<L, N>; ++k) {
    const int item = threadIdx.x + k * THREADS;
    if (item < N * L::dim) function(k, item / L::dim, item % L::dim);
  }
}

// A coordinate of a vector that is stored: it is mixed later, or stored as it is.
template <class L, int N>
__device__ void put(Number x, int n, int i, const Packed& to, int64_t b, int64_t h, const Tokens& tokens) {
  *Memory<L, N>::vector(i, n) = to_float(x);
  const int place = L::place_of_whole(i);
  if (place >= 0) to.whole.row(b, h, tokens.place(n))[place] = x;
}

// Kernels -------------------------------------------------------------------------------------------------------------

template <class L, int N>
__device__ void pack_some(const PackArguments& a) {
  const int64_t b = blockIdx.z, h = blockIdx.y;
  const Tokens tokens{static_cast<int>(blockIdx.x) * N, 0, a.tokens, 0};
  Mix<L, N> mix(a.to.matrix);
  each_item<L, N>([&](int, int n, int i) {
    if (tokens.stored(n)) put<L, N>(a.x.row(b, h, tokens.first + n)[i], n, i, a.to, b, h, tokens);
    else *Memory<L, N>::vector(i, n) = 0;
  });
  if constexpr (L::coded() > 0) {
    __syncthreads();
    store(a.to, b, h, tokens, mix);
  }
}

// Where new tokens of a row go.
struct Counters {
  int64_t length;  // tokens before
  int slot;        // of the first new token in the ring
  int64_t sink;    // of the first new token: which one of its row it is
  int begin, end;  // new tokens for each of which one leaves the ring that the history keeps
  int64_t offset;  // from a new token to the place in the history of the one that leaves for it

  __device__ Counters(const TakeInArguments& a, int64_t b, int64_t room) {
    length = a.length_at ? *a.length_at : a.length;
    const int64_t oldest = max(a.first_at ? *a.first_at : a.first, a.start), leaving = length - a.size;
    const bool is_short = length >> 32 == 0;  // 64-bit divisions are slow
    slot = static_cast<int>(is_short ? static_cast<uint32_t>(length) % a.size : length % a.size);
    sink = length - (a.padding ? a.padding[b] : 0);
    offset = leaving - a.start;
    begin = static_cast<int>(min(max(oldest - leaving, int64_t{0}), int64_t{a.tokens}));
    end = static_cast<int>(max(min(room - offset, int64_t{a.tokens}), int64_t{0}));  // nothing past the memory
  }
};

// New tokens, N of a head. Of those that share a slot of the ring the first one takes out what was there and puts in
// the newest of them; for the others, tokens leave that are new themselves. So a coordinate of a slot is one thread's
// alone, and programs do not depend on each other.
template <class L, int N>
__device__ void take_in_some(const Side& side, const TakeInArguments& a) {
  const int64_t b = blockIdx.z / 2, h = blockIdx.y;
  Mix<L, N> mix(side.history.matrix);
  const int first = blockIdx.x * N, turned = min(a.tokens, a.size);  // slots whose tokens change
  Number newest[ITEMS<L, N>], leaving[ITEMS<L, N>];  // all are read before any is written: they come from far
  each_item<L, N>([&](int k, int n, int i) {
    const int t = first + n;
    if (t < turned) newest[k] = side.x.row(b, h, t + (a.tokens - 1 - t) / a.size * a.size)[i];
  });
  const Counters counters(a, b, side.history.room);
  const Tokens tokens{first, counters.begin, counters.end, counters.offset};
  const auto slot = [&](int t) { return side.recent.row(b, h, a.sinks + (counters.slot + t) % a.size); };
  each_item<L, N>([&](int k, int n, int i) {
    const int t = first + n;
    if (tokens.stored(n)) leaving[k] = t < a.size ? slot(t)[i] : side.x.row(b, h, t - a.size)[i];
  });
  each_item<L, N>([&](int k, int n, int i) {
    const int t = first + n;
    const int64_t sink = counters.sink + t;
    if (tokens.stored(n)) put<L, N>(leaving[k], n, i, side.history, b, h, tokens);
    else *Memory<L, N>::vector(i, n) = 0;
    if (t < turned) slot(t)[i] = newest[k];
    if (t < a.tokens && 0 <= sink && sink < a.sinks) side.recent.row(b, h, sink)[i] = side.x.row(b, h, t)[i];
  });
  if constexpr (L::coded() > 0) {
    if (!tokens.any(N)) return;
    __syncthreads();
    store(side.history, b, h, tokens, mix);
  }
}

// [batch, heads, tokens, d] to a layout. Programs: tokens / MANY rounded up, heads, batch.
extern "C" __global__ void __launch_bounds__(THREADS) pack(const PackArguments a) {
  if (a.values) pack_some<Values, MANY>(a);
  else pack_some<Keys, MANY>(a);
}

// New tokens into a cache. Programs: tokens, heads, 2 batch.
extern "C" __global__ void __launch_bounds__(THREADS, 1) take_in(const TakeInArguments a) {
  if (blockIdx.z % 2) take_in_some<Values, 1>(a.values, a);
  else take_in_some<Keys, 1>(a.keys, a);
}

// The same, for many new tokens. Programs: tokens / MANY rounded up, heads, 2 batch.
extern "C" __global__ void __launch_bounds__(THREADS) take_in_many(const TakeInArguments a) {
  if (blockIdx.z % 2) take_in_some<Values, MANY>(a.values, a);
  else take_in_some<Keys, MANY>(a.keys, a);
}
