// The tokens among which the draw is made: all of them, or what top_k, top_p and min_p leave.
#pragma once

#include <cstdint>

#include "sampling/logit_scan.h"
#include "sampling/sampling.h"
#include "sampling/sampling_scratch.h"

namespace partita {

class Candidates {
 public:
  // logits: [V] as adjusted, no NaN, the largest is `max`; scratch.maxima holds their stripe maxima.
  Candidates(const float* logits, int64_t vocab_size, float max, const SamplingParams& params,
             const SamplingScratch& scratch);

  int64_t size() const { return count_; }
  int32_t token(int64_t position) const { return token_ids_ ? token_ids_[position] : static_cast<int32_t>(position); }
  // e^((logit - max) / temperature), not normalised; 0 where that is below e^-87.
  float weight(int64_t position) const { return weights_[position]; }

  // The token in which u * total weight falls, counted in ascending order of id.  u in [0, 1)
  int32_t draw(double u) const;

 private:
  double total_weight() const;
  void limit_to_top_k(int64_t top_k);
  void weigh(float max, float inverse_temperature);
  void limit_to_nucleus(float top_p);
  void limit_to_min_p(float min_p);
  int64_t collect(const float* values, float threshold);
  void keep_prefix(bool by_weight, double target);

  const LogitScan& scan_;
  SamplingScratch scratch_;
  const float* logits_;       // [count] of the candidates
  const int32_t* token_ids_;  // [count] ascending; null: position = id
  float* weights_ = nullptr;  // [count]
  int64_t count_;
};

}  // namespace partita
