// Bias, masks and penalties: what changes single logits before sampling, and how it is taken back.
#pragma once

#include <cstdint>

#include "sampling/sampling.h"
#include "sampling/sampling_scratch.h"

namespace partita {

// Owns the set of changed logits of one row while it is sampled. Costs O(history + bias), never O(V): membership is a
// sparse set (Briggs and Torczon, 1993), whose index need not be initialised.
class LogitAdjustments {
 public:
  LogitAdjustments(float* logits, int64_t vocab_size, const SamplingScratch& scratch)
      : logits_(logits), vocab_size_(vocab_size), touched_idx_(scratch.touched_idx), touched_(scratch.touched) {}

  // logit_bias, min_tokens, repetition, then presence and frequency. Ids in the history outside the vocabulary
  // (placeholders) have no logit and are passed over.
  void apply(const SamplingParams& params, const TokenHistory& history);

  bool any() const { return num_touched_ > 0; }
  void restore();  // puts the raw logits back

 private:
  TouchedLogit& touch(int32_t token);

  float* logits_;
  int64_t vocab_size_;
  uint32_t* touched_idx_;
  TouchedLogit* touched_;
  uint32_t num_touched_ = 0;
};

}  // namespace partita
