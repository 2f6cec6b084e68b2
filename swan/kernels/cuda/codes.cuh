// Scales and codes of vectors in shared memory.
#pragma once

#include "mix.cuh"

// The fraction bits of 2^(n / 8), rounded to a float. (An array that is indexed would lie in slow memory.)
constexpr uint32_t fraction_of_eighths(int n) {
  const uint32_t low = n == 0 ? 0 : n == 1 ? 0x0b95c2 : n == 2 ? 0x1837f0 : 0x25fed7;
  const uint32_t high = n == 4 ? 0x3504f3 : n == 5 ? 0x45672a : n == 6 ? 0x5744fd : 0x6ac0c7;
  return n < 4 ? low : high;
}

// The scale 2^((byte - 128) / 8), or NaN.
__device__ inline float scale_of(int byte) {
  if (byte == NOT_A_NUMBER) return NO_NUMBER;
  return __uint_as_float(static_cast<uint32_t>(byte / 8 - 16 + 127) << 23 | fraction_of_eighths(byte % 8));
}

// The byte of the smallest scale that is not below a number: how many scales are below it. 8 for each power of two, and
// those of its own octave. NOT_A_NUMBER for what is above all scales, and for NaN.
__device__ inline int scale_byte(float peak) {
  const uint32_t bits = __float_as_uint(peak), fraction = bits & 0x7fffff;
  int byte = (static_cast<int>(bits >> 23) - 127 + 16) * 8;
#pragma unroll
  for (int n = 0; n < 8; ++n) byte += fraction > fraction_of_eighths(n);
  return min(max(byte, 0), 255);
}

constexpr float HALF_AN_EIGHTH_DOWN = 0.95760328f;  // 2^(-1 / 16): what is rounded up from there is the nearest

// Where codes of so many bits are clipped, as in swan/storage/codes.py; 0: they are not.
__device__ inline float clip_of(int bits) { return bits == 1 ? 1.0f : bits == 2 ? 2.2f : bits == 3 ? 2.6f : 0.0f; }

__device__ inline float sum_of_warp(float x) {
  for (int other = 16; other; other /= 2) x += __shfl_xor_sync(~0u, x, other);
  return x;
}

// Codes of a group of a vector, by a warp. Returns the byte of its scale.
template <class L, int N>
__device__ int quantize(const Span& group, int n, bool mix) {
  using M = Memory<L, N>;
  const int lane = threadIdx.x % 32;
  uint32_t peak = 0;  // magnitudes of floats are in the order of their bits, and NaN above all
  for (int i = group.start + lane; i < group.start + group.size; i += 32) {
    const float x = mixed<L, N>(mix, n, i);
    *M::sum(0, n, i) = x;  // this lane alone reads it, here and below
    peak = max(peak, __float_as_uint(x) & 0x7fffffffu);
  }
  for (int other = 16; other; other /= 2) peak = max(peak, __shfl_xor_sync(~0u, peak, other));
  const int byte = scale_byte(__uint_as_float(peak));
  const float scale = scale_of(byte), half = 1 << (group.bits - 1), most = (1 << group.bits) - 1;
  const float clip = clip_of(group.bits);
  float square = 0, shorter = 1;
  if (clip) {
    for (int i = group.start + lane; i < group.start + group.size; i += 32) {
      const float part = *M::sum(0, n, i) / scale;
      square += part * part;
    }
    square = sum_of_warp(square);
    const float limit = clip * sqrtf(square / group.size);
    if (limit > 0 && limit < 1) shorter = limit;
  }
  float along = 0;
  for (int i = group.start + lane; i < group.start + group.size; i += 32) {
    const float part = *M::sum(0, n, i) / scale, step = floorf(part / shorter * half) + half;
    const uint8_t code = static_cast<uint8_t>(fminf(fmaxf(step, 0), most));  // 0 where the scale is NaN
    *M::code(n, i) = code;
    along += part * (code - (half - 0.5f));
  }
  if (!clip || byte == NOT_A_NUMBER) return byte;
  along = sum_of_warp(along);
  if (!(along > 0)) return 0;  // all numbers are 0
  return min(scale_byte(scale * half * square / along * HALF_AN_EIGHTH_DOWN), NOT_A_NUMBER - 1);
}

// A byte of a part of the codes of a group: fields of `part` bits that begin at bit `shift` of the codes.
__device__ inline int gather(const uint8_t* codes, int size, int part, int shift, int byte) {
  int fields = 0;
#pragma unroll
  for (int slot = 0; slot < 8 / part; ++slot) {
    const int i = byte * (8 / part) + slot;
    if (i < size) fields |= (codes[i] >> shift & ((1 << part) - 1)) << slot * part;
  }
  return fields;
}

// A byte of the row of a vector. Bytes after the last group are 0.
template <class L>
__device__ uint8_t byte_of_row(const uint8_t* codes, int byte) {
  int result = 0;
  each_coded<L>([&](const Span& group) {
#pragma unroll
    for (int i = 0; i < group.parts(); ++i) {
      const int inside = byte - group.part_byte(i);
      if (inside < 0 || inside >= group.part_bytes(i)) continue;
      result = gather(codes + group.start, group.size, group.part(i), group.shift(i), inside);
    }
  });
  return static_cast<uint8_t>(result);
}
