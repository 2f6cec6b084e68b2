// Packed keys or values as the kernels read them: where a layout has what, and one vector as floats.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common.h"

namespace swan {

constexpr int64_t CHUNK = 64;       // floats of a vector are a whole number of these

constexpr int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Where the tokens of sequences are, if they lie in pages: token t of sequence b is in number[b * stride + (t >> bits)].
struct Pages {
  const int64_t* number = nullptr;  // null: they lie as they are
  int64_t stride = 0, last = 0;     // `last`: the last page of a sequence that may be looked up
  int bits = 0;                     // a page holds 2 ** bits tokens
};

// A tensor [batch, heads, tokens, width] whose last axis is dense; or none. With pages its first axis counts these.
struct Plane {
  const uint8_t* data = nullptr;
  int64_t batch = 0, head = 0, token = 0;  // strides in bytes
  Pages pages;

  const uint8_t* row(int64_t b, int64_t h, int64_t t) const {
    if (pages.number) {
      b = pages.number[b * pages.stride + std::min(t >> pages.bits, pages.last)];
      t &= (int64_t{1} << pages.bits) - 1;
    }
    return data + b * batch + h * head + t * token;
  }

  // How many of the tokens from t to before `end` lie in one piece.
  int64_t together(int64_t t, int64_t end) const {
    return pages.number ? std::min(end, ((t >> pages.bits) + 1) << pages.bits) - t : end - t;
  }
};

// What is stored of packed vectors.
struct Planes {
  Plane codes, whole, scales, positions;
  int64_t row = 0;  // bytes of a row of codes
  c10::ScalarType dtype = c10::ScalarType::Float;  // of the whole numbers of 16 bits and more
};

// Layout: {0, size, bits, size, bits, ...} for graded, {1, d, keep, bits} for top-k.
struct Source : Planes {
  struct Group {
    int64_t start, size, bits;  // coordinates
    int64_t byte;               // of the first part in a row of codes; the second follows it

    int64_t second() const { return byte + part_bytes(size, PARTS[bits][0]); }
    float middle() const { return ((1 << bits) - 1) / 2.f; }  // of the steps
    float step(uint8_t scale) const { return scales_of_bytes()[scale] * HALVINGS[bits]; }
  };

  bool topk = false;
  int64_t d = 0, used = 0, keep = 0, bits = 0;  // used: coordinates up to the last that is stored
  std::vector<Group> coded, dense;

  Source(const Planes& planes, const int64_t* layout, size_t count) : Planes(planes), topk(layout[0] == 1) {
    if (topk) {
      d = used = layout[1], keep = layout[2], bits = layout[3];
      return;
    }
    int64_t byte = 0;
    for (size_t i = 1; i < count; i += 2) {
      const int64_t size = layout[i], b = layout[i + 1];
      if (b == 16) {
        dense.push_back({d, size, b, 0});
      } else if (b) {
        coded.push_back({d, size, b, byte});
        byte += code_bytes(size, b);
      }
      d += size;
      if (b) used = d;
    }
  }

  void put_in_pages(const Pages& pages) {
    for (Plane* plane : {&codes, &whole, &scales, &positions}) plane->pages = pages;
  }

  // One vector, into `rounded_up(used, CHUNK)` floats.
  void unpack(int64_t b, int64_t h, int64_t t, float* out) const {
    if (topk) return unpack_topk(b, h, t, out);
    std::fill_n(out, rounded_up(used, CHUNK), 0.f);
    for (size_t g = 0; g < coded.size(); ++g) {
      const Group& group = coded[g];
      uint8_t code[MAX_DIM + 8] = {};
      unpack_codes(group, codes.row(b, h, t), code);
      const float step = group.step(scales.row(b, h, t)[g]), middle = group.middle();
      for (int64_t i = 0; i < group.size; ++i) out[group.start + i] = (code[i] - middle) * step;
    }
    if (dense.empty()) return;
    const uint8_t* from = whole.row(b, h, t);
    for (const Group& group : dense) {
      to_float(from, dtype, group.size, out + group.start);
      from += group.size * bytes_of(dtype);
    }
  }

 private:
  static void unpack_codes(const Group& group, const uint8_t* row, uint8_t* code) {
    const int low = PARTS[group.bits][1];
    add_part(row + group.byte, group.size, PARTS[group.bits][0], low, code);
    if (low) add_part(row + group.second(), group.size, low, 0, code);
  }

  // code |= field << shift
  static void add_part(const uint8_t* from, int64_t size, int part, int shift, uint8_t* code) {
    const auto add = [&](auto p) {
      constexpr int P = decltype(p)::value;
      const auto eight = [&](const uint8_t* bytes, int64_t i) {
        uint64_t before;
        std::memcpy(&before, code + i, 8);
        before |= spread<P>(bytes) << shift;
        std::memcpy(code + i, &before, 8);
      };
      int64_t i = 0;
      for (; i + 8 <= size; i += 8) eight(from + i / 8 * P, i);
      if (i == size) return;
      uint8_t rest[4] = {};
      std::memcpy(rest, from + i / 8 * P, part_bytes(size - i, P));
      eight(rest, i);
    };
    switch (part) {
      case 1: return add(std::integral_constant<int, 1>());
      case 2: return add(std::integral_constant<int, 2>());
      default: return add(std::integral_constant<int, 4>());
    }
  }

  void unpack_topk(int64_t b, int64_t h, int64_t t, float* out) const {
    float values[MAX_DIM + CHUNK];
    if (bits == 16) {
      to_float(whole.row(b, h, t), dtype, keep, values);
    } else if (bits == 8) {
      c10::BFloat16 scale;
      std::memcpy(&scale, scales.row(b, h, t), sizeof(scale));
      const float s = scale;
      const auto* code = reinterpret_cast<const int8_t*>(codes.row(b, h, t));
      for (int64_t i = 0; i < keep; ++i) values[i] = code[i] * s;
    } else {
      const Group group{0, keep, 4, 0};
      uint8_t code[MAX_DIM + 8] = {};
      unpack_codes(group, codes.row(b, h, t), code);
      const float step = group.step(*scales.row(b, h, t));
      for (int64_t i = 0; i < keep; ++i) values[i] = (code[i] - 7.5f) * step;
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
#if defined(__AVX512F__)
      _mm512_storeu_ps(out + c, _mm512_maskz_expand_ps(present, _mm512_loadu_ps(next)));
      next += __builtin_popcount(present);
#else
      for (int i = 0; i < 16; ++i) out[c + i] = present >> i & 1 ? *next++ : 0.f;
#endif
    }
  }
};

}  // namespace swan
