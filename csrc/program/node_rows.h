// Nodes that move rows: page copies, embedding lookup, post-norm-and-add, gathering the rows that get logits.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "embedding/embedding.h"
#include "program/program.h"

namespace partita {

// Copy-on-write: the step's page copies, before anything reads or writes a page.
class CopyPagesOp final : public CpuOp {
 public:
  const char* kind() const override { return "copy_pages"; }
  ResourceClass resource_class(const StepShape&) const override { return ResourceClass::kMemory; }
  NodeCost cost(const StepShape&) const override { return {}; }
  int64_t num_chunks(const CpuFrame& frame, int phase) const override;
  void run_chunk(CpuFrame& frame, int phase, int64_t chunk, Worker& worker, const void* stage) const override;
};

// Token ids -> hidden rows. The ids are read from the row store when the node runs, so a step can be planned and
// prepared while the token it starts from is still being computed. A frame's input_embeddings replace the lookup.
class EmbeddingOp final : public CpuOp {
 public:
  // table: [V, H]; `keep_alive` owns its bytes.
  EmbeddingOp(Weight table, std::shared_ptr<const void> keep_alive, float scale, BufferId output);

  const char* kind() const override { return "embedding"; }
  std::string detail() const override;
  ResourceClass resource_class(const StepShape&) const override { return ResourceClass::kMemory; }
  NodeCost cost(const StepShape& shape) const override;
  int64_t num_chunks(const CpuFrame& frame, int phase) const override;
  void run_chunk(CpuFrame& frame, int phase, int64_t chunk, Worker& worker, const void* stage) const override;

 private:
  EmbeddingTable table_;
  std::shared_ptr<const void> keep_alive_;
  float scale_;
  BufferId output_;
};

// residual += rms_norm(branch): models that normalise what a block adds (Gemma 3).
class NormAddOp final : public CpuOp {
 public:
  NormAddOp(std::vector<float> weight, float eps, BufferId branch, BufferId residual);

  const char* kind() const override { return "norm_add"; }
  std::string detail() const override;
  ResourceClass resource_class(const StepShape&) const override { return ResourceClass::kMemory; }
  NodeCost cost(const StepShape& shape) const override;
  int64_t num_chunks(const CpuFrame& frame, int phase) const override;
  void run_chunk(CpuFrame& frame, int phase, int64_t chunk, Worker& worker, const void* stage) const override;

 private:
  std::vector<float> weight_;
  float eps_;
  BufferId branch_;
  BufferId residual_;
};

// Hidden rows of the tokens whose logits are wanted.  [T, H] -> [S, H]
class GatherLogitRowsOp final : public CpuOp {
 public:
  GatherLogitRowsOp(int64_t width, BufferId input, BufferId output) : width_(width), input_(input), output_(output) {}

  const char* kind() const override { return "gather_logit_rows"; }
  ResourceClass resource_class(const StepShape&) const override { return ResourceClass::kMemory; }
  NodeCost cost(const StepShape& shape) const override;
  int64_t num_chunks(const CpuFrame& frame, int phase) const override;
  void run_chunk(CpuFrame& frame, int phase, int64_t chunk, Worker& worker, const void* stage) const override;

 private:
  int64_t width_;
  BufferId input_;
  BufferId output_;
};

}  // namespace partita
