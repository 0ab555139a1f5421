#include "sampling/candidates.h"

#include <algorithm>
#include <functional>
#include <limits>

namespace partita {
namespace {

// Below this many, sorting the rest beats another histogram.
constexpr int64_t kSortLimit = 512;

}  // namespace

Candidates::Candidates(const float* logits, int64_t vocab_size, float max, const SamplingParams& params,
                       const SamplingScratch& scratch)
    : scan_(active_logit_scan()), scratch_(scratch), logits_(logits), token_ids_(nullptr), count_(vocab_size) {
  if (params.top_k > 0 && params.top_k < vocab_size) limit_to_top_k(params.top_k);
  weigh(max, 1.0f / params.temperature);
  if (params.top_p < 1.0f) limit_to_nucleus(params.top_p);
  if (params.min_p > 0.0f) limit_to_min_p(params.min_p);
}

// Compacts the candidates to those whose value reaches the threshold, in their old (ascending) order.
int64_t Candidates::collect(const float* values, float threshold) {
  const int64_t count = scan_.collect_at_least(values, count_, threshold, scratch_.positions);
  // In place where a list exists already: a position never lies before its target.
  for (int64_t i = 0; i < count; ++i) {
    const int32_t position = scratch_.positions[i];
    scratch_.token_ids[i] = token(position);
    scratch_.kept_logits[i] = logits_[position];
    if (weights_) weights_[i] = weights_[position];
  }
  token_ids_ = scratch_.token_ids;
  logits_ = scratch_.kept_logits;
  return count_ = count;
}

void Candidates::limit_to_top_k(int64_t top_k) {
  // Lane maxima are logits of different tokens, so the k-th largest of them is no larger than the k-th largest logit.
  // A logit of -infinity is no candidate in any case.
  float bound = std::numeric_limits<float>::lowest();
  const int64_t num_maxima = num_stripes(count_) * kStripeLanes;
  if (top_k <= num_maxima) {
    std::copy_n(scratch_.maxima, num_maxima, scratch_.sorted_maxima);
    std::nth_element(scratch_.sorted_maxima, scratch_.sorted_maxima + (top_k - 1), scratch_.sorted_maxima + num_maxima,
                     std::greater<float>());
    bound = std::max(bound, scratch_.sorted_maxima[top_k - 1]);
  }
  if (collect(logits_, bound) > top_k) keep_prefix(/*by_weight=*/false, static_cast<double>(top_k));
}

void Candidates::weigh(float max, float inverse_temperature) {
  weights_ = scratch_.weights;
  scan_.stripe_weights(logits_, count_, max, inverse_temperature, weights_, scratch_.sums);
}

void Candidates::limit_to_nucleus(float top_p) {
  // All tokens lighter than (1 - p) total / n weigh less than (1 - p) total together: the nucleus is complete without
  // them. The margin covers the rounding of the sums.
  const double total = total_weight();
  const double outside = (1.0 - static_cast<double>(top_p)) * total;
  const double bound = 0.999 * outside / static_cast<double>(count_);
  collect(weights_, std::max(static_cast<float>(bound), std::numeric_limits<float>::min()));
  keep_prefix(/*by_weight=*/true, static_cast<double>(top_p) * total);
}

void Candidates::limit_to_min_p(float min_p) {
  collect(weights_, min_p);  // the most likely token weighs 1
}

// Keeps the shortest prefix, in descending order of logit (the lower id first among equals), that weighs at least
// `target` (or, not by weight, holds `target` tokens). Only the histogram bin in which the prefix ends is refined, so
// this is linear in the number of candidates where sorting them all is not.
void Candidates::keep_prefix(bool by_weight, double target) {
  const auto measure = [&](int32_t position) { return by_weight ? static_cast<double>(weights_[position]) : 1.0; };
  int32_t* active = scratch_.positions;  // where the last token of the prefix can be; ascending
  int64_t num_active = count_;
  for (int64_t i = 0; i < count_; ++i) active[i] = static_cast<int32_t>(i);
  double remaining = target;

  int32_t last = -1;
  while (last < 0) {
    float low = logits_[active[0]], high = low;
    for (int64_t i = 1; i < num_active; ++i) {
      low = std::min(low, logits_[active[i]]);
      high = std::max(high, logits_[active[i]]);
    }
    if (low == high || num_active <= kSortLimit) {
      if (low != high)
        std::sort(active, active + num_active,
                  [&](int32_t a, int32_t b) { return logits_[a] != logits_[b] ? logits_[a] > logits_[b] : a < b; });
      int64_t i = 0;
      for (; i + 1 < num_active; ++i) {
        remaining -= measure(active[i]);
        if (remaining <= 0) break;
      }
      last = active[i];
      break;
    }
    // Bin 0 holds the largest logits; the mapping is monotone, so bins never disagree with the order of the logits.
    const double bins_per_unit = (SamplingScratch::kNumBins - 1) / (static_cast<double>(high) - low);
    const auto bin_of = [&](int32_t position) {
      return static_cast<int64_t>((static_cast<double>(high) - logits_[position]) * bins_per_unit);
    };
    std::fill_n(scratch_.bins, SamplingScratch::kNumBins, 0.0);
    for (int64_t i = 0; i < num_active; ++i) scratch_.bins[bin_of(active[i])] += measure(active[i]);
    int64_t crossing = 0, last_filled = 0;
    double before = 0;  // of the bins before the crossing one
    for (; crossing < SamplingScratch::kNumBins && before + scratch_.bins[crossing] < remaining; ++crossing) {
      if (scratch_.bins[crossing] > 0) last_filled = crossing;
      before += scratch_.bins[crossing];
    }
    if (crossing == SamplingScratch::kNumBins) {  // rounding kept the sum just below the target
      crossing = last_filled;
      before -= scratch_.bins[crossing];
    }
    remaining -= before;
    int64_t num_refined = 0;
    for (int64_t i = 0; i < num_active; ++i)
      if (bin_of(active[i]) == crossing) active[num_refined++] = active[i];
    num_active = num_refined;
  }

  const float last_logit = logits_[last];
  int64_t kept = 0;
  for (int64_t i = 0; i < count_; ++i) {
    const float logit = logits_[i];
    if (logit < last_logit || (logit == last_logit && i > last)) continue;
    scratch_.token_ids[kept] = token(i);
    scratch_.kept_logits[kept] = logit;
    if (weights_) weights_[kept] = weights_[i];
    ++kept;
  }
  token_ids_ = scratch_.token_ids;
  logits_ = scratch_.kept_logits;
  count_ = kept;
}

double Candidates::total_weight() const {
  double total = 0;
  if (!token_ids_)
    for (int64_t s = 0; s < num_stripes(count_); ++s) total += scratch_.sums[s];
  else
    for (int64_t i = 0; i < count_; ++i) total += weights_[i];
  return total;
}

int32_t Candidates::draw(double u) const {
  const double target = u * total_weight();
  int64_t begin = 0, end = count_;
  double before = 0;
  if (!token_ids_) {  // over the whole vocabulary the stripe sums lead to the stripe
    int64_t last_filled = 0;
    for (int64_t stripe = 0; stripe < num_stripes(count_); ++stripe) {
      if (scratch_.sums[stripe] <= 0) continue;
      last_filled = stripe;
      if (before + scratch_.sums[stripe] > target) break;
      before += scratch_.sums[stripe];
    }
    begin = last_filled * kStripeLength;
    end = std::min(count_, begin + kStripeLength);
  }
  int32_t drawn = -1;  // where rounding keeps the sum at or below the target, the last token that has weight
  for (int64_t i = begin; i < end; ++i) {
    if (weights_[i] <= 0) continue;
    drawn = token(i);
    before += weights_[i];
    if (before > target) break;
  }
  return drawn;
}

}  // namespace partita
