// Attention through tiles: tokens are unpacked to floats in the L1 cache, once for all query rows of their KV head.
#pragma once

#include <limits>

#include "source.h"

namespace swan {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;  // floats of a vector
#else
constexpr int64_t LANES = 8;
#endif
constexpr int64_t TILE = 32;  // tokens unpacked at a time
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector x) { *reinterpret_cast<Vector*>(to) = x; }

// e^x to 2 units in the last place, for x <= 0; what is below the smallest normal number is 0.
inline float exponential(float x) {
  const float n = std::rint(std::max(x, -87.f) * 1.44269504f);
  const float r = std::fma(n, -1.42860677e-6f, std::fma(n, -0.693145752f, std::max(x, -87.f)));
  float p = 1.9875691500e-4f;
  p = std::fma(p, r, 1.3981999507e-3f);
  p = std::fma(p, r, 8.3334519073e-3f);
  p = std::fma(p, r, 4.1665795894e-2f);
  p = std::fma(p, r, 1.6666665459e-1f);
  p = std::fma(p, r, 5.0000001201e-1f);
  p = std::fma(p, r * r, r + 1.f);
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return x < -87.f ? 0.f : p * power;
}

#if defined(__AVX512F__)
// Sums of neighbouring lanes, then of pairs of them, then of quarters, of two registers each time.
inline __m512 twos(__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
inline __m512 fours(__m512 a, __m512 b) {
  const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
}
inline __m512 quarters(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}
#endif

// The sums of as many vectors as one has lanes.
inline Vector sums(const Vector (&x)[LANES]) {
#if defined(__AVX512F__)
  __m512 y[4];
  for (int i = 0; i < 4; ++i) y[i] = fours(twos(x[4 * i], x[4 * i + 1]), twos(x[4 * i + 2], x[4 * i + 3]));
  return quarters(quarters(y[0], y[1]), quarters(y[2], y[3]));
#elif defined(__AVX2__)
  const auto half = [&](int i) {
    const __m256 a = _mm256_hadd_ps(x[i], x[i + 1]), b = _mm256_hadd_ps(x[i + 2], x[i + 3]);
    return _mm256_hadd_ps(a, b);
  };
  const __m256 a = half(0), b = half(4);
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
#else
  Vector found{};
  for (int i = 0; i < LANES; ++i) {
    float sum = 0;
    for (int j = 0; j < LANES; ++j) sum += x[i][j];
    found[i] = sum;
  }
  return found;
#endif
}

// scores[row][token] of ROWS rows and all tokens of a tile.
template <int ROWS>
void dot(const float* q, const float* tile, int64_t width, float* scores) {
  constexpr int TOKENS = LANES / ROWS;
  for (int64_t t = 0; t < TILE; t += TOKENS) {
    Vector sum[LANES] = {};
    for (int64_t c = 0; c < width; c += LANES) {
      Vector x[ROWS];
      for (int r = 0; r < ROWS; ++r) x[r] = load(q + r * width + c);
      for (int i = 0; i < TOKENS; ++i) {
        const Vector key = load(tile + (t + i) * width + c);
        for (int r = 0; r < ROWS; ++r) sum[r * TOKENS + i] += x[r] * key;
      }
    }
    const Vector found = sums(sum);
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < TOKENS; ++i) scores[r * TILE + t + i] = found[r * TOKENS + i];
  }
}

// out[row] = out[row] * factor[row] + sum over tokens of weights[row][token] * tile[token]
template <int ROWS>
void accumulate(const float* weights, const float* tile, int64_t count, int64_t width, const float* factor, float* out) {
  constexpr int WIDE = LANES / 4;
  for (int64_t c = 0; c < width; c += WIDE * LANES) {
    Vector sum[ROWS][WIDE];
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < WIDE; ++i) sum[r][i] = load(out + r * width + c + i * LANES) * factor[r];
    for (int64_t t = 0; t < count; ++t) {
      Vector value[WIDE];
      for (int i = 0; i < WIDE; ++i) value[i] = load(tile + t * width + c + i * LANES);
      for (int r = 0; r < ROWS; ++r)
        for (int i = 0; i < WIDE; ++i) sum[r][i] += weights[r * TILE + t] * value[i];
    }
    for (int r = 0; r < ROWS; ++r)
      for (int i = 0; i < WIDE; ++i) store(out + r * width + c + i * LANES, sum[r][i]);
  }
}

