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

static_assert(PAGE % TILE == 0, "tiles lie in pages");

__device__ __forceinline__ const Plane& plane_of(const AttendArguments& a, int plane) {
  switch (plane) {
    case K_CODES: return a.k.codes;
    case V_CODES: return a.v.codes;
    case K_WHOLE: return a.k.whole;
    case V_WHOLE: return a.v.whole;
    case K_SCALES: return a.k.scales;
    default: return a.v.scales;
  }
}

// Tiles of a warp, one after the other; those of other warps are between them.
struct Fetch {
  static constexpr int NEXT = WARPS * TILE;  // tokens from a tile to the next
  static constexpr uint32_t DIVISOR = PAGE ? PAGE : 1;

  const uint8_t* from[ROUNDS];  // in the next tile; with pages, in the first tile of page 0
  // For leaders that are not inside of a plane: bytes to the next tile; with pages, to the next token and page.
  int step[ROUNDS], page[ROUNDS];
  const int64_t* table;  // pages of the sequence
  int number;            // the page of the next tile: looked up a tile ahead, because it comes from far

  // Begins at a token.
  __device__ __forceinline__ Fetch(const AttendArguments& a, const Place& at, int token, int stop, int lane) {
    unrolled<ROUNDS>([&](auto round) {
      constexpr int r = round, byte = r * ROUND;
      const int own = byte + lane * 16;
      unrolled<PLANES>([&](auto plane) {
        constexpr int begin = begin_of(plane), end = begin_of(plane + 1);
        if constexpr (leader_of(r) == r && begin < byte + ROUND && end > byte) {
          if (own < begin) return;  // of an earlier plane
          const Plane& p = plane_of(a, plane);
          from[r] = p.data + at.kv_head * p.head + own - begin;
          if constexpr (PAGE) {
            step[r] = bytes_of(plane), page[r] = static_cast<int>(p.batch);
          } else {
            from[r] += at.batch * p.batch + int64_t(token) * bytes_of(plane);
            step[r] = NEXT * bytes_of(plane);
          }
        }
      });
    });
    if constexpr (PAGE) {
      table = a.pages.table + at.batch * a.pages.table_batch;
      look_up(token, stop);
    }
  }

  // Copies the tile of a token, and gets ready for the one after it, if that begins before `stop`.
  __device__ __forceinline__ void copy_next(const AttendArguments& a, Address to, int token, int stop, int lane) {
    const uint8_t* tile[ROUNDS];
    const int place = static_cast<uint32_t>(token) % DIVISOR;
    unrolled<ROUNDS>([&](auto round) {
      constexpr int r = round, plane = plane_at(r * ROUND);
      if constexpr (leader_of(r) == r) {
        const int bytes = is_inside(r) ? static_cast<int>(plane_of(a, plane).batch) : page[r];
        const int of_token = is_inside(r) ? bytes_of(plane) : step[r];
        tile[r] = PAGE ? from[r] + int64_t(number) * bytes + place * of_token : from[r];
      }
    });
    unrolled<ROUNDS>([&](auto round) {
      constexpr int leader = leader_of(round), bytes = round * ROUND;
      if (bytes + ROUND <= STAGE || lane * 16 < STAGE - bytes)
        copy16(to + bytes, tile[leader] + (bytes - leader * ROUND));
    });
    if (PAGE) return look_up(token + NEXT, stop);
    unrolled<ROUNDS>([&](auto round) {
      if constexpr (leader_of(round) == round)
        from[round] += is_inside(round) ? NEXT * bytes_of(plane_at(round * ROUND)) : step[round];
    });
  }

 private:
  __device__ __forceinline__ void look_up(int token, int stop) {
    if (token < stop) number = static_cast<int>(table[static_cast<uint32_t>(token) / DIVISOR]);
  }
};
