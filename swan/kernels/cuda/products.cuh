// Products of packed keys and values with numbers in registers, from bytes straight to operands of tensor cores.
//
// Scores of 16 tokens and 8 query rows are S^T = K q^T, outputs O^T = V^T P^T. Codes become half precision by AND and
// OR, two in a word. What is constant in these numbers is taken off sums, never off codes.
#pragma once

#include "numbers.cuh"
#include "shares.cuh"

__device__ constexpr uint32_t twice(uint32_t x) { return x * 0x10001u; }
__device__ constexpr uint32_t ones(int bits) { return (1u << bits) - 1; }

// Keys ---------------------------------------------------------------------------------------------------------------

// A lane's quarter of a coded group is in blocks of 16, 8 and 4 coordinates. Fields j and j + width / 2 of a block are
// a pair, so that wide blocks of few bits are words of pairs already. Of a group of 16 bits numbers 2j and 2j + 1 are a
// pair.
struct Block {
  int first, width;
};
__device__ constexpr Block block_of(Span span, int b) {
  const int quarter = span.size / 4, most = span.bits < 4 ? 16 : 8;
  int first = 0;
  while (true) {
    const int left = quarter - first, width = left >= most ? most : left >= 8 ? 8 : 4;
    if (b-- == 0) return {first, width};
    first += width;
  }
}
__device__ constexpr int blocks_of(Span span) {
  int count = 0;
  for (int first = 0; first < span.size / 4; first += block_of(span, count++).width) {
  }
  return count;
}

// Calls function(i, first, second, j): pair i of a coded group, its coordinates in the quarter, its place in its block.
template <class L, int G, class Function>
__device__ __forceinline__ void each_pair(const Function& function) {
  constexpr Span span = L::layout.spans[G];
  unrolled<blocks_of(span)>([&](auto b) {
    constexpr Block block = block_of(span, b);
#pragma unroll
    for (int j = 0; j < block.width / 2; ++j)
      function(block.first / 2 + j, block.first + j, block.first + j + block.width / 2, j);
  });
}

// Fields of P bits of a block, the first ones of pairs in one half word, the second ones in the other.
template <int P, int FIRST, int WIDTH>
__device__ __forceinline__ uint32_t halves(const uint32_t* words) {
  constexpr int HALF = WIDTH / 2 * P, BEGIN = FIRST * P % 32;  // bits
  const uint32_t x = words[FIRST * P / 32];
  if constexpr (HALF == 16) return x;
  else if constexpr (HALF == 8) return __byte_perm(x, 0, BEGIN ? 0x4342 : 0x4140);
  else return (x >> BEGIN & ones(2 * HALF)) * (1 + (1 << (16 - HALF)));
}

// Field J of each half word is left where it stands in its byte, which becomes bits of the mantissa, and the exponent
// makes up for it: 2^SHIFT (2^(10 - at) + field).
template <int P, int SHIFT, int J>
__device__ __forceinline__ uint32_t key_field(uint32_t x) {
  constexpr int byte = J * P / 8 * 8, at = J * P - byte;
  return and_or(x >> byte, twice(ones(P) << at), twice(0x3c00u + ((SHIFT + 10 - at) << 10)));
}
// What field j of a code's parts gives together when the code is the middle one.
__device__ constexpr float middle_key(Span span, int j) {
  float sum = 0;
  for (int i = 0; i < span.parts(); ++i) {
    const int p = span.part(i);
    sum += (1 << span.shift(i)) * ((1 << (10 - j * p % 8)) + ones(p) * 0.5f);
  }
  return sum;
}

// Adds the products of a part with queries, for tokens in two rows.
template <class L, int G, int PART>
__device__ __forceinline__ void add_key_part(float (&sums)[4], const uint8_t* const (&row)[2], int t,
                                             const uint32_t* q) {
  constexpr Span span = L::layout.spans[G];
  constexpr int P = span.part(PART), SHIFT = span.shift(PART), BITS = span.size / 4 * P;
  uint32_t x[2][(BITS + 31) / 32];
  for (int i = 0; i < 2; ++i) load_share<4, BITS, span.part_byte(PART), L::layout.row>(row[i], t, x[i]);
  unrolled<blocks_of(span)>([&](auto b) {
    constexpr Block block = block_of(span, b);
    const uint32_t u = halves<P, block.first, block.width>(x[0]), v = halves<P, block.first, block.width>(x[1]);
    const uint32_t* pairs = q + block.first / 2;
    unrolled<block.width / 4>([&](auto two) {
      constexpr int J = 2 * two;
      const uint32_t a[4] = {key_field<P, SHIFT, J>(u), key_field<P, SHIFT, J>(v), key_field<P, SHIFT, J + 1>(u),
                             key_field<P, SHIFT, J + 1>(v)};
      mma_half(sums, a, pairs[J], pairs[J + 1]);
    });
  });
}

