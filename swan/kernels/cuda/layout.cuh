// What the layouts of keys and values imply, known when a kernel is compiled. Macros: D and K_GROUPS, the dimension and
// the groups {size, bits} of keys, such as 128 and {{32, 5}, {96, 3}}; DV and V_GROUPS, those of values.
#pragma once

#include "ptx.cuh"

// The scale byte of a group some number of which is NaN, infinite, or above all scales. Its numbers are read as NaN.
constexpr int NOT_A_NUMBER = 255;
#define NO_NUMBER __uint_as_float(0x7fc00000u)  // NaN, for which there is no constant without headers

struct Group {
  int size, bits;
};

// A group that is stored.
struct Span {
  int start, size, bits;
  int stored;  // coordinates of stored groups before it
  int byte;    // at which it begins in a row of codes
  int whole;   // coordinates of 16 bits before it
  int scale;   // groups of fewer bits before it

  __device__ constexpr bool coded() const { return bits < 16; }
  // Codes are stored in parts of 4, 2 and 1 bits, high bits first.
  __device__ constexpr int parts() const { return bits == 1 || bits == 2 || bits == 4 ? 1 : 2; }
  __device__ constexpr int part(int i) const {
    const int first = bits >= 4 ? 4 : bits >= 2 ? 2 : 1;
    return i ? bits - first : first;
  }
  __device__ constexpr int shift(int i) const { return i ? 0 : bits - part(0); }
  __device__ constexpr int part_bytes(int i) const { return (size * part(i) + 7) / 8; }
  __device__ constexpr int part_byte(int i) const { return byte + (i ? part_bytes(0) : 0); }
};

template <int N>
struct Layout {
  Span spans[N];  // the first `count` are there
  int count, d, stored;
  int row;     // bytes of codes of a token, whole words
  int whole;   // coordinates of 16 bits
  int scales;  // groups of fewer bits
};

template <int N>
__device__ constexpr Layout<N> layout_of(const Group (&groups)[N]) {
  Layout<N> x{};
  for (const Group& group : groups) {
    if (group.bits) {
      const Span span{x.d, group.size, group.bits, x.stored, x.row, x.whole, x.scales};
      x.spans[x.count++] = span;
      x.stored += span.size;
      if (span.coded()) {
        for (int i = 0; i < span.parts(); ++i) x.row += span.part_bytes(i);
        x.scales += 1;
      } else {
        x.whole += span.size;
      }
    }
    x.d += group.size;
  }
  x.row = (x.row + 3) / 4 * 4;
  return x;
}

constexpr Group K_LIST[] = K_GROUPS;
constexpr Group V_LIST[] = V_GROUPS;

struct Keys {
  static constexpr auto layout = layout_of(K_LIST);
};
struct Values {
  static constexpr auto layout = layout_of(V_LIST);
};
static_assert(Keys::layout.d == D && Values::layout.d == DV, "groups do not sum to the head dimensions");

// A number that the compiler knows, as an argument; and a loop over such.
template <int I>
struct Constant {
  __device__ constexpr operator int() const { return I; }
};
template <int N, int I = 0, class Function>
__device__ __forceinline__ void unrolled(Function&& function) {
  if constexpr (I < N) {
    function(Constant<I>{});
    unrolled<N, I + 1>(function);
  }
}
