// What a .cu file finds here in place of CUDA, when tests run its kernels on a CPU (tests/kernels/cuda_on_cpu.py).
//
// Each thread of a program (a block) is a fibre; a warp's instructions wait for its lanes. Loads and stores are seen
// because the kernel is compiled with -fsanitize=thread: the calls that the compiler writes beside them are answered by
// cuda_on_cpu/machine.cpp, which checks each access. Instructions of PTX have the names that ptx.cuh gives them.
//
// Shared memory is the one array `extern __shared__ ... shared[]`, of the size given at launch. A `__shared__` array
// of a fixed size does not compile. Threads of a warp meet in full: masks must name all lanes.
#pragma once

#ifndef CUDA_ON_CPU_MACHINE
// A copy that a kernel makes by these names is checked as well; the names are bound before a header uses them.
extern "C" void* memcpy(void*, const void*, decltype(sizeof 0)) noexcept asm("checked_memcpy");
extern "C" void* memmove(void*, const void*, decltype(sizeof 0)) noexcept asm("checked_memcpy");
extern "C" void* memset(void*, int, decltype(sizeof 0)) noexcept asm("checked_memset");
#endif

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __restrict__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ __attribute__((weak))  // not allowed on variables of a function: those would not be shared

using std::max;
using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Bits ----------------------------------------------------------------------------------------------------------------

namespace cuda_on_cpu {
template <typename To, typename From>
inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}
}  // namespace cuda_on_cpu

inline uint32_t __float_as_uint(float x) { return cuda_on_cpu::bits<uint32_t>(x); }
inline int __float_as_int(float x) { return cuda_on_cpu::bits<int>(x); }
inline float __uint_as_float(uint32_t x) { return cuda_on_cpu::bits<float>(x); }
inline float __int_as_float(int x) { return cuda_on_cpu::bits<float>(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t n) {
  return static_cast<uint32_t>(((static_cast<uint64_t>(high) << 32 | low) << (n & 31)) >> 32);
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t n) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (n & 31));
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = selector >> 4 * i, byte = static_cast<uint32_t>(both >> 8 * (s & 7)) & 255;
    result |= (s & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;  // bit 3 asks for the sign of the byte
  }
  return result;
}
template <typename T>
inline T __ldg(const T* p) {
  return *p;
}

// Numbers of two bytes, rounded to nearest even -----------------------------------------------------------------------

