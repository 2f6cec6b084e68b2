// Vectors to the bytes of a graded layout and back, as swan/kernels/cpu/pack.cpp does on a CPU: prompts whole, and new
// tokens of a cache, which push the oldest ones out of the ring into the history.
//
// Macros: D, K_GROUPS, DV, V_GROUPS (layout.cuh); DTYPE (numbers.cuh).
//
// A program has 2 max(D, DV) threads, rounded up to whole warps, and 37 N max(D, DV) bytes of shared memory for the N
// vectors that it packs at once: 1 in `take_in`, MANY in `take_in_many` and `pack`.
#include "codes.cuh"

constexpr int MANY = 8;

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

// Keys and values that go to slots of pages, which are the first axis of planes.
struct PackPagesArguments {
  Plane<const Number> k, v;
  Packed keys, values;
  const int64_t* slots;  // [tokens]: page times tokens of a page, plus the place in it; below 0: nowhere
  int tokens, page;      // tokens of a page: more than there is `room` for in a plane that has the first ones only
};

struct UnpackArguments {
  Packed from;
  Plane<Number> to;  // [batch, heads, tokens, d], in the coordinates in which vectors are stored
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

// What a program packs ------------------------------------------------------------------------------------------------

// The tokens of a program: `first` is the first of them; those of [begin, end) are stored, token t at place t + offset.
struct Tokens {
  int first, begin, end;
  int64_t offset;

  __device__ bool stored(int n) const { return begin <= first + n && first + n < end; }
  template <typename T>
  __device__ T* row(const Plane<T>& plane, int64_t b, int64_t h, int n) const {
    return plane.row(b, h, first + n + offset);
  }
  __device__ bool any(int count) const { return begin < first + count && first < end && begin < end; }
};

// The same where tokens, those before `end`, have slots of pages, each with `room` for its first tokens.
struct Slots {
  int first, end;
  const int64_t* slots;
  uint32_t page;  // tokens of a page
  int64_t room;

  __device__ uint32_t slot(int n) const { return static_cast<uint32_t>(slots[first + n]); }
  __device__ bool stored(int n) const { return first + n < end && slots[first + n] >= 0 && slot(n) % page < room; }
  template <typename T>
  __device__ T* row(const Plane<T>& plane, int64_t, int64_t h, int n) const {
    return plane.row(slot(n) / page, h, slot(n) % page);
  }
};

// Stores the N vectors in shared memory that are to be stored; all but their coordinates of 16 bits.
template <class L, int N, class Places>
__device__ void store(const Packed& to, int64_t b, int64_t h, const Places& tokens, Mix<L, N>& mix) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  mix.multiply();
  __syncthreads();
  for (int n = 0; n < N; ++n) {
    if (!tokens.stored(n)) continue;
    each_coded<L>([&](const Span& group) {
      if ((n * L::layout.scales + group.scale) % WARPS != warp) return;
      const int byte = quantize<L, N>(group, n, to.matrix);
      if (lane == 0) tokens.row(to.scales, b, h, n)[group.scale] = static_cast<uint8_t>(byte);
    });
  }
  __syncthreads();
  constexpr int ROW = L::layout.row;
  for (int i = threadIdx.x; i < N * ROW; i += THREADS) {
    const int n = i / ROW, byte = i % ROW;
    if (tokens.stored(n)) tokens.row(to.codes, b, h, n)[byte] = byte_of_row<L>(Memory<L, N>::code(n), byte);
  }
}

template <class L, int N>
constexpr int ITEMS = (N * L::layout.d + THREADS - 1) / THREADS;

// Calls a function for each coordinate that a thread moves: item k of the thread is coordinate i of vector n.
template <class L, int N, typename Function>
__device__ void each_item(const Function& function) {
#pragma unroll
  for (int k = 0; k < ITEMS<L, N>; ++k) {
    const int item = threadIdx.x + k * THREADS;
    if (item < N * L::layout.d) function(k, item / L::layout.d, item % L::layout.d);
  }
}

// The place of a coordinate among those of 16 bits, or -1.
template <class L>
__device__ int place_of_whole(int coordinate) {
  int place = -1;
  unrolled<L::layout.count>([&](auto n) {
    constexpr Span span = L::layout.spans[n];
    const int inside = coordinate - span.start;
    if (!span.coded() && 0 <= inside && inside < span.size) place = span.whole + inside;
  });
  return place;
}

// A coordinate of a vector that is stored: it is mixed later, or stored as it is.
template <class L, int N, class Places>
__device__ void put(Number x, int n, int i, const Packed& to, int64_t b, int64_t h, const Places& tokens) {
  *Memory<L, N>::vector(i, n) = to_float(x);
  const int place = place_of_whole<L>(i);
  if (place >= 0) tokens.row(to.whole, b, h, n)[place] = x;
}

