// What a program (block) of `attend` is: WARPS with STAGES of tiles each, and its place. PROGRAMS run on a processor.
#pragma once

#include "arguments.cuh"

#ifndef WARPS
#define WARPS 4
#endif
#ifndef STAGES
#define STAGES 3
#endif
#ifndef PROGRAMS
#define PROGRAMS (D + DV > 256 ? 2 : 4)  // what registers allow
#endif

constexpr int ROWS = 8;          // query rows
constexpr int TILE = 32;         // tokens of the history
constexpr int RECENT_TILE = 16;  // recent ones, which go to registers at once
#define NOTHING __uint_as_float(0xff800000u)  // -infinity, for which there is no constant without headers

struct Place {
  int batch, kv_head, first_row, rows;  // rows: how many
  int64_t head;                         // batch * kv_heads + kv_head
};

// Computed where it is needed rather than kept: the loop over tiles needs the registers.
__device__ __forceinline__ Place place_of_program(const AttendArguments& a) {
  const int head = program_y(), first_row = program_z() * ROWS;
  return {head / a.kv_heads, head % a.kv_heads, first_row, min(a.rows() - first_row, ROWS), head};
}

// Rows of a product of 16 tokens: row r is token r / 2 + 4 (r % 2) of each 8. Then a lane's four tokens as the inner
// axis of the product with values, pairs of rows, are t, t + 4, t + 8, t + 12: lanes read rows that follow each other.
__device__ __forceinline__ int token_of_row(int g) { return (g >> 1) + 4 * (g & 1); }
