// From logits to a token: the contract of this folder. Each row is independent of every other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace partita {

// Per request; fixed at admission.
struct SamplingParams {
  float temperature = 1.0f;       // 0 = greedy (argmax, lowest id wins a tie)
  float top_p = 1.0f;             // (0, 1]
  float min_p = 0.0f;             // [0, 1], relative to the most likely token
  int32_t top_k = 0;              // 0 = all
  float presence_penalty = 0.0f;  // on tokens generated so far
  float frequency_penalty = 0.0f;
  float repetition_penalty = 1.0f;  // on prompt and generated tokens
  uint64_t seed = 0;
  int32_t num_logprobs = -1;                          // -1 none; n: the sampled token's and the n most likely ones'
  int32_t min_tokens = 0;                             // stop_token_ids are impossible before that many generated tokens
  std::vector<int32_t> stop_token_ids;                // EOS included, unless ignored
  std::vector<std::pair<int32_t, float>> logit_bias;  // token id, added to its logit

  void check(int64_t vocab_size) const;  // throws ValueError naming field, value, range
};

// What sampling needs of one request's history.
struct TokenHistory {
  const int32_t* tokens = nullptr;  // [num_tokens] prompt then generated
  int64_t num_prompt_tokens = 0;
  int64_t num_tokens = 0;  // the sampled token becomes tokens[num_tokens]
};

struct SampledToken {
  int32_t token = -1;  // -1: the logits held a NaN, +infinity or no finite value; the request must fail
  float logprob = 0;   // log softmax of the raw logits (before bias, penalties, temperature), if asked for
  int32_t rank = 0;    // 1 + number of tokens with a larger raw logit, if logprobs were asked for
  std::vector<std::pair<int32_t, float>> top;  // num_logprobs most likely ids and their logprobs, descending
};

// A temperature below this is greedy too: dividing by it would leave one token anyway, or overflow.
constexpr float kGreedyTemperature = 1e-5f;

size_t sampling_scratch_bytes(int64_t vocab_size);  // per worker, 64-byte aligned; need not be initialised

// logits: [V] fp32; changed while sampling (bias, penalties) and put back. The draw is a counter-based random number
// (Philox 4x32-10) of (seed, num_tokens): it depends on nothing else. Order: logit_bias, min_tokens, repetition,
// presence/frequency, temperature, top_k, top_p, min_p, draw; logprobs are of the raw logits. Among equal logits the
// lower id counts as the more likely. top_k keeps exactly k; top_p the fewest tokens whose probability after top_k is
// at least top_p; min_p those at least min_p times as likely as the most likely one. Same token on every CPU ISA.
// `params` must have passed check().
SampledToken sample_token(float* logits, int64_t vocab_size, const SamplingParams& params, const TokenHistory& history,
                          std::byte* scratch);

// What sample_token draws from: (token id, probability), ascending ids, zero probabilities left out; empty where
// sample_token gives -1. For tests, and for verifying drafted tokens.
std::vector<std::pair<int32_t, double>> sampling_distribution(float* logits, int64_t vocab_size,
                                                              const SamplingParams& params, const TokenHistory& history,
                                                              std::byte* scratch);

}  // namespace partita
