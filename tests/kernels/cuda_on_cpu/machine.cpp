// Runs a launch, and answers the calls that -fsanitize=thread and -fsanitize=alignment write into kernels.
#define CUDA_ON_CPU_MACHINE
#include <cstdio>

#include "instructions.h"

// The array that kernels declare as `extern __shared__ ... shared[]`, aligned as on a GPU.
asm(R"(
.bss
.balign 4096
.globl cuda_on_cpu_shared_zone
.globl shared
cuda_on_cpu_shared_zone:
.skip 65536
shared:
.skip 262144
.skip 65536
.text
)");

// What kernels are called with ----------------------------------------------------------------------------------------

struct Argument {
  char kind;  // 'p' for a pointer, 'i' for an integer, 'f' for a float, 's' for a struct
  int64_t integer;
  double number;
  const void* bytes;
  int64_t size;
};
static const Argument* arguments;
static int argument_count;
static void (*kernel)();

void cuda_on_cpu::get_argument(int index, int count, char kind, void* to, int64_t size) {
  if (count != argument_count)
    fail("argument", "the kernel has " + std::to_string(count) + ", not " + std::to_string(argument_count), 0);
  const Argument& a = arguments[index];
  const float number = static_cast<float>(a.number);
  const bool real = kind == 'f' || kind == 'd';
  if (a.kind != (real ? 'f' : kind) || (kind == 's' && a.size != size))
    fail("argument", "number " + std::to_string(index) + " has another type or size in the kernel", 0);
  const void* from = &a.integer;
  if (kind == 's') from = a.bytes;
  if (real) from = kind == 'f' ? static_cast<const void*>(&number) : &a.number;
  std::memcpy(to, from, size);
}

// Programs ------------------------------------------------------------------------------------------------------------

static void body() {
  kernel();
  running->done = true;
  --running->program->left;
  pause();
}

static std::unique_ptr<Program> start(uint64_t index, uint64_t slot) {
  auto program = std::make_unique<Program>();
  Program& p = *program;
  const unsigned count = blockDim.x * blockDim.y * blockDim.z;
  p.index = index;
  p.place.x = index % gridDim.x, p.place.y = index / gridDim.x % gridDim.y, p.place.z = index / gridDim.x / gridDim.y;
  p.left = p.block.size = count;
  p.warps.resize((count + 31) / 32);
  p.threads.resize(count);
  p.saved.assign(shared_bytes, 0xff);
  std::fill_n(p.state.begin() + SHARED_GUARD, shared_bytes, INSIDE | WRITABLE);
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = p.threads[i];
    t.program = &p, t.index = i, t.warp = &p.warps[i / 32];
    t.place.x = i % blockDim.x, t.place.y = i / blockDim.x % blockDim.y, t.place.z = i / blockDim.x / blockDim.y;
    t.warp->size++;
    t.stamp = stamp_of(t);
    t.fibre.start(stacks->begin() + (slot * count + i) * STACK, body);
    p.ready.push_back(&t);
  }
  return program;
}

// Says where the threads wait that will never meet.
static void report_barrier(const Program& p) {
  const Thread *waits = nullptr, *other = nullptr;
  for (const Thread& t : p.threads)
    if (t.waits && !waits) waits = &t;
  for (const Thread& t : p.threads)
    if (t.waits != waits->waits && !other) other = &t;
  unsigned count = 0;
  for (const Thread& t : p.threads) count += t.waits == waits->waits;
  report = std::string("barrier: ") + std::to_string(count) + " threads of program " + text(p.place) + " wait in " +
           waits->waits + ", the first, " + std::to_string(waits->index) + ", at " + text(waits->site);
  if (!other) return;
  report += "; thread " + std::to_string(other->index);
  report += other->done ? " has ended" : std::string(" waits in ") + other->waits + " at " + text(other->site);
}

// Threads of one program go on, as many times as are allowed.
static void run(Program& p, uint64_t turns) {
  std::copy_n(p.saved.data(), shared_bytes, shared);
  shared_zone.state = p.state.begin();
  shared_zone.cells = reinterpret_cast<Cell*>(p.cells.begin());
  blockIdx = p.place;
  for (; turns && !p.ready.empty() && report.empty(); --turns) {
    running = p.ready.front();
    p.ready.pop_front();
    threadIdx = running->place;
    Fibre::change(host, running->fibre);
  }
  if (report.empty() && p.ready.empty() && p.left) report_barrier(p);
  std::copy_n(shared, shared_bytes, p.saved.data());
}

extern "C" void place_buffers(Region* regions, int count) { buffers = std::make_unique<Buffers>(regions, count); }

