// Attention of few queries over a packed history, and over dense tokens beside it, on a CPU. Threads take KV heads and
// stretches of tokens; parts merge by log-sum-exp. Tokens are unpacked into a tile in the L1 cache, once for all query rows
// of their KV head; codes, with AVX-512, are multiplied as they are (attend_cpu_avx512.h).

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

#include "cpu_common.h"

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define SWAN_AVX512
#endif

namespace {

using swan::PARTS;
using swan::scales_of_bytes;
using swan::to_float;

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;   // floats of a vector
#else
constexpr int64_t LANES = 8;
#endif
constexpr int64_t CHUNK = 64;   // coordinates that are unpacked at a time
constexpr int64_t TILE = 32;    // tokens unpacked at a time
constexpr int64_t MAX_DIM = 256;
constexpr int64_t MAX_GROUPS = 16;
constexpr int64_t MOST_ROWS = 16;  // query rows up to which codes are read anew for each four
constexpr int64_t LEAST = 256;  // tokens worth a thread of their own
constexpr int64_t GRAIN = 64;  // query rows worth a thread
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

typedef float Vector __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void store(float* to, Vector x) { *reinterpret_cast<Vector*>(to) = x; }

constexpr int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

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

// A tensor [batch, heads, tokens, width] whose last axis is dense; or none.
struct Plane {
  const uint8_t* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;  // strides in bytes

  Plane() = default;
  explicit Plane(const at::Tensor& t) {
    TORCH_CHECK(t.dim() == 4 && (t.stride(3) == 1 || t.size(3) == 1), "expected [batch, heads, tokens, width]");
    const int64_t size = t.element_size();
    data = static_cast<const uint8_t*>(t.const_data_ptr());
    batch = t.stride(0) * size, head = t.stride(1) * size, token = t.stride(2) * size;
  }
  const uint8_t* row(int64_t b, int64_t h, int64_t t) const { return data + b * batch + h * head + t * token; }
};

// Codes of 64 coordinates from up to 64 bytes of a row: a byte, a rotation and a mask for each.
struct Field {
  int64_t base;
  uint64_t bytes;
  alignas(64) uint8_t byte[CHUNK], turn[CHUNK], mask[CHUNK];
};

// Keys or values. Layout: {0, size, bits, size, bits, ...} for graded, {1, d, keep, bits} for top-k.
struct Source {
  Plane codes, whole, scales, positions;
  at::ScalarType dtype = at::kFloat;
  bool topk = false;
  int64_t d = 0, used = 0, keep = 0, bits = 0;  // used: coordinates up to the last that is stored
  struct Group {
    int64_t start, size, bits, byte;
  };
  std::vector<Group> coded, dense;
  std::vector<std::vector<Field>> fields;  // of each chunk, in the order of the coordinates
  alignas(64) float middle[MAX_DIM];       // of the steps of each coordinate
  alignas(64) int32_t slot[MAX_DIM];       // its group; 0 where nothing is stored
  float halvings[MAX_GROUPS] = {};         // 2 ** (1 - bits) of each group

  Source(const at::TensorList& planes, const at::IntArrayRef layout) {
    // planes: codes, whole, scales, positions, each a tensor or an empty one
    if (planes[0].numel()) codes = Plane(planes[0]);
    if (planes[1].numel()) whole = Plane(planes[1]), dtype = planes[1].scalar_type();
    if (planes[2].numel()) scales = Plane(planes[2]);
    if (planes[3].numel()) positions = Plane(planes[3]);
    topk = layout[0] == 1;
    if (topk) {
      d = used = layout[1], keep = layout[2], bits = layout[3];
      return;
    }
    int64_t byte = 0;
    for (size_t i = 1; i < layout.size(); i += 2) {
      const int64_t size = layout[i], b = layout[i + 1];
      if (b == 16) {
        dense.push_back({d, size, b, 0});
      } else if (b) {
        TORCH_CHECK(static_cast<int64_t>(coded.size()) < MAX_GROUPS, "at most ", MAX_GROUPS, " coded groups");
        coded.push_back({d, size, b, byte});
        byte += swan::code_bytes(size, b);
      }
      d += size;
      if (b) used = d;
    }
    if (!coded.empty()) plan();
  }

