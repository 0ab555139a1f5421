// Switching between stacks of one OS thread.
#pragma once

#include <cstddef>

namespace partita::simt {

// A stack that waits: made by prepare_fiber, left by switch_fiber.
using FiberState = void*;

// Lays out a stack so that the first switch to it calls entry(), which must not return.
FiberState prepare_fiber(char* stack_low, size_t stack_bytes, void (*entry)());

// Leaves the running stack's state in `*leave` and goes on where `enter` was left.
extern "C" void partita_simt_switch_fiber(FiberState* leave, FiberState enter);
inline void switch_fiber(FiberState* leave, FiberState enter) { partita_simt_switch_fiber(leave, enter); }

}  // namespace partita::simt
