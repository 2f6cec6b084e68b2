// Copies of tiles of a packed history to shared memory, which a warp asks for long before it needs them.
#pragma once

#include "program.cuh"

// The planes of a tile follow each other in shared memory. Bytes of a token in each:
constexpr int K_CODES = 0, V_CODES = 1, K_WHOLE = 2, V_WHOLE = 3, K_SCALES = 4, V_SCALES = 5, PLANES = 6;
constexpr int BYTES[PLANES] = {Keys::layout.row,       Values::layout.row,    2 * Keys::layout.whole,
                               2 * Values::layout.whole, Keys::layout.scales, Values::layout.scales};

// Where a plane begins, or the last one ends: a byte of a tile, a multiple of 16.
__device__ constexpr int begin_of(int plane) {
  int begin = 0;
  for (int i = 0; i < plane; ++i) begin += TILE * BYTES[i];
  return begin;
}
constexpr int STAGE = begin_of(PLANES);

// Each lane copies a piece of 16 bytes in each round. Rounds inside of one plane have one pointer for all; in others
// lanes have pointers to different planes.
constexpr int ROUND = 32 * 16, ROUNDS = (STAGE + ROUND - 1) / ROUND;

__device__ constexpr int plane_at(int byte) {
  int plane = 0;
  while (plane + 1 < PLANES && begin_of(plane + 1) <= byte) ++plane;
  return plane;
}
__device__ constexpr bool is_inside(int round) {
  return (round + 1) * ROUND <= STAGE && plane_at(round * ROUND) == plane_at((round + 1) * ROUND - 1);
}
// The round whose pointer a round uses.
__device__ constexpr int leader_of(int round) {
  int leader = round;
  while (is_inside(round) && leader > 0 && is_inside(leader - 1) &&
         plane_at((leader - 1) * ROUND) == plane_at(round * ROUND))
    --leader;
  return leader;
}

// Tiles of a warp, one after the other; those of other warps are between them.
struct Fetch {
  const uint8_t* from[ROUNDS];
  int step[ROUNDS];  // bytes to the next tile, for leaders that are not inside of a plane

  // Begins at a token.
  __device__ __forceinline__ Fetch(const AttendArguments& a, const Place& at, int64_t token, int lane) {
    const Plane* const planes[PLANES] = {&a.k.codes, &a.v.codes, &a.k.whole, &a.v.whole, &a.k.scales, &a.v.scales};
    unrolled<ROUNDS>([&](auto round) {
      constexpr int r = round, byte = r * ROUND;
      const int own = byte + lane * 16;
      unrolled<PLANES>([&](auto plane) {
        constexpr int begin = begin_of(plane), end = begin_of(plane + 1);
        if constexpr (leader_of(r) == r && begin < byte + ROUND && end > byte) {
          if (own < begin) return;  // of an earlier plane
          const Plane& p = *planes[plane];
          from[r] = p.data + at.batch * p.batch + at.kv_head * p.head + token * BYTES[plane] + own - begin;
          step[r] = WARPS * TILE * BYTES[plane];
        }
      });
    });
  }

  __device__ __forceinline__ void copy_next(Address to, int lane) {
    unrolled<ROUNDS>([&](auto round) {
      constexpr int leader = leader_of(round), bytes = round * ROUND;
      if (bytes + ROUND <= STAGE || lane * 16 < STAGE - bytes) copy16(to + bytes, from[leader] + (bytes - leader * ROUND));
    });
    unrolled<ROUNDS>([&](auto round) {
      if constexpr (leader_of(round) == round)
        from[round] += is_inside(round) ? WARPS * TILE * BYTES[plane_at(round * ROUND)] : step[round];
    });
  }
};