  void plan() {
    std::fill_n(middle, MAX_DIM, 0.f);
    std::fill_n(slot, MAX_DIM, 0);
    for (size_t g = 0; g < coded.size(); ++g) {
      const auto& group = coded[g];
      halvings[g] = std::exp2(1.f - group.bits);
      for (int64_t c = group.start; c < group.start + group.size; ++c) {
        middle[c] = ((1 << group.bits) - 1) / 2.f;
        slot[c] = static_cast<int32_t>(g);
      }
    }
    std::array<int64_t, CHUNK> place;
    std::iota(place.begin(), place.end(), 0);
    fields = fields_in(coded, used, place);
  }

  float step(size_t group, uint8_t scale) const { return scales_of_bytes()[scale] * halvings[group]; }

  // The fields of each chunk of groups that begin where they say, coordinate c in lane place[c].
  static std::vector<std::vector<Field>> fields_in(const std::vector<Group>& groups, int64_t width,
                                                   const std::array<int64_t, CHUNK>& place) {
    struct Bit {  // `part` bits from bit `shift` of `byte`, worth 2 ** `worth` in the code of a lane
      int64_t lane, byte;
      int part, shift, worth;
    };
    std::vector<std::vector<Field>> found;
    for (int64_t chunk = 0; chunk < width; chunk += CHUNK) {
      std::vector<Bit> left;
      for (const auto& group : groups) {
        int64_t byte = group.byte;
        int worth = static_cast<int>(group.bits);
        for (const int part : PARTS[group.bits]) {
          if (!part) continue;
          worth -= part;
          const int64_t n = (group.size * part + 7) / 8;
          for (int64_t i = std::max<int64_t>(chunk - group.start, 0); i < group.size && group.start + i < chunk + CHUNK; ++i)
            left.push_back({place[group.start + i - chunk], byte + i % n, part, static_cast<int>(i / n) * part, worth});
          byte += n;
        }
      }
      std::stable_sort(left.begin(), left.end(), [](const Bit& a, const Bit& b) { return a.byte < b.byte; });
      const int64_t lowest = left.empty() ? 0 : left.front().byte;
      std::vector<Field> fields_of_chunk;
      while (!left.empty()) {  // what does not fit in 64 bytes, or comes second for its lane, goes into the next field
        const int64_t next = left.front().byte;
        Field field{left.back().byte < lowest + 64 ? lowest : next, 0, {}, {}, {}};
        std::vector<Bit> rest;
        for (const Bit& bit : left) {
          if (field.mask[bit.lane] || bit.byte >= field.base + 64) {
            rest.push_back(bit);
            continue;
          }
          field.byte[bit.lane] = static_cast<uint8_t>(bit.byte - field.base);
          field.turn[bit.lane] = static_cast<uint8_t>((8 * (bit.lane % 8) + bit.shift - bit.worth) & 63);
          field.mask[bit.lane] = static_cast<uint8_t>(((1 << bit.part) - 1) << bit.worth);
          field.bytes |= uint64_t{1} << (bit.byte - field.base);
        }
        fields_of_chunk.push_back(field);
        left = std::move(rest);
      }
      found.push_back(std::move(fields_of_chunk));
    }
    return found;
  }

  // One vector, into `rounded_up(used, CHUNK)` floats.
  void unpack(int64_t b, int64_t h, int64_t t, float* out) const {
    if (topk) return unpack_topk(b, h, t, out);
    if (!coded.empty()) unpack_codes(codes.row(b, h, t), scales.row(b, h, t), out);
    if (dense.empty()) return;
    const uint8_t* row = whole.row(b, h, t);
    const int64_t size = at::elementSize(dtype);
    for (const auto& group : dense) {
      to_float(row, dtype, group.size, out + group.start);
      row += group.size * size;
    }
  }

#if defined(SWAN_AVX512)
  static __m512i codes_of(const std::vector<Field>& fields, const uint8_t* row) {
    __m512i code = _mm512_setzero_si512();
    for (const Field& f : fields) {
      const __m512i bytes = _mm512_maskz_loadu_epi8(f.bytes, row + f.base);
      const __m512i placed = _mm512_permutexvar_epi8(_mm512_load_si512(f.byte), bytes);
      const __m512i turned = _mm512_multishift_epi64_epi8(_mm512_load_si512(f.turn), placed);
      code = _mm512_ternarylogic_epi64(code, turned, _mm512_load_si512(f.mask), 0xF8);  // code | (turned & mask)
    }
    return code;
  }
#endif