// What went wrong first, or nothing. Programs run one after the other, or in turns.
extern "C" const char* launch(void (*function)(), const unsigned* grid, const unsigned* block, uint64_t bytes,
                              int in_turns, const Argument* given, int count) {
  kernel = function, arguments = given, argument_count = count;
  gridDim = {grid[0], grid[1], grid[2]}, blockDim = {block[0], block[1], block[2]};
  shared_bytes = bytes;
  shared_zone.base = reinterpret_cast<uintptr_t>(cuda_on_cpu_shared_zone);
  shared_zone.size = MAX_SHARED + 2 * SHARED_GUARD;
  report.clear();
  const uint64_t programs = uint64_t{1} * grid[0] * grid[1] * grid[2];
  const uint64_t threads = uint64_t{1} * block[0] * block[1] * block[2];
  stacks = std::make_unique<Pages>(threads * (in_turns ? programs : 1) * STACK);
  if (programs >= MANY_PROGRAMS || threads > 1024 || bytes > MAX_SHARED) report = "unsupported: a launch of this size";
  if (in_turns) {
    std::deque<std::unique_ptr<Program>> left;
    for (uint64_t i = 0; i < programs && report.empty(); ++i) left.push_back(start(i, i));
    while (!left.empty() && report.empty()) {
      auto program = std::move(left.front());
      left.pop_front();
      run(*program, threads);
      if (program->left) left.push_back(std::move(program));
    }
  } else {
    for (uint64_t i = 0; i < programs && report.empty(); ++i) run(*start(i, 0), ~uint64_t{0});
  }
  buffers->copy_back();
  buffers.reset(), stacks.reset(), lists.clear(), clocks.clear();
  return report.empty() ? nullptr : report.c_str();
}

// What the compiler calls ---------------------------------------------------------------------------------------------

// The unaligned ones belong to copies of bytes (memcpy), which need no alignment in CUDA either.
#define CUDA_ON_CPU_ACCESS(NAME, KIND, BYTES, ALIGNED) \
  extern "C" void NAME(const void* p) { check<KIND>(p, BYTES, CUDA_ON_CPU_SITE, ALIGNED); }
CUDA_ON_CPU_ACCESS(__tsan_read1, READ, 1, true)
CUDA_ON_CPU_ACCESS(__tsan_read2, READ, 2, true)
CUDA_ON_CPU_ACCESS(__tsan_read4, READ, 4, true)
CUDA_ON_CPU_ACCESS(__tsan_read8, READ, 8, true)
CUDA_ON_CPU_ACCESS(__tsan_read16, READ, 16, true)
CUDA_ON_CPU_ACCESS(__tsan_write1, WRITE, 1, true)
CUDA_ON_CPU_ACCESS(__tsan_write2, WRITE, 2, true)
CUDA_ON_CPU_ACCESS(__tsan_write4, WRITE, 4, true)
CUDA_ON_CPU_ACCESS(__tsan_write8, WRITE, 8, true)
CUDA_ON_CPU_ACCESS(__tsan_write16, WRITE, 16, true)
CUDA_ON_CPU_ACCESS(__tsan_unaligned_read2, READ, 2, false)
CUDA_ON_CPU_ACCESS(__tsan_unaligned_read4, READ, 4, false)
CUDA_ON_CPU_ACCESS(__tsan_unaligned_read8, READ, 8, false)
CUDA_ON_CPU_ACCESS(__tsan_unaligned_read16, READ, 16, false)
CUDA_ON_CPU_ACCESS(__tsan_unaligned_write2, WRITE, 2, false)
CUDA_ON_CPU_ACCESS(__tsan_unaligned_write4, WRITE, 4, false)
CUDA_ON_CPU_ACCESS(__tsan_unaligned_write8, WRITE, 8, false)
CUDA_ON_CPU_ACCESS(__tsan_unaligned_write16, WRITE, 16, false)
extern "C" void __tsan_read_range(const void* p, size_t n) { check<READ>(p, n, CUDA_ON_CPU_SITE, false); }
extern "C" void __tsan_write_range(const void* p, size_t n) { check<WRITE>(p, n, CUDA_ON_CPU_SITE, false); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}

extern "C" void* checked_memcpy(void* to, const void* from, size_t n) {
  if (n) check<READ>(from, n, CUDA_ON_CPU_SITE, false), check<WRITE>(to, n, CUDA_ON_CPU_SITE, false);
  return std::memmove(to, from, n);
}
extern "C" void* checked_memset(void* to, int value, size_t n) {
  if (n) check<WRITE>(to, n, CUDA_ON_CPU_SITE, false);
  return std::memset(to, value, n);
}

// A load or store by a type that needs more alignment than the address has. The compiler splits copies of structs into
// loads of their fields, so this is seen here only.
extern "C" void __ubsan_handle_type_mismatch_v1(const void*, const void* p) {
  fail("misaligned", "access at " + place_of(reinterpret_cast<uintptr_t>(p)), CUDA_ON_CPU_SITE);
}
