// Loops that keep one kind of execution unit busy; each returns the operations done (or bytes read).
#pragma once

#include <cstddef>
#include <cstdint>

namespace partita {

struct PeakLoops {
  double (*int8_dots)(int64_t iterations);
  double (*bf16_dots)(int64_t iterations);  // null where there is none
  double (*fp32_multiply_adds)(int64_t iterations);
  double (*read)(const std::byte* data, size_t bytes);  // bytes: a multiple of 1024
};

extern const PeakLoops kPeakLoopsPortable;
extern const PeakLoops kPeakLoopsAvx2;
extern const PeakLoops kPeakLoopsAvx512;

}  // namespace partita
