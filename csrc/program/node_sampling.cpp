#include "program/node_sampling.h"

#include <cmath>

#include "core/check.h"
#include "program/cpu_frame.h"

namespace partita {
namespace {

// log softmax(logits)[token]; fp64 sums, so that a perplexity over a long text is not the sum's own error.
float token_logprob(const float* logits, int64_t vocab_size, int32_t token) {
  float largest = logits[0];
  for (int64_t i = 1; i < vocab_size; ++i) largest = std::max(largest, logits[i]);
  double sum = 0;
  for (int64_t i = 0; i < vocab_size; ++i) sum += std::exp(logits[i] - largest);
  return static_cast<float>(logits[token] - largest - std::log(sum));
}

}  // namespace

std::string SamplingOp::detail() const { return concat("vocabulary ", vocab_size_); }

NodeCost SamplingOp::cost(const StepShape& shape) const {
  return {static_cast<double>(shape.num_logit_rows * vocab_size_),
          sizeof(float) * 1.0 * shape.num_logit_rows * vocab_size_};
}

int64_t SamplingOp::num_chunks(const CpuFrame& frame, int) const { return frame.num_logit_rows(); }

void SamplingOp::run_chunk(CpuFrame& frame, int, int64_t chunk, Worker& worker, const void*) const {
  float* logits = frame.buffer_as<float>(logits_) + chunk * vocab_size_;
  const int32_t token_idx = frame.logit_tokens()[chunk];
  const int32_t row = frame.token_rows()[token_idx];
  const int64_t position = frame.token_positions()[token_idx];
  RowStore& rows = frame.row_store();
  int32_t* tokens = rows.tokens(row);
  if (frame.scores_all()) {
    const int32_t next = tokens[position + 1];
    frame.score(chunk) = next >= 0 && next < vocab_size_ ? token_logprob(logits, vocab_size_, next) : NAN;
    return;
  }
  TokenHistory history;
  history.tokens = tokens;
  history.num_prompt_tokens = rows.num_prompt_tokens(row);
  history.num_tokens = position + 1;
  SampledToken& sampled = frame.sampled(chunk);
  sampled = sample_token(logits, vocab_size_, rows.sampling(row), history,
                         worker.scratch_of(sampling_scratch_bytes(vocab_size_)));
  tokens[position + 1] = sampled.token;
}

SoftCapOp::SoftCapOp(int64_t vocab_size, float cap, BufferId logits)
    : vocab_size_(vocab_size), cap_(cap), logits_(logits) {
  PARTITA_CHECK(cap > 0, "soft_cap: got ", cap, ", wanted a positive number");
}

std::string SoftCapOp::detail() const { return concat("cap ", cap_); }

NodeCost SoftCapOp::cost(const StepShape& shape) const {
  const double elements = static_cast<double>(shape.num_logit_rows) * vocab_size_;
  return {10 * elements, 2 * sizeof(float) * elements};
}

int64_t SoftCapOp::num_chunks(const CpuFrame& frame, int) const { return frame.num_logit_rows(); }

void SoftCapOp::run_chunk(CpuFrame& frame, int, int64_t chunk, Worker&, const void*) const {
  float* logits = frame.buffer_as<float>(logits_) + chunk * vocab_size_;
  for (int64_t i = 0; i < vocab_size_; ++i) logits[i] = cap_ * std::tanh(logits[i] / cap_);
}

}  // namespace partita
