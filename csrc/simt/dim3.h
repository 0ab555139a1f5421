// A launch's extents, the same type in both worlds (device/launch.cuh).
#pragma once

namespace partita::simt {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

}  // namespace partita::simt
