// A linear layer as a node: (norm, quantise) the input rows, then matmul with its epilogue.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "gemm/gemm.h"
#include "program/program.h"

namespace partita {

struct LinearNode {
  std::shared_ptr<const PackedLinear> weights;
  BufferId input = kNoBuffer;     // [rows, in_features] fp32
  BufferId output = kNoBuffer;    // [rows, out_features] fp32 (gated: half of it)
  BufferId prepared = kNoBuffer;  // [rows, prepared_row_bytes] or wider
  RowKind rows = RowKind::kToken;
  std::vector<float> norm_weight;  // RMS norm of the input; empty: none
  float norm_eps = 0;
  std::vector<float> bias;  // [out_features]; empty: none
  bool add_to_output = false;
  GateActivation gate = GateActivation::kNone;
};

class LinearOp final : public CpuOp {
 public:
  LinearOp(LinearNode node, int64_t input_stride, int64_t output_stride, int64_t prepared_stride);

  const char* kind() const override { return "linear"; }
  std::string detail() const override;
  ResourceClass resource_class(const StepShape& shape) const override;
  NodeCost cost(const StepShape& shape) const override;
  int num_phases() const override { return 2; }
  int64_t num_chunks(const CpuFrame& frame, int phase) const override;
  bool claims_in_runs(int phase) const override { return phase == 1; }
  void run_chunk(CpuFrame& frame, int phase, int64_t chunk, Worker& worker, const void* stage) const override;

 private:
  int64_t num_rows(const StepShape& shape) const;
  void prepare_rows(const CpuFrame& frame, int64_t first, int64_t last, std::byte* prepared, int64_t stride) const;

  LinearNode node_;
  int64_t input_stride_;     // floats
  int64_t output_stride_;    // floats
  int64_t prepared_stride_;  // bytes, what the prepared buffer has for a row
};

}  // namespace partita
