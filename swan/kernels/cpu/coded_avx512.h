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

  Coded(const Source& k, const Source& v, bool exact) : k_(k), v_(v), exact_(exact), k_steps_(k), v_steps_(v) {
    std::array<int64_t, CHUNK> same, pairs;
    for (int64_t c = 0; c < CHUNK; ++c) {
      same[c] = c;
      pairs[c] = c % 16 / 4 * 16 + c / 16 * 4 + c % 4;  // in order once tokens are interleaved
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
  // Distances of two codes from scale bytes, which are no NOT_A_NUMBER, four tokens at a time.
  struct Steps {
    alignas(64) float least[LANES], halving[LANES] = {};  // scales of bytes 0 to 7; of the group of each lane
    alignas(16) uint8_t place[LANES];                     // in the bytes of four tokens, for each token and group
    int64_t groups;

    explicit Steps(const Source& x) : groups(x.coded.size()) {
      for (int64_t i = 0; i < LANES; ++i) {
        const int64_t g = i % GROUPS;
        least[i] = scales_of_bytes()[i % 8];
        place[i] = g < groups ? static_cast<uint8_t>(i / GROUPS * groups + g) : 0x80;  // 0x80: none
        if (g < groups) halving[i] = HALVINGS[x.coded[g].bits];
      }
    }

    void read(const Plane& scales, int64_t b, int64_t h, int64_t t, int64_t count, float (&to)[SPAN][GROUPS]) const {
      const __m512 eight = _mm512_load_ps(least), halvings = _mm512_load_ps(halving);
      const __m128i places = _mm_load_si128(reinterpret_cast<const __m128i*>(place));
      for (int64_t i = 0; i < SPAN; i += 4) {
        __m128i bytes = _mm_setzero_si128();
        if (const int64_t left = std::min<int64_t>(count - i, 4); left > 0) {
          if (scales.token == groups) {  // tokens side by side
            bytes = _mm_maskz_loadu_epi8(static_cast<__mmask16>((1 << left * groups) - 1), scales.row(b, h, t + i));
          } else {
            alignas(16) uint8_t row[LANES] = {};
            for (int64_t j = 0; j < left; ++j) std::memcpy(row + j * groups, scales.row(b, h, t + i + j), groups);
            bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(row));
          }
        }
        const __m512i scale = _mm512_cvtepu8_epi32(_mm_shuffle_epi8(bytes, places));
        const __m512i eighth = _mm512_castps_si512(_mm512_permutexvar_ps(scale, eight));  // by the low bits
        const __m512i found = _mm512_add_epi32(eighth, _mm512_slli_epi32(_mm512_srli_epi32(scale, 3), 23));
        _mm512_store_ps(to[i], _mm512_mul_ps(_mm512_castsi512_ps(found), halvings));
      }
    }
  };

  const Source &k_, &v_;
  const bool exact_;
  const Steps k_steps_, v_steps_;
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
    alignas(64) float step[SPAN][GROUPS];  // of the codes of the keys, then of the values
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

  // sum + products of codes with bytes, four neighbours at a time; of codes of two tokens with their weights, which all
  // lanes share. Compilers would copy sums from one register to another.
  [[gnu::always_inline]] static __m512i plus_products(__m512i sum, __m512i codes, __m512i bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(bytes));
    return sum;
  }
  [[gnu::always_inline]] static __m512i plus_pairs(__m512i sum, __m512i codes, const int32_t* weights) {
    asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*weights));
    return sum;
  }

  template <bool EXACT>
  void scores(const Query& q, int64_t b, int64_t h, int64_t t, int64_t count, Span& span) const {
    constexpr int BYTES = EXACT ? 4 : 2;
    k_steps_.read(k_.scales, b, h, t, count, span.step);
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
        each<4>([&](auto j) __attribute__((always_inline)) {
          each<BYTES>([&](auto n) __attribute__((always_inline)) {
            sum[j][n] = n % 2 ? _mm512_load_si512(q.start[n / 2][g]) : _mm512_setzero_si512();
          });
        });
        const int64_t first = k_groups_[g].start / PIECE, pieces = (k_groups_[g].size + PIECE - 1) / PIECE;
        for (int64_t piece = first; piece < first + pieces; ++piece) {
          const uint8_t* codes = span.code[i] + piece * PIECE;
          __m512i byte[BYTES];
          each<BYTES>([&](auto n) __attribute__((always_inline)) { byte[n] = _mm512_load_si512(q.bytes[n][piece]); });
          each<4>([&](auto j) __attribute__((always_inline)) {
            const auto* code = reinterpret_cast<const __m128i*>(codes + j * sizeof(span.code[0]));
            const __m512i x = _mm512_broadcast_i32x4(_mm_load_si128(code));
            each<BYTES>([&](auto n) __attribute__((always_inline)) { sum[j][n] = plus_products(sum[j][n], x, byte[n]); });
          });
        }
        each<4>([&](auto j) __attribute__((always_inline)) {
          const auto two_bytes = [&](int n) __attribute__((always_inline)) {
            return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sum[j][n], 8), sum[j][n + 1]));
          };
          __m512 found = two_bytes(0);
          if constexpr (EXACT) found = _mm512_fmadd_ps(two_bytes(2), _mm512_set1_ps(1 / 65536.f), found);
          x[j] = _mm512_fmadd_ps(found, _mm512_set1_ps(span.step[i + j][g]), x[j]);
        });
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
    v_steps_.read(v_.scales, b, h, t, count, span.step);
    const __m512i first = _mm512_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12);
    for (size_t g = 0; g < v_.coded.size(); ++g) {
      const __m512i place = _mm512_add_epi32(first, _mm512_set1_epi32(static_cast<int32_t>(g)));
      __m512 weight[QUADS], most = _mm512_setzero_ps();
      for (int64_t i = 0; i < QUADS; ++i) {
        const __m512 step = _mm512_permutexvar_ps(place, _mm512_load_ps(span.step[4 * i]));
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
        const __m512i none = _mm512_setzero_si512();
        __m512i whole[4][ROWS];
        each<4>([&](auto j) { each<ROWS>([&](auto r) { whole[j][r] = _mm512_setzero_si512(); }); });
        const int32_t *pair = span.pair[0][0], *weight[4];  // of two tokens, for each group; for 16 coordinates
        each<4>([&](auto j) { weight[j] = pair + slot[j * LANES] * ROWS; });
        for (int64_t i = 0; i < count; i += 2) {
          const __m512i one = codes(row + i * v_.codes.token);
          const __m512i two = codes(row + std::min(i + 1, count - 1) * v_.codes.token);
          const __m512i low = _mm512_unpacklo_epi8(one, two), high = _mm512_unpackhi_epi8(one, two);
          const __m512i x[4] = {_mm512_unpacklo_epi8(low, none), _mm512_unpackhi_epi8(low, none),
                                _mm512_unpacklo_epi8(high, none), _mm512_unpackhi_epi8(high, none)};
          each<4>([&](auto j) __attribute__((always_inline)) {
            each<ROWS>([&](auto r) __attribute__((always_inline)) {
              if constexpr (ALIKE) {
                whole[j][r] = plus_pairs(whole[j][r], x[j], weight[j] + r);
              } else {
                const __m512i weights = _mm512_permutexvar_epi32(index(j, r), _mm512_load_si512(pair));
                whole[j][r] = _mm512_dpwssd_epi32(whole[j][r], x[j], weights);
              }
            });
            weight[j] += GROUPS * ROWS;
          });
          pair += GROUPS * ROWS;
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
