// The bytes of packed rows that a lane owns, loaded as words.
//
// The order of coordinates in a product is free, so lane t of 4 (keys) or g of 8 (values) owns a quarter or an eighth
// of each part of a row, in one piece.
#pragma once

#include "layout.cuh"

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
