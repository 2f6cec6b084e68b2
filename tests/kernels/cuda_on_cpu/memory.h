// What is known of each byte of memory that kernels may touch, and who touched it last.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "fibres.h"

namespace cuda_on_cpu {

// Who accessed a byte and when, as one number: a program, its count of block barriers so far, its warp's count of
// warp barriers, the warp and the lane. 0 is nobody. Accesses of several threads at the same time are one stamp with
// MANY lanes or warps; those of several programs are a list elsewhere (machine.h).
using Stamp = uint64_t;
constexpr int PROGRAM = 50, BLOCK_EPOCH = 34, WARP_EPOCH = 14, WARP = 8, LANE = 2;  // first bits
constexpr Stamp ATOMIC = 2, SOMEBODY = 1, MANY = 63, MANY_PROGRAMS = (1 << 14) - 1;
constexpr uint64_t MAX_BLOCK_EPOCH = (1 << 16) - 1, MAX_WARP_EPOCH = (1 << 20) - 1;

inline uint64_t program_of(Stamp s) { return s >> PROGRAM; }
inline uint64_t block_epoch(Stamp s) { return s >> BLOCK_EPOCH & MAX_BLOCK_EPOCH; }
inline uint64_t warp_epoch(Stamp s) { return s >> WARP_EPOCH & MAX_WARP_EPOCH; }
inline uint64_t warp_of(Stamp s) { return s >> WARP & MANY; }
inline uint64_t lane_of(Stamp s) { return s >> LANE & MANY; }
inline Stamp with_many_lanes(Stamp s) { return s | MANY << LANE; }
inline Stamp with_many_warps(Stamp s) { return with_many_lanes(s) | MANY << WARP; }

struct Cell {
  Stamp writer, reader, atomic;
  uint32_t writer_site, reader_site, atomic_site;  // where in the kernel
};

enum State : uint8_t { INSIDE = 1, WRITTEN = 2, WRITABLE = 4, IN_FLIGHT = 8 };  // of a byte

constexpr size_t GUARD = 1 << 20;  // bytes around each buffer where an access is known to have missed it
constexpr size_t SHARED_GUARD = 64 << 10, MAX_SHARED = 256 << 10;

struct Zone {
  uintptr_t base = 0;
  size_t size = 0;
  uint8_t* state = nullptr;
  Cell* cells = nullptr;
  bool holds(uintptr_t address) const { return address - base < size; }
};

// A buffer of the host, as tests/kernels/cuda_on_cpu.py declares it too.
struct Region {
  const char* name;
  uint8_t* bytes;   // the host's
  uint8_t* state;   // of each byte; says afterwards what was written
  int64_t size;
  int64_t offset;   // the address modulo ALIGNMENT
  uint64_t address;  // where kernels see it
};
constexpr int64_t ALIGNMENT = 256;  // of memory that CUDA gives

// Copies of the host's buffers for one launch, far enough from each other.
class Buffers {
 public:
  Buffers(Region* regions, int count) : regions_(regions, regions + count), bytes_(room(regions, count)),
                                        state_(room(regions, count)), cells_(room(regions, count) * sizeof(Cell)) {
    size_t at = GUARD;
    for (int i = 0; i < count; ++i) {
      Region& r = regions[i];
      r.address = reinterpret_cast<uint64_t>(bytes_.begin() + at + r.offset);
      std::memcpy(bytes_.begin() + at + r.offset, r.bytes, r.size);
      std::memcpy(state_.begin() + at + r.offset, r.state, r.size);
      regions_[i].address = r.address;
      at += step(r);
    }
    zone.base = reinterpret_cast<uintptr_t>(bytes_.begin());
    zone.size = at;
    zone.state = state_.begin();
    zone.cells = reinterpret_cast<Cell*>(cells_.begin());
  }

  void copy_back() const {
    for (const Region& r : regions_) {
      const uint8_t* state = zone.state + (r.address - zone.base);
      for (int64_t i = 0; i < r.size; ++i)
        if (state[i] & WRITABLE && state[i] & WRITTEN) r.bytes[i] = reinterpret_cast<uint8_t*>(r.address)[i];
      std::memcpy(r.state, state, r.size);
    }
  }

  // The nearest buffer and the place in it.
  std::string place(uintptr_t address) const {
    const Region* nearest = nullptr;
    uintptr_t least = ~uintptr_t{0};
    for (const Region& r : regions_) {
      const uintptr_t end = r.address + r.size;
      const uintptr_t away = address < r.address ? r.address - address : address >= end ? address - end : 0;
      if (away < least) nearest = &r, least = away;
    }
    if (!nearest) return "no buffer";
    return std::string(nearest->name) + "[byte " + std::to_string(static_cast<int64_t>(address - nearest->address)) +
           " of " + std::to_string(nearest->size) + "]";
  }

  Zone zone;

 private:
  std::vector<Region> regions_;
  Pages bytes_, state_, cells_;

  static size_t step(const Region& r) {
    return GUARD + (r.size + 2 * ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  }
  static size_t room(const Region* regions, int count) {
    size_t sum = GUARD;
    for (int i = 0; i < count; ++i) sum += step(regions[i]);
    return sum;
  }
};

}  // namespace cuda_on_cpu
