// Graded keys and values of few bits without a tile of floats, for CPUs with AVX2: codes as numbers of two bytes are
// multiplied with queries and with weights of two bytes (pmaddwd), sixteen at a time, for up to four query rows of a KV
// head.
//
// The codes of 32 coordinates (a unit) are taken from bytes together (codes_avx2.h). Keys are read from two tokens, one in
// each half of a register, values from two tokens that alternate. A unit that is longer than its group meets zeros in the
// queries, and sums that nobody reads.
#pragma once

#include "codes_avx2.h"

namespace swan {

class Coded {
 public:
  static constexpr int64_t ROWS = 4;  // of queries, at a time

  static bool reads(const Source& k, const Source& v) {
    const auto coded = [](const Source& x) { return !x.topk && !x.coded.empty() && x.dense.empty(); };
    return coded(k) && coded(v) && k.coded.size() <= MAX_GROUPS;
  }

  Coded(const Source& k, const Source& v, bool) : k_(k), v_(v) {
    for (const auto* x : {&k, &v})
      for (const auto& group : x->coded) wide_ = wide_ || group.bits > 6;
  }

  // Out [rows, width of v], not divided by total; peak and total [rows]. q: [rows, width of k], times the scale.
  void attend(const float* q, int64_t rows, int64_t b, int64_t h, int64_t begin, int64_t end,
              const bool* const (&seen)[ROWS], float* out, float* peak, float* total) const {
    if (rows == 1) return attend<1>(q, rows, b, h, begin, end, seen, out, peak, total);
    if (rows == 2) return attend<2>(q, rows, b, h, begin, end, seen, out, peak, total);
    attend<4>(q, rows, b, h, begin, end, seen, out, peak, total);
  }

 private:
  static constexpr int64_t SPAN = 64;     // tokens at a time
  static constexpr int64_t UNIT = 32;     // coordinates whose codes are taken together
  static constexpr int64_t OVERREAD = 16;  // bytes that a unit may read behind its row
  static constexpr int64_t MAX_GROUPS = 16, MAX_UNITS = MAX_DIM / UNIT + MAX_GROUPS;

  const Source &k_, &v_;
  bool wide_ = false;  // codes of 8 bits, which leave less room for the numbers that they are multiplied with

  // The distance of two codes of so many bits, for each scale byte.
  static const float* steps(int64_t bits) {
    static const auto tables = [] {
      std::array<std::array<float, 256>, 9> t;
      for (int64_t n = 0; n < 9; ++n)
        for (int i = 0; i < 256; ++i) t[n][i] = scales_of_bytes()[i] * HALVINGS[n];
      return t;
    }();
    return tables[bits].data();
  }

  static int64_t units(const Source::Group& group) { return (group.size + UNIT - 1) / UNIT; }

  // Rows of 64 tokens: in place, or copied where some are missing or the memory behind them may be another's.
  struct Rows {
    const uint8_t *codes, *scales;
    int64_t code, scale;  // bytes from a token to the next

    Rows(const Source& x, int64_t b, int64_t h, int64_t t, int64_t count, bool copy, std::vector<uint8_t>& memory)
        : codes(x.codes.row(b, h, t)), scales(x.scales.row(b, h, t)), code(x.codes.token), scale(x.scales.token) {
      if (!copy) return;
      const int64_t width = x.row, groups = x.coded.size();
      memory.assign(SPAN * (width + groups) + OVERREAD, 0);
      for (int64_t i = 0; i < count; ++i) {
        std::copy_n(scales + i * scale, groups, memory.data() + i * groups);
        std::copy_n(codes + i * code, width, memory.data() + SPAN * groups + i * width);
      }
      scales = memory.data(), scale = groups;
      codes = memory.data() + SPAN * groups, code = width;
    }
  };

