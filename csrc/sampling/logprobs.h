// Log probabilities of the raw logits at one position.
#pragma once

#include <cstdint>

#include "sampling/sampling.h"
#include "sampling/sampling_scratch.h"

namespace partita {

// Fills logprob, rank and top of `sampled`, whose token is set.  logits: [V] raw, their largest finite.
// logprob = (logit - max) - log(sum e^(logit - max)), the sum in fp32 within a stripe and fp64 across stripes.
void add_logprobs(const float* logits, int64_t vocab_size, int32_t num_top, const SamplingScratch& scratch,
                  SampledToken* sampled);

}  // namespace partita
