// Linear layers on a GPU: canonical weight -> packed weight in device memory -> matmul. What gemm.h is for the CPU.
//
// pack_linear_gpu() lays one or more weights (row segments: Q|K|V, gate|up) out once for the device and one activation
// type; the GpuPackedLinear then serves every number of tokens, choosing a kernel for each among those that read this
// packed layout. Nothing here waits for the device but packing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/gpu.h"
#include "gemm/canonical_weight.h"
#include "gemm/gemm.h"

namespace partita {

// How x lies in device memory. kF32 is the exact mode: weights dequantised exactly, fp32 accumulation in ascending K.
enum class GpuActivations : uint8_t { kF32, kF16, kBF16, kInt8, kE4M3 };
const char* gpu_activations_name(GpuActivations activations);  // "f32", "f16", "bf16", "int8", "e4m3"
GpuActivations parse_gpu_activations(const std::string& name);
constexpr DType gpu_activation_dtype(GpuActivations activations) {
  switch (activations) {
    case GpuActivations::kF32:
      return DType::kF32;
    case GpuActivations::kF16:
      return DType::kF16;
    case GpuActivations::kBF16:
      return DType::kBF16;
    case GpuActivations::kInt8:
      return DType::kI8;
    case GpuActivations::kE4M3:
      return DType::kE4M3;
  }
  return DType::kF32;
}
constexpr int gpu_activation_bytes(GpuActivations activations) {
  return activations == GpuActivations::kF32 ? 4 : activations >= GpuActivations::kInt8 ? 1 : 2;
}

struct GpuLinearParams {
  const void* x = nullptr;         // [T, K] of the activation type, rows 16-byte aligned
  int64_t x_stride = 0;            // elements between tokens
  const float* x_scale = nullptr;  // [T] of int8 and e4m3; or [T, K / 128] where the weight is FP8 in 128 x 128 blocks
  const int32_t* x_sum = nullptr;  // [T] sum of the codes (int8)
  int64_t num_tokens = 0;          // T
  void* out = nullptr;             // [T, N] (gated: [T, N / 2])
  DType out_type = DType::kF32;    // f32, f16 or bf16; int8 or e4m3 where packed with quantises_output
  int64_t out_stride = 0;          // elements between tokens
  const float* bias = nullptr;     // [N] in the order of the segments, or null
  bool add_to_out = false;         // out += (f32 only)
  GateActivation gate = GateActivation::kNone;  // first half of the rows is gate, second half up: out = f(gate) * up
  // Codes as out: those of prepare_rows (norm/norm_gpu.h) with this code_scale over the same outputs in fp32, bit for
  // bit. One number for all tokens, known beforehand: a row's own maximum is known to no tile of it.
  float out_code_scale = 0;
  float* out_scale = nullptr;  // [T] or null: set to out_code_scale, the x_scale of the linear that reads the codes
  int32_t* out_sum = nullptr;  // [T] or null: sums of the int8 codes, its x_sum
  // workspace_bytes(T) or more, 256-byte aligned, of one stream at a time. Its counters are zero before and after each
  // run: the caller zeroes it once.
  std::byte* workspace = nullptr;
  int num_ctas = 0;  // most CTAs to use (soft partition); 0: as many as the chip runs
};

struct GpuPackOptions {
  GpuActivations activations = GpuActivations::kBF16;
  // The same bits for a token at every T: kernels are chosen among those that accumulate alike, without split-K.
  bool batch_invariant = false;
  // The segments are gate|up and every run is gated: rows of both halves are interleaved by eight, so that one lane
  // holds both sums of an output.
  bool interleaves_gate = false;
  // Every run's out is int8 or e4m3 codes: only kernels whose epilogue stores them are candidates.
  bool quantises_output = false;
  // Replaces the cost model's choice where a line matches; see select_gpu.h for the format. Empty: none.
  std::string selection_table;
};

class GpuPackedLinear {
 public:
  virtual ~GpuPackedLinear() = default;

  int64_t out_features = 0;  // all segments together
  int64_t in_features = 0;
  GpuActivations activations = GpuActivations::kBF16;
  std::string kernel;  // layouts of the parts: segments of different formats are packed and launched apart
  std::string reason;  // one line per candidate layout: chosen, or why not

  virtual size_t packed_bytes() const = 0;  // on the device
  virtual size_t workspace_bytes(int64_t max_tokens) const = 0;
  // Enqueues; chooses by num_tokens among the candidates that share the packed layout. Throws ValueError for bad
  // params.
  virtual void run(const GpuLinearParams& params, GpuStream stream) const = 0;
  // The ranking for this many tokens: each candidate's predicted time, or why it is out.
  virtual std::string describe_choice(int64_t num_tokens) const = 0;
  // For tests: the canonical weight of one part, read back out of the packed bytes. Scales are as the packed form holds
  // them, that is rounded where it must.
  virtual int num_parts() const = 0;
  virtual CanonicalWeight unpack(int part) const = 0;

  double operations(int64_t num_tokens) const { return 2.0 * num_tokens * out_features * in_features; }
};

std::shared_ptr<GpuPackedLinear> pack_linear_gpu(std::shared_ptr<Gpu> gpu, const std::vector<Weight>& segments,
                                                 const GpuPackOptions& options);
std::shared_ptr<GpuPackedLinear> pack_linear_gpu(std::shared_ptr<Gpu> gpu, std::vector<CanonicalWeight> segments,
                                                 const GpuPackOptions& options);

}  // namespace partita