  // Query rows as numbers of two bytes; sums of a group start at minus the middles of the steps.
  template <int R>
  struct Query {
    alignas(32) int16_t number[MAX_UNITS][4][R][16] = {};
    alignas(32) int32_t start[MAX_GROUPS][R][8] = {};
    alignas(32) float unit[8];  // of a number, for each row, twice; 1 where all numbers are zero

    Query(const Coded& coded, const float* q, int64_t rows) {
      const int64_t width = rounded_up(coded.k_.used, CHUNK);
      const float largest = coded.wide_ ? 16383.f : 32767.f;
      std::fill_n(unit, 8, 1.f);
      for (int64_t r = 0; r < std::min<int64_t>(R, rows); ++r) {
        const float* x = q + r * width;
        float most = 0;
        for (int64_t c = 0; c < width; ++c) most = std::max(most, std::abs(x[c]));
        if (most == 0) continue;
        unit[r] = unit[r + 4] = most / largest;
        int64_t u = 0;
        for (size_t g = 0; g < coded.k_.coded.size(); u += units(coded.k_.coded[g]), ++g) {
          const auto& group = coded.k_.coded[g];
          int64_t sum = 0;
          for (int64_t c = 0; c < group.size; ++c) {
            const auto n = static_cast<int16_t>(std::lrint(x[group.start + c] / most * largest));
            int16_t* lanes = number[u + c / UNIT][c % 4][r];
            lanes[c % UNIT / 4] = lanes[c % UNIT / 4 + 8] = n;
            sum += n;
          }
          start[g][r][0] = start[g][r][4] = static_cast<int32_t>(std::lrint(-static_cast<double>(group.middle()) * sum));
        }
      }
    }
  };

  template <typename Function>
  static void by_bits(int64_t bits, const Function& function) {
    switch (bits) {
      case 1: return function(std::integral_constant<int, 1>());
      case 2: return function(std::integral_constant<int, 2>());
      case 3: return function(std::integral_constant<int, 3>());
      case 4: return function(std::integral_constant<int, 4>());
      case 5: return function(std::integral_constant<int, 5>());
      case 6: return function(std::integral_constant<int, 6>());
      default: return function(std::integral_constant<int, 8>());
    }
  }

  // ---- scores

