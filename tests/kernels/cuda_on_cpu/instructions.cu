// Kernels of test_cuda_on_cpu.py, one for each instruction or pattern.
struct Plane { const float* x; long stride; };
struct Params { Plane planes[2]; float* out; int n; };

// Fragments of a [16, 16] and b [8, 16] (its columns), pairs of numbers in a word.
template <bool HALF>
__device__ void product(const uint32_t* a, const uint32_t* b, float* c) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  const uint32_t x[4] = {a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4]};
  float sum[4] = {c[g * 8 + 2 * t], c[g * 8 + 2 * t + 1], c[(g + 8) * 8 + 2 * t], c[(g + 8) * 8 + 2 * t + 1]};
  if constexpr (HALF) mma_half(sum, x, b[g * 8 + t], b[g * 8 + t + 4]);
  else mma(sum, x, b[g * 8 + t], b[g * 8 + t + 4]);
  c[g * 8 + 2 * t] = sum[0], c[g * 8 + 2 * t + 1] = sum[1];
  c[(g + 8) * 8 + 2 * t] = sum[2], c[(g + 8) * 8 + 2 * t + 1] = sum[3];
}
extern "C" __global__ void __launch_bounds__(32, 1) product_bf16(const uint32_t* a, const uint32_t* b, float* c) {
  product<false>(a, b, c);
}
extern "C" __global__ void product_half(const uint32_t* a, const uint32_t* b, float* c) {
  product<true>(a, b, c);
}

template <int N, bool TRANSPOSED>
__global__ void matrices(const uint16_t* x, uint32_t* y) {  // [N, 8, 8] to lanes [N, 32]
  extern __shared__ __align__(16) uint8_t shared[];
  uint16_t* rows = (uint16_t*)shared;  // rows lie 48 bytes apart
  for (int i = threadIdx.x; i < N * 64; i += 32) rows[i / 8 * 24 + i % 8] = x[i];
  __syncwarp();
  uint32_t z[N];
  const Address row = shared_address(rows) + (lane_id() % (8 * N)) * 48;
  if (TRANSPOSED) load_matrix_transposed(z, row); else load_matrix(z, row);
  for (int i = 0; i < N; i++) y[i * 32 + threadIdx.x] = z[i];
}
extern "C" __global__ void transposed(const uint32_t* x, uint32_t* y) { y[threadIdx.x] = transpose8(x[threadIdx.x]); }

extern "C" __global__ void shuffles(const int* x, int* y) {
  const int i = threadIdx.x, v = x[i], all = ~0;
  y[i] = __shfl_sync(all, v, 5);
  y[64 + i] = __shfl_xor_sync(all, v, 9);
  y[128 + i] = __shfl_down_sync(all, v, 3);
  y[192 + i] = __shfl_up_sync(all, v, 3);
  y[256 + i] = __shfl_sync(all, v, 1, 8);
  y[320 + i] = __any_sync(all, v < -100);
  y[384 + i] = __all_sync(all, v > -100);
  y[448 + i] = __ballot_sync(all, v > 0);
  y[512 + i] = (int)__shfl_xor_sync(all, (double)v, 1);
}

extern "C" __global__ void bits(const uint32_t* x, uint32_t* y) {
  const int i = threadIdx.x;
  y[i] = __byte_perm(x[i], ~x[i], 0x6351);
  y[32 + i] = __popc(x[i]);
  y[64 + i] = __ffs(x[i]);
  y[96 + i] = __clz(x[i]);
  y[128 + i] = __funnelshift_r(x[i], 7, 4);
  y[160 + i] = and_or(x[i], 0xff00, 3);
}
extern "C" __global__ void roundings(const float* x, uint32_t* bf16, uint32_t* half, float* back, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    bf16[i] = pack2(x[i], 0), half[i] = pack2_half(x[i], 0);
    back[i] = __half2float(__float2half(x[i]));
  }
}

extern "C" __global__ void copies(const uint8_t* x, uint8_t* y) {  // 16, 8, 4 and 16 of 5 bytes for each thread
  extern __shared__ __align__(16) uint8_t shared[];
  const int i = threadIdx.x;
  const Address to = shared_address(shared) + 64 * i;
  copy16(to, x + 64 * i);
  commit_copies();
  copy8(to + 16, x + 64 * i + 16), copy4(to + 32, x + 64 * i + 32);
  commit_copies();
  wait_copies<1>();
  for (int b = 0; b < 16; b++) y[64 * i + b] = shared[64 * i + b];
  copy16_zeros(to + 48, x + 64 * i + 48, 5);
  wait_all_copies();
  __syncthreads();
  const int j = (i + 7) % blockDim.x;  // what another thread copied
  for (int b = 16; b < 24; b++) y[64 * j + b] = shared[64 * j + b];
  for (int b = 32; b < 36; b++) y[64 * j + b] = shared[64 * j + b];
  *(uint4*)(y + 64 * j + 48) = *(uint4*)(shared + 64 * j + 48);
}

extern "C" __global__ void atomics(int* n, unsigned* u, float* f) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(n, i), atomicMax(n + 1, i), atomicMin(n + 2, -i), atomicCAS(n + 3, i, i + 1), atomicExch(n + 4, 7);
  atomicAdd(u, 1), atomicMax(u + 1, 0x80000000u + i);
  atomicAdd(f, 0.5f);
}

// Each program sums a part; the last one adds the sums.
extern "C" __global__ void sum(const float* x, float* sums, float* out, unsigned* count, int fences) {
  extern __shared__ __align__(16) uint8_t shared[];
  float* words = (float*)shared;
  bool* last = (bool*)(words + 64);
  const int i = threadIdx.x;
  words[i] = x[blockIdx.x * 64 + i];
  for (int n = 32; n; n /= 2) {
    __syncthreads();
    if (i < n) words[i] += words[i + n];
  }
  if (i == 0) sums[blockIdx.x] = words[0];
  __syncthreads();
  if (i == 0) {
    if (fences & 1) __threadfence();
    *last = atomicAdd(count, 1) == gridDim.x - 1;
    if (fences & 2) __threadfence();
  }
  __syncthreads();
  if (*last && i == 1) {
    float all = 0;
    for (int n = 0; n < gridDim.x; n++) all += sums[n];
    *out = all, *count = 0;
  }
}
// The first program waits for the last one.
extern "C" __global__ void relay(int* flag, int* out) {
  if (blockIdx.x == 0) {
    while (atomicAdd(flag, 0) == 0) {}
    __threadfence();
    out[1] = out[0] + 1;
  } else if (blockIdx.x == gridDim.x - 1) {
    out[0] = 41;
    __syncthreads();
    __threadfence();
    atomicExch(flag, 1);
  }
}
extern "C" __global__ void places(int* out) {
  const int i = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * (blockIdx.x + gridDim.x * blockIdx.y));
  out[i] = i;
}
extern "C" __global__ void by_struct(const Params p) {
  const Plane &a = p.planes[0], &b = p.planes[1];
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) p.out[i] = a.x[i * a.stride] - b.x[i * b.stride];
}
