#include "program/node_rows.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/check.h"
#include "norm/rms_norm_row.h"
#include "program/cpu_frame.h"

namespace partita {
namespace {

// Row copies are short: some 8 KiB a chunk keeps claiming cheap against the work.
constexpr int64_t kRowsPerChunk = 16;

int64_t chunks_of(int64_t rows) { return (rows + kRowsPerChunk - 1) / kRowsPerChunk; }

}  // namespace

int64_t CopyPagesOp::num_chunks(const CpuFrame& frame, int) const {
  return static_cast<int64_t>(frame.copies().size());
}

void CopyPagesOp::run_chunk(CpuFrame& frame, int, int64_t chunk, Worker&, const void*) const {
  const PageCopyPair& copy = frame.copies()[chunk];
  frame.arena().copy_page(copy.source, copy.target);
}

EmbeddingOp::EmbeddingOp(Weight table, std::shared_ptr<const void> keep_alive, float scale, BufferId output)
    : table_(std::move(table)), keep_alive_(std::move(keep_alive)), scale_(scale), output_(output) {}

std::string EmbeddingOp::detail() const {
  return concat(table_.vocab_size(), " x ", table_.hidden(), " ", weight_format_name(table_.weight().format));
}

NodeCost EmbeddingOp::cost(const StepShape& shape) const {
  const double row_bytes = static_cast<double>(table_.weight().num_bytes) / table_.vocab_size();
  return {0, shape.num_tokens * (row_bytes + sizeof(float) * table_.hidden())};
}

int64_t EmbeddingOp::num_chunks(const CpuFrame& frame, int) const { return chunks_of(frame.num_tokens()); }

void EmbeddingOp::run_chunk(CpuFrame& frame, int, int64_t chunk, Worker&, const void*) const {
  const int64_t width = table_.hidden();
  const int64_t first = chunk * kRowsPerChunk;
  const int64_t num_rows = std::min(kRowsPerChunk, frame.num_tokens() - first);
  float* output = frame.buffer_as<float>(output_) + first * width;
  if (frame.input_embeddings()) {
    std::copy_n(frame.input_embeddings() + first * width, num_rows * width, output);
    return;
  }
  int32_t token_ids[kRowsPerChunk];
  for (int64_t i = 0; i < num_rows; ++i) {
    const int32_t id = frame.row_store().tokens(frame.token_rows()[first + i])[frame.token_positions()[first + i]];
    // A request whose logits were not finite leaves -1 behind; what is planned after it is dropped unseen.
    token_ids[i] = id < 0 ? 0 : id;
  }
  EmbeddingParams params;
  params.table = &table_;
  params.num_tokens = num_rows;
  params.token_ids = token_ids;
  params.scale = scale_;
  params.out = output;
  params.out_stride = width;
  const int64_t num_row_chunks = embedding_num_chunks(params);
  for (int64_t row_chunk = 0; row_chunk < num_row_chunks; ++row_chunk) embedding_run_chunk(params, row_chunk);
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

int64_t NormAddOp::num_chunks(const CpuFrame& frame, int) const { return chunks_of(frame.num_tokens()); }

void NormAddOp::run_chunk(CpuFrame& frame, int, int64_t chunk, Worker&, const void*) const {
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

int64_t GatherLogitRowsOp::num_chunks(const CpuFrame& frame, int) const { return chunks_of(frame.num_logit_rows()); }

void GatherLogitRowsOp::run_chunk(CpuFrame& frame, int, int64_t chunk, Worker&, const void*) const {
  const float* input = frame.buffer_as<float>(input_);
  float* output = frame.buffer_as<float>(output_);
  const int64_t last = std::min((chunk + 1) * kRowsPerChunk, frame.num_logit_rows());
  for (int64_t s = chunk * kRowsPerChunk; s < last; ++s)
    std::memcpy(output + s * width_, input + frame.logit_tokens()[s] * width_, sizeof(float) * width_);
}

}  // namespace partita
