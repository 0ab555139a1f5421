#include "sampling/sampling.h"

#include <algorithm>
#include <limits>

#include "core/check.h"
#include "sampling/candidates.h"
#include "sampling/logit_adjustments.h"
#include "sampling/logit_scan.h"
#include "sampling/logprobs.h"
#include "sampling/philox.h"
#include "sampling/sampling_scratch.h"

namespace partita {
namespace {

// The largest logit and the lowest id that has it; token -1 for a row that cannot be sampled. Fills scratch.maxima.
struct LargestLogit {
  int32_t token = -1;
  float value = 0;
};

LargestLogit find_largest(const float* logits, int64_t vocab_size, const SamplingScratch& scratch) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  if (!active_logit_scan().stripe_maxima(logits, vocab_size, scratch.maxima)) return {};
  const float* const maxima = scratch.maxima;
  const float* const maxima_end = scratch.maxima + num_stripes(vocab_size) * kStripeLanes;
  float max = -kInfinity;
  for (const float* maximum = maxima; maximum < maxima_end; ++maximum) max = std::max(max, *maximum);
  if (max == -kInfinity || max == kInfinity) return {};
  const int64_t stripe = (std::find(maxima, maxima_end, max) - maxima) / kStripeLanes;
  int64_t token = stripe * kStripeLength;
  while (logits[token] != max) ++token;
  return {static_cast<int32_t>(token), max};
}

bool is_greedy(const SamplingParams& params) { return params.temperature < kGreedyTemperature; }

}  // namespace

size_t sampling_scratch_bytes(int64_t vocab_size) {
  PARTITA_CHECK(vocab_size > 0 && vocab_size <= std::numeric_limits<int32_t>::max() - kStripeLength, "vocab_size: got ",
                vocab_size, ", wanted 1 to 2^31 - 1025");
  size_t num_bytes = 0;
  SamplingScratch::lay_out(nullptr, vocab_size, &num_bytes);
  return num_bytes;
}

SampledToken sample_token(float* logits, int64_t vocab_size, const SamplingParams& params, const TokenHistory& history,
                          std::byte* scratch_bytes) {
  const SamplingScratch scratch = SamplingScratch::lay_out(scratch_bytes, vocab_size, nullptr);
  LogitAdjustments adjustments(logits, vocab_size, scratch);
  adjustments.apply(params, history);

  SampledToken sampled;
  const LargestLogit largest = find_largest(logits, vocab_size, scratch);
  if (largest.token < 0 || is_greedy(params)) {
    sampled.token = largest.token;
  } else {
    const Candidates candidates(logits, vocab_size, largest.value, params, scratch);
    sampled.token = candidates.draw(uniform_draw(params.seed, static_cast<uint64_t>(history.num_tokens)));
  }

  adjustments.restore();
  if (params.num_logprobs >= 0 && sampled.token >= 0)
    add_logprobs(logits, vocab_size, params.num_logprobs, scratch, &sampled);
  return sampled;
}

std::vector<std::pair<int32_t, double>> sampling_distribution(float* logits, int64_t vocab_size,
                                                              const SamplingParams& params, const TokenHistory& history,
                                                              std::byte* scratch_bytes) {
  const SamplingScratch scratch = SamplingScratch::lay_out(scratch_bytes, vocab_size, nullptr);
  LogitAdjustments adjustments(logits, vocab_size, scratch);
  adjustments.apply(params, history);

  std::vector<std::pair<int32_t, double>> distribution;
  const LargestLogit largest = find_largest(logits, vocab_size, scratch);
  if (largest.token >= 0 && is_greedy(params)) {
    distribution.emplace_back(largest.token, 1.0);
  } else if (largest.token >= 0) {
    const Candidates candidates(logits, vocab_size, largest.value, params, scratch);
    double total = 0;  // not the sum of stripe sums, whose fp32 parts show in the eighth digit
    for (int64_t i = 0; i < candidates.size(); ++i) total += candidates.weight(i);
    for (int64_t i = 0; i < candidates.size(); ++i)
      if (candidates.weight(i) > 0) distribution.emplace_back(candidates.token(i), candidates.weight(i) / total);
  }
  adjustments.restore();
  return distribution;
}

}  // namespace partita
