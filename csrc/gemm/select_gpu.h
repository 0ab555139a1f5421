// Which GPU kernel multiplies a packed matrix with how many tokens: candidates as data, an analytic cost, a printable
// reason for each. Nothing is measured here or at start.
//
// The cost of a candidate at num_splits s, in microseconds:
//   launch + waves * (fill + max(memory, arithmetic of a wave)) + combine
// memory: a wave's bytes of weights (once from memory, further token tiles from L2) and activations (from L2) at the
// device's bandwidth or at what the copies in flight of the wave's CTAs allow, whichever is less; arithmetic: the
// padded tile at the tensor cores' rate (of mma.sync), or decoding its weights at the lanes', shared by an SM's CTAs;
// combine: partials through L2.
//
// A stored table overrides it: text, one choice a line, `#` begins a comment:
//   <out_features> <in_features> <max_tokens> <kernel> <num_splits>
// For a packed matrix of this shape, of the lines with max_tokens >= T the one with the least counts. A kernel that is
// not there or does not fit is passed over, which describe says.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/gpu.h"
#include "gemm/gemm_kernels_gpu.h"

namespace partita {

struct TableLine {
  int64_t out_features, in_features, max_tokens;
  std::string kernel;
  int num_splits;
};
// Throws ValueError naming the line.
std::vector<TableLine> parse_selection_table(const std::string& text);

// What a choice depends on beside the number of tokens.
struct GemmProblem {
  PackedWeightView weight;  // shape and group
  GpuActivations activations = GpuActivations::kBF16;
  GateActivation gate = GateActivation::kNone;
  bool batch_invariant = false;
  bool quantises_output = false;
  GpuProperties device;
};

struct GemmChoice {
  const GemmKernel* kernel = nullptr;
  int num_splits = 1;
  double microseconds = 0;
};

// Work items of a launch, its counters and its partials.
int64_t num_output_tiles(const GemmKernel& kernel, const PackedWeightView& weight, int64_t num_tokens);
size_t partial_bytes(const GemmKernel& kernel, const PackedWeightView& weight, int64_t num_tokens, int num_splits);

// The front of every workspace holds the counters of split-K, whichever linear uses it next, then come partials.
constexpr int64_t kMaxSplitTiles = 16384;
constexpr size_t kCounterBytes = kMaxSplitTiles * sizeof(uint32_t);
constexpr size_t kMaxPartialBytes = size_t{16} << 20;
constexpr int kMaxSplits = 16;

double predicted_microseconds(const GemmKernel& kernel, const GemmProblem& problem, int64_t num_tokens, int num_splits);

// Why a kernel of this layout is no candidate whatever T; empty: it is.
std::string rejection(const GemmKernel& kernel, const GemmProblem& problem);

// The cheapest of the candidates, of which there is at least one; all read the same packed layout.
GemmChoice choose_gemm(const std::vector<const GemmKernel*>& candidates, const GemmProblem& problem, int64_t num_tokens,
                       const std::vector<TableLine>& table);
// The ranking as text: predicted time of each, the table's word.
std::string describe_gemm(const std::vector<const GemmKernel*>& candidates, const GemmProblem& problem,
                          int64_t num_tokens, const std::vector<TableLine>& table);

}  // namespace partita
