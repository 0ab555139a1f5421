#include "rope/rope.h"

#include <cmath>

#include "core/check.h"

namespace partita {

RopeTableStorage::RopeTableStorage(const std::vector<double>& inv_freq, int64_t num_positions, double attention_factor)
    : num_positions_(num_positions), rotary_dim_(static_cast<int>(inv_freq.size() * 2)) {
  PARTITA_CHECK(!inv_freq.empty() && inv_freq.size() <= 128, "inv_freq: got ", inv_freq.size(),
                " values, wanted rotary_dim / 2, from 1 to 128");
  PARTITA_CHECK(num_positions >= 1 && num_positions <= (int64_t{1} << 24), "num_positions: got ", num_positions,
                ", wanted 1 to 16777216 (past 2^24 fp32 cannot tell positions apart)");
  PARTITA_CHECK(std::isfinite(attention_factor), "attention_factor: got ", attention_factor,
                ", wanted a finite number");
  for (size_t i = 0; i < inv_freq.size(); ++i)
    PARTITA_CHECK(std::isfinite(inv_freq[i]), "inv_freq[", i, "]: got ", inv_freq[i], ", wanted a finite number");

  const size_t half = inv_freq.size();
  cos_ = AlignedBuffer(sizeof(float) * half * num_positions);
  sin_ = AlignedBuffer(sizeof(float) * half * num_positions);
  const float factor = static_cast<float>(attention_factor);
  for (int64_t position = 0; position < num_positions; ++position) {
    float* cos_row = cos_.as<float>() + position * half;
    float* sin_row = sin_.as<float>() + position * half;
    for (size_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(position) * static_cast<float>(inv_freq[i]);
      cos_row[i] = std::cos(angle) * factor;
      sin_row[i] = std::sin(angle) * factor;
    }
  }
}

RopeTable RopeTableStorage::table() const { return {num_positions_, rotary_dim_, cos_.as<float>(), sin_.as<float>()}; }

}  // namespace partita
