// What the layouts of keys and values imply, known when the kernel is compiled. Macros: K_GROUPS and V_GROUPS, as
// {{size, bits}, ...} with sizes that are multiples of 16, and their sums D and DV.
#pragma once

#include "ptx.cuh"

struct Group {
  int size, bits;
};

// A group that is stored: its first coordinate, and how many coordinates of stored groups there are before it; the byte
// at which it begins in a row of codes, or in one of whole numbers; and which scale is its own.
struct Span {
  int start, size, bits, stored, byte, whole, scale;

  __device__ constexpr bool coded() const { return bits < 16; }
  // Codes are stored in parts of 4, 2 and 1 bits, high bits first.
  __device__ constexpr int parts() const { return bits == 1 || bits == 2 || bits == 4 ? 1 : 2; }
  __device__ constexpr int part(int i) const {
    const int first = bits == 3 ? 2 : bits > 4 ? 4 : bits;
    return i ? bits - first : first;
  }
  __device__ constexpr int shift(int i) const { return i ? 0 : bits - part(0); }
  __device__ constexpr int part_byte(int i) const { return byte + (i ? size * part(0) / 8 : 0); }
};

template <int N>
struct Layout {
  Span spans[N];                                  // the first `count` are there
  int count, d, stored, row, whole_row, scales;  // coordinates, and bytes of a row in each plane
};

template <int N>
__device__ constexpr Layout<N> layout_of(const Group (&groups)[N]) {
  Layout<N> x{};
  for (int i = 0; i < N; ++i) {
    const int size = groups[i].size, bits = groups[i].bits;
    if (bits) {
      x.spans[x.count++] = {x.d, size, bits, x.stored, x.row, x.whole_row, x.scales};
      x.stored += size;
      (bits == 16 ? x.whole_row : x.row) += size * bits / 8;
      x.scales += bits < 16;
    }
    x.d += size;
  }
  x.row = (x.row + 3) / 4 * 4;
  return x;
}

constexpr Group K_LIST[] = K_GROUPS;
constexpr Group V_LIST[] = V_GROUPS;
constexpr Group K_WHOLE[] = {{D, 16}};
constexpr Group V_WHOLE[] = {{DV, 16}};

struct Keys {
  static constexpr auto layout = layout_of(K_LIST);
};
struct Values {
  static constexpr auto layout = layout_of(V_LIST);
};
struct RecentKeys {
  static constexpr auto layout = layout_of(K_WHOLE);
};
struct RecentValues {
  static constexpr auto layout = layout_of(V_WHOLE);
};
static_assert(Keys::layout.d == D && Values::layout.d == DV, "groups do not sum to the head dimensions");

// Arrays have at least one element.
__device__ constexpr int some(int n) { return n > 0 ? n : 1; }
__device__ constexpr int common_divisor(int a, int b) { return b ? common_divisor(b, a % b) : a; }

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
