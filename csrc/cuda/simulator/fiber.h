// One CUDA thread of the simulated device: a stack of its own, entered and left by swapping the stack
// pointer.
#pragma once
#include <stdint.h>
#include <stdlib.h>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace saccade {
namespace sim {

constexpr size_t kStackBytes = 256 << 10;

#ifdef __x86_64__
// Saves what a function must preserve and the stack pointer, and takes up the other stack. A hundred times
// faster than swapcontext, which asks the kernel for the signal mask at each switch.
extern "C" __attribute__((naked, noinline, weak)) void saccade_sim_switch(void** /*save*/, void* /*load*/) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15;"
      "movq %rsp, (%rdi); movq %rsi, %rsp;"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}

struct Context {
  void* sp = nullptr;

  void start(char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStackBytes - 64);
    *--top = nullptr;  // where entry, which never returns, would return to; keeps the stack aligned
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    sp = top;
  }
  void switch_to(Context& other) { saccade_sim_switch(&sp, other.sp); }
};
#else
struct Context {
  ucontext_t context;

  void start(char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&context, &other.context); }
};
#endif

}  // namespace sim
}  // namespace saccade
