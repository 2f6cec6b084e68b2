// Graded keys and values of few bits without a tile of floats, for CPUs with AVX-512 (VBMI, VNNI).
//
// Codes go from bytes into the lanes of a register in four instructions for 64 coordinates. Scores are dot products of
// codes with queries in two bytes (four where the cache is float32); outputs are sums of codes times weights of 15 bits
// (floats where the cache is float32), for four query rows at a time. A scale is applied once to the sums of a group of
// a key, and is part of the weight of a value.
#pragma once

#include "fields_avx512.h"
#include "tiles.h"

namespace swan {

class Coded {
 public:
  static constexpr int64_t ROWS = 4, SPAN = 64, QUADS = SPAN / 4, GROUPS = 4;
  static constexpr int64_t PIECE = 16;  // coordinates of a key that four rows meet in one register
  static constexpr int64_t MAX_PIECES = MAX_DIM / PIECE + GROUPS;

  static bool reads(const Source& k, const Source& v) {
    for (const Source* x : {&k, &v})
      if (x->topk || x->coded.empty() || !x->dense.empty() || x->coded.size() > GROUPS) return false;
    return true;
  }

  Coded(const Source& k, const Source& v, bool exact) : k_(k), v_(v), exact_(exact) {
    std::array<int64_t, CHUNK> same, pairs;
    for (int64_t c = 0; c < CHUNK; ++c) {
      same[c] = c;
      pairs[c] = c / 32 * 32 + c % 16 / 4 * 8 + c % 32 / 16 * 4 + c % 4;  // in order once tokens are interleaved
    }
    int64_t width = 0;
    for (auto group : k.coded) {  // each begins a piece
      group.start = width;
      k_groups_.push_back(group);
      width += rounded_up(group.size, PIECE);
    }
    k_fields_ = fields_in(k_groups_, width, same);
    v_fields_ = fields_in(v.coded, v.used, exact ? same : pairs);
    for (size_t g = 0; g < v.coded.size(); ++g)
      for (int64_t c = v.coded[g].start; c < v.coded[g].start + v.coded[g].size; ++c)
        middle_[c] = v.coded[g].middle(), slot_[c] = static_cast<int32_t>(g);
    for (size_t i = 0; i < v_fields_.size() * 4; ++i) {
      const int32_t* slot = slot_ + i * LANES;
      alike_.push_back(std::all_of(slot, slot + LANES, [&](int32_t s) { return s == slot[0]; }));
    }
  }

