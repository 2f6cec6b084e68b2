// Numbers of a cache: DTYPE is bfloat16, float16 or float32.
#pragma once

#ifndef CUDA_ON_CPU  // there are no system headers where sources are compiled at run time
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int64_t = long long;
#endif

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};
using float32 = float;

__device__ inline float to_float(float32 x) { return x; }
__device__ inline float to_float(bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
#ifdef CUDA_ON_CPU
inline float to_float(float16 x) { return cuda_on_cpu::from_half(x.bits); }
#else
__device__ inline float to_float(float16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
#endif

// Neighbours that are read or written at once: they lie at a multiple of their size.
template <typename T, int N>
struct alignas(sizeof(T) * N) Some {
  T at[N];
};
