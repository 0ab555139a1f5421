#include "embedding/embedding.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/check.h"

namespace partita {
namespace {

int64_t rows_per_chunk(int64_t hidden) { return std::max<int64_t>(1, 8192 / hidden); }

}  // namespace

EmbeddingTable::EmbeddingTable(Weight weight) : weight_(std::move(weight)) { weight_.check("embedding"); }

void EmbeddingTable::check_ids(const int32_t* token_ids, int64_t num_tokens) const {
  for (int64_t t = 0; t < num_tokens; ++t)
    PARTITA_CHECK(token_ids[t] >= 0 && token_ids[t] < vocab_size(), "token_ids[", t, "]: got ", token_ids[t],
                  ", wanted an id in [0, ", vocab_size(), ")");
}

void embedding_check(const EmbeddingParams& params) {
  PARTITA_CHECK(params.table, "table: got a null pointer");
  PARTITA_CHECK(params.num_tokens >= 0, "num_tokens: got ", params.num_tokens, ", wanted at least 0");
  PARTITA_CHECK(std::isfinite(params.scale), "scale: got ", params.scale, ", wanted a finite number");
  if (params.num_tokens == 0) return;
  PARTITA_CHECK(params.token_ids && params.out, "token_ids, out: got a null pointer");
  PARTITA_CHECK(params.out_stride >= params.table->hidden() || params.num_tokens == 1, "out_stride: got ",
                params.out_stride, ", wanted at least hidden = ", params.table->hidden());
  params.table->check_ids(params.token_ids, params.num_tokens);
}

int64_t embedding_num_chunks(const EmbeddingParams& params) {
  const int64_t rows = rows_per_chunk(params.table->hidden());
  return (params.num_tokens + rows - 1) / rows;
}

void embedding_run_chunk(const EmbeddingParams& params, int64_t chunk) {
  const EmbeddingTable& table = *params.table;
  const int64_t hidden = table.hidden();
  const int64_t rows = rows_per_chunk(hidden);
  const int64_t end = std::min(params.num_tokens, (chunk + 1) * rows);
  for (int64_t t = chunk * rows; t < end; ++t) {
    PARTITA_CHECK(params.token_ids[t] >= 0 && params.token_ids[t] < table.vocab_size(), "token_ids[", t, "]: got ",
                  params.token_ids[t], ", wanted an id in [0, ", table.vocab_size(), ")");
    float* out = params.out + t * params.out_stride;
    table.weight().dequantize_row(params.token_ids[t], out);
    if (params.scale != 1.0f)
      for (int64_t i = 0; i < hidden; ++i) out[i] *= params.scale;
  }
}

}  // namespace partita
