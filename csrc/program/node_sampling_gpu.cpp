#include "program/node_sampling_gpu.h"

#include "core/check.h"
#include "sampling/sampling_gpu.h"

namespace partita {

GpuSamplingOp::GpuSamplingOp(const Program& program, BufferId logits)
    : gpu_(program.gpu()), vocab_size_(program.buffers()[logits].width), logits_(logits) {
  PARTITA_CHECK(vocab_size_ <= kMaxGpuVocabSize, "vocabulary: got ", vocab_size_, " tokens, wanted at most ",
                kMaxGpuVocabSize, " on a GPU");
}

std::string GpuSamplingOp::detail() const { return concat("vocabulary ", vocab_size_); }

NodeCost GpuSamplingOp::cost(const StepShape& shape) const {
  const double elements = static_cast<double>(shape.num_logit_rows * vocab_size_);
  return {elements, sizeof(float) * elements};
}

size_t GpuSamplingOp::workspace_bytes(const GpuStepLimits& limits) const {
  return sample_gpu_workspace_bytes(*gpu_, static_cast<int>(limits.max_logit_rows), vocab_size_, limits.max_context,
                                    {});
}

void GpuSamplingOp::launch(const GpuRun& run) const {
  const GpuFrameMemory& memory = *run.memory;
  const GpuResultLayout& results = memory.result_layout();
  auto* logits = reinterpret_cast<float*>(memory.buffer(logits_));
  const auto floats_at = [&](int64_t offset) { return reinterpret_cast<float*>(memory.results() + offset); };
  const auto ints_at = [&](int64_t offset) { return reinterpret_cast<int32_t*>(memory.results() + offset); };
  if (run.scores_all) {
    ScoreGpuParams p;
    p.num_logit_rows = static_cast<int>(run.num_logit_rows);
    p.vocab_size = vocab_size_;
    p.logits = logits;
    p.logits_stride = vocab_size_;
    p.logit_rows = run.input(run.layout->logit_rows);
    p.num_tokens = run.input(run.layout->logit_num_tokens);
    p.tokens = run.rows->device_tokens();
    p.tokens_stride = run.rows->tokens_stride();
    p.scores = floats_at(results.logprobs);
    score_gpu(*run.gpu, p, run.stream);
    return;
  }
  SampleGpuParams p;
  p.num_logit_rows = static_cast<int>(run.num_logit_rows);
  p.vocab_size = vocab_size_;
  p.logits = logits;
  p.logits_stride = vocab_size_;
  p.logit_rows = run.input(run.layout->logit_rows);
  p.num_tokens = run.input(run.layout->logit_num_tokens);
  p.tokens = run.rows->device_tokens();
  p.tokens_stride = run.rows->tokens_stride();
  p.rows = run.rows->device_sampling().view();
  p.capacity = run.rows->device_sampling().capacity();
  p.features = run.features;
  p.workspace = {memory.workspace(workspace_key()), static_cast<int>(memory.limits().max_logit_rows),
                 memory.limits().max_context};
  p.sampled = ints_at(results.tokens);
  if (run.features.logprobs) {
    p.logprobs = floats_at(results.logprobs);
    p.ranks = ints_at(results.ranks);
    p.top_ids = ints_at(results.top_ids);
    p.top_logprobs = floats_at(results.top_logprobs);
  }
  sample_gpu(*run.gpu, p, run.stream);
}

GpuSoftCapOp::GpuSoftCapOp(const Program& program, float cap, BufferId logits)
    : vocab_size_(program.buffers()[logits].width), cap_(cap), logits_(logits) {
  PARTITA_CHECK(cap > 0, "soft_cap: got ", cap, ", wanted a positive number");
}

std::string GpuSoftCapOp::detail() const { return concat("cap ", cap_); }

NodeCost GpuSoftCapOp::cost(const StepShape& shape) const {
  const double elements = static_cast<double>(shape.num_logit_rows * vocab_size_);
  return {10 * elements, 2 * sizeof(float) * elements};
}

void GpuSoftCapOp::launch(const GpuRun& run) const {
  SoftCapGpuParams p;
  p.num_logit_rows = static_cast<int>(run.num_logit_rows);
  p.vocab_size = vocab_size_;
  p.logits = reinterpret_cast<float*>(run.memory->buffer(logits_));
  p.logits_stride = vocab_size_;
  p.cap = cap_;
  soft_cap_gpu(*run.gpu, p, run.stream);
}

}  // namespace partita
