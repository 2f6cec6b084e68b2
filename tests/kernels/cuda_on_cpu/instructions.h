// What the threads of a warp or of a program do together, atomics, and copies that arrive later.
#pragma once

#include "machine.h"

using namespace cuda_on_cpu;

dim3 threadIdx, blockIdx, blockDim, gridDim;

// Barriers ------------------------------------------------------------------------------------------------------------

static void end_block_epoch(Program& program, Site site) {
  if (++program.epoch > MAX_BLOCK_EPOCH) fail("unsupported", "too many barriers", site);
  for (Thread& t : program.threads) join(program.known, t.known);
}

void __syncthreads() {
  Program& program = *running->program;
  if (meet(program.block, "__syncthreads", CUDA_ON_CPU_SITE)) end_block_epoch(program, CUDA_ON_CPU_SITE);
  running->stamp = stamp_of(*running);
}

// Of these operations only this one orders memory: shuffles, votes and mma do not.
void __syncwarp(unsigned mask) {
  bool last;
  Warp& warp = meet_warp("__syncwarp", mask, CUDA_ON_CPU_SITE, last);
  if (last && ++warp.epoch > MAX_WARP_EPOCH) fail("unsupported", "too many barriers", CUDA_ON_CPU_SITE);
  if (last && running->program->warps.size() == 1) end_block_epoch(*running->program, CUDA_ON_CPU_SITE);
  running->stamp = stamp_of(*running);
}

void __threadfence() {
  running->fence = static_cast<uint32_t>(running->program->epoch);
  join(running->known, running->heard);
}

void __trap() { fail("trap", "the kernel gave up", CUDA_ON_CPU_SITE); }

// Values of other lanes -----------------------------------------------------------------------------------------------

namespace cuda_on_cpu {

int lane() { return static_cast<int>(running->lane()); }

uint64_t exchange(const char* instruction, unsigned mask, uint64_t value, int from) {
  const unsigned me = running->lane();
  auto& in = running->warp->in;
  in[me][0] = value, in[me][1] = static_cast<uint64_t>(from);
  bool last;
  Warp& warp = meet_warp(instruction, mask, CUDA_ON_CPU_SITE, last);
  if (last)
    for (unsigned i = 0; i < warp.size; ++i) {
      if (in[i][1] >= warp.size) fail("unsupported", "a value of a lane that there is not", CUDA_ON_CPU_SITE);
      warp.out[i] = in[in[i][1]][0];
    }
  return warp.out[me];
}

uint32_t ballot(const char* instruction, unsigned mask, bool vote) {
  running->warp->in[running->lane()][0] = vote;
  bool last;
  Warp& warp = meet_warp(instruction, mask, CUDA_ON_CPU_SITE, last);
  if (last) {
    warp.out[0] = 0;
    for (unsigned i = 0; i < warp.size; ++i) warp.out[0] |= warp.in[i][0] << i;
  }
  return static_cast<uint32_t>(warp.out[0]);
}

}  // namespace cuda_on_cpu

// Tensor cores --------------------------------------------------------------------------------------------------------

static uint16_t half_of(uint32_t word, int which) { return static_cast<uint16_t>(word >> 16 * which); }

// Products are exact and sums are rounded once; tensor cores cut bits off their sums.
template <float (*NUMBER)(uint16_t)>
static void multiply(Warp& warp) {
  double a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const uint32_t* words = warp.words[lane];
    for (int h = 0; h < 2; ++h) {
      for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][2 * t + h + 8 * (i / 2)] = NUMBER(half_of(words[i], h));
      for (int i = 0; i < 2; ++i) b[2 * t + h + 8 * i][g] = NUMBER(half_of(words[4 + i], h));
      for (int i = 0; i < 2; ++i) c[g + 8 * i][2 * t + h] = warp.sums[lane][2 * i + h];
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      warp.sums[lane][i] = static_cast<float>(c[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2]);
}