  // Adds a group's share to the scores [token, row] of 64 tokens, or sets them.
  template <int B, int R>
  static void score(const Source::Group& group, const Rows& keys, size_t index, const int16_t (*q)[4][R][16],
                    const int32_t (&start)[R][8], bool first, float* scores) {
    constexpr int P = PARTS[B][0], Q = PARTS[B][1];
    const int64_t count = units(group), next = keys.code, second = group.second() - group.byte;
    const float* table = steps(B);
    const uint8_t *row = keys.codes + group.byte, *scale = keys.scales + index;
    for (int64_t t = 0; t < SPAN; t += 2, row += 2 * next, scale += 2 * keys.scale) {
      __m256i sum[4] = {};
      each<R>([&](auto r) { sum[r] = _mm256_load_si256(reinterpret_cast<const __m256i*>(start[r])); });
      const uint8_t *first_part = row, *second_part = row + second;
      const auto* numbers = q;
      for (int64_t u = 0; u < count; ++u, ++numbers, first_part += UNIT / 8 * P, second_part += UNIT / 8 * Q) {
        const __m256i upper = halves<P>(first_part, first_part + next);
        const __m256i lower = Q ? halves<Q ? Q : 1>(second_part, second_part + next) : upper;
        each<4>([&](auto j) __attribute__((always_inline)) {
          const __m256i x = code<B, j>(upper, lower);
          each<R>([&](auto r) __attribute__((always_inline)) { sum[r] = plus_products(sum[r], x, (*numbers)[j][r]); });
        });
      }
      const __m256i sums = _mm256_hadd_epi32(_mm256_hadd_epi32(sum[0], sum[1]), _mm256_hadd_epi32(sum[2], sum[3]));
      const __m256 step = _mm256_set_m128(_mm_set1_ps(table[scale[keys.scale]]), _mm_set1_ps(table[scale[0]]));
      const __m256 before = first ? _mm256_setzero_ps() : _mm256_load_ps(scores + t * ROWS);
      _mm256_store_ps(scores + t * ROWS, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), step, before));
    }
  }

  // ---- softmax

  // e^x for x <= 0, as `exponential`.
  static __m256 exponentials(__m256 x) {
    const __m256 least = _mm256_set1_ps(-87.f), there = _mm256_cmp_ps(x, least, _CMP_GE_OQ);
    const auto times_plus = [](__m256 a, __m256 b, float c) { return _mm256_fmadd_ps(a, b, _mm256_set1_ps(c)); };
    x = _mm256_max_ps(x, least);
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    const __m256 coarse = _mm256_fmadd_ps(n, _mm256_set1_ps(-0.693145752f), x);
    const __m256 r = _mm256_fmadd_ps(n, _mm256_set1_ps(-1.42860677e-6f), coarse);
    __m256 p = times_plus(_mm256_set1_ps(1.9875691500e-4f), r, 1.3981999507e-3f);
    p = times_plus(p, r, 8.3334519073e-3f);
    p = times_plus(p, r, 4.1665795894e-2f);
    p = times_plus(p, r, 1.6666665459e-1f);
    p = times_plus(p, r, 5.0000001201e-1f);
    p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.f)));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(power)), there);
  }

  static __m256 larger_half(__m256 x) { return _mm256_max_ps(x, _mm256_permute2f128_ps(x, x, 1)); }
  static __m256 sum_of_halves(__m256 x) { return _mm256_add_ps(x, _mm256_permute2f128_ps(x, x, 1)); }

  struct Softmax {
    alignas(32) float score[SPAN * ROWS];  // [token, row]: scores, then weights
    __m256 peak = _mm256_set1_ps(NOTHING), total = _mm256_setzero_ps(), factor;  // of rows, twice

    void weigh(__m256 unit) {
      __m256 most = peak;
      for (int64_t t = 0; t < SPAN; t += 2) {
        const __m256 x = _mm256_mul_ps(_mm256_load_ps(score + t * ROWS), unit);
        _mm256_store_ps(score + t * ROWS, x);
        most = _mm256_max_ps(most, x);
      }
      most = larger_half(most);
      // Where a row has seen nothing yet, its peak counts as zero.
      const __m256 zero = _mm256_and_ps(most, _mm256_cmp_ps(most, _mm256_set1_ps(NOTHING), _CMP_NEQ_OQ));
      factor = exponentials(_mm256_sub_ps(peak, zero));
      __m256 sum = _mm256_setzero_ps();
      for (int64_t t = 0; t < SPAN; t += 2) {
        const __m256 x = exponentials(_mm256_sub_ps(_mm256_load_ps(score + t * ROWS), zero));
        _mm256_store_ps(score + t * ROWS, x);
        sum = _mm256_add_ps(sum, x);
      }
      total = _mm256_fmadd_ps(total, factor, sum_of_halves(sum));
      peak = most;
    }
  };

  // ---- values

  // Weights times scales as numbers of two bytes, of two tokens in each word of four, for a group of values.
  template <int R>
  struct Weights {
    alignas(32) int32_t pair[SPAN / 2][R][8];
    alignas(32) float unit[8], middle[8];  // of a number; of all steps, in those

    void set(const Source::Group& group, const Rows& values, size_t index, float largest, const float* weights) {
      alignas(32) float scaled[SPAN * ROWS];
      const float* table = steps(group.bits);
      __m256 most = _mm256_set1_ps(1e-30f);
      for (int64_t t = 0; t < SPAN; t += 2) {
        const uint8_t* scale = values.scales + t * values.scale + index;
        const __m256 step = _mm256_set_m128(_mm_set1_ps(table[scale[values.scale]]), _mm_set1_ps(table[scale[0]]));
        const __m256 x = _mm256_mul_ps(_mm256_load_ps(weights + t * ROWS), step);
        _mm256_store_ps(scaled + t * ROWS, x);
        most = _mm256_max_ps(most, x);
      }
      most = larger_half(most);
      const __m256 numbers = _mm256_div_ps(_mm256_set1_ps(largest), most);
      __m256i sum = _mm256_setzero_si256();
      for (int64_t t = 0; t < SPAN; t += 2) {
        const __m256i x = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(scaled + t * ROWS), numbers));
        sum = _mm256_add_epi32(sum, x);
        const __m128i second = _mm_slli_epi32(_mm256_extracti128_si256(x, 1), 16);
        const __m128i pairs = _mm_or_si128(_mm256_castsi256_si128(x), second);
        auto* to = reinterpret_cast<__m256i*>(pair[t / 2]);
        _mm256_store_si256(to, _mm256_broadcastd_epi32(pairs));
        if constexpr (R > 1) _mm256_store_si256(to + 1, _mm256_broadcastd_epi32(_mm_shuffle_epi32(pairs, 0x55)));
        if constexpr (R > 2) {
          _mm256_store_si256(to + 2, _mm256_broadcastd_epi32(_mm_shuffle_epi32(pairs, 0xAA)));
          _mm256_store_si256(to + 3, _mm256_broadcastd_epi32(_mm_shuffle_epi32(pairs, 0xFF)));
        }
      }
      _mm256_store_ps(unit, _mm256_mul_ps(most, _mm256_set1_ps(1 / largest)));
      const __m256 whole = sum_of_halves(_mm256_cvtepi32_ps(sum));
      _mm256_store_ps(middle, _mm256_mul_ps(whole, _mm256_set1_ps(group.middle())));
    }
  };

  // weights @ codes of 64 tokens, for every fourth coordinate of a unit from J on, and COUNT - 1 of its neighbours: as
  // many sums as stay in registers.
  template <int B, int R, int J, int COUNT>
  static void sum_codes(const Source::Group& group, const Rows& values, int64_t u, const Weights<R>& weights,
                        __m256i (*sums)[R]) {
    constexpr int P = PARTS[B][0], Q = PARTS[B][1];
    const int64_t next = values.code;
    const uint8_t* first_part = values.codes + group.byte + u * (UNIT / 8 * P);
    const uint8_t* second_part = values.codes + group.second() + u * (UNIT / 8 * Q);
    __m256i sum[COUNT][R] = {};
    const auto* weight = weights.pair;
    for (; weight < weights.pair + SPAN / 2; ++weight, first_part += 2 * next, second_part += 2 * next) {
      const __m256i upper = turns<P>(first_part, first_part + next);
      const __m256i lower = Q ? turns<Q ? Q : 1>(second_part, second_part + next) : upper;
      each<COUNT>([&](auto j) __attribute__((always_inline)) {
        const __m256i x = code<B, J + j>(upper, lower);
        each<R>([&](auto r) __attribute__((always_inline)) { sum[j][r] = plus_products(sum[j][r], x, (*weight)[r]); });
      });
    }
    each<COUNT>([&](auto j) { each<R>([&](auto r) { sums[J + j][r] = sum[j][r]; }); });
  }

  // out[row] += weights @ values of 64 tokens, for the coordinates of a unit.
  template <int B, int R>
  static void add(const Source::Group& group, const Rows& values, int64_t u, const Weights<R>& weights, int64_t rows,
                  int64_t width, float* out) {
    __m256i sum[4][R];
    if constexpr (R <= 2) {
      sum_codes<B, R, 0, 4>(group, values, u, weights, sum);
    } else {
      sum_codes<B, R, 0, 2>(group, values, u, weights, sum);
      sum_codes<B, R, 2, 2>(group, values, u, weights, sum);
    }
    const int64_t count = std::min(UNIT, group.size - u * UNIT);
    for (int64_t r = 0; r < std::min<int64_t>(R, rows); ++r) {
      const auto exact = [&](__m256i x) {
        const __m256 less = _mm256_sub_ps(_mm256_cvtepi32_ps(x), _mm256_set1_ps(weights.middle[r]));
        return _mm256_mul_ps(less, _mm256_set1_ps(weights.unit[r]));
      };
      __m256 found[4];  // in the order of the coordinates
      transpose(exact(sum[0][r]), exact(sum[1][r]), exact(sum[2][r]), exact(sum[3][r]), found);
      float* to = out + r * width + group.start + u * UNIT;
      if (count == UNIT) {
        for (int i = 0; i < 4; ++i) _mm256_storeu_ps(to + 8 * i, _mm256_add_ps(_mm256_loadu_ps(to + 8 * i), found[i]));
      } else {
        const auto* number = reinterpret_cast<const float*>(found);
        for (int64_t c = 0; c < count; ++c) to[c] += number[c];
      }
    }
  }

  template <int R>
  void attend(const float* q, int64_t rows, int64_t b, int64_t h, int64_t begin, int64_t end,
              const bool* const (&seen)[ROWS], float* out, float* peak, float* total) const {
    const Query<R> query(*this, q, rows);
    const __m256 unit = _mm256_load_ps(query.unit);
    const int64_t width = rounded_up(v_.used, CHUNK);
    const float largest = wide_ ? 16383.f : 32767.f;
    std::fill_n(out, rows * width, 0.f);
    Softmax softmax;
    Weights<R> weights;
    std::vector<uint8_t> k_memory, v_memory;
    for (int64_t t = begin; t < end; t += SPAN) {
      const int64_t count = std::min(SPAN, end - t);
      if (!any(seen, rows, t, count)) continue;
      const bool last = t + SPAN + OVERREAD / 4 > end;  // a row has four bytes or more
      const Rows keys(k_, b, h, t, count, last, k_memory), values(v_, b, h, t, count, last, v_memory);
      int64_t u = 0;
      for (size_t g = 0; g < k_.coded.size(); u += units(k_.coded[g]), ++g)
        by_bits(k_.coded[g].bits, [&](auto bits) {
          score<bits, R>(k_.coded[g], keys, g, query.number + u, query.start[g], g == 0, softmax.score);
        });
      hide(seen, rows, t, count, softmax.score);
      softmax.weigh(unit);
      alignas(32) float factor[8];
      _mm256_store_ps(factor, softmax.factor);
      for (int64_t r = 0; r < rows; ++r)
        if (factor[r] != 1)
          for (int64_t c = 0; c < width; ++c) out[r * width + c] *= factor[r];
      for (size_t g = 0; g < v_.coded.size(); ++g) {
        weights.set(v_.coded[g], values, g, largest, softmax.score);
        by_bits(v_.coded[g].bits, [&](auto bits) {
          for (int64_t i = 0; i < units(v_.coded[g]); ++i)
            add<bits, R>(v_.coded[g], values, i, weights, rows, width, out);
        });
      }
    }
    alignas(32) float peaks[8], totals[8];
    _mm256_store_ps(peaks, softmax.peak), _mm256_store_ps(totals, softmax.total);
    std::copy_n(peaks, rows, peak), std::copy_n(totals, rows, total);
  }

  static bool any(const bool* const (&seen)[ROWS], int64_t rows, int64_t t, int64_t count) {
    for (int64_t r = 0; r < rows; ++r)
      if (!seen[r] || std::memchr(seen[r] + t, true, count)) return true;
    return false;
  }

  static void hide(const bool* const (&seen)[ROWS], int64_t rows, int64_t t, int64_t count, float* scores) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; seen[r] && i < count; ++i)
        if (!seen[r][t + i]) scores[i * ROWS + r] = NOTHING;
    for (int64_t i = count * ROWS; i < SPAN * ROWS; ++i) scores[i] = NOTHING;
  }
};

}  // namespace swan
