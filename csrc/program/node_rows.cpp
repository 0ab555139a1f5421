#include "program/node_rows.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/check.h"
#include "norm/rms_norm_row.h"
#include "program/frame.h"

namespace partita {
namespace {

// Row copies are short: some 8 KiB a chunk keeps claiming cheap against the work.
constexpr int64_t kRowsPerChunk = 16;

int64_t chunks_of(int64_t rows) { return (rows + kRowsPerChunk - 1) / kRowsPerChunk; }

}  // namespace

int64_t CopyPagesOp::num_chunks(const Frame& frame, int) const { return static_cast<int64_t>(frame.copies().size()); }

void CopyPagesOp::run_chunk(Frame& frame, int, int64_t chunk, Worker&, const void*) const {
  const PageCopyPair& copy = frame.copies()[chunk];
  frame.arena().copy_page(copy.source, copy.target);
}

EmbeddingOp::EmbeddingOp(Weight table, std::shared_ptr<const void> keep_alive, float scale, BufferId output)
    : table_(std::move(table)), keep_alive_(std::move(keep_alive)), scale_(scale), output_(output) {
  table_.check("embedding");
}

std::string EmbeddingOp::detail() const {
  return concat(table_.out_features, " x ", table_.in_features, " ", weight_format_name(table_.format));
}

NodeCost EmbeddingOp::cost(const StepShape& shape) const {
  const double row_bytes = static_cast<double>(table_.num_bytes) / table_.out_features;
  return {0, shape.num_tokens * (row_bytes + sizeof(float) * table_.in_features)};
}

int64_t EmbeddingOp::num_chunks(const Frame& frame, int) const { return chunks_of(frame.num_tokens()); }

void EmbeddingOp::run_chunk(Frame& frame, int, int64_t chunk, Worker&, const void*) const {
  const int64_t width = table_.in_features;
  float* output = frame.buffer_as<float>(output_);
  const int64_t last = std::min((chunk + 1) * kRowsPerChunk, frame.num_tokens());
  for (int64_t t = chunk * kRowsPerChunk; t < last; ++t) {
    float* out_row = output + t * width;
    if (frame.input_embeddings()) {
      std::copy_n(frame.input_embeddings() + t * width, width, out_row);
      continue;
    }
    const int32_t token = frame.row_store().tokens(frame.token_rows()[t])[frame.token_positions()[t]];
    // A request whose logits were not finite leaves -1 behind; what is planned after it is dropped unseen.
    if (token < 0 || token >= table_.out_features) {
      std::fill_n(out_row, width, 0.0f);
      continue;
    }
    table_.dequantize_row(token, out_row);
    if (scale_ != 1.0f)
      for (int64_t i = 0; i < width; ++i) out_row[i] *= scale_;
  }
}

NormAddOp::NormAddOp(std::vector<float> weight, float eps, BufferId branch, BufferId residual)
    : weight_(std::move(weight)), eps_(eps), branch_(branch), residual_(residual) {
  PARTITA_CHECK(!weight_.empty(), "norm weight: got none");
}

std::string NormAddOp::detail() const { return concat("width ", weight_.size()); }

NodeCost NormAddOp::cost(const StepShape& shape) const {
  const double elements = static_cast<double>(shape.num_tokens) * weight_.size();
  return {5 * elements, 3 * sizeof(float) * elements};
}

int64_t NormAddOp::num_chunks(const Frame& frame, int) const { return chunks_of(frame.num_tokens()); }

void NormAddOp::run_chunk(Frame& frame, int, int64_t chunk, Worker&, const void*) const {
  const int64_t width = static_cast<int64_t>(weight_.size());
  const float* branch = frame.buffer_as<float>(branch_);
  float* residual = frame.buffer_as<float>(residual_);
  const int64_t last = std::min((chunk + 1) * kRowsPerChunk, frame.num_tokens());
  for (int64_t t = chunk * kRowsPerChunk; t < last; ++t) {
    rms_norm_add_row(branch + t * width, weight_.data(), eps_, width, residual + t * width);
  }
}

NodeCost GatherLogitRowsOp::cost(const StepShape& shape) const {
  return {0, 2.0 * sizeof(float) * shape.num_logit_rows * width_};
}

int64_t GatherLogitRowsOp::num_chunks(const Frame& frame, int) const { return chunks_of(frame.num_logit_rows()); }

void GatherLogitRowsOp::run_chunk(Frame& frame, int, int64_t chunk, Worker&, const void*) const {
  const float* input = frame.buffer_as<float>(input_);
  float* output = frame.buffer_as<float>(output_);
  const int64_t last = std::min((chunk + 1) * kRowsPerChunk, frame.num_logit_rows());
  for (int64_t s = chunk * kRowsPerChunk; s < last; ++s)
    std::memcpy(output + s * width_, input + frame.logit_tokens()[s] * width_, sizeof(float) * width_);
}

}  // namespace partita
