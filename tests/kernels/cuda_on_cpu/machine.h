// Threads, programs and their barriers, and the check of each access. One launch at a time.
#pragma once

#include <deque>
#include <memory>
#include <unordered_map>

#include "../cuda_on_cpu.h"
#include "memory.h"

// Shared memory stands at one address for all programs, with room around it.
extern "C" uint8_t shared[], cuda_on_cpu_shared_zone[];
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start[], _end[];  // of this library

namespace cuda_on_cpu {

// Where in the library an instruction or access of the kernel stands.
using Site = uint32_t;
inline Site site_of(const void* address) {
  return static_cast<Site>(static_cast<const char*>(address) - __ehdr_start);
}
#define CUDA_ON_CPU_SITE site_of(__builtin_return_address(0))

constexpr unsigned MAX_ATOMICS = 1000000;  // of one thread

struct Thread;
struct Program;

// For each program, how many of its block epochs are known to be over: what it did in those comes before what one does.
using Clock = std::vector<uint32_t>;
inline void join(Clock& a, const Clock& b) {
  if (a.size() < b.size()) a.resize(b.size());
  for (size_t i = 0; i < b.size(); ++i) a[i] = std::max(a[i], b[i]);
}
inline uint32_t entry(const Clock& clock, size_t i) { return i < clock.size() ? clock[i] : 0; }

struct Copy {
  Address to;
  const uint8_t* from;
  int bytes, present;
  Site site;
};

// Threads that wait for each other. The last to arrive goes on at once, and finds the others' values.
struct Meeting {
  const char* instruction = nullptr;
  unsigned size = 0;
  std::vector<Thread*> waiting;
};

struct Warp : Meeting {
  uint64_t epoch = 0;
  uint64_t in[32][2] = {}, out[32] = {};
  uint32_t words[32][6] = {};
  float sums[32][4] = {};
};

struct Thread {
  Fibre fibre;
  Program* program;
  unsigned index;
  dim3 place;
  Warp* warp;
  Stamp stamp;
  bool done = false;
  const char* waits = nullptr;  // the instruction
  Site site = 0;
  std::vector<std::vector<Copy>> groups{1};  // of copies in flight, the last not committed
  uint32_t fence = 0;                        // the block epoch of its last fence
  Clock heard, known;                        // by atomics; and since a fence
  unsigned atomics = 0;
  unsigned lane() const { return index % 32; }
};

struct Program {
  uint64_t index;
  dim3 place;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Meeting block;
  uint64_t epoch = 1;
  Clock known;
  std::deque<Thread*> ready;
  unsigned left;  // threads that have not ended
  Pages state{MAX_SHARED + 2 * SHARED_GUARD}, cells{(MAX_SHARED + 2 * SHARED_GUARD) * sizeof(Cell)};
  std::vector<uint8_t> saved;  // shared memory while another program runs
};

inline Thread* running = nullptr;
inline Fibre host;  // what starts the fibres
inline std::string report;
inline std::unique_ptr<Buffers> buffers;
inline std::unique_ptr<Pages> stacks;
inline size_t shared_bytes = 0;
inline Zone shared_zone;
inline std::vector<std::vector<Stamp>> lists;        // of stamps of several programs
inline std::unordered_map<uintptr_t, Clock> clocks;  // of places that atomics touched

// Reports -------------------------------------------------------------------------------------------------------------

inline std::string text(dim3 x) {
  return "(" + std::to_string(x.x) + ", " + std::to_string(x.y) + ", " + std::to_string(x.z) + ")";
}

inline std::string text(Site site) {
  char buffer[32];
  snprintf(buffer, sizeof buffer, "[0x%x]", site);  // the Python side looks it up
  return buffer;
}

// Ends the launch.
[[noreturn]] inline void fail(const std::string& kind, const std::string& what, Site site) {
  report = kind + ": " + what + "; thread " + std::to_string(running->index) + " of program " +
           text(running->program->place) + " at " + text(site);
  Fibre::change(running->fibre, host);
  __builtin_unreachable();
}

inline std::string place_of(uintptr_t address) {
  if (!shared_zone.holds(address)) return buffers->place(address);
  const auto at = static_cast<int64_t>(address - reinterpret_cast<uintptr_t>(shared));
  return "shared[byte " + std::to_string(at) + " of " + std::to_string(shared_bytes) + "]";
}

inline std::string who(Stamp s) {
  if (program_of(s) == MANY_PROGRAMS) return "several programs";
  std::string result = "program " + std::to_string(program_of(s));
  if (program_of(s) == running->program->index) result = "the same program";
  if (warp_of(s) == MANY) return "several warps of " + result;
  if (lane_of(s) == MANY) return "several threads of warp " + std::to_string(warp_of(s)) + " of " + result;
  return "thread " + std::to_string(warp_of(s) * 32 + lane_of(s)) + " of " + result;
}

// Order of accesses ---------------------------------------------------------------------------------------------------

inline Stamp stamp_of(const Thread& t) {
  return t.program->index << PROGRAM | t.program->epoch << BLOCK_EPOCH | t.warp->epoch << WARP_EPOCH |
         static_cast<Stamp>(t.index / 32) << WARP | static_cast<Stamp>(t.lane()) << LANE | SOMEBODY;
}

inline std::vector<Stamp>& list_of(Stamp s) { return lists[s >> WARP & 0xffffffff]; }

// Whether what `old` says is known to come before what the running thread does now.
inline bool comes_before(Stamp old, Stamp now) {
  if (old == 0) return true;
  if (program_of(old) == program_of(now)) {
    if (block_epoch(old) != block_epoch(now)) return true;
    if (warp_of(old) != warp_of(now)) return false;
    return warp_epoch(old) != warp_epoch(now) || (lane_of(old) == lane_of(now) && lane_of(old) != MANY);
  }
  if (program_of(old) == MANY_PROGRAMS) {
    for (Stamp s : list_of(old))
      if (!comes_before(s, now)) return false;
    return true;
  }
  // An atomic access is part of what it hands over; others are if they came before the barrier before the fence.
  const size_t other = program_of(old);
  return std::max(entry(running->known, other), entry(running->program->known, other)) + (old & ATOMIC ? 1 : 0) >
         block_epoch(old);
}

// The stamp of both, of which later accesses need to know.
inline Stamp together(Stamp old, Stamp now) {
  if (program_of(old) == MANY_PROGRAMS) {
    for (Stamp& s : list_of(old))
      if (program_of(s) == program_of(now)) return s = together(s, now), old;
    return list_of(old).push_back(now), old;
  }
  if (comes_before(old, now)) return now;
  if (program_of(old) != program_of(now)) {
    lists.push_back({old, now});
    return MANY_PROGRAMS << PROGRAM | static_cast<Stamp>(lists.size() - 1) << WARP | SOMEBODY;
  }
  return warp_of(old) != warp_of(now) ? with_many_warps(now) : with_many_lanes(now);
}

// The check of an access ----------------------------------------------------------------------------------------------

enum Kind { READ, WRITE, ATOMIC_ACCESS };
constexpr const char* NAMES[] = {"read", "write", "atomic access"};

[[noreturn, gnu::noinline, gnu::cold]] inline void explain(Kind kind, uintptr_t address, size_t bytes, int state,
                                                           Site site) {
  const std::string what = std::string(NAMES[kind]) + " of " + std::to_string(bytes) + " bytes, ";
  const std::string place = place_of(address);
  if (!(state & INSIDE)) fail("out of bounds", what + "nearest is " + place, site);
  if (state & IN_FLIGHT) fail("in flight", what + place + " is the target of a copy that nothing waited for", site);
  if (kind != READ && !(state & WRITABLE)) fail("read-only", what + place, site);
  fail("unwritten", what + "nothing wrote " + place, site);
}

[[noreturn, gnu::noinline, gnu::cold]] inline void race(Kind kind, uintptr_t address, const char* other, Stamp stamp,
                                                        Site at, Site site) {
  fail("race", std::string(NAMES[kind]) + " of " + place_of(address) + ", not ordered after the " + other + " by " +
       who(stamp) + " at " + text(at), site);
}

[[noreturn, gnu::noinline, gnu::cold]] inline void misaligned(Kind kind, uintptr_t address, size_t bytes, Site site) {
  fail("misaligned", std::string(NAMES[kind]) + " of " + std::to_string(bytes) + " bytes at " + place_of(address),
       site);
}

// What kernels may touch without a check: their stacks, and constants in the library.
inline bool unchecked(uintptr_t address) {
  return stacks->holds(address) || address - reinterpret_cast<uintptr_t>(__ehdr_start) <
                                       static_cast<uintptr_t>(_end - __ehdr_start);
}

template <Kind KIND>
[[gnu::always_inline]] inline void check(const void* p, size_t bytes, Site site, bool aligned, Stamp now) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  const Zone* zone = &shared_zone;
  if (!zone->holds(address)) {
    if (unchecked(address)) return;
    zone = &buffers->zone;
    if (!zone->holds(address)) explain(KIND, address, bytes, 0, site);
  }
  if (aligned && address % bytes) misaligned(KIND, address, bytes, site);
  const size_t at = address - zone->base;
  if (bytes > zone->size - at) explain(KIND, address, bytes, 0, site);
  constexpr int NEEDED = INSIDE | (KIND != WRITE ? WRITTEN : 0) | (KIND != READ ? WRITABLE : 0);
  uint8_t* state = zone->state + at;
  for (size_t i = 0; i < bytes; ++i)
    if ((state[i] & (NEEDED | IN_FLIGHT)) != NEEDED) explain(KIND, address + i, bytes, state[i], site);
  if (KIND == READ && !(state[0] & WRITABLE)) return;  // nobody writes there
  Cell* cell = zone->cells + at;
  for (size_t i = 0; i < bytes; ++i) {
    Cell& c = cell[i];
    if (c.writer != now && !comes_before(c.writer, now))
      race(KIND, address + i, "write", c.writer, c.writer_site, site);
    if (KIND != ATOMIC_ACCESS && !comes_before(c.atomic, now))
      race(KIND, address + i, "atomic access", c.atomic, c.atomic_site, site);
    if (KIND == READ) {
      if (c.reader != now) c.reader = together(c.reader, now), c.reader_site = site;
      continue;
    }
    if (!comes_before(c.reader, now)) race(KIND, address + i, "read", c.reader, c.reader_site, site);
    if (KIND == WRITE) c = {now, 0, 0, site, 0, 0};
    if (KIND == ATOMIC_ACCESS) c.atomic = together(c.atomic, now | ATOMIC), c.atomic_site = site;
    state[i] |= WRITTEN;
  }
}

