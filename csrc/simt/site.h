// Where a kernel calls a barrier, a wait or an instruction of the whole warp: the call's own file and line, caught by
// default arguments.
#pragma once

namespace partita::simt {

struct Site {
  const char* file = nullptr;
  int line = 0;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

}  // namespace partita::simt
