// What the CPU kernels share: numbers of the cache's dtypes, the parts of codes and the scales of swan/storage/codes.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Half.h>

#include <array>
#include <cmath>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// The name of an operator in the variant that is compiled: several of them may be loaded together.
#define SWAN_TEXT_OF(x) #x
#define SWAN_TEXT(x) SWAN_TEXT_OF(x)
#define SWAN_OPERATOR(name) #name "_" SWAN_TEXT(SWAN_VARIANT)

namespace swan {

// Of a code, high bits first.
constexpr int PARTS[9][2] = {{0, 0}, {1, 0}, {2, 0}, {2, 1}, {4, 0}, {4, 1}, {4, 2}, {0, 0}, {4, 4}};

// Bytes of so many codes, each part rounded up.
inline int64_t code_bytes(int64_t size, int64_t bits) {
  int64_t bytes = 0;
  for (const int part : PARTS[bits]) bytes += (size * part + 7) / 8;
  return bytes;
}

// 2 ** ((byte - 128) / 8) for each byte.
inline const std::array<float, 256>& scales_of_bytes() {
  static const auto table = [] {
    std::array<float, 256> t;
    for (int i = 0; i < 256; ++i) t[i] = std::exp2((i - 128) / 8.f);
    return t;
  }();
  return table;
}

// A row of numbers of the cache's dtype.
inline void to_float(const uint8_t* from, at::ScalarType dtype, int64_t count, float* to) {
  switch (dtype) {
    case at::kFloat:
      std::memcpy(to, from, count * sizeof(float));
      break;
    case at::kBFloat16: {
      const auto* half = reinterpret_cast<const uint16_t*>(from);
      auto* bits = reinterpret_cast<uint32_t*>(to);
      for (int64_t i = 0; i < count; ++i) bits[i] = static_cast<uint32_t>(half[i]) << 16;
      break;
    }
    default: {
      const auto* half = reinterpret_cast<const c10::Half*>(from);
      int64_t i = 0;
#if defined(__AVX512F__)
      for (; i + 16 <= count; i += 16)
        _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half + i))));
#endif
      for (; i < count; ++i) to[i] = half[i];
    }
  }
}

}  // namespace swan
