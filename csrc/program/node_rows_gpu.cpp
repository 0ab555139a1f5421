#include "program/node_rows_gpu.h"

#include <stdexcept>

#include "attention/pages_gpu.h"
#include "core/check.h"
#include "core/gpu_library.h"
#include "norm/norm_gpu.h"
#include "program/node_linear_gpu.h"
#include "program/token_ids_gpu.h"

namespace partita {

void GpuCopyPagesOp::launch(const GpuRun& run) const {
  CopyPagesParams p;
  p.arena = run.arena->data();
  p.page_bytes = run.arena->page_bytes();
  p.max_pairs = run.num_copies;
  p.pairs = run.input(run.layout->copies);
  p.num_pairs = run.input(run.layout->num_copies);
  copy_pages(*run.gpu, p, run.stream);
}

GpuEmbeddingOp::GpuEmbeddingOp(const Program& program, const Weight& table, float scale, BufferId token_ids,
                               BufferId output)
    : table_(program.gpu(), table),
      scale_(scale),
      token_ids_(token_ids),
      output_(output),
      output_stride_(program.buffers()[output].width) {}

std::string GpuEmbeddingOp::detail() const {
  return concat(table_.vocab_size(), " x ", table_.hidden(), " ", weight_format_name(table_.format()));
}

NodeCost GpuEmbeddingOp::cost(const StepShape& shape) const {
  return {0, static_cast<double>(shape.num_tokens) * (table_.row_bytes() + sizeof(float) * table_.hidden())};
}

void GpuEmbeddingOp::launch(const GpuRun& run) const {
  const auto* kernel = kernels_of(*run.gpu).only<TokenIdsKernel>();
  if (!kernel) throw std::runtime_error("token_ids: this device library was built without the kernel");
  TokenIdsParams ids;
  ids.num_tokens = run.num_tokens;
  ids.token_rows = run.input(run.layout->token_rows);
  ids.token_positions = run.input(run.layout->token_positions);
  ids.tokens = run.rows->device_tokens();
  ids.tokens_stride = run.rows->tokens_stride();
  ids.token_ids = reinterpret_cast<int32_t*>(run.memory->buffer(token_ids_));
  kernel->launch(ids, run.stream);
  EmbeddingGpuParams p;
  p.table = &table_;
  p.num_tokens = run.num_tokens;
  p.token_ids = ids.token_ids;
  p.scale = scale_;
  p.out = reinterpret_cast<float*>(run.memory->buffer(output_));
  p.out_stride = output_stride_;
  embedding_gpu(*run.gpu, p, run.stream);
}

GpuNormAddOp::GpuNormAddOp(const Program& program, const std::vector<float>& weight, float eps, BufferId branch,
                           BufferId residual)
    : width_(static_cast<int64_t>(weight.size())),
      weight_(upload_floats(program.gpu(), weight, "norm weight")),
      eps_(eps),
      branch_(branch),
      residual_(residual),
      branch_spec_(program.buffers()[branch]),
      residual_spec_(program.buffers()[residual]) {
  PARTITA_CHECK(!weight.empty(), "norm weight: got none");
  PARTITA_CHECK(residual_spec_.dtype == DType::kF32, "residual: got ", dtype_name(residual_spec_.dtype),
                ", wanted float32");
}

std::string GpuNormAddOp::detail() const { return concat("width ", width_); }

NodeCost GpuNormAddOp::cost(const StepShape& shape) const {
  const double elements = static_cast<double>(shape.num_tokens * width_);
  return {5 * elements, elements * (dtype_bytes(branch_spec_.dtype) + 2 * sizeof(float))};
}

void GpuNormAddOp::launch(const GpuRun& run) const {
  NormAddGpuParams p;
  p.num_rows = run.num_tokens;
  p.width = width_;
  p.branch = run.memory->buffer(branch_);
  p.branch_type = branch_spec_.dtype;
  p.branch_stride = branch_spec_.width;
  p.norm_weight = weight_.as<float>();
  p.norm_eps = eps_;
  p.residual = reinterpret_cast<float*>(run.memory->buffer(residual_));
  p.residual_stride = residual_spec_.width;
  norm_add_gpu(*run.gpu, p, run.stream);
}

NodeCost GpuGatherLogitRowsOp::cost(const StepShape& shape) const {
  return {0, 2.0 * sizeof(float) * shape.num_logit_rows * width_};
}

void GpuGatherLogitRowsOp::launch(const GpuRun& run) const {
  GatherRowsParams p;
  p.num_rows = run.num_logit_rows;
  p.width = width_;
  p.row_idxs = run.input(run.layout->logit_tokens);
  p.num_in_rows = run.num_tokens;
  p.in = reinterpret_cast<const float*>(run.memory->buffer(input_));
  p.in_stride = width_;
  p.out = reinterpret_cast<float*>(run.memory->buffer(output_));
  p.out_stride = width_;
  gather_rows(*run.gpu, p, run.stream);
}

}  // namespace partita
