#include "simt/code_address.h"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace partita::simt {
namespace {

// One line of what addr2line says, without "??".
std::string ask_addr2line(const char* library, unsigned long offset) {
  char command[1200];
  if (std::strchr(library, '\'')) return "";
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%lx 2>/dev/null", library, offset);
  FILE* pipe = popen(command, "r");
  if (!pipe) return "";
  std::string found;
  bool is_twin = true;
  char line[1024];
  // With -i the innermost inlined call comes first; wrappers and intrinsics are passed over for what called them, as
  // far as they were inlined into it.
  while (std::fgets(line, sizeof line, pipe)) {
    line[std::strcspn(line, " \n")] = '\0';
    if (line[0] == '?' || !is_twin) continue;
    is_twin = std::strstr(line, "csrc/simt/device/") != nullptr;
    const char* path = line;
    for (const char* at = std::strstr(line, "csrc/"); at; at = std::strstr(at + 1, "csrc/")) path = at + 5;
    found = path;
  }
  pclose(pipe);
  return found;
}

// Reading the library's debug information takes a good part of a second, so each place is asked for once.
std::string source_line(const char* library, unsigned long offset) {
  static std::mutex mutex;
  static std::map<unsigned long, std::string> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(offset);
  if (found != known.end()) return found->second;
  return known[offset] = ask_addr2line(library, offset);
}

}  // namespace

std::string resolve_places(const std::string& text) {
  Dl_info info;
  const char* library = dladdr(__ehdr_start, &info) && info.dli_fname ? info.dli_fname : "";
  std::string resolved;
  size_t from = 0;
  for (size_t at = text.find("{+0x"); at != std::string::npos; at = text.find("{+0x", from)) {
    resolved += text.substr(from, at - from);
    const size_t end = text.find('}', at);
    // The address is where the call returns to; the call lies before it.
    const unsigned long offset = std::strtoul(text.c_str() + at + 2, nullptr, 16);
    const std::string place = source_line(library, offset - 1);
    const char* name = std::strrchr(library, '/');
    resolved += " at " + (!place.empty() ? place : (name ? name + 1 : library) + text.substr(at + 1, end - at - 1));
    from = end + 1;
  }
  return resolved + text.substr(from);
}

}  // namespace partita::simt
