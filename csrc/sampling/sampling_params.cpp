#include <cmath>

#include "core/check.h"
#include "sampling/sampling.h"

namespace partita {
namespace {

void check_finite(const char* name, float value) {
  PARTITA_CHECK(std::isfinite(value), name, ": got ", value, ", wanted a finite number");
}

}  // namespace

// Written so that a NaN fails every range.
void SamplingParams::check(int64_t vocab_size) const {
  PARTITA_CHECK(std::isfinite(temperature) && temperature >= 0, "temperature: got ", temperature,
                ", wanted a finite number of at least 0 (0 is greedy)");
  PARTITA_CHECK(top_p > 0 && top_p <= 1, "top_p: got ", top_p, ", wanted a number in (0, 1]");
  PARTITA_CHECK(min_p >= 0 && min_p <= 1, "min_p: got ", min_p, ", wanted a number in [0, 1]");
  PARTITA_CHECK(top_k >= 0, "top_k: got ", top_k, ", wanted at least 0 (0 keeps all)");
  check_finite("presence_penalty", presence_penalty);
  check_finite("frequency_penalty", frequency_penalty);
  PARTITA_CHECK(std::isfinite(repetition_penalty) && repetition_penalty > 0, "repetition_penalty: got ",
                repetition_penalty, ", wanted a finite number above 0 (1 is none)");
  PARTITA_CHECK(num_logprobs >= -1 && num_logprobs <= vocab_size, "num_logprobs: got ", num_logprobs,
                ", wanted -1 (none) to the vocabulary's ", vocab_size);
  PARTITA_CHECK(min_tokens >= 0, "min_tokens: got ", min_tokens, ", wanted at least 0");
  for (size_t i = 0; i < stop_token_ids.size(); ++i)
    PARTITA_CHECK(stop_token_ids[i] >= 0 && stop_token_ids[i] < vocab_size, "stop_token_ids[", i, "]: got ",
                  stop_token_ids[i], ", wanted an id in [0, ", vocab_size, ")");
  for (const auto& [token, bias] : logit_bias) {
    PARTITA_CHECK(token >= 0 && token < vocab_size, "logit_bias: got token id ", token, ", wanted one in [0, ",
                  vocab_size, ")");
    PARTITA_CHECK(std::isfinite(bias), "logit_bias: got ", bias, " for token id ", token, ", wanted a finite number");
  }
}

}  // namespace partita
