// What the CPU kernels share: numbers of the cache's dtypes, and the codes and scale bytes of swan/storage/codes.py.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <array>
#include <cmath>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// The name of an operator in the variant that is compiled: several of them may be loaded together.
#define SWAN_TEXT_OF(x) #x
#define SWAN_TEXT(x) SWAN_TEXT_OF(x)
#define SWAN_OPERATOR(name) #name "_" SWAN_TEXT(SWAN_VARIANT)

namespace swan {

// Calls a function with 0, 1, ... N - 1 as constants: sums in an array stay in registers then.
template <int N, typename Function>
[[gnu::always_inline]] inline void each(const Function& function) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (function(std::integral_constant<int, I>()), ...);
  }(std::make_integer_sequence<int, N>());
}

constexpr int64_t MAX_DIM = 256;

// Bits of the parts of a code, high bits first.
constexpr int PARTS[9][2] = {{0, 0}, {1, 0}, {2, 0}, {2, 1}, {4, 0}, {4, 1}, {4, 2}, {0, 0}, {4, 4}};

// 2 ** (1 - bits): the distance of two codes, over the scale.
constexpr float HALVINGS[9] = {2, 1, 1 / 2.f, 1 / 4.f, 1 / 8.f, 1 / 16.f, 1 / 32.f, 1 / 64.f, 1 / 128.f};

// Bytes of so many fields: coordinate i of a part of P bits stands at bit i * P.
constexpr int64_t part_bytes(int64_t size, int part) { return (size * part + 7) / 8; }

// Bytes of so many codes, each part rounded up.
inline int64_t code_bytes(int64_t size, int64_t bits) {
  int64_t bytes = 0;
  for (const int part : PARTS[bits]) bytes += part_bytes(size, part);
  return bytes;
}

// Bytes of a row of codes: a whole number of words of four bytes.
constexpr int64_t row_bytes(int64_t bytes) { return (bytes + 3) / 4 * 4; }

// Eight fields of P bits, from P bytes to a byte each.
template <int P>
inline uint64_t spread(const uint8_t* from) {
  uint64_t x = 0;
  std::memcpy(&x, from, P);
  if constexpr (P == 4) {
    x = (x | x << 16) & 0x0000FFFF0000FFFF;
    x = (x | x << 8) & 0x00FF00FF00FF00FF;
    return (x | x << 4) & 0x0F0F0F0F0F0F0F0F;
  } else if constexpr (P == 2) {
    x = (x | x << 24) & 0x000000FF000000FF;
    x = (x | x << 12) & 0x000F000F000F000F;
    return (x | x << 6) & 0x0303030303030303;
  } else {
    x = (x | x << 28) & 0x0000000F0000000F;
    x = (x | x << 14) & 0x0003000300030003;
    return (x | x << 7) & 0x0101010101010101;
  }
}

// The way back.
template <int P>
inline void gather(uint64_t x, uint8_t* to) {
  if constexpr (P == 4) {
    x = (x | x >> 4) & 0x00FF00FF00FF00FF;
    x = (x | x >> 8) & 0x0000FFFF0000FFFF;
    x |= x >> 16;
  } else if constexpr (P == 2) {
    x = (x | x >> 6) & 0x000F000F000F000F;
    x = (x | x >> 12) & 0x000000FF000000FF;
    x |= x >> 24;
  } else {
    x = (x | x >> 7) & 0x0003000300030003;
    x = (x | x >> 14) & 0x0000000F0000000F;
    x |= x >> 28;
  }
  std::memcpy(to, &x, P);
}

// The scale byte of a group some number of which is NaN, infinite, or above all scales. Its numbers are read as NaN.
constexpr uint8_t NOT_A_NUMBER = 255;

// 2 ** ((byte - 128) / 8) for each byte; NaN for NOT_A_NUMBER.
inline const std::array<float, 256>& scales_of_bytes() {
  static const auto table = [] {
    std::array<float, 256> t;
    for (int i = 0; i < NOT_A_NUMBER; ++i) t[i] = std::exp2((i - 128) / 8.f);
    t[NOT_A_NUMBER] = NAN;
    return t;
  }();
  return table;
}

constexpr int64_t bytes_of(c10::ScalarType dtype) { return dtype == c10::ScalarType::Float ? 4 : 2; }

// A row of numbers of the cache's dtype as floats.
inline void to_float(const uint8_t* from, c10::ScalarType dtype, int64_t count, float* to) {
  switch (dtype) {
    case c10::ScalarType::Float:
      std::memcpy(to, from, count * sizeof(float));
      break;
    case c10::ScalarType::BFloat16: {
      const auto* half = reinterpret_cast<const uint16_t*>(from);
      auto* bits = reinterpret_cast<uint32_t*>(to);
      for (int64_t i = 0; i < count; ++i) bits[i] = static_cast<uint32_t>(half[i]) << 16;
      break;
    }
    default: {
      const auto* half = reinterpret_cast<const c10::Half*>(from);
      int64_t i = 0;
#if defined(__F16C__)
      for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i))));
#endif
      for (; i < count; ++i) to[i] = half[i];
    }
  }
}

// The way back.
inline void from_float(const float* from, c10::ScalarType dtype, int64_t count, uint8_t* to) {
  switch (dtype) {
    case c10::ScalarType::Float:
      std::memcpy(to, from, count * sizeof(float));
      break;
    case c10::ScalarType::BFloat16: {
      auto* half = reinterpret_cast<c10::BFloat16*>(to);
      for (int64_t i = 0; i < count; ++i) half[i] = from[i];
      break;
    }
    default: {
      auto* half = reinterpret_cast<c10::Half*>(to);
      for (int64_t i = 0; i < count; ++i) half[i] = from[i];
    }
  }
}

}  // namespace swan
