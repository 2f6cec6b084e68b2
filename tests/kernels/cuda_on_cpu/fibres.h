// Fibres: stacks of their own, between which one thread of the CPU switches.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cuda_on_cpu {

constexpr size_t STACK = 256 << 10;

// Memory that the system gives page by page, when it is touched, full of zeros.
class Pages {
 public:
  explicit Pages(size_t bytes) : bytes_(bytes ? bytes : 1) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    begin_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (begin_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~Pages() { munmap(begin_, bytes_); }
  Pages(const Pages&) = delete;
  uint8_t* begin() const { return static_cast<uint8_t*>(begin_); }
  bool holds(uintptr_t address) const { return address - reinterpret_cast<uintptr_t>(begin_) < bytes_; }

 private:
  void* begin_;
  size_t bytes_;
};

#if defined(__x86_64__)

// Swapcontext saves the mask of signals by a call of the system; this saves what functions must preserve, and nothing
// else. Rounding modes are the same everywhere.
extern "C" void cuda_on_cpu_switch(void** from, void* to);
asm(R"(
.text
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");

class Fibre {
 public:
  void start(uint8_t* stack, void (*function)()) {
    auto* top = reinterpret_cast<void**>(stack + STACK);
    top[-2] = reinterpret_cast<void*>(function);  // where the switch returns to; the stack is aligned as after a call
    for (int i = 3; i <= 8; ++i) top[-i] = nullptr;  // six registers
    at_ = top - 8;
  }
  static void change(Fibre& from, Fibre& to) { cuda_on_cpu_switch(&from.at_, to.at_); }

 private:
  void* at_ = nullptr;
};

#else

class Fibre {
 public:
  void start(uint8_t* stack, void (*function)()) {
    getcontext(&at_);
    at_.uc_stack.ss_sp = stack, at_.uc_stack.ss_size = STACK, at_.uc_link = nullptr;
    makecontext(&at_, function, 0);
  }
  static void change(Fibre& from, Fibre& to) { swapcontext(&from.at_, &to.at_); }

 private:
  ucontext_t at_;
};

#endif

}  // namespace cuda_on_cpu
