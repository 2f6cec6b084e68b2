// Attention of few query rows over a packed history, and over recent tokens that are dense, in one pass over the bytes.
//
// `attend`: a program (block) has a span of the history, or the recent tokens, of one KV head, for up to 8 query rows
// of it. Each warp streams tiles of 32 tokens of its own (cp.async) with its own running softmax; warps merge at the
// end. The parts of programs are merged by the last program that writes one, or by a second kernel, `merge`.
// The reference of the softmax moves only when a score exceeds it by more than 8 (in base 2), which is rare.
//
// Macros: K_GROUPS, V_GROUPS, D, DV (layout.cuh); DTYPE (numbers.cuh) of queries, recent tokens, groups of 16 bits and
// outputs; WARPS, STAGES and PROGRAMS (program.cuh); PAGE (arguments.cuh), where a table says where tokens are. With float32 there are no recent tokens and no groups of 16 bits.

#include "fetch.cuh"
#include "merge.cuh"
#include "part.cuh"

static_assert(sizeof(Number) == 2 || Keys::layout.whole + Values::layout.whole == 0,
              "groups of 16 bits are numbers of two bytes");

constexpr int SCALES = TILE * (Keys::layout.scales + Values::layout.scales);  // decoded ones of a warp, floats

// Scales of a tile are decoded by lanes that have a token each, [scales, 8, 4]: token i is at place i % 8, i / 8.
__device__ __forceinline__ float& place_of_scale(float* scales, int n, int lane) {
  return scales[n * TILE + lane % 8 * 4 + lane / 8];
}

// Keys count steps of 2^(1 - bits).
__device__ __forceinline__ void decode_key_scales(const uint8_t* bytes, float* to, int lane) {
  unrolled<Keys::layout.count>([&](auto n) {
    constexpr Span span = Keys::layout.spans[n];
    if constexpr (span.coded()) {
      const float byte = bytes[lane * Keys::layout.scales + span.scale];
      const float scale = exp2_(fmaf(byte, 0.125f, -15.0f - span.bits));
      place_of_scale(to, span.scale, lane) = byte == NOT_A_NUMBER ? NO_NUMBER : scale;
    }
  });
}

template <class L>
__device__ __forceinline__ void decode_value_scales(const uint8_t* bytes, float* to, int lane, bool there,
                                                    Running<L>& run) {
  constexpr int N = L::layout.scales;
  if constexpr (N > 0) {
    float exponents[N];
    bool above = false;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int byte = bytes[lane * N + n];
      exponents[n] = there && byte == NOT_A_NUMBER ? NO_NUMBER : fmaf(byte, 0.125f, run.bias);
      above |= exponents[n] > MOST;
    }
    if (__any_sync(~0u, above)) run.move_bias(exponents, there);
#pragma unroll
    for (int n = 0; n < N; ++n) place_of_scale(to, n, lane) = exp2_(exponents[n]);
  }
}