namespace cuda_on_cpu {
inline float from_bf16(uint16_t x) { return bits<float>(static_cast<uint32_t>(x) << 16); }
inline uint16_t to_bf16(float x) {
  const auto u = bits<uint32_t>(x);
  return static_cast<uint16_t>(x != x ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline float from_half(uint16_t x) {
  const uint32_t sign = (x & 0x8000u) << 16, rest = (x & 0x7fffu) << 13;
  if (rest >= 0x0f800000) return bits<float>(sign | rest | 0x7f800000);  // infinite, or not a number
  return bits<float>(sign | bits<uint32_t>(bits<float>(rest) * 0x1p112f));  // the exponents differ by 112
}
inline uint16_t to_half(float x) {
  const auto u = bits<uint32_t>(x), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
  if (rest > 0x7f800000) return 0x7fff;
  if (rest >= bits<uint32_t>(65520.f)) return static_cast<uint16_t>(sign | 0x7c00);
  // Below 2**-14 steps are 2**-24 wide, as those of floats from 0.5 on.
  if (rest < 0x38800000) return static_cast<uint16_t>(sign | (bits<uint32_t>(bits<float>(rest) + 0.5f) - 0x3f000000));
  return static_cast<uint16_t>(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}
}  // namespace cuda_on_cpu

struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };
using half = __half;
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
struct alignas(4) __half2 { __half x, y; };
using half2 = __half2;
inline float __bfloat162float(__nv_bfloat16 x) { return cuda_on_cpu::from_bf16(x.bits); }
inline float __half2float(__half x) { return cuda_on_cpu::from_half(x.bits); }
inline __nv_bfloat16 __float2bfloat16(float x) { return {cuda_on_cpu::to_bf16(x)}; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __float2bfloat16(x); }
inline __half __float2half(float x) { return {cuda_on_cpu::to_half(x)}; }
inline __half __float2half_rn(float x) { return __float2half(x); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16(x), __float2bfloat16(y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }

// What threads do together (machine.cpp) ------------------------------------------------------------------------------

void __syncthreads();
void __syncwarp(unsigned mask = ~0u);
void __threadfence();
inline void __threadfence_block() {}
[[noreturn]] void __trap();

namespace cuda_on_cpu {
uint64_t exchange(const char* instruction, unsigned mask, uint64_t value, int from);  // the value of lane `from`
uint32_t ballot(const char* instruction, unsigned mask, bool vote);
int lane();
uint64_t begin_atomic(void* p, int bytes);  // checks the access; what stands there
void end_atomic(void* p, uint64_t value, int bytes);
void get_argument(int index, int count, char kind, void* to, int64_t bytes);  // of the launch

template <typename T>
T from_lane(const char* instruction, unsigned mask, T value, int from) {
  static_assert(sizeof(T) <= 8);
  uint64_t word = 0;
  __builtin_memcpy(&word, &value, sizeof value);
  word = exchange(instruction, mask, word, from);
  __builtin_memcpy(&value, &word, sizeof value);
  return value;
}
// Lanes are in rows of `width`; who asks for one outside of its row gets its own value.
inline int in_row(int lane, int from, int width) { return (lane ^ from) & ~(width - 1) ? lane : from; }

template <typename T, typename Function>
T atomically(T* p, const Function& function) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  T value;
  const uint64_t word = begin_atomic(p, sizeof(T));
  __builtin_memcpy(&value, &word, sizeof value);
  const T next = function(value);
  uint64_t after = 0;
  __builtin_memcpy(&after, &next, sizeof next);
  end_atomic(p, after, sizeof(T));
  return value;
}
template <typename T>
using same = std::common_type_t<T>;  // no deduction from this argument: atomicAdd(&unsigned, 1)
}  // namespace cuda_on_cpu

template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const int row = cuda_on_cpu::lane() & ~(width - 1);
  return cuda_on_cpu::from_lane("__shfl_sync", mask, value, row | (from & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32) {
  const int lane = cuda_on_cpu::lane();
  return cuda_on_cpu::from_lane("__shfl_xor_sync", mask, value, cuda_on_cpu::in_row(lane, lane ^ flip, width));
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int lane = cuda_on_cpu::lane();
  return cuda_on_cpu::from_lane("__shfl_down_sync", mask, value, cuda_on_cpu::in_row(lane, lane + by, width));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int lane = cuda_on_cpu::lane();
  return cuda_on_cpu::from_lane("__shfl_up_sync", mask, value, cuda_on_cpu::in_row(lane, lane - by, width));
}
inline unsigned __ballot_sync(unsigned mask, int vote) { return cuda_on_cpu::ballot("__ballot_sync", mask, vote); }
inline int __any_sync(unsigned mask, int vote) { return cuda_on_cpu::ballot("__any_sync", mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return cuda_on_cpu::ballot("__all_sync", mask, !vote) == 0; }

template <typename T>
T atomicAdd(T* p, cuda_on_cpu::same<T> x) { return cuda_on_cpu::atomically(p, [=](T old) { return T(old + x); }); }
template <typename T>
T atomicMax(T* p, cuda_on_cpu::same<T> x) { return cuda_on_cpu::atomically(p, [=](T old) { return max(old, x); }); }
template <typename T>
T atomicMin(T* p, cuda_on_cpu::same<T> x) { return cuda_on_cpu::atomically(p, [=](T old) { return min(old, x); }); }
template <typename T>
T atomicExch(T* p, cuda_on_cpu::same<T> x) { return cuda_on_cpu::atomically(p, [=](T) { return x; }); }
template <typename T>
T atomicCAS(T* p, cuda_on_cpu::same<T> expected, cuda_on_cpu::same<T> x) {
  return cuda_on_cpu::atomically(p, [=](T old) { return old == expected ? x : old; });
}

// What ptx.cuh has in PTX ---------------------------------------------------------------------------------------------

inline int lane_id() { return cuda_on_cpu::lane(); }
inline int program_y() { return static_cast<int>(blockIdx.y); }
inline int program_z() { return static_cast<int>(blockIdx.z); }
inline uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }
inline float exp2_(float x) {  // ex2.approx.ftz
  const float y = exp2f(x);
  return y < FLT_MIN ? 0 : y;
}
inline void prefetch(const void*) {}
inline uint32_t pack2(float x, float y) {
  return cuda_on_cpu::to_bf16(x) | static_cast<uint32_t>(cuda_on_cpu::to_bf16(y)) << 16;
}
inline uint32_t pack2_half(float x, float y) {
  return cuda_on_cpu::to_half(x) | static_cast<uint32_t>(cuda_on_cpu::to_half(y)) << 16;
}

// c += a b, m16n8k16. With g = lane / 4 and t = lane % 4: A has rows g and g + 8 at k = 2t, 2t + 1, then the same at
// k + 8; B the same k in column g; C rows g, g + 8 at columns 2t, 2t + 1.
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
uint32_t transpose8(uint32_t x);  // movmatrix: lane 4 r + t holds columns 2t, 2t + 1 of row r

using Address = uint32_t;  // in shared memory
Address shared_address(const void* p);

// ldmatrix: lane 8 i + r gives the address of row r of matrix i (8 x 8 numbers of two bytes); of each matrix, or of its
// transpose, a lane gets what transpose8 says.
template <int N>
void load_matrix(uint32_t (&x)[N], Address row);
template <int N>
void load_matrix_transposed(uint32_t (&x)[N], Address row);

// cp.async: what is copied arrives when wait_copies says so, not before. `present` bytes are read, zeros fill the rest.
void copy16(Address to, const void* from);
void copy8(Address to, const void* from);
void copy4(Address to, const void* from);
void copy16_zeros(Address to, const void* from, int present);
void copy8_zeros(Address to, const void* from, int present);
void copy4_zeros(Address to, const void* from, int present);
void commit_copies();
namespace cuda_on_cpu {
void wait_copies(int groups);
void wait_all_copies();
}  // namespace cuda_on_cpu
template <int N>
inline void wait_copies() { cuda_on_cpu::wait_copies(N); }  // all groups but the last N have arrived
inline void wait_all_copies() { cuda_on_cpu::wait_all_copies(); }

// How a launch calls a kernel -----------------------------------------------------------------------------------------

namespace cuda_on_cpu {
template <typename T>
T argument(int index, int count) {
  std::remove_cv_t<T> value;
  const char kind = std::is_pointer_v<T> ? 'p' : std::is_integral_v<T> ? 'i' : std::is_floating_point_v<T> ? 'f' : 's';
  get_argument(index, count, sizeof(T) == 8 && kind == 'f' ? 'd' : kind, &value, sizeof value);
  return value;
}
template <typename... T, size_t... I>
void call(void (*kernel)(T...), std::index_sequence<I...>) { kernel(argument<T>(I, sizeof...(T))...); }
template <typename... T>
void call(void (*kernel)(T...)) { call(kernel, std::index_sequence_for<T...>()); }
}  // namespace cuda_on_cpu