template <float (*NUMBER)(uint16_t)>
static void multiply(const char* name, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site site) {
  Warp& warp = *running->warp;
  const unsigned lane = running->lane();
  std::copy_n(a, 4, warp.words[lane]), std::copy_n(c, 4, warp.sums[lane]);
  warp.words[lane][4] = b0, warp.words[lane][5] = b1;
  if (warp.size != 32) fail("unsupported", std::string(name) + " of less than 32 lanes", site);
  if (meet(warp, name, site)) multiply<NUMBER>(warp);
  std::copy_n(warp.sums[lane], 4, c);
}

void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply<from_bf16>("mma", c, a, b0, b1, CUDA_ON_CPU_SITE);
}
void mma_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply<from_half>("mma_half", c, a, b0, b1, CUDA_ON_CPU_SITE);
}

uint32_t transpose8(uint32_t x) {
  running->warp->in[running->lane()][0] = x;
  bool last;
  Warp& warp = meet_warp("transpose8", ~0u, CUDA_ON_CPU_SITE, last);
  const auto at = [&](int row, int column) {
    return static_cast<uint32_t>(half_of(static_cast<uint32_t>(warp.in[4 * row + column / 2][0]), column % 2));
  };
  for (int i = 0; last && i < 32; ++i) warp.out[i] = at(2 * (i % 4), i / 4) | at(2 * (i % 4) + 1, i / 4) << 16;
  return static_cast<uint32_t>(warp.out[running->lane()]);
}

// Shared memory -------------------------------------------------------------------------------------------------------

Address shared_address(const void* p) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (!shared_zone.holds(address)) fail("out of bounds", "shared_address of other memory", CUDA_ON_CPU_SITE);
  return static_cast<Address>(address - shared_zone.base);
}

static uint8_t* shared_at(Address address, int bytes, Site site) {
  const uintptr_t result = shared_zone.base + address;
  if (address >= shared_zone.size) explain(WRITE, result, bytes, 0, site);
  if (address % bytes) misaligned(WRITE, result, bytes, site);
  return reinterpret_cast<uint8_t*>(result);
}

static void load_matrix(const char* name, uint32_t* x, int count, bool transposed, Address row, Site site) {
  Thread* me = running;
  Warp& warp = *me->warp;
  const unsigned lane = me->lane();
  if (warp.size != 32) fail("unsupported", std::string(name) + " of less than 32 lanes", site);
  // The warp reads a row, not the lane that has its address: many lanes, in a word.
  if (lane < 8u * count) check<READ>(shared_at(row, 16, site), 16, site, true, with_many_lanes(me->stamp));
  warp.words[lane][0] = row;
  meet(warp, name, site);
  const int g = lane / 4, t = lane % 4;
  for (int i = 0; i < count; ++i) {
    const auto at = [&](int r, int c) {
      uint16_t number;
      std::memcpy(&number, reinterpret_cast<uint8_t*>(shared_zone.base) + warp.words[8 * i + r][0] + 2 * c, 2);
      return static_cast<uint32_t>(number);
    };
    x[i] = transposed ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
  }
  meet(warp, name, site);  // nobody changes its address before all have read
}

template <int N>
void load_matrix(uint32_t (&x)[N], Address row) {
  static_assert(N == 1 || N == 2 || N == 4);
  load_matrix("load_matrix", x, N, false, row, CUDA_ON_CPU_SITE);
}
template <int N>
void load_matrix_transposed(uint32_t (&x)[N], Address row) {
  static_assert(N == 1 || N == 2 || N == 4);
  load_matrix("load_matrix_transposed", x, N, true, row, CUDA_ON_CPU_SITE);
}
template void load_matrix(uint32_t (&)[1], Address);
template void load_matrix(uint32_t (&)[2], Address);
template void load_matrix(uint32_t (&)[4], Address);
template void load_matrix_transposed(uint32_t (&)[1], Address);
template void load_matrix_transposed(uint32_t (&)[2], Address);
template void load_matrix_transposed(uint32_t (&)[4], Address);

