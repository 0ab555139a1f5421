#include "program/node_linear.h"

#include <algorithm>
#include <utility>

#include "core/check.h"
#include "core/chunk_claims.h"
#include "program/cpu_frame.h"

namespace partita {
namespace {

// Up to this many values every worker prepares all rows for itself: about a microsecond, less than the barrier that
// sharing them costs.
constexpr int64_t kMaxPrivateValues = 6144;
// Of a decode batch all workers should get some; of a prompt, claims should not show.
int64_t rows_per_prepare_chunk(int64_t rows) { return rows <= 64 ? 2 : 8; }

bool is_private(const PackedLinear& weights, int64_t rows) { return rows * weights.in_features <= kMaxPrivateValues; }

}  // namespace

LinearOp::LinearOp(LinearNode node, int64_t input_stride, int64_t output_stride, int64_t prepared_stride)
    : node_(std::move(node)),
      input_stride_(input_stride),
      output_stride_(output_stride),
      prepared_stride_(prepared_stride) {
  const PackedLinear& weights = *node_.weights;
  const bool is_gated = node_.gate != GateActivation::kNone;
  const int64_t output_width = is_gated ? weights.out_features / 2 : weights.out_features;
  PARTITA_CHECK(input_stride_ >= weights.in_features, "linear: input rows hold ", input_stride_,
                " floats, the weight wants ", weights.in_features);
  PARTITA_CHECK(output_stride_ >= output_width, "linear: output rows hold ", output_stride_,
                " floats, the weight makes ", output_width);
  PARTITA_CHECK(prepared_stride_ >= static_cast<int64_t>(weights.prepared_row_bytes()), "linear: prepared rows hold ",
                prepared_stride_, " bytes, the weight wants ", weights.prepared_row_bytes());
  PARTITA_CHECK(node_.norm_weight.empty() || static_cast<int64_t>(node_.norm_weight.size()) == weights.in_features,
                "norm_weight: got ", node_.norm_weight.size(), " elements, wanted ", weights.in_features);
  PARTITA_CHECK(node_.bias.empty() || static_cast<int64_t>(node_.bias.size()) == weights.out_features, "bias: got ",
                node_.bias.size(), " elements, wanted ", weights.out_features);
}

int64_t LinearOp::num_rows(const StepShape& shape) const {
  return node_.rows == RowKind::kToken ? shape.num_tokens : shape.num_logit_rows;
}

std::string LinearOp::detail() const {
  return concat(node_.weights->in_features, " -> ", node_.weights->out_features, ", ", node_.weights->kernel);
}

ResourceClass LinearOp::resource_class(const StepShape& shape) const {
  // About 28 operations fit in the time of one byte on the CPUs and GPUs this runs on; fewer: memory-bound.
  const NodeCost node_cost = cost(shape);
  return node_cost.operations < 28.0 * node_cost.bytes ? ResourceClass::kMemory : ResourceClass::kCompute;
}

NodeCost LinearOp::cost(const StepShape& shape) const {
  const int64_t rows = num_rows(shape);
  if (rows == 0) return {};
  const int64_t row_bytes = sizeof(float) * (node_.weights->in_features + node_.weights->out_features);
  return {node_.weights->operations(rows), static_cast<double>(node_.weights->packed_bytes() + rows * row_bytes)};
}

int64_t LinearOp::num_chunks(const CpuFrame& frame, int phase) const {
  const int64_t rows = num_rows(frame.shape());
  if (rows == 0) return 0;
  if (phase == 0) return is_private(*node_.weights, rows) ? 0 : (rows - 1) / rows_per_prepare_chunk(rows) + 1;
  return node_.weights->num_chunks(rows, node_.gate != GateActivation::kNone);
}

void LinearOp::prepare_rows(const CpuFrame& frame, int64_t first, int64_t last, std::byte* prepared,
                            int64_t stride) const {
  const float* input = frame.buffer_as<float>(node_.input);
  const float* norm_weight = node_.norm_weight.empty() ? nullptr : node_.norm_weight.data();
  for (int64_t row = first; row < last; ++row)
    node_.weights->prepare_row(input + row * input_stride_, norm_weight, node_.norm_eps, prepared + row * stride);
}

void LinearOp::run_chunk(CpuFrame& frame, int phase, int64_t chunk, Worker& worker, const void* stage) const {
  const PackedLinear& weights = *node_.weights;
  const int64_t rows = num_rows(frame.shape());
  const int64_t stride = static_cast<int64_t>(weights.prepared_row_bytes());
  const bool is_gated = node_.gate != GateActivation::kNone;
  std::byte* prepared = frame.buffer(node_.prepared);
  if (phase == 0) {
    // Its first weights travel while this worker prepares rows.
    const int64_t num_chunks = weights.num_chunks(rows, is_gated);
    if (chunk < worker.num_workers)
      weights.prefetch_chunk(rows, is_gated, run_begin(num_chunks, worker.num_workers, worker.worker_idx));
    const int64_t chunk_rows = rows_per_prepare_chunk(rows), first = chunk * chunk_rows;
    prepare_rows(frame, first, std::min(first + chunk_rows, rows), prepared, stride);
    return;
  }
  if (is_private(weights, rows)) {
    if (worker.private_rows_owner != stage) {
      if (worker.private_rows.bytes() < static_cast<size_t>(rows * stride))
        worker.private_rows = AlignedBuffer(rows * stride);
      weights.prefetch_chunk(rows, is_gated, chunk);
      prepare_rows(frame, 0, rows, worker.private_rows.data(), stride);
      worker.private_rows_owner = stage;
    }
    prepared = worker.private_rows.data();
  }
  LinearEpilogue epilogue;
  epilogue.out = frame.buffer_as<float>(node_.output);
  epilogue.out_stride = output_stride_;
  epilogue.bias = node_.bias.empty() ? nullptr : node_.bias.data();
  epilogue.add_to_out = node_.add_to_output;
  epilogue.gate = node_.gate;
  weights.run_chunk(prepared, rows, epilogue, chunk, worker.run_end,
                    worker.scratch_of(weights.scratch_bytes(rows, is_gated)));
}

}  // namespace partita
