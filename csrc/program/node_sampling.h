// The last nodes: the cap some models put on their logits, and a token for each sampling row, or the log probability of
// each scheduled token's successor.
#pragma once

#include <string>

#include "program/program.h"

namespace partita {

// Late inputs (penalties, seeds, token history) are read from the row store when the node runs. The sampled token
// becomes the row's next known token at once, so the next step's embedding finds it there.
class SamplingOp final : public CpuOp {
 public:
  SamplingOp(int64_t vocab_size, BufferId logits) : vocab_size_(vocab_size), logits_(logits) {}

  const char* kind() const override { return "sampling"; }
  std::string detail() const override;
  ResourceClass resource_class(const StepShape&) const override { return ResourceClass::kMemory; }
  NodeCost cost(const StepShape& shape) const override;
  int64_t num_chunks(const CpuFrame& frame, int phase) const override;
  void run_chunk(CpuFrame& frame, int phase, int64_t chunk, Worker& worker, const void* stage) const override;

 private:
  int64_t vocab_size_;
  BufferId logits_;
};

// logits = cap * tanh(logits / cap), in place.
class SoftCapOp final : public CpuOp {
 public:
  SoftCapOp(int64_t vocab_size, float cap, BufferId logits);

  const char* kind() const override { return "soft_cap"; }
  std::string detail() const override;
  ResourceClass resource_class(const StepShape&) const override { return ResourceClass::kMemory; }
  NodeCost cost(const StepShape& shape) const override;
  int64_t num_chunks(const CpuFrame& frame, int phase) const override;
  void run_chunk(CpuFrame& frame, int phase, int64_t chunk, Worker& worker, const void* stage) const override;

 private:
  int64_t vocab_size_;
  float cap_;
  BufferId logits_;
};

}  // namespace partita
