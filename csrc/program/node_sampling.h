// The last node: a token for each sampling row, or the log probability of each scheduled token's successor.
#pragma once

#include <string>

#include "program/program.h"

namespace partita {

// Late inputs (penalties, seeds, token history) are read from the row store when the node runs. The sampled token
// becomes the row's next known token at once, so the next step's embedding finds it there.
class SamplingOp final : public Op {
 public:
  // soft_cap: logits become cap * tanh(logits / cap) first; 0: none.
  SamplingOp(int64_t vocab_size, float soft_cap, BufferId logits)
      : vocab_size_(vocab_size), soft_cap_(soft_cap), logits_(logits) {}

  const char* kind() const override { return "sampling"; }
  std::string detail() const override;
  ResourceClass resource_class(const StepShape&) const override { return ResourceClass::kMemory; }
  NodeCost cost(const StepShape& shape) const override;
  int64_t num_chunks(const Frame& frame, int phase) const override;
  void run_chunk(Frame& frame, int phase, int64_t chunk, Worker& worker, const void* stage) const override;

 private:
  int64_t vocab_size_;
  float soft_cap_;
  BufferId logits_;
};

}  // namespace partita
