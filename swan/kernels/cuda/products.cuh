// Products of packed keys and values with numbers in registers, from bytes straight to operands of tensor cores.
//
// Scores of 16 tokens and 8 query rows are S^T = K q^T, outputs O^T = V^T P^T. The order of coordinates in a product is
// free, so lane t of 4 (keys) or g of 8 (values) owns a quarter or an eighth of each part of a row, in one piece.
// A field of a code becomes a number by AND and OR: its bits go into the mantissa of 2^e (2^P + field). The constant is
// taken off sums, never off codes. Keys become half precision, whose mantissa has room for several fields, so that few
// are shifted; values become bfloat16, because sums over tokens must not carry large constants.
#pragma once

#include "layout.cuh"
#include "numbers.cuh"

template <class L>
constexpr bool in_sixteens() {
  for (int i = 0; i < L::layout.count; ++i)
    if (L::layout.spans[i].size % 16) return false;
  return true;
}
static_assert(in_sixteens<Keys>() && in_sixteens<Values>(), "sizes of groups are not multiples of 16");

// Shares -------------------------------------------------------------------------------------------------------------

__device__ constexpr int common_divisor(int a, int b) { return b ? common_divisor(b, a % b) : a; }

// Whether the last word of some owner's share is in two words of the row.
__device__ constexpr bool crosses(int owners, int first, int bits) {
  const int last = bits - (bits - 1) / 32 * 32;
  for (int i = 0; i < owners; ++i)
    if ((first + i * bits) % 32 + last > 32) return true;
  return false;
}

template <int BITS, int ALIGNED>
__device__ __forceinline__ void load_words(const uint8_t* from, uint32_t* words) {
  if constexpr (ALIGNED % 128 == 0) {
    for (int i = 0; i < BITS / 128; ++i) {
      const uint4 x = reinterpret_cast<const uint4*>(from)[i];
      words[4 * i] = x.x, words[4 * i + 1] = x.y, words[4 * i + 2] = x.z, words[4 * i + 3] = x.w;
    }
  } else if constexpr (ALIGNED % 64 == 0) {
    for (int i = 0; i < BITS / 64; ++i) {
      const uint2 x = reinterpret_cast<const uint2*>(from)[i];
      words[2 * i] = x.x, words[2 * i + 1] = x.y;
    }
  } else {
    for (int i = 0; i < BITS / 32; ++i) words[i] = reinterpret_cast<const uint32_t*>(from)[i];
  }
}

// Loads the BITS bits of an owner, the share of one of OWNERS, of a part that begins at byte FIRST of a row. A row has
// ROW bytes, whole words. What is above the share in the last word is anything.
template <int OWNERS, int BITS, int FIRST, int ROW>
__device__ __forceinline__ void load_share(const uint8_t* row, uint32_t owner, uint32_t* words) {
  constexpr int ALIGNED = common_divisor(common_divisor(ROW * 8, FIRST * 8), common_divisor(BITS, 128));
  if constexpr (ALIGNED % 32 == 0) {
    load_words<BITS, ALIGNED>(row + owner * (BITS / 8) + FIRST, words);
  } else if constexpr (BITS == 16 && ALIGNED == 16) {
    words[0] = *reinterpret_cast<const uint16_t*>(row + owner * 2 + FIRST);
  } else if constexpr (8 % BITS == 0) {
    words[0] = (row + owner * BITS / 8)[FIRST] >> owner * BITS % 8;
  } else {
    constexpr int WORDS = (BITS + 31) / 32;
    const uint32_t bit = FIRST * 8 + owner * BITS, shift = bit % 32;
    const uint32_t* from = reinterpret_cast<const uint32_t*>(row) + bit / 32;
    uint32_t low = from[0];
    for (int i = 0; i < WORDS - 1; ++i) {
      const uint32_t high = from[i + 1];
      words[i] = __funnelshift_r(low, high, shift);
      low = high;
    }
    if constexpr (crosses(OWNERS, FIRST * 8, BITS)) {
      constexpr int LAST = ROW / 4 - 1;  // beyond it there is no word, and nothing of the last owner's
      constexpr bool inside = (FIRST * 8 + (OWNERS - 1) * BITS) / 32 + WORDS <= LAST;
      const int next = bit / 32 + WORDS;
      const uint32_t high = reinterpret_cast<const uint32_t*>(row)[inside ? next : min(next, LAST)];
      words[WORDS - 1] = __funnelshift_r(low, high, shift);
    } else {
      words[WORDS - 1] = low >> shift;
    }
  }
}

// Fields -------------------------------------------------------------------------------------------------------------

__device__ constexpr uint32_t twice(uint32_t x) { return x * 0x10001u; }

// Field J of each half word, in half precision: 2^SHIFT (2^(10 - at) + field), with its place `at` in the mantissa.
template <int P, int SHIFT, int J>
__device__ __forceinline__ uint32_t field_half(uint32_t x) {
  constexpr int base = J * P / 8 * 8, at = J * P - base;
  return and_or(x >> base, twice(((1u << P) - 1) << at), twice(0x3c00u + ((SHIFT + 10 - at) << 10)));
}
// The same in bfloat16: 2^SHIFT (2^P + field).
template <int P, int SHIFT, int J>
__device__ __forceinline__ uint32_t field_bf16(uint32_t x) {
  constexpr int at = J * P, to = 7 - P;
  const uint32_t moved = at > to ? x >> (at > to ? at - to : 0) : x << (at > to ? 0 : to - at);
  return and_or(moved, twice(((1u << P) - 1) << to), twice(0x3f80u + ((SHIFT + P) << 7)));
}
// What field J of a code's parts gives together when the code is the middle one.
__device__ constexpr float middle_half(Span span, int j) {
  float sum = 0;
  for (int i = 0; i < span.parts(); ++i) {
    const int p = span.part(i);
    sum += (1 << span.shift(i)) * ((1 << (10 - j * p % 8)) + ((1 << p) - 1) * 0.5f);
  }
  return sum;
}
__device__ constexpr float middle_bf16(Span span) {
  float sum = 0;
  for (int i = 0; i < span.parts(); ++i) sum += (1 << span.shift(i)) * (1.5f * (1 << span.part(i)) - 0.5f);
  return sum;
}

