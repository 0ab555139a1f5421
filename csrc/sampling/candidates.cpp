#include "sampling/candidates.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "core/float16.h"

namespace partita {
namespace {

// Once this few tokens are left among which the cut lies, they are sorted.
constexpr int64_t kSortLimit = 256;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();

// Integers in the order of the floats: halving a range of them always ends, whatever the logits' scale.
int64_t key_of(float value) {
  const auto bits = static_cast<int32_t>(float_to_bits(value));
  return bits >= 0 ? bits : static_cast<int64_t>(bits ^ 0x7fffffff);
}
float from_key(int64_t key) {
  const auto bits = static_cast<int32_t>(key);
  return bits_to_float(static_cast<uint32_t>(bits >= 0 ? bits : bits ^ 0x7fffffff));
}

}  // namespace

Candidates::Candidates(const float* logits, int64_t vocab_size, float max, const SamplingParams& params,
                       const SamplingScratch& scratch)
    : scan_(active_logit_scan()), scratch_(scratch), logits_(logits), count_(vocab_size), max_(max) {
  const bool limits_count = params.top_k > 0 && params.top_k < vocab_size;
  const float bound = limits_count ? top_k_bound(params.top_k) : kLowest;
  if (bound > kLowest) collect(bound);
  scan_.stripe_weights(logits_, count_, max, 1.0f / params.temperature, scratch_.weights, scratch_.sums);
  if (limits_count) cut_to_prefix(Measure::kCount, static_cast<double>(params.top_k), bound);
  if (params.top_p < 1.0f) {
    // All tokens lighter than (1 - p) total / n weigh less than (1 - p) total together: the cut is above that. The
    // margin covers the rounding of sums and logarithm.
    const double total = total_weight();
    const double lightest = (1.0 - static_cast<double>(params.top_p)) * total / static_cast<double>(count_);
    const double low = max + params.temperature * std::max(-87.0, std::log(lightest) - 1e-3);
    cut_to_prefix(Measure::kWeight, static_cast<double>(params.top_p) * total,
                  std::nextafter(static_cast<float>(std::max<double>(low, kLowest)), kLowest));
  }
  if (params.min_p > 0.0f)  // the most likely token weighs 1
    scan_.keep_at_least(scratch_.weights, count_, params.min_p, scratch_.weights, scratch_.sums);
}

// No larger than the k-th largest logit: lane maxima are logits of different tokens, so the k-th largest of them is
// such a bound. Where there are fewer of them: the lowest float.
float Candidates::top_k_bound(int64_t top_k) const {
  const int64_t num_maxima = num_stripes(count_) * kStripeLanes;
  if (top_k > num_maxima) return kLowest;
  std::copy_n(scratch_.maxima, num_maxima, scratch_.sorted_maxima);
  std::nth_element(scratch_.sorted_maxima, scratch_.sorted_maxima + (top_k - 1), scratch_.sorted_maxima + num_maxima,
                   std::greater<float>());
  return std::max(kLowest, scratch_.sorted_maxima[top_k - 1]);
}

// Compacts the candidates from the whole vocabulary to the logits that reach the bound.
void Candidates::collect(float bound) {
  const int64_t count = scan_.collect_range(logits_, count_, bound, kInfinity, scratch_.token_ids);
  for (int64_t i = 0; i < count; ++i) scratch_.kept_logits[i] = logits_[scratch_.token_ids[i]];
  token_ids_ = scratch_.token_ids;
  logits_ = scratch_.kept_logits;
  count_ = count;
}

// Zeroes all weights but those of the shortest prefix, in descending order of logit (the lower id first among equals),
// whose measure reaches `target`: the sum of the weights, or the number of tokens. The prefix ends at a logit of at
// least `low`. Nothing is sorted but the few tokens around the cut: vector passes narrow down where it lies, to a ninth
// of the range each, over what the pass before left.
void Candidates::cut_to_prefix(Measure measure, double target, float low) {
  const float* active_logits = logits_;  // of the tokens among which the cut lies
  const float* active_weights = measure == Measure::kWeight ? scratch_.weights : nullptr;
  int64_t num_active = count_;
  const int32_t* active = nullptr;                // [num_active] their positions, ascending; null: all
  float low_logit = low, high_logit = kInfinity;  // the cut lies at low <= logit < high
  const auto compact = [&] {
    const int64_t num_left = scan_.collect_range(active_logits, num_active, low_logit, high_logit, scratch_.positions);
    for (int64_t i = 0; i < num_left; ++i) {  // in place from the second time on: nothing moves to the right
      const int32_t from = scratch_.positions[i];
      scratch_.active[i] = active ? active[from] : from;
      scratch_.active_logits[i] = active_logits[from];
      if (active_weights) scratch_.active_weights[i] = active_weights[from];
    }
    active = scratch_.active;
    active_logits = scratch_.active_logits;
    if (active_weights) active_weights = scratch_.active_weights;
    num_active = num_left;
  };

  const auto num_in_range = [&] {
    return scan_.count_greater(active_logits, num_active, std::nextafter(low_logit, -kInfinity)) -
           scan_.count_greater(active_logits, num_active, std::nextafter(high_logit, -kInfinity));
  };

  // What lies at or above the low key reaches the target; at or above the high key lies `before`, which does not.
  int64_t low_key = key_of(low), high_key = key_of(max_) + 1;
  double before = 0, before_active = 0;  // the latter: of what compact() left out
  while (high_key - low_key > 1) {
    const int64_t num_left = num_in_range();
    if (num_left <= kSortLimit) break;
    if (num_left < num_active / 2) {
      compact();
      before_active = before;
    }
    int64_t keys[kNumThresholds];
    float thresholds[kNumThresholds];
    double measures[kNumThresholds];
    for (int j = 0; j < kNumThresholds; ++j) {
      keys[j] = low_key + (high_key - low_key) * (j + 1) / (kNumThresholds + 1);
      thresholds[j] = from_key(keys[j]);
    }
    scan_.measure_at_least(active_logits, active_weights, num_active, thresholds, measures);
    int reaching = 0;  // thresholds [0, reaching) reach the target
    while (reaching < kNumThresholds && before_active + measures[reaching] >= target) ++reaching;
    if (reaching > 0) {
      low_key = keys[reaching - 1];
      low_logit = thresholds[reaching - 1];
    }
    if (reaching < kNumThresholds) {
      high_key = keys[reaching];
      high_logit = thresholds[reaching];
      before = before_active + measures[reaching];
    }
  }
  compact();
  if (num_active == 0) return;

  int32_t* ordered = scratch_.active;
  if (high_key - low_key > 1)  // else all are equal, and in order of id as they are
    std::sort(ordered, ordered + num_active,
              [&](int32_t a, int32_t b) { return logits_[a] != logits_[b] ? logits_[a] > logits_[b] : a < b; });
  double remaining = target - before;
  int64_t last = 0;
  for (; last + 1 < num_active; ++last) {
    remaining -= measure == Measure::kWeight ? static_cast<double>(scratch_.weights[ordered[last]]) : 1.0;
    if (remaining <= 0) break;
  }
  const float last_logit = logits_[ordered[last]];
  for (int64_t i = last + 1; i < num_active && logits_[ordered[i]] == last_logit; ++i) scratch_.weights[ordered[i]] = 0;
  scan_.keep_at_least(logits_, count_, last_logit, scratch_.weights, scratch_.sums);
}

double Candidates::total_weight() const {
  double total = 0;
  for (int64_t s = 0; s < num_stripes(count_); ++s) total += scratch_.sums[s];
  return total;
}

int32_t Candidates::draw(double u) const {
  const double target = u * total_weight();
  int64_t stripe = 0;
  double before = 0;
  for (int64_t s = 0; s < num_stripes(count_); ++s) {
    if (scratch_.sums[s] <= 0) continue;
    stripe = s;
    if (before + scratch_.sums[s] > target) break;
    before += scratch_.sums[s];
  }
  // Where rounding keeps the sum at or below the target: the last token that has weight.
  int64_t drawn = -1;
  const int64_t end = std::min(count_, (stripe + 1) * kStripeLength);
  for (int64_t i = stripe * kStripeLength; i < end; ++i) {
    if (scratch_.weights[i] <= 0) continue;
    drawn = i;
    before += scratch_.weights[i];
    if (before > target) break;
  }
  return drawn < 0 ? -1 : token(drawn);
}

}  // namespace partita
