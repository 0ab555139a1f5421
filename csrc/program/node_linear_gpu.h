// A linear layer on a GPU: its input rows normed and converted where they are not what the kernel reads, then the
// matmul with its epilogue.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "gemm/gemm_gpu.h"
#include "program/gpu_run.h"
#include "program/program.h"

namespace partita {

struct GpuLinearNode {
  std::shared_ptr<const GpuPackedLinear> weights;
  BufferId input = kNoBuffer;     // [rows, in_features] f32, f16 or bf16
  BufferId output = kNoBuffer;    // [rows, out_features] (gated: half of it)
  BufferId prepared = kNoBuffer;  // [rows, >= in_features] of the activation type
  BufferId scales = kNoBuffer;    // [rows, >= 1] fp32; int8 and e4m3 activations
  BufferId sums = kNoBuffer;      // [rows, >= 1] int32; int8
  RowKind rows = RowKind::kToken;
  std::vector<float> norm_weight;  // RMS norm of the input; empty: none
  float norm_eps = 0;
  std::vector<float> bias;  // [out_features]; empty: none
  bool add_to_output = false;
  GateActivation gate = GateActivation::kNone;
};

class GpuLinearOp final : public GpuOp {
 public:
  GpuLinearOp(const Program& program, GpuLinearNode node);

  const char* kind() const override { return "linear"; }
  std::string detail() const override;
  ResourceClass resource_class(const StepShape& shape) const override;
  NodeCost cost(const StepShape& shape) const override;
  void launch(const GpuRun& run) const override;
  // Shared by all linears: each counts in the first bytes, always as many.
  size_t workspace_bytes(const GpuStepLimits& limits) const override;

 private:
  int64_t num_rows(const StepShape& shape) const {
    return node_.rows == RowKind::kToken ? shape.num_tokens : shape.num_logit_rows;
  }

  GpuLinearNode node_;
  BufferSpec input_, output_, prepared_;
  bool is_prepared_;  // the input must be normed or converted first
  GpuBuffer norm_weight_, bias_;
};

// Host values in device memory; nothing for an empty vector.
GpuBuffer upload_floats(const std::shared_ptr<Gpu>& gpu, const std::vector<float>& values, const char* label);

}  // namespace partita