  // Out [rows, width of v], not divided by total; peak and total [rows].
  void attend(const float* q, int64_t rows, int64_t b, int64_t h, int64_t begin, int64_t end,
              const bool* const (&seen)[ROWS], float* out, float* peak, float* total) const {
    const Query query(*this, q, rows);
    const int64_t width = v_fields_.size() * CHUNK;
    Span span;
    alignas(64) float sums[ROWS * MAX_DIM] = {};
    for (int64_t t = begin; t < end; t += SPAN) {
      const int64_t count = std::min(SPAN, end - t);
      const __mmask64 there = ~0ull >> (SPAN - count);
      __mmask64 visible[ROWS], any = 0, all = ~0ull;
      for (int64_t r = 0; r < ROWS; ++r) {
        visible[r] = there;
        if (seen[r]) {
          const __m512i bytes = _mm512_maskz_loadu_epi8(there, seen[r] + t);
          visible[r] = _mm512_test_epi8_mask(bytes, bytes);
        }
        if (r < rows) any |= visible[r];
        all &= visible[r];
      }
      if (!any) continue;
      exact_ ? scores<true>(query, b, h, t, count, span) : scores<false>(query, b, h, t, count, span);
      for (int64_t i = 0; ~all && i < SPAN; ++i)
        for (int64_t r = 0; r < ROWS; ++r)
          if (!(visible[r] >> i & 1)) span.weight[i * ROWS + r] = NOTHING;
      softmax(span);
      exact_ ? weights<true>(b, h, t, count, span) : weights<false>(b, h, t, count, span);
      for (size_t chunk = 0; chunk < v_fields_.size(); ++chunk) {
        const bool alike = std::all_of(&alike_[chunk * 4], &alike_[chunk * 4] + 4, [](char x) { return x; });
        if (exact_)
          alike ? add<true, true>(chunk, b, h, t, count, span, sums) : add<true, false>(chunk, b, h, t, count, span, sums);
        else
          alike ? add<false, true>(chunk, b, h, t, count, span, sums) : add<false, false>(chunk, b, h, t, count, span, sums);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(sums + r * width, width, out + r * width);
      peak[r] = span.peak[r], total[r] = span.total[r];
    }
  }

 private:
  const Source &k_, &v_;
  const bool exact_;
  std::vector<Source::Group> k_groups_;
  std::vector<std::vector<Field>> k_fields_, v_fields_;
  alignas(64) float middle_[MAX_DIM] = {};  // of the steps of each coordinate of a value
  alignas(64) int32_t slot_[MAX_DIM] = {};  // its group; 0 where nothing is stored
  std::vector<char> alike_;  // whether 16 coordinates of values share a scale

  // Four query rows as numbers of four bytes, most significant first, of which the first two may be enough:
  // row = unit * number / 65536. Sums start at minus the middles of the steps.
  struct Query {
    alignas(64) int8_t bytes[4][MAX_PIECES][ROWS][PIECE] = {};
    alignas(64) int32_t start[2][GROUPS][ROWS][4] = {};  // of the first and of the last two bytes
    alignas(64) float unit[LANES];

    Query(const Coded& coded, const float* q, int64_t rows) {
      const int64_t width = rounded_up(coded.k_.used, CHUNK);
      for (int64_t r = 0; r < ROWS; ++r) {
        float most = 0;
        for (int64_t c = 0; r < rows && c < width; ++c) most = std::max(most, std::abs(q[r * width + c]));
        const double largest = coded.exact_ ? 0x7F7F7F7F : 0x7F7F0000, steps = most > 0 ? largest / most : 0;
        for (int i = 0; i < 4; ++i) unit[4 * i + r] = static_cast<float>(most / largest * 65536);
        for (size_t g = 0; most > 0 && g < coded.k_groups_.size(); ++g) {
          const auto& group = coded.k_groups_[g];
          double sum[4] = {}, sum_low[4] = {};
          for (int64_t c = 0; c < group.size; ++c) {
            const int64_t place = group.start + c;
            const double exact = q[r * width + coded.k_.coded[g].start + c] * steps;
            int64_t left = coded.exact_ ? std::llrint(exact) : std::llrint(exact / 65536) * 65536;
            int64_t digit[4];
            for (int i = 3; i >= 0; --i) {
              digit[i] = static_cast<int8_t>(left & 0xFF);
              bytes[i][place / PIECE][r][place % PIECE] = static_cast<int8_t>(digit[i]);
              left = (left - digit[i]) / 256;
            }
            const double middle = ((1 << group.bits) - 1) / 2.;
            sum[c % PIECE / 4] -= middle * (256 * digit[0] + digit[1]);
            sum_low[c % PIECE / 4] -= middle * (256 * digit[2] + digit[3]);
          }
          for (int64_t i = 0; i < 4; ++i) {
            start[0][g][r][i] = static_cast<int32_t>(std::floor(sum[i]));
            start[1][g][r][i] = static_cast<int32_t>((sum[i] - std::floor(sum[i])) * 65536 + sum_low[i]);
          }
        }
      }
    }
  };

  // What is known of up to 64 tokens and four rows.
  struct Span {
    alignas(64) float weight[SPAN * ROWS];           // scores, then weights before scales: [token, row]
    alignas(64) uint8_t code[SPAN][rounded_up(MAX_PIECES * PIECE, CHUNK)] = {};  // of the keys
    alignas(64) float k_step[SPAN][GROUPS] = {};
    alignas(64) float v_step[GROUPS][SPAN] = {};
    alignas(64) int32_t pair[SPAN / 2][GROUPS][ROWS] = {};  // weights of two tokens in 16 bits each
    alignas(64) float scaled[SPAN][GROUPS][ROWS] = {};      // weights as floats
    alignas(64) float unit[GROUPS][ROWS] = {}, sum[GROUPS][ROWS] = {};  // of a weight in 16 bits; of the weights
    alignas(64) float factor[ROWS], peak[LANES], total[LANES] = {};
    Span() { std::fill_n(peak, LANES, NOTHING); }
  };

  static __m512 each_quarter(__m512 (*op)(__m512, __m512), __m512 x) {  // of the four quarters of a register
    x = op(x, _mm512_shuffle_f32x4(x, x, 0x4E));
    return op(x, _mm512_shuffle_f32x4(x, x, 0xB1));
  }
  static __m512 larger(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
  static __m512 plus(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
  static __m512i low_half(__m512i x) { return _mm512_cvtepu8_epi16(_mm512_castsi512_si256(x)); }
  static __m512i high_half(__m512i x) { return _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(x, 1)); }

  template <bool EXACT>
  void scores(const Query& q, int64_t b, int64_t h, int64_t t, int64_t count, Span& span) const {
    constexpr int BYTES = EXACT ? 4 : 2;
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t* scale = k_.scales.row(b, h, t + i);
      for (size_t g = 0; g < k_.coded.size(); ++g) span.k_step[i][g] = k_.coded[g].step(scale[g]);
    }
    const uint8_t* row = k_.codes.row(b, h, t);
    for (size_t chunk = 0; chunk < k_fields_.size(); ++chunk)
      by_fields(k_fields_[chunk], [&](const auto& codes) {
        for (int64_t i = 0; i < count; ++i)
          _mm512_store_si512(span.code[i] + chunk * CHUNK, codes(row + i * k_.codes.token));
      });
    const __m512 unit = _mm512_load_ps(q.unit);
    const __m512i turned = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int64_t i = 0; i < count; i += 4) {
      for (int64_t j = i; j < i + 4; ++j) {  // of the next span: a few at a time, for many at once are waited for
        __builtin_prefetch(k_.codes.row(b, h, t + SPAN + j));
        __builtin_prefetch(v_.codes.row(b, h, t + SPAN + j));
      }
      __m512 x[4] = {};  // of four tokens: a quarter for each row
      for (size_t g = 0; g < k_groups_.size(); ++g) {
        __m512i sum[4][BYTES];
        for (auto& of_token : sum)
          for (int n = 0; n < BYTES; ++n) of_token[n] = n % 2 ? _mm512_load_si512(q.start[n / 2][g]) : _mm512_setzero_si512();
        const int64_t first = k_groups_[g].start / PIECE, pieces = (k_groups_[g].size + PIECE - 1) / PIECE;
        for (int64_t piece = first; piece < first + pieces; ++piece) {
          __m512i byte[BYTES];
          for (int n = 0; n < BYTES; ++n) byte[n] = _mm512_load_si512(q.bytes[n][piece]);
          for (int64_t j = 0; j < 4; ++j) {
            const auto* codes = reinterpret_cast<const __m128i*>(span.code[i + j] + piece * PIECE);
            const __m512i code = _mm512_broadcast_i32x4(_mm_load_si128(codes));
            for (int n = 0; n < BYTES; ++n) sum[j][n] = _mm512_dpbusd_epi32(sum[j][n], code, byte[n]);
          }
        }
        for (int64_t j = 0; j < 4; ++j) {
          const auto two_bytes = [&](int n) {
            return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sum[j][n], 8), sum[j][n + 1]));
          };
          __m512 found = two_bytes(0);
          if constexpr (EXACT) found = _mm512_fmadd_ps(two_bytes(2), _mm512_set1_ps(1 / 65536.f), found);
          x[j] = _mm512_fmadd_ps(found, _mm512_set1_ps(span.k_step[i + j][g]), x[j]);
        }
      }
      const __m512 found = _mm512_permutexvar_ps(turned, fours(twos(x[0], x[1]), twos(x[2], x[3])));
      _mm512_store_ps(span.weight + i * ROWS, _mm512_mul_ps(found, unit));
    }
  }

  static void softmax(Span& span) {
    __m512 most = _mm512_load_ps(span.peak);
    for (int64_t i = 0; i < QUADS; ++i) most = larger(most, _mm512_load_ps(span.weight + i * LANES));
    most = each_quarter(larger, most);
    alignas(64) float zero[LANES], change[LANES];  // where a row has seen nothing yet, its peak counts as zero
    const __mmask16 none = _mm512_cmp_ps_mask(most, _mm512_set1_ps(NOTHING), _CMP_EQ_OQ);
    _mm512_store_ps(zero, _mm512_mask_mov_ps(most, none, _mm512_setzero_ps()));
    for (int64_t i = 0; i < LANES; ++i) change[i] = exponential(span.peak[i] - zero[i]);
    for (int64_t i = 0; i < SPAN * ROWS; i += LANES)
      for (int64_t j = 0; j < LANES; ++j) span.weight[i + j] = exponential(span.weight[i + j] - zero[j]);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < QUADS; ++i) sum = plus(sum, _mm512_load_ps(span.weight + i * LANES));
    sum = each_quarter(plus, sum);
    _mm512_store_ps(span.total, _mm512_fmadd_ps(_mm512_load_ps(span.total), _mm512_load_ps(change), sum));
    _mm512_store_ps(span.peak, most);
    std::copy_n(change, ROWS, span.factor);
  }

  // Weights times scales, for each group of the values.
  template <bool EXACT>
  void weights(int64_t b, int64_t h, int64_t t, int64_t count, Span& span) const {
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t* scale = v_.scales.row(b, h, t + i);
      for (size_t g = 0; g < v_.coded.size(); ++g) span.v_step[g][i] = v_.coded[g].step(scale[g]);
    }
    const __m512i each = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    for (size_t g = 0; g < v_.coded.size(); ++g) {
      __m512 weight[QUADS], most = _mm512_setzero_ps();
      for (int64_t i = 0; i < QUADS; ++i) {
        const __m512 step = _mm512_permutexvar_ps(each, _mm512_broadcast_f32x4(_mm_load_ps(span.v_step[g] + 4 * i)));
        weight[i] = _mm512_mul_ps(_mm512_load_ps(span.weight + i * LANES), step);
        most = larger(most, weight[i]);
        if constexpr (EXACT) {
          _mm_store_ps(span.scaled[4 * i][g], _mm512_castps512_ps128(weight[i]));
          _mm_store_ps(span.scaled[4 * i + 1][g], _mm512_extractf32x4_ps(weight[i], 1));
          _mm_store_ps(span.scaled[4 * i + 2][g], _mm512_extractf32x4_ps(weight[i], 2));
          _mm_store_ps(span.scaled[4 * i + 3][g], _mm512_extractf32x4_ps(weight[i], 3));
        }
      }
      if constexpr (EXACT) continue;
      most = each_quarter(larger, most);
      const __mmask16 some = _mm512_cmp_ps_mask(most, _mm512_set1_ps(1e-30f), _CMP_GT_OQ);
      const __m512 steps = _mm512_maskz_div_ps(some, _mm512_set1_ps(32767), most);
      __m512i sum = _mm512_setzero_si512();
      for (int64_t i = 0; i < QUADS; ++i) {
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(weight[i], steps));
        sum = _mm512_add_epi32(sum, whole);
        const __m512i next = _mm512_shuffle_i32x4(whole, whole, 0xF5);  // quarters 1, 1, 3, 3
        const __m512i pair = _mm512_or_si512(whole, _mm512_slli_epi32(next, 16));
        _mm_store_si128(reinterpret_cast<__m128i*>(span.pair[2 * i][g]), _mm512_castsi512_si128(pair));
        _mm_store_si128(reinterpret_cast<__m128i*>(span.pair[2 * i + 1][g]), _mm512_extracti32x4_epi32(pair, 2));
      }
      const __m512 total = each_quarter(plus, _mm512_cvtepi32_ps(sum));
      _mm_store_ps(span.sum[g], _mm512_castps512_ps128(total));
      _mm_store_ps(span.unit[g], _mm512_castps512_ps128(_mm512_mul_ps(most, _mm512_set1_ps(1 / 32767.f))));
    }
  }

  // out = out * factor + weights @ values of 64 coordinates; ALIKE: 16 neighbours share a scale.
  template <bool EXACT, bool ALIKE>
  void add(int64_t chunk, int64_t b, int64_t h, int64_t t, int64_t count, const Span& span, float* out) const {
    const int32_t* slot = slot_ + chunk * CHUNK;
    const float* middle = middle_ + chunk * CHUNK;
    const auto index = [&](int i, int r) {  // of group and row, for each lane
      const __m512i group = _mm512_load_si512(slot + i * LANES);
      return _mm512_add_epi32(_mm512_slli_epi32(group, 2), _mm512_set1_epi32(r));
    };
    __m512 sums[4][ROWS];
    const uint8_t* row = v_.codes.row(b, h, t);
    by_fields(v_fields_[chunk], [&](const auto& codes) {
      if constexpr (EXACT) {
        for (auto& four_rows : sums)
          for (auto& sum : four_rows) sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < count; ++i) {
          const __m512i code = codes(row + i * v_.codes.token);
          const __m128i part[4] = {_mm512_castsi512_si128(code), _mm512_extracti32x4_epi32(code, 1),
                                   _mm512_extracti32x4_epi32(code, 2), _mm512_extracti32x4_epi32(code, 3)};
          for (int j = 0; j < 4; ++j) {
            const __m512 number = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(part[j]));
            const __m512 x = _mm512_sub_ps(number, _mm512_load_ps(middle + j * LANES));
            for (int r = 0; r < ROWS; ++r) {
              const __m512 weight = ALIKE ? _mm512_set1_ps(span.scaled[i][slot[j * LANES]][r])
                                          : _mm512_permutexvar_ps(index(j, r), _mm512_load_ps(span.scaled[i][0]));
              sums[j][r] = _mm512_fmadd_ps(x, weight, sums[j][r]);
            }
          }
        }
      } else {
        __m512i whole[4][ROWS];
        for (auto& four_rows : whole)
          for (auto& sum : four_rows) sum = _mm512_setzero_si512();
        for (int64_t i = 0; i < count; i += 2) {
          const __m512i one = codes(row + i * v_.codes.token);
          const __m512i two = codes(row + std::min(i + 1, count - 1) * v_.codes.token);
          const __m512i one_low = low_half(one), one_high = high_half(one);
          const __m512i two_low = low_half(two), two_high = high_half(two);
          const __m512i x[4] = {_mm512_unpacklo_epi16(one_low, two_low), _mm512_unpackhi_epi16(one_low, two_low),
                                _mm512_unpacklo_epi16(one_high, two_high), _mm512_unpackhi_epi16(one_high, two_high)};
          const auto& pair = span.pair[i / 2];
          for (int j = 0; j < 4; ++j)
            for (int r = 0; r < ROWS; ++r) {
              const __m512i weight = ALIKE ? _mm512_set1_epi32(pair[slot[j * LANES]][r])
                                           : _mm512_permutexvar_epi32(index(j, r), _mm512_load_si512(pair[0]));
              whole[j][r] = _mm512_dpwssd_epi32(whole[j][r], x[j], weight);
            }
        }
        for (int j = 0; j < 4; ++j)
          for (int r = 0; r < ROWS; ++r) {
            const __m512 sum = _mm512_permutexvar_ps(index(j, r), _mm512_load_ps(span.sum[0]));
            const __m512 unit = _mm512_permutexvar_ps(index(j, r), _mm512_load_ps(span.unit[0]));
            const __m512 exact = _mm512_cvtepi32_ps(whole[j][r]);
            sums[j][r] = _mm512_mul_ps(_mm512_fnmadd_ps(_mm512_load_ps(middle + j * LANES), sum, exact), unit);
          }
      }
    });
    const int64_t width = v_fields_.size() * CHUNK;
    for (int r = 0; r < ROWS; ++r)
      for (int j = 0; j < 4; ++j) {
        float* to = out + r * width + chunk * CHUNK + j * LANES;
        _mm512_store_ps(to, _mm512_fmadd_ps(_mm512_load_ps(to), _mm512_set1_ps(span.factor[r]), sums[j][r]));
      }
  }
};

}  // namespace swan
