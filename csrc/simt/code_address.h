// Places in the kernels' machine code, as offsets into the library, and the source lines they came from. Internal to
// csrc/simt.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

extern "C" const char __ehdr_start[] __attribute__((visibility("hidden")));

namespace partita::simt {

inline uint32_t code_of(const void* address) {
  return static_cast<uint32_t>(static_cast<const char*>(address) - __ehdr_start);
}
inline const void* address_of_code(uint32_t code) { return __ehdr_start + code; }

// The mark of a place in a report's text, which resolve_places replaces.
struct CodePlace {
  char text[24];
  explicit CodePlace(uint32_t code) { std::snprintf(text, sizeof text, "{+0x%x}", code); }
};

// Replaces the marks by " at path:line", asking addr2line, or where there is none by " at library+0x123".
std::string resolve_places(const std::string& text);

}  // namespace partita::simt
