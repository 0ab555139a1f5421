// The tokens among which the draw is made, with their weights: all of them, or what top_k, top_p and min_p leave.
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
  // e^((logit - max) / temperature), not normalised; 0 for a token that is cut off, or where that is below e^-87.
  float weight(int64_t position) const { return scratch_.weights[position]; }

  // The token in which u * total weight falls, counted in ascending order of id.  u in [0, 1)
  int32_t draw(double u) const;

 private:
  float top_k_bound(int64_t top_k) const;
  void collect(float bound);
  enum class Measure { kCount, kWeight };
  void cut_to_prefix(Measure measure, double target, float low);
  double total_weight() const;

  const LogitScan& scan_;
  SamplingScratch scratch_;
  const float* logits_;                 // [count]
  const int32_t* token_ids_ = nullptr;  // [count] ascending; null: position = id
  int64_t count_;
  float max_;
};

}  // namespace partita
