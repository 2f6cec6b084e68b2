// Copies of tiles of a packed history to shared memory, which a warp asks for long before it needs them.
#pragma once

#include "program.cuh"

// The planes of a tile follow each other in shared memory. Codes come first, and of those the ones that fill whole
// rounds (below), if they do: then fewer rounds meet two planes, which cost registers.
constexpr int K_CODES = Keys::layout.row % 16 ? 1 : 0, V_CODES = 1 - K_CODES;
constexpr int K_WHOLE = 2, V_WHOLE = 3, K_SCALES = 4, V_SCALES = 5, PLANES = 6;

// Bytes of a token in a plane.
__device__ constexpr int bytes_of(int plane) {
  switch (plane) {
    case K_CODES: return Keys::layout.row;
    case V_CODES: return Values::layout.row;
    case K_WHOLE: return 2 * Keys::layout.whole;
    case V_WHOLE: return 2 * Values::layout.whole;
    case K_SCALES: return Keys::layout.scales;
    default: return Values::layout.scales;
  }
}

// Where a plane begins, or the last one ends: a byte of a tile, a multiple of 16.
__device__ constexpr int begin_of(int plane) {
  int begin = 0;
  for (int i = 0; i < plane; ++i) begin += TILE * bytes_of(i);
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
    const Plane* planes[PLANES] = {nullptr, nullptr, &a.k.whole, &a.v.whole, &a.k.scales, &a.v.scales};
    planes[K_CODES] = &a.k.codes, planes[V_CODES] = &a.v.codes;
    unrolled<ROUNDS>([&](auto round) {
      constexpr int r = round, byte = r * ROUND;
      const int own = byte + lane * 16;
      unrolled<PLANES>([&](auto plane) {
        constexpr int begin = begin_of(plane), end = begin_of(plane + 1);
        if constexpr (leader_of(r) == r && begin < byte + ROUND && end > byte) {
          if (own < begin) return;  // of an earlier plane
          const Plane& p = *planes[plane];
          from[r] = p.data + at.batch * p.batch + at.kv_head * p.head + token * bytes_of(plane) + own - begin;
          step[r] = WARPS * TILE * bytes_of(plane);
        }
      });
    });
  }

  __device__ __forceinline__ void copy_next(Address to, int lane) {
    unrolled<ROUNDS>([&](auto round) {
      constexpr int leader = leader_of(round), bytes = round * ROUND;
      if (bytes + ROUND <= STAGE || lane * 16 < STAGE - bytes)
        copy16(to + bytes, from[leader] + (bytes - leader * ROUND));
    });
    unrolled<ROUNDS>([&](auto round) {
      if constexpr (leader_of(round) == round)
        from[round] += is_inside(round) ? WARPS * TILE * bytes_of(plane_at(round * ROUND)) : step[round];
    });
  }
};
