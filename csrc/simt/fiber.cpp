// Only what the calling convention makes the callee keep is saved: the compiler keeps the rest around the call.
#include "simt/fiber.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)

asm(R"(
.text
.p2align 4
.globl partita_simt_switch_fiber
.hidden partita_simt_switch_fiber
.type partita_simt_switch_fiber, @function
partita_simt_switch_fiber:
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
  retq
.size partita_simt_switch_fiber, .-partita_simt_switch_fiber
)");

namespace partita::simt {

FiberState prepare_fiber(char* stack_low, size_t stack_bytes, void (*entry)()) {
  const uintptr_t top = (reinterpret_cast<uintptr_t>(stack_low) + stack_bytes) & ~uintptr_t{15};
  auto* slots = reinterpret_cast<uint64_t*>(top);
  slots[-1] = 0;  // entry's return address; a debugger's stack walk ends here
  slots[-2] = reinterpret_cast<uint64_t>(entry);
  std::memset(slots - 8, 0, 6 * sizeof(uint64_t));  // rbp, rbx, r12 .. r15
  return slots - 8;
}

}  // namespace partita::simt

#elif defined(__aarch64__)

asm(R"(
.text
.p2align 4
.globl partita_simt_switch_fiber
.hidden partita_simt_switch_fiber
.type partita_simt_switch_fiber, %function
partita_simt_switch_fiber:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size partita_simt_switch_fiber, .-partita_simt_switch_fiber
)");

namespace partita::simt {

FiberState prepare_fiber(char* stack_low, size_t stack_bytes, void (*entry)()) {
  const uintptr_t top = (reinterpret_cast<uintptr_t>(stack_low) + stack_bytes) & ~uintptr_t{15};
  auto* slots = reinterpret_cast<uint64_t*>(top - 160);
  std::memset(slots, 0, 160);
  slots[11] = reinterpret_cast<uint64_t>(entry);  // x30
  return slots;
}

}  // namespace partita::simt

#else

#include <ucontext.h>

// The state is the address of a context at the low end of a stack, or of one that the leaving call keeps in its frame.
extern "C" void partita_simt_switch_fiber(void** leave, void* enter) {
  ucontext_t here;
  *leave = &here;
  swapcontext(&here, static_cast<ucontext_t*>(enter));
}

namespace partita::simt {

FiberState prepare_fiber(char* stack_low, size_t stack_bytes, void (*entry)()) {
  // Above the canary, which lies in the lowest bytes.
  auto* context = reinterpret_cast<ucontext_t*>((reinterpret_cast<uintptr_t>(stack_low) + 127) & ~uintptr_t{63});
  getcontext(context);
  char* low = reinterpret_cast<char*>(context + 1);
  context->uc_stack.ss_sp = low;
  context->uc_stack.ss_size = static_cast<size_t>(stack_low + stack_bytes - low);
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

}  // namespace partita::simt

#endif