template <Kind KIND>
inline void check(const void* p, size_t bytes, Site site, bool aligned) {
  check<KIND>(p, bytes, site, aligned, running->stamp);
}

// Meetings and turns --------------------------------------------------------------------------------------------------

inline void pause() { Fibre::change(running->fibre, host); }

// True for the last thread that arrives, at once; false for the others, afterwards.
inline bool meet(Meeting& m, const char* instruction, Site site) {
  Thread* me = running;
  if (!m.waiting.empty() && m.instruction != instruction)
    fail("barrier", std::string(instruction) + " meets " + m.instruction + ", where thread " +
         std::to_string(m.waiting[0]->index) + " waits at " + text(m.waiting[0]->site), site);
  m.instruction = instruction, me->waits = instruction, me->site = site;
  if (m.waiting.size() + 1 < m.size) {
    m.waiting.push_back(me);
    pause();
    return false;
  }
  me->waits = nullptr;
  for (Thread* t : m.waiting) t->waits = nullptr, t->program->ready.push_back(t);
  m.waiting.clear();
  return true;
}

inline Warp& meet_warp(const char* instruction, unsigned mask, Site site, bool& last) {
  Warp& warp = *running->warp;
  const unsigned all = warp.size == 32 ? ~0u : (1u << warp.size) - 1;
  if ((mask & all) != all) fail("unsupported", std::string(instruction) + " of some lanes only", site);
  last = meet(warp, instruction, site);
  return warp;
}

}  // namespace cuda_on_cpu