  void unpack_codes(const uint8_t* row, const uint8_t* scale, float* out) const {
#if defined(SWAN_AVX512)
    alignas(64) float step_of[MAX_GROUPS] = {};
    for (size_t g = 0; g < coded.size(); ++g) step_of[g] = step(g, scale[g]);
    const __m512 steps = _mm512_load_ps(step_of);
    for (size_t i = 0; i < fields.size(); ++i) {
      const int64_t chunk = i * CHUNK;
      const __m512i code = codes_of(fields[i], row);
      const auto widen = [&](__m128i part, int64_t c) {
        const __m512 x = _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(part)), _mm512_load_ps(middle + c));
        const __m512 s = _mm512_permutexvar_ps(_mm512_load_si512(slot + c), steps);
        _mm512_storeu_ps(out + c, _mm512_mul_ps(x, s));
      };
      widen(_mm512_castsi512_si128(code), chunk);
      widen(_mm512_extracti32x4_epi32(code, 1), chunk + 16);
      widen(_mm512_extracti32x4_epi32(code, 2), chunk + 32);
      widen(_mm512_extracti32x4_epi32(code, 3), chunk + 48);
    }
#else
    std::fill_n(out, rounded_up(used, CHUNK), 0.f);
    for (size_t g = 0; g < coded.size(); ++g) {
      const float s = step(g, scale[g]);
      const auto& group = coded[g];
      const float middle_of_group = ((1 << group.bits) - 1) / 2.f;
      float* to = out + group.start;
      const uint8_t* from = row + group.byte;
      int worth = static_cast<int>(group.bits);
      for (const int part : PARTS[group.bits]) {
        if (!part) continue;
        worth -= part;
        const int64_t n = (group.size * part + 7) / 8;
        const int mask = (1 << part) - 1;
        for (int64_t slot_start = 0, shift = 0; slot_start < group.size; slot_start += n, shift += part) {
          const int64_t count = std::min(n, group.size - slot_start);
          for (int64_t i = 0; i < count; ++i)
            to[slot_start + i] += static_cast<float>(((from[i] >> shift) & mask) << worth);
        }
        from += n;
      }
      for (int64_t i = 0; i < group.size; ++i) to[i] = (to[i] - middle_of_group) * s;
    }
#endif
  }

  void unpack_topk(int64_t b, int64_t h, int64_t t, float* out) const {
    alignas(64) float values[MAX_DIM + CHUNK];
    if (bits == 16) {
      to_float(whole.row(b, h, t), dtype, keep, values);
    } else if (bits == 8) {
      c10::BFloat16 scale;
      std::memcpy(&scale, scales.row(b, h, t), sizeof(scale));
      const float s = scale;
      const auto* code = reinterpret_cast<const int8_t*>(codes.row(b, h, t));
      for (int64_t i = 0; i < keep; ++i) values[i] = code[i] * s;
    } else {
      const float s = scales_of_bytes()[*scales.row(b, h, t)] / 8;
      const uint8_t* code = codes.row(b, h, t);
      const int64_t n = (keep + 1) / 2;
      for (int64_t i = 0; i < n; ++i) values[i] = ((code[i] & 15) - 7.5f) * s;
      for (int64_t i = n; i < keep; ++i) values[i] = ((code[i - n] >> 4) - 7.5f) * s;
    }
    if (!positions.data) {
      std::copy_n(values, d, out);
      return;
    }
    const uint8_t* bitmap = positions.row(b, h, t);
    const float* next = values;
    for (int64_t c = 0; c < d; c += 16) {
      const bool second = c + 8 < d;
      const uint16_t present = static_cast<uint16_t>(bitmap[c / 8] | (second ? bitmap[c / 8 + 1] << 8 : 0));
#if defined(SWAN_AVX512)
      _mm512_storeu_ps(out + c, _mm512_maskz_expand_ps(present, _mm512_loadu_ps(next)));
      next += __builtin_popcount(present);
#else
      for (int i = 0; i < 16; ++i) out[c + i] = present >> i & 1 ? *next++ : 0.f;
#endif
    }
  }
};

#if defined(SWAN_AVX512)
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
#if defined(SWAN_AVX512)
  __m512 y[4];
  for (int i = 0; i < 4; ++i) y[i] = fours(twos(x[4 * i], x[4 * i + 1]), twos(x[4 * i + 2], x[4 * i + 3]));
  return quarters(quarters(y[0], y[1]), quarters(y[2], y[3]));
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

