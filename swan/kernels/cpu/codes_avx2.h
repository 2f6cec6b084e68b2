// Codes of 32 coordinates (a unit) as numbers of two bytes in registers of AVX2, and their products with others.
//
// Bit fields stand in the order of the coordinates, so that lane l of eight has coordinates 4 l to 4 l + 3, whatever the
// bits of a part, and four shifts and masks take one coordinate of each lane.
#pragma once

#include <utility>

#include "tiles.h"

namespace swan {

inline __m256i both(__m128i a, __m128i b) { return _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1); }
inline __m128i bytes16(const uint8_t* x) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x)); }
inline __m128i bytes8(const uint8_t* x) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)); }
inline int32_t bytes4(const uint8_t* x) {
  int32_t word;
  std::memcpy(&word, x, 4);
  return word;
}

// Fields of P bits in words of two bytes: token a in the lower half, token b in the upper one.
template <int P>
inline __m256i halves(const uint8_t* a, const uint8_t* b) {
  if constexpr (P == 4) return both(bytes16(a), bytes16(b));
  if constexpr (P == 2) return _mm256_cvtepu8_epi16(_mm_unpacklo_epi64(bytes8(a), bytes8(b)));
  const __m256i x = both(_mm_cvtsi32_si128(bytes4(a)), _mm_cvtsi32_si128(bytes4(b)));
  const __m256i twice = _mm256_setr_epi8(0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3, -1,  //
                                         0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3, -1);
  const __m256i turn = _mm256_setr_epi16(16, 1, 16, 1, 16, 1, 16, 1, 16, 1, 16, 1, 16, 1, 16, 1);
  return _mm256_mullo_epi16(_mm256_shuffle_epi8(x, twice), turn);  // the four fields of a word from bit 4 on
}

// The same, words of token a and token b in turn.
template <int P>
inline __m256i turns(const uint8_t* a, const uint8_t* b) {
  __m256i x, y;
  if constexpr (P == 4) {
    x = _mm256_cvtepu16_epi32(bytes16(a)), y = _mm256_cvtepu16_epi32(bytes16(b));
  } else if constexpr (P == 2) {
    x = _mm256_cvtepu8_epi32(bytes8(a)), y = _mm256_cvtepu8_epi32(bytes8(b));
  } else {
    const __m256i first = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28), mask = _mm256_set1_epi32(15);
    x = _mm256_slli_epi32(_mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(bytes4(a)), first), mask), 4);
    y = _mm256_slli_epi32(_mm256_srlv_epi32(_mm256_set1_epi32(bytes4(b)), first), 4);
  }
  return _mm256_or_si256(x, _mm256_slli_epi32(y, 16));
}

// Field J of each word, times 2 ** SHIFT.
template <int P, int SHIFT, int J>
inline __m256i field(__m256i words) {
  constexpr int at = P == 1 ? 4 + J : P * J;
  const __m256i mask = _mm256_set1_epi16(((1 << P) - 1) << SHIFT);
  if constexpr (at > SHIFT) return _mm256_and_si256(_mm256_srli_epi16(words, at - SHIFT), mask);
  return _mm256_and_si256(_mm256_slli_epi16(words, SHIFT - at), mask);
}

template <int B, int J>
inline __m256i code(__m256i upper, __m256i lower) {
  constexpr int P = PARTS[B][0], Q = PARTS[B][1];
  const __m256i x = field<P, Q, J>(upper);
  if constexpr (Q == 0) return x;
  return _mm256_or_si256(x, field<Q ? Q : 1, 0, J>(lower));
}

// sum + products of neighbours in x and in memory. Compilers would keep what is in memory in registers that there are
// not, and copy sums from one to another.
[[gnu::always_inline]] inline __m256i plus_products(__m256i sum, __m256i x, const void* numbers) {
#if defined(__AVXVNNI__)
  return _mm256_dpwssd_avx_epi32(sum, x, _mm256_load_si256(static_cast<const __m256i*>(numbers)));
#else
  __m256i product;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
      : "+x"(sum), "=&x"(product)
      : "x"(x), "m"(*static_cast<const __m256i*>(numbers)));
  return sum;
#endif
}

// Four registers of eight lanes, one after the other lane by lane.
inline void transpose(__m256 a, __m256 b, __m256 c, __m256 d, __m256 (&to)[4]) {
  const __m256d low = _mm256_castps_pd(_mm256_unpacklo_ps(a, b)), high = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
  const __m256d also = _mm256_castps_pd(_mm256_unpacklo_ps(c, d)), more = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
  const __m256 even[2] = {_mm256_castpd_ps(_mm256_unpacklo_pd(low, also)), _mm256_castpd_ps(_mm256_unpacklo_pd(high, more))};
  const __m256 odd[2] = {_mm256_castpd_ps(_mm256_unpackhi_pd(low, also)), _mm256_castpd_ps(_mm256_unpackhi_pd(high, more))};
  for (int i = 0; i < 2; ++i) {
    to[i] = _mm256_permute2f128_ps(even[i], odd[i], 0x20);
    to[i + 2] = _mm256_permute2f128_ps(even[i], odd[i], 0x31);
  }
}

}  // namespace swan
