#include "program/node_linear_gpu.h"

#include <utility>

#include "core/check.h"
#include "norm/norm_gpu.h"

namespace partita {
GpuBuffer upload_floats(const std::shared_ptr<Gpu>& gpu, const std::vector<float>& values, const char* label) {
  if (values.empty()) return {};
  GpuBuffer buffer(gpu, values.size() * sizeof(float), label);
  gpu->copy(buffer.data(), values.data(), buffer.bytes(), GpuCopy::kHostToDevice, gpu->default_stream());
  gpu->synchronize(gpu->default_stream());
  return buffer;
}

GpuLinearOp::GpuLinearOp(const Program& program, GpuLinearNode node) : node_(std::move(node)) {
  const GpuPackedLinear& weights = *node_.weights;
  input_ = program.buffers()[node_.input];
  output_ = program.buffers()[node_.output];
  const bool is_gated = node_.gate != GateActivation::kNone;
  const int64_t output_width = is_gated ? weights.out_features / 2 : weights.out_features;
  const DType wanted = gpu_activation_dtype(weights.activations);
  PARTITA_CHECK(input_.width >= weights.in_features, "linear: input rows hold ", input_.width,
                " elements, the weight wants ", weights.in_features);
  PARTITA_CHECK(output_.width >= output_width, "linear: output rows hold ", output_.width,
                " elements, the weight makes ", output_width);
  PARTITA_CHECK(node_.norm_weight.empty() || static_cast<int64_t>(node_.norm_weight.size()) == weights.in_features,
                "norm_weight: got ", node_.norm_weight.size(), " elements, wanted ", weights.in_features);
  PARTITA_CHECK(node_.bias.empty() || static_cast<int64_t>(node_.bias.size()) == weights.out_features, "bias: got ",
                node_.bias.size(), " elements, wanted ", weights.out_features);
  is_prepared_ = !node_.norm_weight.empty() || input_.dtype != wanted;
  if (is_prepared_) {
    prepared_ = program.buffers()[node_.prepared];
    PARTITA_CHECK(prepared_.dtype == wanted && prepared_.width >= weights.in_features, "linear: prepared rows hold ",
                  prepared_.width, " of ", dtype_name(prepared_.dtype), ", the weight wants ", weights.in_features,
                  " of ", dtype_name(wanted));
  }
  norm_weight_ = upload_floats(program.gpu(), node_.norm_weight, "norm weight");
  bias_ = upload_floats(program.gpu(), node_.bias, "bias");
}

std::string GpuLinearOp::detail() const {
  return concat(node_.weights->in_features, " -> ", node_.weights->out_features, ", ", node_.weights->kernel);
}

ResourceClass GpuLinearOp::resource_class(const StepShape& shape) const {
  // GPUs do some 200 to 300 16-bit operations in the time that one byte takes to come from memory.
  const NodeCost node_cost = cost(shape);
  return node_cost.operations < 200.0 * node_cost.bytes ? ResourceClass::kMemory : ResourceClass::kCompute;
}

NodeCost GpuLinearOp::cost(const StepShape& shape) const {
  const int64_t rows = num_rows(shape);
  if (rows == 0) return {};
  const double row_bytes = static_cast<double>(input_.row_bytes() + output_.row_bytes());
  return {node_.weights->operations(rows), static_cast<double>(node_.weights->packed_bytes()) + rows * row_bytes};
}

size_t GpuLinearOp::workspace_bytes(const GpuStepLimits& limits) const {
  return node_.weights->workspace_bytes(node_.rows == RowKind::kToken ? limits.max_tokens : limits.max_logit_rows);
}

void GpuLinearOp::launch(const GpuRun& run) const {
  const int64_t rows = run.num_rows(node_.rows);
  if (rows == 0) return;
  const GpuFrameMemory& memory = *run.memory;
  GpuLinearParams p;
  p.x = memory.buffer(node_.input);
  p.x_stride = input_.width;
  if (is_prepared_) {
    PrepareRowsParams prepare;
    prepare.num_rows = rows;
    prepare.width = node_.weights->in_features;
    prepare.in = p.x;
    prepare.in_type = input_.dtype;
    prepare.in_stride = input_.width;
    prepare.norm_weight = norm_weight_.as<float>();
    prepare.norm_eps = node_.norm_eps;
    prepare.out = memory.buffer(node_.prepared);
    prepare.out_type = prepared_.dtype;
    prepare.out_stride = prepared_.width;
    if (prepared_.dtype == DType::kI8 || prepared_.dtype == DType::kE4M3)
      prepare.out_scale = reinterpret_cast<float*>(memory.buffer(node_.scales));
    if (prepared_.dtype == DType::kI8) prepare.out_sum = reinterpret_cast<int32_t*>(memory.buffer(node_.sums));
    prepare_rows(*run.gpu, prepare, run.stream);
    p.x = prepare.out;
    p.x_stride = prepared_.width;
    p.x_scale = prepare.out_scale;
    p.x_sum = prepare.out_sum;
  }
  p.num_tokens = rows;
  p.out = memory.buffer(node_.output);
  p.out_type = output_.dtype;
  p.out_stride = output_.width;
  p.bias = bias_.as<float>();
  p.add_to_out = node_.add_to_output;
  p.gate = node_.gate;
  p.workspace = memory.workspace(workspace_key());
  p.num_ctas = run.num_ctas;
  node_.weights->run(p, run.stream);
}

}  // namespace partita