struct Mask {  // tokens lie side by side
  const bool* data = nullptr;
  int64_t batch = 0, head = 0, query = 0;

  explicit Mask(const std::optional<at::Tensor>& mask) {
    if (!mask) return;
    const auto stride = [&](int axis) { return mask->size(axis) == 1 ? 0 : mask->stride(axis); };
    data = mask->const_data_ptr<bool>(), batch = stride(0), head = stride(1), query = stride(2);
  }
};

#if defined(SWAN_AVX512)
#include "attend_cpu_avx512.h"
#else
class Coded {};  // codes are read through tiles
#endif

// Attention of `rows` rows of one KV head over tokens begin to end; out not yet divided by total.
struct Part {
  const Source &k, &v;
  const Coded* coded;  // reads them, or null
  const Mask& mask;
  const float* q;  // [rows, k width], times the scale
  int64_t b, h, rows, groups, queries;
  float *out, *peak, *total;  // [rows, v width], [rows], [rows]

  // Whether a row sees each token of the history; null: it sees all.
  const bool* seen_by(int64_t row) const {
    const int64_t head = h * groups + row / queries, query = row % queries;
    return mask.data ? mask.data + b * mask.batch + head * mask.head + query * mask.query : nullptr;
  }

  void run(int64_t begin, int64_t end) const {
#if defined(SWAN_AVX512)
    if (coded) return run_coded(begin, end);
#endif
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

#if defined(SWAN_AVX512)
  void run_coded(int64_t begin, int64_t end) const {
    for (int64_t r = 0; r < rows; r += Coded::ROWS) {
      const int64_t count = std::min(rows - r, Coded::ROWS), width = rounded_up(v.used, CHUNK);
      const bool* seen[Coded::ROWS] = {};
      for (int64_t i = 0; i < count; ++i) seen[i] = seen_by(r + i);
      coded->attend(q + r * rounded_up(k.used, CHUNK), count, b, h, begin, end, seen, out + r * width, peak + r,
                    total + r);
    }
  }
#endif

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
    if (most == NOTHING) {
      std::fill_n(score, TILE, 0.f);
      return 1.f;
    }
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

// The history, or the tokens beside it that are not packed: queries times the scale, and what each part found, in rows.
struct Side {
  const Source &k, &v;
  const Mask mask;
  const int64_t tokens, splits, stretch;
  const int64_t k_width = rounded_up(k.used, CHUNK), v_width = rounded_up(v.used, CHUNK);
  std::vector<float> q, outs, peaks, totals;

  // `rows` query rows of each of `workers` KV heads of all sequences.
  Side(const Source& k, const Source& v, const Mask& mask, int64_t tokens, int64_t workers, int64_t rows)
      : k(k), v(v), mask(mask), tokens(tokens), splits(splits_of(tokens, workers)),
        stretch(rounded_up((tokens + splits - 1) / splits, TILE)), q(workers * rows * k_width),
        outs(workers * splits * rows * v_width), peaks(workers * splits * rows), totals(peaks.size()), rows_(rows) {}

  static int64_t splits_of(int64_t tokens, int64_t workers) {
    const int64_t wanted = (4 * at::get_num_threads() + workers - 1) / std::max<int64_t>(workers, 1);
    return std::max<int64_t>(1, std::min(wanted, tokens / LEAST));
  }

  void query(int64_t row, const float* x, float scale) {
    for (int64_t c = 0; c < k.used; ++c) q[row * k_width + c] = x[c] * scale;
  }

  float peak(int64_t row) const {
    float most = NOTHING;
    for (int64_t s = 0; s < splits; ++s) most = std::max(most, peaks[part(row, s)]);
    return most;
  }

  // Adds what a row found to sums [d of v]; returns the sum of its weights.
  float add(int64_t row, float most, float* sums) const {
    float total = 0;
    for (int64_t s = 0; s < splits; ++s) {
      const int64_t i = part(row, s);
      const float factor = exponential(peaks[i] - most);
      total += factor * totals[i];
      for (int64_t c = 0; c < v.used; ++c) sums[c] += factor * outs[i * v_width + c];
    }
    return total;
  }

 private:
  const int64_t rows_;
  int64_t part(int64_t row, int64_t split) const { return (row / rows_ * splits + split) * rows_ + row % rows_; }
};

// A matrix [d, d] or its transpose, for rows.
struct Matrix {
  static constexpr int64_t BLOCK = 4 * LANES;
  int64_t d, width;
  std::vector<float> rows;

  Matrix(const at::Tensor& matrix, bool transposed)
      : d(matrix.size(0)), width(rounded_up(d, BLOCK)), rows(d * width) {
    const at::Tensor m = matrix.contiguous();
    std::vector<float> row(d);
    for (int64_t i = 0; i < d; ++i) {
      to_float(static_cast<const uint8_t*>(m.const_data_ptr()) + i * d * m.element_size(), m.scalar_type(), d, row.data());
      for (int64_t j = 0; j < d; ++j) rows[transposed ? j * width + i : i * width + j] = row[j];
    }
  }

  std::vector<float> times(const float* x) const {
    std::vector<float> out(width);
    for (int64_t start = 0; start < d; start += BLOCK) {
      Vector sum[4] = {};
      for (int64_t c = 0; c < d; ++c)
        for (int i = 0; i < 4; ++i) sum[i] += x[c] * load(&rows[c * width + start + i * LANES]);
      for (int i = 0; i < 4; ++i) store(&out[start + i * LANES], sum[i]);
    }
    return out;
  }
};

const at::Tensor& stored(at::TensorList planes) {
  return *std::find_if(planes.begin(), planes.end(), [](const at::Tensor& t) { return t.dim() == 4; });
}

void check(const at::Tensor& q, const Source& k, const Source& v, at::TensorList k_planes, at::TensorList v_planes,
           int64_t tokens, const std::optional<at::Tensor>& mask, at::TensorList recent,
           const std::optional<at::Tensor>& recent_mask) {
  const auto &keys = stored(k_planes), &values = stored(v_planes);
  const int64_t batch = q.size(0), kv_heads = keys.size(1);
  TORCH_CHECK(q.dim() == 4 && q.size(3) == k.d && keys.size(0) == batch && q.size(1) % kv_heads == 0 &&
                  keys.size(2) >= tokens && values.sizes().slice(0, 3).equals(keys.sizes().slice(0, 3)),
              "keys and values do not fit the queries or each other");
  const auto fits = [&](const std::optional<at::Tensor>& m, int64_t count) {
    return !m || (m->scalar_type() == at::kBool && m->dim() == 4 && (m->size(0) == 1 || m->size(0) == batch) &&
                  (m->size(1) == 1 || m->size(1) == q.size(1)) && m->size(2) == q.size(2) && m->size(3) == count);
  };
  TORCH_CHECK(fits(mask, tokens), "the mask does not fit");
  if (recent.empty()) return;
  for (int i = 0; i < 2; ++i)
    TORCH_CHECK(recent[i].dim() == 4 && recent[i].size(0) == batch && recent[i].size(1) == kv_heads &&
                    recent[i].size(2) == recent[0].size(2) && recent[i].size(3) == (i ? v.d : k.d) &&
                    recent[i].scalar_type() == q.scalar_type(),
                "recent keys and values do not fit the history");
  TORCH_CHECK(fits(recent_mask, recent[0].size(2)), "the mask of the recent tokens does not fit");
}

// `mixes`: of keys and values, each a matrix or an empty tensor; `recent`: keys and values as they are, or nothing.
std::tuple<at::Tensor, at::Tensor> attend(
    const at::Tensor& q, at::TensorList k_planes, at::IntArrayRef k_layout, at::TensorList v_planes,
    at::IntArrayRef v_layout, int64_t tokens, const std::optional<at::Tensor>& mask, double scale, at::TensorList mixes,
    at::TensorList recent, const std::optional<at::Tensor>& recent_mask) {
  const Source k(k_planes, k_layout), v(v_planes, v_layout);
  check(q, k, v, k_planes, v_planes, tokens, mask, recent, recent_mask);
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), kv_heads = stored(k_planes).size(1);
  const int64_t groups = heads / kv_heads, rows = groups * queries, workers = batch * kv_heads;

  const auto side_by_side = [](const std::optional<at::Tensor>& m) {
    return m && m->stride(3) != 1 ? std::optional(m->contiguous()) : m;
  };
  const auto seen = side_by_side(mask), recent_seen = side_by_side(recent_mask);
  Side history(k, v, Mask(seen), tokens, workers, rows);
  std::vector<at::Tensor> dense;
  for (const at::Tensor& t : recent) dense.push_back(t.stride(3) == 1 ? t : t.contiguous());
  std::optional<Source> recent_k, recent_v;
  std::optional<Side> beside;
  if (!dense.empty()) {
    const at::Tensor none = at::empty({0}, q.options());
    recent_k.emplace(at::TensorList({none, dense[0], none, none}), at::IntArrayRef({0, k.d, 16}));
    recent_v.emplace(at::TensorList({none, dense[1], none, none}), at::IntArrayRef({0, v.d, 16}));
    beside.emplace(*recent_k, *recent_v, Mask(recent_seen), dense[0].size(2), workers, rows);
  }
  std::optional<Matrix> key_mix, value_mix;
  if (mixes.size() && mixes[0].numel()) key_mix.emplace(mixes[0], false);
  if (mixes.size() && mixes[1].numel()) value_mix.emplace(mixes[1], true);

  const at::Tensor wide = q.to(at::kFloat).contiguous();
  std::vector<char> finite(workers * rows, true);  // of the others, integers would make numbers
  at::parallel_for(0, workers * rows, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* x = wide.const_data_ptr<float>() + row * k.d;
      finite[row] = std::all_of(x, x + k.d, [](float c) { return std::isfinite(c); });
      if (!finite[row]) continue;
      history.query(row, key_mix ? key_mix->times(x).data() : x, static_cast<float>(scale));
      if (beside) beside->query(row, x, static_cast<float>(scale));
    }
  });
  std::optional<Coded> coded;
