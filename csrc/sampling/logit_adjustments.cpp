#include "sampling/logit_adjustments.h"

#include <limits>

namespace partita {

TouchedLogit& LogitAdjustments::touch(int32_t token) {
  const uint32_t idx = touched_idx_[token];  // anything at all, if the token is not in the set yet
  if (idx < num_touched_ && touched_[idx].token == token) return touched_[idx];
  touched_idx_[token] = num_touched_;
  touched_[num_touched_] = {token, 0, 0, logits_[token]};
  return touched_[num_touched_++];
}

void LogitAdjustments::apply(const SamplingParams& params, const TokenHistory& history) {
  for (const auto& [token, bias] : params.logit_bias) {
    touch(token);
    logits_[token] += bias;
  }
  if (history.num_tokens - history.num_prompt_tokens < params.min_tokens) {
    for (const int32_t token : params.stop_token_ids) {
      touch(token);
      // NaN and +infinity stay, so that the row is still seen to be broken.
      if (logits_[token] <= std::numeric_limits<float>::max()) logits_[token] = -std::numeric_limits<float>::infinity();
    }
  }
  const bool repeats = params.repetition_penalty != 1.0f;
  const bool counts = params.presence_penalty != 0.0f || params.frequency_penalty != 0.0f;
  if (!repeats && !counts) return;

  // Count first, so that each token is penalised once however often it occurs.
  for (int64_t i = repeats ? 0 : history.num_prompt_tokens; i < history.num_tokens; ++i) {
    const int32_t token = history.tokens[i];
    if (token < 0 || token >= vocab_size_) continue;
    TouchedLogit& touched = touch(token);
    ++touched.num_seen;
    touched.num_generated += i >= history.num_prompt_tokens;
  }
  for (uint32_t i = 0; i < num_touched_; ++i) {
    const TouchedLogit& touched = touched_[i];
    if (touched.num_seen == 0) continue;
    float& logit = logits_[touched.token];
    if (repeats) logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
    if (touched.num_generated > 0)
      logit -= params.presence_penalty + params.frequency_penalty * static_cast<float>(touched.num_generated);
  }
}

void LogitAdjustments::restore() {
  for (uint32_t i = 0; i < num_touched_; ++i) logits_[touched_[i].token] = touched_[i].raw;
  num_touched_ = 0;
}

}  // namespace partita