// Kernels -------------------------------------------------------------------------------------------------------------

template <class L, int N, class Places>
__device__ void pack_some(const Plane<const Number>& x, const Packed& to, int64_t b, const Places& tokens) {
  const int64_t h = blockIdx.y;
  Mix<L, N> mix(to.matrix);
  each_item<L, N>([&](int, int n, int i) {
    if (tokens.stored(n)) put<L, N>(x.row(b, h, tokens.first + n)[i], n, i, to, b, h, tokens);
    else *Memory<L, N>::vector(i, n) = 0;
  });
  if constexpr (L::layout.scales > 0) {
    __syncthreads();
    store(to, b, h, tokens, mix);
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
  if constexpr (L::layout.scales > 0) {
    if (!tokens.any(N)) return;
    __syncthreads();
    store(side.history, b, h, tokens, mix);
  }
}

// [batch, heads, tokens, d] to a layout. Programs: tokens / MANY rounded up, heads, batch.
extern "C" __global__ void __launch_bounds__(THREADS, 1) pack(const PackArguments a) {
  const Tokens tokens{static_cast<int>(blockIdx.x) * MANY, 0, a.tokens, 0};
  if (a.values) pack_some<Values, MANY>(a.x, a.to, blockIdx.z, tokens);
  else pack_some<Keys, MANY>(a.x, a.to, blockIdx.z, tokens);
}

// [1, heads, tokens, d] to slots of pages. Programs: tokens / MANY rounded up, heads, 2.
extern "C" __global__ void __launch_bounds__(THREADS, 1) pack_pages(const PackPagesArguments a) {
  const Packed& to = blockIdx.z ? a.values : a.keys;
  const Slots tokens{static_cast<int>(blockIdx.x) * MANY, a.tokens, a.slots, static_cast<uint32_t>(a.page), to.room};
  if (blockIdx.z) pack_some<Values, MANY>(a.v, to, 0, tokens);
  else pack_some<Keys, MANY>(a.k, to, 0, tokens);
}

// New tokens into a cache. Programs: tokens, heads, 2 batch.
extern "C" __global__ void __launch_bounds__(THREADS, 1) take_in(const TakeInArguments a) {
  if (blockIdx.z % 2) take_in_some<Values, 1>(a.values, a);
  else take_in_some<Keys, 1>(a.keys, a);
}

// The same, for many new tokens. Programs: tokens / MANY rounded up, heads, 2 batch.
extern "C" __global__ void __launch_bounds__(THREADS, 1) take_in_many(const TakeInArguments a) {
  if (blockIdx.z % 2) take_in_some<Values, MANY>(a.values, a);
  else take_in_some<Keys, MANY>(a.keys, a);
}

// Coordinate i of the vector in a row of each plane.
template <class L>
__device__ float stored_number(const uint8_t* codes, const Number* whole, const uint8_t* scales, int i) {
  float x = 0;
  unrolled<L::layout.count>([&](auto n) {
    constexpr Span span = L::layout.spans[n];
    const int inside = i - span.start;
    if (inside < 0 || inside >= span.size) return;
    if constexpr (span.coded()) {
      int code = 0;
      for (int p = 0; p < span.parts(); ++p) {
        const int bit = inside * span.part(p), field = codes[span.part_byte(p) + bit / 8] >> bit % 8;
        code |= (field & ((1 << span.part(p)) - 1)) << span.shift(p);
      }
      x = (code - ((1 << span.bits) - 1) * 0.5f) * (scale_of(scales[span.scale]) / (1 << (span.bits - 1)));
    } else {
      x = to_float(whole[span.whole + inside]);
    }
  });
  return x;
}

// A vector, by a warp.
template <class L>
__device__ void unpack_one(const UnpackArguments& a) {
  const int64_t b = blockIdx.z, h = blockIdx.y, token = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (token >= a.tokens) return;
  const uint8_t *codes = a.from.codes.row(b, h, token), *scales = a.from.scales.row(b, h, token);
  const Number* whole = a.from.whole.row(b, h, token);
  Number* to = a.to.row(b, h, token);
  for (int i = threadIdx.x % 32; i < L::layout.d; i += 32) to[i] = Number::of(stored_number<L>(codes, whole, scales, i));
}

// Stored vectors back to numbers. Programs: tokens / WARPS rounded up, heads, batch.
extern "C" __global__ void __launch_bounds__(THREADS, 1) unpack(const UnpackArguments a) {
  if (a.values) unpack_one<Values>(a);
  else unpack_one<Keys>(a);
}
