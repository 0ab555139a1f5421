#include "embedding/embedding_gpu.h"

#include <cmath>
#include <stdexcept>
#include <utility>

#include "core/check.h"
#include "core/gpu_library.h"
#include "gemm/weight_blocks.h"

namespace partita {
namespace {

// Formats that cuda/embedding.cu reads.
bool is_readable(WeightFormat format) {
  switch (format) {
    case WeightFormat::kF32:
    case WeightFormat::kF16:
    case WeightFormat::kBF16:
    case WeightFormat::kQ4_0:
    case WeightFormat::kQ4_1:
    case WeightFormat::kQ5_0:
    case WeightFormat::kQ8_0:
    case WeightFormat::kQ4_K:
    case WeightFormat::kQ6_K:
      return true;
    default:
      return false;
  }
}

GpuBuffer uploaded(std::shared_ptr<Gpu> gpu, const void* bytes, size_t num_bytes, const char* label) {
  GpuBuffer buffer(gpu, num_bytes, label);
  gpu->copy(buffer.data(), bytes, num_bytes, GpuCopy::kHostToDevice, gpu->default_stream());
  gpu->synchronize(gpu->default_stream());
  return buffer;
}

}  // namespace

GpuEmbeddingTable::GpuEmbeddingTable(std::shared_ptr<Gpu> gpu, const Weight& weight)
    : format_(weight.format), vocab_size_(weight.out_features), hidden_(weight.in_features) {
  PARTITA_CHECK(gpu != nullptr, "gpu: got none");
  weight.check("embedding");
  PARTITA_CHECK(is_readable(format_), "embedding: got format ", weight_format_name(format_),
                ", wanted F32, F16, BF16 or a GGUF block format");
  const WeightFormatInfo& info = weight_format_info(format_);
  row_bytes_ = hidden_ / info.block_values * info.block_bytes;
  rows_ = uploaded(gpu, weight.data, weight.num_bytes, "embedding table");
  if (!weight.row_order.empty())
    row_order_ =
        uploaded(gpu, weight.row_order.data(), weight.row_order.size() * sizeof(int32_t), "embedding row order");
}

void embedding_gpu(Gpu& gpu, const EmbeddingGpuParams& params, GpuStream stream) {
  PARTITA_CHECK(params.table, "table: got a null pointer");
  PARTITA_CHECK(params.table->gpu().get() == &gpu, "table: lies on another device");
  PARTITA_CHECK(params.num_tokens >= 0 && params.num_tokens < (int64_t{1} << 31), "num_tokens: got ", params.num_tokens,
                ", wanted 0 to 2^31 - 1");
  PARTITA_CHECK(std::isfinite(params.scale), "scale: got ", params.scale, ", wanted a finite number");
  if (params.num_tokens == 0) return;
  PARTITA_CHECK(params.token_ids && params.out, "token_ids, out: got a null pointer");
  PARTITA_CHECK(params.out_stride >= params.table->hidden() || params.num_tokens == 1, "out_stride: got ",
                params.out_stride, ", wanted at least hidden = ", params.table->hidden());
  const auto* kernel = kernels_of(gpu).only<EmbeddingKernel>();
  if (!kernel) throw std::runtime_error("embedding: this device library was built without the kernel");
  const GpuEmbeddingTable& table = *params.table;
  kernel->launch({table.rows(), table.row_order(), table.row_bytes(), table.vocab_size(), table.hidden(),
                  table.format(), params.token_ids, params.num_tokens, params.scale, params.out, params.out_stride},
                 stream);
}

void gather_rows(Gpu& gpu, const GatherRowsParams& params, GpuStream stream) {
  PARTITA_CHECK(params.num_rows >= 0 && params.num_rows < (int64_t{1} << 31), "num_rows: got ", params.num_rows,
                ", wanted 0 to 2^31 - 1");
  PARTITA_CHECK(params.width > 0, "width: got ", params.width, ", wanted at least 1");
  PARTITA_CHECK(params.num_in_rows >= 0, "num_in_rows: got ", params.num_in_rows, ", wanted at least 0");
  if (params.num_rows == 0) return;
  PARTITA_CHECK(params.row_idxs && params.out && (params.in || params.num_in_rows == 0),
                "row_idxs, in, out: got a null pointer");
  PARTITA_CHECK(params.in_stride >= params.width || params.num_in_rows <= 1, "in_stride: got ", params.in_stride,
                ", wanted at least width = ", params.width);
  PARTITA_CHECK(params.out_stride >= params.width || params.num_rows == 1, "out_stride: got ", params.out_stride,
                ", wanted at least width = ", params.width);
  PARTITA_CHECK(params.in != params.out, "out: is `in`, wanted another array");
  const auto* kernel = kernels_of(gpu).only<GatherRowsKernel>();
  if (!kernel) throw std::runtime_error("gather_rows: this device library was built without the kernel");
  kernel->launch(params, stream);
}

}  // namespace partita
