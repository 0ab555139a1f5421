// How one worker's sampling scratch is laid out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "sampling/logit_scan.h"

namespace partita {

// A logit that bias, penalties or masks changed, with what it was.
struct TouchedLogit {
  int32_t token;
  int32_t num_seen;       // how often it occurs in the history that a penalty looks at
  int32_t num_generated;  // how often of these it was generated
  float raw;
};

struct SamplingScratch {
  float* maxima;          // [num_stripes, 16]
  float* sorted_maxima;   // [num_stripes, 16]
  double* sums;           // [num_stripes]
  float* weights;         // [V]
  int32_t* token_ids;     // [V + kCollectSlack]
  float* kept_logits;     // [V]
  float* active_logits;   // [V]
  float* active_weights;  // [V]
  int32_t* active;        // [V + kCollectSlack] positions
  int32_t* positions;     // [V + kCollectSlack]
  uint32_t* touched_idx;  // [V] token -> where it may lie in `touched`
  TouchedLogit* touched;  // [V]

  // With base null: only the bytes that are needed.
  static SamplingScratch lay_out(std::byte* base, int64_t vocab_size, size_t* num_bytes) {
    size_t used = 0;
    const auto take = [&](auto*& pointer, int64_t count) {
      using Element = std::remove_reference_t<decltype(*pointer)>;
      pointer = base ? reinterpret_cast<Element*>(base + used) : nullptr;
      used += (static_cast<size_t>(count) * sizeof(Element) + 63) / 64 * 64;
    };
    SamplingScratch scratch{};
    take(scratch.maxima, num_stripes(vocab_size) * kStripeLanes);
    take(scratch.sorted_maxima, num_stripes(vocab_size) * kStripeLanes);
    take(scratch.sums, num_stripes(vocab_size));
    take(scratch.weights, vocab_size);
    take(scratch.token_ids, vocab_size + kCollectSlack);
    take(scratch.kept_logits, vocab_size);
    take(scratch.active_logits, vocab_size);
    take(scratch.active_weights, vocab_size);
    take(scratch.active, vocab_size + kCollectSlack);
    take(scratch.positions, vocab_size + kCollectSlack);
    take(scratch.touched_idx, vocab_size);
    take(scratch.touched, vocab_size);
    if (num_bytes) *num_bytes = used;
    return scratch;
  }
};

}  // namespace partita
