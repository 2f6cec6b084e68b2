// The numbers of a cache: DTYPE is bfloat16, float16 or float32.
#pragma once

#include "ptx.cuh"

// Numbers of two bytes also come in pairs, a word, of which tensor cores make products.
struct bfloat16 {
  uint16_t bits;

  static __device__ __forceinline__ bfloat16 of(float x) { return {static_cast<uint16_t>(pack2(x, 0))}; }
  static __device__ __forceinline__ uint32_t pack(float x, float y) { return pack2(x, y); }
  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma(c, a, b0, b1);
  }
};
struct float16 {
  uint16_t bits;

  static __device__ __forceinline__ float16 of(float x) { return {static_cast<uint16_t>(pack2_half(x, 0))}; }
  static __device__ __forceinline__ uint32_t pack(float x, float y) { return pack2_half(x, y); }
  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_half(c, a, b0, b1);
  }
};
struct float32 {
  float value;

  static __device__ __forceinline__ float32 of(float x) { return {x}; }
};

__device__ __forceinline__ float to_float(bfloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(float16 x) { return from_half(x.bits); }
__device__ __forceinline__ float to_float(float32 x) { return x.value; }

// Neighbours that are read or written at once: they lie at a multiple of their size.
template <typename T, int N>
struct alignas(sizeof(T) * N) Some {
  T at[N];
};

using Number = DTYPE;

// The dtype of groups of 16 bits and of recent tokens in `attend`; with float32, which tensor cores do not take, there
// are none.
template <class T>
struct OfTwoBytes {
  using type = T;
};
template <>
struct OfTwoBytes<float32> {
  using type = bfloat16;
};
using Whole = OfTwoBytes<Number>::type;