// Keys ---------------------------------------------------------------------------------------------------------------

// A lane's quarter of a group: blocks of 8 coordinates, whose fields j and j + 4 are a pair, then perhaps 4 coordinates
// with pairs j and j + 2. Of a group of 16 bits numbers 2j and 2j + 1 are a pair.
// Calls function(i, first, second, j): pair i of a coded group, and its coordinates in the quarter.
template <class Function>
__device__ __forceinline__ void pairs_of(int size, const Function& function) {
  const int quarter = size / 4;
#pragma unroll
  for (int i = 0; i < quarter / 2; ++i) {
    const int block = i / 4 * 8, j = i % 4, apart = block + 8 <= quarter ? 4 : 2;
    function(i, block + j, block + j + apart, j);
  }
}

// Block b of a part, the first fields of its pairs in one half word, the second in the other: 4 pairs, 2 in a TAIL.
template <int P, bool TAIL>
__device__ __forceinline__ uint32_t halves(const uint32_t* words, int b) {
  constexpr int HALF = TAIL ? 2 * P : 4 * P;  // bits
  if constexpr (P == 4) {
    return TAIL ? __byte_perm(words[b], 0, 0x4140) : words[b];
  } else if constexpr (HALF == 8) {
    return __byte_perm(words[b / 2], 0, b % 2 ? 0x4342 : 0x4140);
  } else {
    const uint32_t x = (words[b * P / 4] >> b * P % 4 * 8) & ((1u << 2 * HALF) - 1);
    return x | x << (16 - HALF);
  }
}

// Adds the products of a part with queries, for tokens in two rows.
template <class L, int G, int PART>
__device__ __forceinline__ void add_key_part(float (&sums)[4], const uint8_t* const (&row)[2], int t,
                                             const uint32_t* q) {
  constexpr Span span = L::layout.spans[G];
  constexpr int P = span.part(PART), SHIFT = span.shift(PART), BITS = span.size / 4 * P, BLOCKS = span.size / 32;
  uint32_t x[2][(BITS + 31) / 32];
  for (int i = 0; i < 2; ++i) load_share<4, BITS, span.part_byte(PART), L::layout.row>(row[i], t, x[i]);
#pragma unroll
  for (int b = 0; b < BLOCKS; ++b) {
    const uint32_t u = halves<P, false>(x[0], b), v = halves<P, false>(x[1], b);
    const uint32_t first[4] = {field_half<P, SHIFT, 0>(u), field_half<P, SHIFT, 0>(v), field_half<P, SHIFT, 1>(u),
                               field_half<P, SHIFT, 1>(v)};
    mma_half(sums, first, q[4 * b], q[4 * b + 1]);
    const uint32_t second[4] = {field_half<P, SHIFT, 2>(u), field_half<P, SHIFT, 2>(v), field_half<P, SHIFT, 3>(u),
                                field_half<P, SHIFT, 3>(v)};
    mma_half(sums, second, q[4 * b + 2], q[4 * b + 3]);
  }
  if constexpr (span.size % 32) {
    const uint32_t u = halves<P, true>(x[0], BLOCKS), v = halves<P, true>(x[1], BLOCKS);
    const uint32_t last[4] = {field_half<P, SHIFT, 0>(u), field_half<P, SHIFT, 0>(v), field_half<P, SHIFT, 1>(u),
                              field_half<P, SHIFT, 1>(v)};
    mma_half(sums, last, q[4 * BLOCKS], q[4 * BLOCKS + 1]);
  }
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

// o += V^T weights for 16 tokens in four rows of a lane. Weights are pairs of tokens, b0 and b1; tile i of `o` has
// coordinates 2i (rows g of the product) and 2i + 1 (rows g + 8) of lane g's eighth.
template <class L, int G, int PART>
__device__ __forceinline__ void add_value_part(float (*o)[4], const uint8_t* const (&row)[4], int g, uint32_t b0,
                                               uint32_t b1) {
  constexpr Span span = L::layout.spans[G];
  constexpr int P = span.part(PART), SHIFT = span.shift(PART), COUNT = span.size / 8, BITS = COUNT * P;
  uint32_t x[4][(BITS + 31) / 32];
#pragma unroll
  for (int i = 0; i < 4; ++i) load_share<8, BITS, span.part_byte(PART), L::layout.row>(row[i], g, x[i]);
  constexpr int HALF = 16 / P;  // fields in half a word
  unrolled<(COUNT + HALF - 1) / HALF>([&](auto h) {
    constexpr int FIRST = h * HALF, FIELDS = COUNT - FIRST < HALF ? COUNT - FIRST : HALF;
    constexpr uint32_t selector = h % 2 ? 0x7632 : 0x5410;
    const uint32_t u = __byte_perm(x[0][h / 2], x[1][h / 2], selector);
    const uint32_t v = __byte_perm(x[2][h / 2], x[3][h / 2], selector);
    unrolled<FIELDS / 2>([&](auto pair) {
      constexpr int J = 2 * pair;
      const uint32_t a[4] = {field_bf16<P, SHIFT, J>(u), field_bf16<P, SHIFT, J + 1>(u), field_bf16<P, SHIFT, J>(v),
                             field_bf16<P, SHIFT, J + 1>(v)};
      mma(o[FIRST / 2 + pair], a, b0, b1);
    });
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
