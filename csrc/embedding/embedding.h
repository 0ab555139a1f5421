// Token ids -> hidden states: the contract of this folder.
#pragma once

#include <cstdint>

#include "gemm/gemm.h"

namespace partita {

// The embedding matrix [V, H] as its file holds it, in any WeightFormat; rows are read exactly, one at a time.
// Borrows the weight's bytes, like the Weight.
class EmbeddingTable {
 public:
  // Throws ValueError when the weight's bytes do not fit its shape.
  explicit EmbeddingTable(Weight weight);

  int64_t vocab_size() const { return weight_.out_features; }  // V
  int64_t hidden() const { return weight_.in_features; }       // H
  const Weight& weight() const { return weight_; }

  // Throws ValueError that names the position and the id when one is outside [0, V).  token_ids: [num_tokens]
  void check_ids(const int32_t* token_ids, int64_t num_tokens) const;

 private:
  Weight weight_;
};

struct EmbeddingParams {
  const EmbeddingTable* table = nullptr;
  int64_t num_tokens = 0;              // T
  const int32_t* token_ids = nullptr;  // [T]
  float scale = 1.0f;                  // of every element (Gemma: sqrt(H), rounded to bf16 by the caller)
  float* out = nullptr;                // [T, H]
  int64_t out_stride = 0;              // floats between tokens
};

// Throws ValueError that names the field; checks every id.
void embedding_check(const EmbeddingParams& params);

// Chunks are runs of rows, of a length that depends on H alone; any order, any worker. An id outside [0, V) throws
// here too, before memory is read: ids may have been written (by sampling) after embedding_check.
int64_t embedding_num_chunks(const EmbeddingParams& params);
void embedding_run_chunk(const EmbeddingParams& params, int64_t chunk);

}  // namespace partita
