// Types, and instructions that CUDA C++ has no name for: there are no headers where sources are compiled at run time.
// tests/kernels/cuda_on_cpu.h has the same instructions in C++.
#pragma once

#ifndef CUDA_ON_CPU
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int64_t = long long;
using Address = uint32_t;  // in shared memory

// c += a b, m16n8k16. With g = lane / 4 and t = lane % 4: A has rows g and g + 8 at k = 2t, 2t + 1, then the same at
// k + 8; B the same k in column g; C rows g, g + 8 at columns 2t, 2t + 1.
#define SWAN_MMA(name, type)                                                                                        \
  __device__ __forceinline__ void name(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {           \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                                     \
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                            \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                   \
  }
SWAN_MMA(mma, "bf16")
SWAN_MMA(mma_half, "f16")
#undef SWAN_MMA

__device__ __forceinline__ int lane_id() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}
// blockIdx, which is read at each call.
__device__ __forceinline__ int program_y() {
  int y;
  asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(y));
  return y;
}
__device__ __forceinline__ int program_z() {
  int z;
  asm volatile("mov.u32 %0, %%ctaid.z;" : "=r"(z));
  return z;
}
// (x & mask) | bits
__device__ __forceinline__ uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
  return y;
}
__device__ __forceinline__ float exp2_(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Lane 4 r + t holds columns 2t, 2t + 1 of row r of a matrix of 8 x 8 numbers of two bytes; of its transpose, after.
__device__ __forceinline__ uint32_t transpose8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
__device__ __forceinline__ Address shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// Copies to shared memory, which arrive when wait_copies says so: all groups but the last N.
__device__ __forceinline__ void copy16(Address to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
// Asks for a line of memory, which comes to the second level of the cache.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
// Two numbers of two bytes, the first one in the low half: bfloat16, or half precision.
__device__ __forceinline__ uint32_t pack2(float x, float y) {
  uint32_t z;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(z) : "f"(y), "f"(x));
  return z;
}
__device__ __forceinline__ uint32_t pack2_half(float x, float y) {
  uint32_t z;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(z) : "f"(y), "f"(x));
  return z;
}
__device__ __forceinline__ float from_half(uint32_t x) {  // of the low half
  float y;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(y) : "r"(x));
  return y;
}
#else
inline float from_half(uint32_t x) { return cuda_on_cpu::from_half(static_cast<uint16_t>(x)); }
#endif