template <typename Function>
void by_rows(int64_t rows, Function function) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) function(std::integral_constant<int, 4>(), r);
  for (; r + 2 <= rows; r += 2) function(std::integral_constant<int, 2>(), r);
  for (; r < rows; ++r) function(std::integral_constant<int, 1>(), r);
}

struct Mask {  // tokens lie side by side; null: all are seen
  const bool* data = nullptr;
  int64_t batch = 0, head = 0, query = 0;  // strides
};

// Attention of `rows` rows of one KV head over tokens begin to end; out is not divided by total.
struct Stretch {
  const Source &k, &v;
  const Mask& mask;
  const float* q;  // [rows, k width], times the scale
  int64_t b, h, rows, groups, queries;
  float *out, *peak, *total;  // [rows, v width], [rows], [rows]

  // Whether a row sees each token; null: it sees all.
  const bool* seen_by(int64_t row) const {
    const int64_t head = h * groups + row / queries, query = row % queries;
    return mask.data ? mask.data + b * mask.batch + head * mask.head + query * mask.query : nullptr;
  }

  void run(int64_t begin, int64_t end) const {
    const int64_t k_width = rounded_up(k.used, CHUNK), v_width = rounded_up(v.used, CHUNK);
    std::vector<float> tile(TILE * k_width), v_tile(TILE * v_width), scores(rows * TILE), factor(rows);
    std::fill_n(out, rows * v_width, 0.f);
    std::fill_n(peak, rows, NOTHING);
    std::fill_n(total, rows, 0.f);
    for (int64_t start = begin; start < end; start += TILE) {
      const int64_t count = std::min(TILE, end - start);
      if (mask.data && !any(start, count)) continue;
      for (int64_t t = 0; t < count; ++t) k.unpack(b, h, start + t, tile.data() + t * k_width);
      by_rows(rows, [&](auto n, int64_t r) {
        dot<n>(q + r * k_width, tile.data(), k_width, scores.data() + r * TILE);
      });
      for (int64_t r = 0; r < rows; ++r) factor[r] = weigh(r, start, count, scores.data() + r * TILE);
      for (int64_t t = 0; t < count; ++t) v.unpack(b, h, start + t, v_tile.data() + t * v_width);
      by_rows(rows, [&](auto n, int64_t r) {
        accumulate<n>(scores.data() + r * TILE, v_tile.data(), count, v_width, factor.data() + r, out + r * v_width);
      });
    }
  }

 private:
  bool any(int64_t start, int64_t count) const {
    for (int64_t r = 0; r < rows; ++r)
      if (std::memchr(seen_by(r) + start, true, count)) return true;
    return false;
  }

  // Scores become weights; returns the factor of what was there before.
  float weigh(int64_t r, int64_t start, int64_t count, float* score) const {
    if (const bool* seen = seen_by(r))
      for (int64_t t = 0; t < count; ++t)
        if (!seen[start + t]) score[t] = NOTHING;
    for (int64_t t = count; t < TILE; ++t) score[t] = NOTHING;
    Vector high = load(score);
    for (int64_t t = LANES; t < TILE; t += LANES) {
      const Vector x = load(score + t);
      high = x > high ? x : high;
    }
    float most = peak[r];
    for (int i = 0; i < LANES; ++i) most = std::max(most, high[i]);
    if (most == NOTHING && std::none_of(score, score + count, [](float x) { return std::isnan(x); })) {
      std::fill_n(score, TILE, 0.f);
      return 1.f;
    }
    if (most == NOTHING) most = 0;  // NaN, which the total shows
    for (int64_t t = 0; t < TILE; ++t) score[t] = exponential(score[t] - most);
    Vector each = load(score);
    for (int64_t t = LANES; t < TILE; t += LANES) each += load(score + t);
    float sum = 0;
    for (int i = 0; i < LANES; ++i) sum += each[i];
    const float factor = exponential(peak[r] - most);
    total[r] = total[r] * factor + sum;
    peak[r] = most;
    return factor;
  }
};

}  // namespace swan
