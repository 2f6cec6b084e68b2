// Codes of 64 coordinates in the lanes of a register of AVX-512, taken from bytes in four instructions for a field.
#pragma once

#include <array>

#include "source.h"

namespace swan {

// Codes of 64 coordinates from up to 64 bytes of a row: a byte, a rotation and a mask for each.
struct Field {
  int64_t base;
  uint64_t bytes;
  alignas(64) uint8_t byte[CHUNK], turn[CHUNK], mask[CHUNK];
};

// The fields of each chunk of groups that begin where they say, coordinate c in lane place[c].
inline std::vector<std::vector<Field>> fields_in(const std::vector<Source::Group>& groups, int64_t width,
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
        for (int64_t i = std::max<int64_t>(chunk - group.start, 0); i < group.size && group.start + i < chunk + CHUNK; ++i)
          left.push_back({place[group.start + i - chunk], byte + i * part / 8, part, static_cast<int>(i * part % 8), worth});
        byte += part_bytes(group.size, part);
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

inline __m512i codes_of(const std::vector<Field>& fields, const uint8_t* row) {
  __m512i code = _mm512_setzero_si512();
  for (const Field& f : fields) {
    const __m512i bytes = _mm512_maskz_loadu_epi8(f.bytes, row + f.base);
    const __m512i placed = _mm512_permutexvar_epi8(_mm512_load_si512(f.byte), bytes);
    const __m512i turned = _mm512_multishift_epi64_epi8(_mm512_load_si512(f.turn), placed);
    code = _mm512_ternarylogic_epi64(code, turned, _mm512_load_si512(f.mask), 0xF8);  // code | (turned & mask)
  }
  return code;
}

// Of N fields in the same 64 bytes.
template <int N>
struct Reader {
  int64_t base;
  __mmask64 bytes = 0;
  __m512i byte[N], turn[N], mask[N];
  explicit Reader(const std::vector<Field>& fields) : base(fields[0].base) {
    for (int i = 0; i < N; ++i) {
      bytes |= fields[i].bytes;
      byte[i] = _mm512_load_si512(fields[i].byte);
      turn[i] = _mm512_load_si512(fields[i].turn);
      mask[i] = _mm512_load_si512(fields[i].mask);
    }
  }
  __m512i operator()(const uint8_t* row) const {
    const __m512i found = _mm512_maskz_loadu_epi8(bytes, row + base);
    __m512i code = _mm512_setzero_si512();
    for (int i = 0; i < N; ++i) {
      const __m512i turned = _mm512_multishift_epi64_epi8(turn[i], _mm512_permutexvar_epi8(byte[i], found));
      code = _mm512_ternarylogic_epi64(code, turned, mask[i], 0xF8);  // code | (turned & mask)
    }
    return code;
  }
};

// Calls a function with a reader: of a row, the codes of a chunk, by tables in registers where they are few.
template <typename Function>
void by_fields(const std::vector<Field>& fields, const Function& function) {
  if (fields.size() == 1) return function(Reader<1>(fields));
  if (fields.size() == 2 && fields[0].base == fields[1].base) return function(Reader<2>(fields));
  function([&](const uint8_t* row) { return codes_of(fields, row); });
}

}  // namespace swan
