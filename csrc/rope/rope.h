// Rotary position tables: who owns the cosines and sines that attention's append reads.
#pragma once

#include <cstdint>
#include <vector>

#include "core/aligned_buffer.h"

namespace partita {

// cos/sin of every position, one table per (theta, scaling) of a model; "neox" half-split pairs (i, i + rotary_dim/2).
struct RopeTable {
  int64_t num_positions = 0;
  int rotary_dim = 0;          // even, <= head_dim; the rest of the head passes through
  const float* cos = nullptr;  // [num_positions, rotary_dim / 2]
  const float* sin = nullptr;  // [num_positions, rotary_dim / 2]
};

// Owns one table. Values as Hugging Face transformers computes them, so that logits agree: the angle is the fp32
// product of position and fp32(inv_freq), its cosine and sine are rounded to fp32, then multiplied by the factor.
class RopeTableStorage {
 public:
  // inv_freq: [rotary_dim / 2], scaling (linear, llama3, yarn ...) already applied by the caller.
  // attention_factor multiplies both tables (yarn, longrope); 1 otherwise. Throws ValueError on a bad argument.
  RopeTableStorage(const std::vector<double>& inv_freq, int64_t num_positions, double attention_factor = 1.0);

  RopeTable table() const;

 private:
  int64_t num_positions_;
  int rotary_dim_;
  AlignedBuffer cos_;
  AlignedBuffer sin_;
};

}  // namespace partita