__device__ __forceinline__ void attend_history(const AttendArguments& a, const Place& at, uint8_t* shared) {
  const int lane = lane_id(), warp = __shfl_sync(~0u, threadIdx.x / 32, 0), g = lane / 4, t = lane % 4;
  // Splits share what rows see: a static cache has room for far more tokens than there are.
  const Sight sight = sight_of_history(a, at);
  const int from = sight.first / TILE * TILE, tiles_seen = (max(sight.end - from, 0) + TILE - 1) / TILE;
  const int span = (tiles_seen + a.splits - 1) / a.splits * TILE, begin = from + blockIdx.x * span;
  const int stop = min(begin + span, sight.end), start = begin + warp * TILE;  // start: of the warp

  Fetch tiles(a, at, start, stop, lane);
  const Address place = shared_address(shared) + warp * STAGE + lane * 16;
  const auto fetch = [&](int stage, int token) {
    if (token < stop) tiles.copy_next(a, place + stage * (WARPS * STAGE), token, stop, lane);
    commit_copies();
  };
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) fetch(stage, start + stage * (WARPS * TILE));

  float* rows = reinterpret_cast<float*>(shared + (STAGES - 1) * WARPS * STAGE);
  copy_queries(a, at, rows);
  if (a.k_mix) {
    __syncthreads();
    mix_queries(a, at, rows, warp, g, t);
  }
  __syncthreads();
  Queries<Keys> q;
  uint8_t* factors = shared + STAGES * WARPS * STAGE;
  q.load(rows, reinterpret_cast<float*>(factors) + WARPS * SCALES, warp == 0, a.scale, g, t);
  __syncthreads();

  Running<Values> run;
  float* k_factors = reinterpret_cast<float*>(factors) + warp * SCALES;
  float* v_factors = k_factors + TILE * Keys::layout.scales;
  int stage = 0;
  for (int token = start; token < stop; token += WARPS * TILE) {
    fetch(stage == 0 ? STAGES - 1 : stage - 1, token + (STAGES - 1) * (WARPS * TILE));
    wait_copies<STAGES - 1>();
    __syncwarp();
    const uint8_t* tile = shared + (stage * WARPS + warp) * STAGE;
    const int last = stop - 1 - token;
    decode_key_scales(tile + begin_of(K_SCALES), k_factors, lane);
    decode_value_scales(tile + begin_of(V_SCALES), v_factors, lane, lane <= last, run);
    __syncwarp();
    const PackedTile<Keys> keys{tile + begin_of(K_CODES), tile + begin_of(K_WHOLE), k_factors, last};
    const PackedTile<Values> values{tile + begin_of(V_CODES), tile + begin_of(V_WHOLE), v_factors, last};
    add_tile<TILE / 16, Keys, Values>(run, keys, values, q, sight, a, token, g, t);
    __syncwarp();
    stage = stage == STAGES - 1 ? 0 : stage + 1;
  }
  wait_copies<0>();
  write_part(run, a, shared);
}

// For numbers of two bytes only.
__device__ __forceinline__ void attend_recent(const AttendArguments& a, const Place& at, uint8_t* shared) {
  const int lane = lane_id(), warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  float* rows = reinterpret_cast<float*>(shared);
  copy_queries(a, at, rows);
  __syncthreads();
  Queries<RecentKeys> q;
  q.load(rows, rows + ROWS * Q_ROW, warp == 0, a.scale, g, t);
  __syncthreads();
  const Sight sight{a.recent_mask, 0, a.recent, false, a.recent_mask.data ? 0 : a.recent};
  const uint8_t* k = a.recent_k.data + at.batch * a.recent_k.batch + at.kv_head * a.recent_k.head;
  const uint8_t* v = a.recent_v.data + at.batch * a.recent_v.batch + at.kv_head * a.recent_v.head;
  Running<RecentValues> run;
  for (int token = warp * RECENT_TILE; token < a.recent; token += WARPS * RECENT_TILE) {
    const int last = a.recent - 1 - token;
    const DenseTile keys{k + token * a.recent_k.token, static_cast<int>(a.recent_k.token), last};
    const DenseTile values{v + token * a.recent_v.token, static_cast<int>(a.recent_v.token), last};
    add_tile<RECENT_TILE / 16, RecentKeys, RecentValues>(run, keys, values, q, sight, a, token, g, t);
  }
  write_part(run, a, shared);
}

// Grid: splits, and one more if there are recent tokens; batch * kv_heads; eighths of query rows.
extern "C" __global__ void __launch_bounds__(WARPS * 32, PROGRAMS) attend(const AttendArguments a) {
  extern __shared__ __align__(16) uint8_t shared[];
  const Place at = place_of_program(a);
  if (static_cast<int>(blockIdx.x) < a.splits)
    attend_history(a, at, shared);
  else if constexpr (sizeof(Number) == 2)
    attend_recent(a, at, shared);
  float* history = reinterpret_cast<float*>(shared);
  if (a.arrived && is_last(a, reinterpret_cast<uint32_t*>(history + ROWS * DV)))
    merge_rows<ROWS>(a, at.head, at.first_row, at.rows, history, WARPS);
}

// Grid: batch * kv_heads, query rows; DV threads, rounded up to whole warps.
extern "C" __global__ void merge(const AttendArguments a) {
  extern __shared__ __align__(16) uint8_t shared[];
  merge_rows<1>(a, blockIdx.x, blockIdx.y, 1, reinterpret_cast<float*>(shared), blockDim.x / 32);
}