// A copy may read and write at any time until it is waited for: both are checked at its start and at its end.
static void copy(Address to, const void* from, int bytes, int present, Site site) {
  if (present < 0 || present > bytes) fail("unsupported", "a copy of " + std::to_string(present) + " bytes", site);
  uint8_t* target = shared_at(to, bytes, site);
  if (reinterpret_cast<uintptr_t>(from) % bytes) misaligned(READ, reinterpret_cast<uintptr_t>(from), bytes, site);
  if (present && !buffers->zone.holds(reinterpret_cast<uintptr_t>(from)))
    explain(READ, reinterpret_cast<uintptr_t>(from), bytes, 0, site);
  check<READ>(from, present, site, false);
  check<WRITE>(target, bytes, site, false);
  for (int i = 0; i < bytes; ++i) shared_zone.state[to + i] = INSIDE | WRITABLE | IN_FLIGHT;
  running->groups.back().push_back({to, static_cast<const uint8_t*>(from), bytes, present, site});
}

static void arrive(const std::vector<Copy>& group) {
  for (const Copy& c : group) {
    for (int i = 0; i < c.bytes; ++i) shared_zone.state[c.to + i] &= ~IN_FLIGHT;
    auto* target = reinterpret_cast<uint8_t*>(shared_zone.base + c.to);
    check<READ>(c.from, c.present, c.site, false);
    check<WRITE>(target, c.bytes, c.site, false);
    std::memcpy(target, c.from, c.present);
    std::memset(target + c.present, 0, c.bytes - c.present);
  }
}

void copy16(Address to, const void* from) { copy(to, from, 16, 16, CUDA_ON_CPU_SITE); }
void copy8(Address to, const void* from) { copy(to, from, 8, 8, CUDA_ON_CPU_SITE); }
void copy4(Address to, const void* from) { copy(to, from, 4, 4, CUDA_ON_CPU_SITE); }
void copy16_zeros(Address to, const void* from, int present) { copy(to, from, 16, present, CUDA_ON_CPU_SITE); }
void copy8_zeros(Address to, const void* from, int present) { copy(to, from, 8, present, CUDA_ON_CPU_SITE); }
void copy4_zeros(Address to, const void* from, int present) { copy(to, from, 4, present, CUDA_ON_CPU_SITE); }

void commit_copies() { running->groups.emplace_back(); }

void cuda_on_cpu::wait_copies(int left) {
  auto& groups = running->groups;
  while (static_cast<int>(groups.size()) - 1 > left) {
    arrive(groups.front());
    groups.erase(groups.begin());
  }
}

void cuda_on_cpu::wait_all_copies() {
  commit_copies();
  wait_copies(0);
}

// Atomics -------------------------------------------------------------------------------------------------------------

uint64_t cuda_on_cpu::begin_atomic(void* p, int bytes) {
  check<ATOMIC_ACCESS>(p, bytes, CUDA_ON_CPU_SITE, true);
  uint64_t value = 0;
  std::memcpy(&value, p, bytes);
  return value;
}

// After a fence, an atomic hands over what the program had done before the barrier before the fence; who touches the
// same place later, by an atomic and then a fence, takes it.
void cuda_on_cpu::end_atomic(void* p, uint64_t value, int bytes) {
  std::memcpy(p, &value, bytes);
  Thread& me = *running;
  if (buffers->zone.holds(reinterpret_cast<uintptr_t>(p))) {
    Clock& clock = clocks[reinterpret_cast<uintptr_t>(p)];
    if (me.fence) {
      join(clock, me.known), join(clock, me.program->known);
      clock.resize(std::max<size_t>(clock.size(), me.program->index + 1));
      clock[me.program->index] = std::max(clock[me.program->index], me.fence);
    }
    join(me.heard, clock);
  }
  if (++me.atomics > MAX_ATOMICS) fail("barrier", "a thread that waits for ever, by atomics", CUDA_ON_CPU_SITE);
  me.program->ready.push_back(&me);  // others go on, if this one waits for them
  pause();
}
