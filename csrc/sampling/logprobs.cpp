#include "sampling/logprobs.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "sampling/logit_scan.h"

namespace partita {

void add_logprobs(const float* logits, int64_t vocab_size, int32_t num_top, const SamplingScratch& scratch,
                  SampledToken* sampled) {
  const LogitScan& scan = active_logit_scan();
  const int64_t num_maxima = num_stripes(vocab_size) * kStripeLanes;
  scan.stripe_maxima(logits, vocab_size, scratch.maxima);
  const float max = *std::max_element(scratch.maxima, scratch.maxima + num_maxima);
  scan.stripe_weights(logits, vocab_size, max, 1.0f, scratch.weights, scratch.sums);
  double total = 0;
  for (int64_t s = 0; s < num_stripes(vocab_size); ++s) total += scratch.sums[s];
  const double log_total = std::log(total);
  const auto logprob = [&](int32_t token) {
    return static_cast<float>((static_cast<double>(logits[token]) - max) - log_total);
  };
  sampled->logprob = logprob(sampled->token);
  sampled->rank = 1 + static_cast<int32_t>(scan.count_greater(logits, vocab_size, logits[sampled->token]));

  num_top = static_cast<int32_t>(std::min<int64_t>(num_top, vocab_size));
  if (num_top <= 0) return;
  float bound = -std::numeric_limits<float>::infinity();
  if (num_top <= num_maxima) {  // as in Candidates::limit_to_top_k
    std::nth_element(scratch.maxima, scratch.maxima + (num_top - 1), scratch.maxima + num_maxima,
                     std::greater<float>());
    bound = scratch.maxima[num_top - 1];
  }
  const int64_t count =
      scan.collect_range(logits, vocab_size, bound, std::numeric_limits<float>::infinity(), scratch.positions);
  std::partial_sort(scratch.positions, scratch.positions + num_top, scratch.positions + count,
                    [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
  sampled->top.reserve(num_top);
  for (int32_t i = 0; i < num_top; ++i) sampled->top.emplace_back(scratch.positions[i], logprob(scratch.positions[i]));
}

}  // namespace partita
