// Something that a kernel does wrong.
#pragma once

#include <cstddef>

#include "simt/site.h"

namespace partita::simt {

struct Thread;

// Notes the report for the running block, with kernel, block and thread before the text, and abandons the thread.
// `code` is an address in the kernel's machine code, or null; its source line is looked up when the launch ends.
[[noreturn]] void report(Thread& thread, const void* code, const char* format, ...)
    __attribute__((format(printf, 3, 4)));

// "path:line", the path cut down to what lies under csrc. Into a buffer of the caller.
const char* describe(Site site, char (&buffer)[256]);

}  // namespace partita::simt
