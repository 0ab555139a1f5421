// Linear layers: canonical weight -> packed weight -> matmul. The contract of this folder.
//
// A Weight says exactly what a tensor of a model file *is* (DESIGN 3): it borrows the file's bytes.
// pack() lays one or more of them (row segments: Q|K|V, gate|up) out once for this machine and one
// activation type; the PackedLinear then serves every number of tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/tensor_view.h"

namespace partita {

enum class WeightFormat : uint8_t { kF32, kF16, kBF16, kQ4_0, kQ4_1, kQ5_0, kQ8_0, kQ4_K, kQ6_K };
const char* weight_format_name(WeightFormat format);  // "F32", "F16", "BF16", "Q4_0", ... (GGUF's names)
WeightFormat parse_weight_format(const std::string& name);

// How the left operand of a matmul is held.
//   kInt8  s8 codes, one fp32 scale per group of 32 inputs (per token where the weight has no groups)
//   kBF16  bfloat16 inputs, fp32 accumulation
//   kF32   the exact mode: fp32 inputs, weights dequantised exactly, fp32 accumulation
enum class ActivationType : uint8_t { kInt8, kBF16, kF32 };
ActivationType parse_activation_type(const std::string& name);  // "int8", "bf16", "fp32"

// One matrix as the file holds it: `data` is borrowed and must outlive the Weight and every pack() call.
struct Weight {
  const std::byte* data = nullptr;  // [out_features, in_features] in `format`, rows contiguous
  size_t num_bytes = 0;
  WeightFormat format = WeightFormat::kF32;
  int64_t out_features = 0;
  int64_t in_features = 0;
  // Row i of the matrix is row row_order[i] of the file (llama GGUF files interleave rotary rows); empty = as filed.
  std::vector<int32_t> row_order;

  // Throws ValueError: num_bytes does not match the shape, in_features not a multiple of the block ...
  void check(const char* name) const;
  // The exact value of each element of one row.  out: [in_features]
  void dequantize_row(int64_t row, float* out) const;
};

enum class GateActivation : uint8_t { kNone, kSilu, kGeluTanh };

// What happens to the sums before they are stored.
struct LinearEpilogue {
  float* out = nullptr;         // [T, N] fp32, N = out_features (gated: of one half)
  int64_t out_stride = 0;       // floats between tokens
  const float* bias = nullptr;  // [out_features] or null
  bool add_to_out = false;      // out += instead of out = (residual)
  GateActivation gate =
      GateActivation::kNone;  // first half of the segments is gate, second half up: out = f(gate) * up
};

class PackedLinear {
 public:
  virtual ~PackedLinear() = default;

  int64_t out_features = 0;  // all segments together
  int64_t in_features = 0;
  ActivationType activation_type = ActivationType::kF32;
  std::string kernel;  // chosen candidate
  std::string reason;  // one line per candidate: chosen, or why not
  virtual size_t packed_bytes() const = 0;

  // A prepared row is one token's input in the form the kernel reads; rows do not depend on each other.
  virtual size_t prepared_row_bytes() const = 0;
  // Optionally RMS-normalises x (norm_weight null: not), then converts.  x: [in_features]
  // y_i = x_i * rsqrt(mean(x^2) + norm_eps) * norm_weight_i
  virtual void prepare_row(const float* x, const float* norm_weight, float norm_eps, std::byte* prepared) const = 0;

  // Work over `num_tokens` prepared rows (contiguous, prepared_row_bytes() apart, 64-byte aligned), cut into
  // independent chunks. A token's result depends neither on num_tokens nor on the chunk (batch invariance).
  virtual int64_t num_chunks(int64_t num_tokens, bool gated) const = 0;
  virtual size_t scratch_bytes(int64_t num_tokens, bool gated) const = 0;  // per worker, 64-byte aligned
  // run_end: the caller will probably run the chunks up to here next (at least chunk + 1), so their weights are
  // prefetched.
  virtual void run_chunk(const std::byte* prepared, int64_t num_tokens, const LinearEpilogue& epilogue, int64_t chunk,
                         int64_t run_end, std::byte* scratch) const = 0;
  // Asks for the first weights of a chunk, for a caller that has something to do before it runs it.
  virtual void prefetch_chunk(int64_t num_tokens, bool gated, int64_t chunk) const = 0;

  // Operations (2 * multiply-adds) and bytes of weights one run over `num_tokens` touches.
  double operations(int64_t num_tokens) const { return 2.0 * num_tokens * out_features * in_features; }
};

// Packs the segments (equal in_features) on num_threads threads. Kernel choice is for the active CPU ISA.
std::unique_ptr<PackedLinear> pack_linear(const std::vector<Weight>& segments, ActivationType activations,
                                          int num_threads);

}  // namespace partita