#if defined(SWAN_AVX512)
  if (rows <= MOST_ROWS && Coded::reads(k, v)) coded.emplace(k, v, q.scalar_type() == at::kFloat);
#endif
  const auto run = [&](Side& side, const Coded* reader, int64_t i) {
    const int64_t worker = i / side.splits, begin = std::min(i % side.splits * side.stretch, side.tokens);
    Part{side.k, side.v, reader, side.mask, side.q.data() + worker * rows * side.k_width, worker / kv_heads,
         worker % kv_heads, rows, groups, queries, side.outs.data() + i * rows * side.v_width,
         side.peaks.data() + i * rows, side.totals.data() + i * rows}
        .run(begin, std::min(begin + side.stretch, side.tokens));
  };
  const int64_t parts = workers * history.splits, others = beside ? workers * beside->splits : 0;
  const int64_t items = std::max(parts, others);  // threads take neighbours: each its share of both
  at::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = parts * begin / items; i < parts * end / items; ++i) run(history, coded ? &*coded : nullptr, i);
    for (int64_t i = others * begin / items; i < others * end / items; ++i) run(*beside, nullptr, i);
  });

  // Merged by log-sum-exp; the history in the coordinates in which it is stored.
  at::Tensor out = at::zeros({batch, heads, queries, v.d}, q.options().dtype(at::kFloat));
  at::Tensor lse = at::full({batch, heads, queries}, NOTHING, q.options().dtype(at::kFloat));
  auto *to = out.mutable_data_ptr<float>(), *lse_to = lse.mutable_data_ptr<float>();
  at::parallel_for(0, workers * rows, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (!finite[row]) {
        std::fill_n(to + row * v.d, v.d, NAN);
        lse_to[row] = NAN;
        continue;
      }
      const float most = std::max(history.peak(row), beside ? beside->peak(row) : NOTHING);
      if (most == NOTHING) continue;
      std::vector<float> sums(v.d);
      float total = history.add(row, most, sums.data());
      if (value_mix) sums = value_mix->times(sums.data());
      if (beside) total += beside->add(row, most, sums.data());
      for (int64_t c = 0; c < v.d; ++c) to[row * v.d + c] = sums[c] / total;
      lse_to[row] = most + std::log(total);
    }
  });
  return {out, lse};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(swan, m) {
  m.def(
      SWAN_OPERATOR(attend_cpu)
      "(Tensor q, Tensor[] k, int[] k_layout, Tensor[] v, int[] v_layout, SymInt tokens, Tensor? mask, "
      "float scale, Tensor[] mixes, Tensor[] recent, Tensor? recent_mask) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(swan, CPU, m) {
  m.impl(SWAN_OPERATOR(attend_cpu), &attend);
}