template <class L, int G>
__device__ __forceinline__ void add_whole_keys(float (&sums)[4], const uint8_t* const (&row)[2], int t,
                                               const uint32_t* q) {
  constexpr Span span = L::layout.spans[G];
  uint32_t x[2][span.size / 8];
  for (int i = 0; i < 2; ++i) load_share<4, span.size * 4, 2 * span.whole, 2 * L::layout.whole>(row[i], t, x[i]);
#pragma unroll
  for (int j = 0; j < span.size / 8; j += 2) {
    const uint32_t a[4] = {x[0][j], x[1][j], x[0][j + 1], x[1][j + 1]};
    Whole::multiply(sums, a, q[j], q[j + 1]);
  }
}

// Values -------------------------------------------------------------------------------------------------------------

// A code of values becomes a mantissa without an exponent (a subnormal number), which is 2^(at - 24) times the code
// when it stands at bit `at`: a constant would be large beside what sums over tokens leave. This is `at` for code j of
// a lane's eighth. Shifts are few where one part is left where it stands in its byte: the low one of 3 bits, else the
// high one if there is room below.
__device__ constexpr int place_of_value(Span span, int j) {
  const int high = j * span.part(0) % 8, low = span.shift(0);
  if (span.parts() == 1) return high;
  if (span.bits == 3) return j % 8;
  return high > low ? high - low : 0;
}

// P bits of each half word, from bit FROM on, at bit TO.
template <int P, int FROM, int TO>
__device__ __forceinline__ uint32_t bits_at(uint32_t x, uint32_t others = 0) {
  constexpr int RIGHT = FROM > TO ? FROM - TO : 0, LEFT = FROM < TO ? TO - FROM : 0;
  return and_or(x >> RIGHT << LEFT, twice(ones(P) << TO), others);
}

// Code J of a lane's eighth for two tokens, of whose rows these are the lane's words.
template <class L, int G, int J>
__device__ __forceinline__ uint32_t value_code(const uint32_t* const (&first)[2], const uint32_t* const (&second)[2]) {
  constexpr Span span = L::layout.spans[G];
  constexpr int AT = place_of_value(span, J);
  const auto halves = [](const uint32_t* const (&words)[2], auto half) {  // one of each token
    return __byte_perm(words[0][half / 2], words[1][half / 2], half % 2 ? 0x7632 : 0x5410);
  };
  constexpr int P = span.part(0), HALF = 16 / P;  // fields in half a word
  uint32_t code = bits_at<P, J % HALF * P, AT + span.shift(0)>(halves(first, Constant<J / HALF>{}));
  if constexpr (span.parts() == 2) {
    constexpr int Q = span.part(1), MORE = 16 / Q;
    code = bits_at<Q, J % MORE * Q, AT>(halves(second, Constant<J / MORE>{}), code);
  }
  return code;
}

// o += V^T weights for 16 tokens in four rows of a lane. Weights are pairs of tokens, b0 and b1; tile i of `o` has
// coordinates 2i (rows g of the product) and 2i + 1 (rows g + 8) of lane g's eighth.
template <class L, int G>
__device__ __forceinline__ void add_coded_values(float (*o)[4], const uint8_t* const (&row)[4], int g, uint32_t b0,
                                                 uint32_t b1) {
  constexpr Span span = L::layout.spans[G];
  constexpr int COUNT = span.size / 8, LAST = span.parts() - 1;
  constexpr int BITS = COUNT * span.part(0), MORE = COUNT * span.part(LAST);
  uint32_t x[4][(BITS + 31) / 32], y[4][(MORE + 31) / 32];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    load_share<8, BITS, span.part_byte(0), L::layout.row>(row[i], g, x[i]);
    if constexpr (LAST > 0) load_share<8, MORE, span.part_byte(1), L::layout.row>(row[i], g, y[i]);
  }
  unrolled<COUNT / 2>([&](auto pair) {
    constexpr int J = 2 * pair;
    const uint32_t* const x0[2] = {x[0], x[1]}, *const x1[2] = {x[2], x[3]};
    const uint32_t* const y0[2] = {y[0], y[1]}, *const y1[2] = {y[2], y[3]};
    const uint32_t a[4] = {value_code<L, G, J>(x0, y0), value_code<L, G, J + 1>(x0, y0), value_code<L, G, J>(x1, y1),
                           value_code<L, G, J + 1>(x1, y1)};
    mma_half(o[pair], a, b0, b1);
  });
}

template <class L, int G>
__device__ __forceinline__ void add_whole_values(float (*o)[4], const uint8_t* const (&row)[4], int g, uint32_t b0,
                                                 uint32_t b1) {
  constexpr Span span = L::layout.spans[G];
  uint32_t x[4][span.size / 16];
#pragma unroll
  for (int i = 0; i < 4; ++i) load_share<8, span.size * 2, 2 * span.whole, 2 * L::layout.whole>(row[i], g, x[i]);
#pragma unroll
  for (int j = 0; j < span.size / 16; ++j) {
    const uint32_t a[4] = {__byte_perm(x[0][j], x[1][j], 0x5410), __byte_perm(x[0][j], x[1][j], 0x7632),
                           __byte_perm(x[2][j], x[3][j], 0x5410), __byte_perm(x[2][j], x[3][j], 0x7632)};
    Whole::multiply(o[j], a, b0, b1);
  }
}
