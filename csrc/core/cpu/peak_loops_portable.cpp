#include <cstring>

#include "core/cpu/peak_loops.h"

namespace partita {
namespace {

constexpr int kLanes = 64;

// Read through volatile, so that the loops below cannot be folded at compile time.
volatile int g_factor = 3;

double int8_dots(int64_t iterations) {
  int32_t acc[kLanes] = {};
  int8_t values[kLanes];
  const int8_t factor = static_cast<int8_t>(g_factor);
  for (int i = 0; i < kLanes; ++i) values[i] = static_cast<int8_t>(i * factor);
  for (int64_t n = 0; n < iterations; ++n)
    for (int i = 0; i < kLanes; ++i) acc[i] += values[i] * static_cast<int8_t>(values[kLanes - 1 - i] + n);
  int32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += acc[i];
  g_factor = (sum & 1) + 3;
  return 2.0 * kLanes * static_cast<double>(iterations);
}

double fp32_multiply_adds(int64_t iterations) {
  float acc[kLanes] = {};
  const float factor = static_cast<float>(g_factor);
  for (int64_t n = 0; n < iterations; ++n)
    for (int i = 0; i < kLanes; ++i) acc[i] = acc[i] * 0.5f + factor;
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += acc[i];
  g_factor = sum > 0 ? 3 : 4;
  return 2.0 * kLanes * static_cast<double>(iterations);
}

double read(const std::byte* data, size_t bytes) {
  uint64_t sums[8] = {};
  for (size_t offset = 0; offset < bytes; offset += 64) {
    uint64_t line[8];
    std::memcpy(line, data + offset, sizeof line);
    for (int i = 0; i < 8; ++i) sums[i] += line[i];
  }
  uint64_t sum = 0;
  for (uint64_t value : sums) sum += value;
  g_factor = (sum & 1) + 3;
  return static_cast<double>(bytes);
}

}  // namespace

const PeakLoops kPeakLoopsPortable = {int8_dots, nullptr, fp32_multiply_adds, read};

}  // namespace partita
