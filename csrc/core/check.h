// The one check header: a failed check throws std::invalid_argument (ValueError in Python) that
// names the argument, what came and what was wanted. Nothing in the library aborts or exits.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace partita {

template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

// A value of the right kind that is out of range, of the wrong shape, misaligned ...
template <typename... Parts>
[[noreturn]] void throw_value_error(const Parts&... parts) {
  throw std::invalid_argument(concat(parts...));
}

// A value of the wrong kind altogether (TypeError in Python).
struct TypeMismatch : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

}  // namespace partita

// PARTITA_CHECK(k > 0, "top_k: got ", k, ", wanted a positive number");
#define PARTITA_CHECK(condition, ...)                            \
  do {                                                           \
    if (!(condition)) ::partita::throw_value_error(__VA_ARGS__); \
  } while (0)
