// Token ids -> hidden states on a GPU, and rows gathered by index. The contract of this folder's GPU half.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "core/gpu.h"
#include "core/kernel_registry.h"
#include "gemm/gemm.h"

namespace partita {

// The embedding matrix [V, H] in device memory as its file holds it: f32, f16 and bf16 rows, or GGUF blocks that the
// kernel dequantises to the same bits as Weight::dequantize_row.
class GpuEmbeddingTable {
 public:
  // Copies the weight's bytes (and row order) to the device. Throws ValueError when they do not fit the shape, or for a
  // format whose rows cannot be read one at a time.
  GpuEmbeddingTable(std::shared_ptr<Gpu> gpu, const Weight& weight);

  int64_t vocab_size() const { return vocab_size_; }  // V
  int64_t hidden() const { return hidden_; }          // H
  WeightFormat format() const { return format_; }
  size_t packed_bytes() const { return rows_.bytes() + row_order_.bytes(); }
  const std::shared_ptr<Gpu>& gpu() const { return rows_.gpu(); }
  const std::byte* rows() const { return rows_.data(); }                       // [V, row_bytes()]
  const int32_t* row_order() const { return row_order_.as<const int32_t>(); }  // [V] or null: as filed
  int64_t row_bytes() const { return row_bytes_; }

 private:
  WeightFormat format_;
  int64_t vocab_size_, hidden_, row_bytes_;
  GpuBuffer rows_, row_order_;
};

struct EmbeddingGpuParams {
  const GpuEmbeddingTable* table = nullptr;
  int64_t num_tokens = 0;              // T
  const int32_t* token_ids = nullptr;  // [T] device; an id outside [0, V), such as -1 of a padded row: a row of zeros
  float scale = 1.0f;                  // of every element
  float* out = nullptr;                // [T, H] device
  int64_t out_stride = 0;              // floats between tokens
};
// Throws ValueError that names the field, and RuntimeError where the device's library lacks the kernel.
void embedding_gpu(Gpu& gpu, const EmbeddingGpuParams& params, GpuStream stream);

// out[s] = in[row_idxs[s]]: the rows whose logits are wanted.
struct GatherRowsParams {
  int64_t num_rows = 0;               // S
  int64_t width = 0;                  // H
  const int32_t* row_idxs = nullptr;  // [S] device; outside [0, T), such as -1: a row of zeros
  int64_t num_in_rows = 0;            // T
  const float* in = nullptr;          // [T, H]
  int64_t in_stride = 0;              // floats between rows
  float* out = nullptr;               // [S, H], apart from `in`
  int64_t out_stride = 0;             // floats
};
void gather_rows(Gpu& gpu, const GatherRowsParams& params, GpuStream stream);

struct EmbeddingKernel {
  static constexpr const char* kFamily = "embedding";
  KernelInfo info;
  // The table's plain fields: kernels see no classes.
  struct Params {
    const std::byte* rows;
    const int32_t* row_order;
    int64_t row_bytes, vocab_size, hidden;
    WeightFormat format;
    const int32_t* token_ids;
    int64_t num_tokens;
    float scale;
    float* out;
    int64_t out_stride;
  };
  void (*launch)(const Params& params, void* stream);
};

struct GatherRowsKernel {
  static constexpr const char* kFamily = "gather_rows";
  KernelInfo info;
  void (*launch)(const GatherRowsParams& params, void* stream);
};

}  // namespace partita
