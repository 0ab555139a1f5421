#include "gemm/select_gpu.h"

#include <algorithm>
#include <cmath>
#include <iomanip>
#include <sstream>

#include "core/check.h"

namespace partita {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Constants of the model, all derived from data sheets or rounded from what the field reports; none is fitted.
constexpr double kLaunchMicroseconds = 2.0;
constexpr double kLatencyMicroseconds = 0.8;       // of a load from memory while memory is busy
constexpr double kCombineMicroseconds = 1.5;       // fence, counter and the second pass of a split tile
constexpr double kL2OverMemory = 2.5;              // bandwidths
constexpr double kUnknownBandwidth = 1500.0;       // GB/s
constexpr double kReachableBandwidth = 0.92;       // of the data sheet's
constexpr double kLanesPerSm = 128;                // instructions of a lane that an SM issues per cycle
constexpr double kLaneShare = 0.5;                 // of them left to decoding, beside MMA, ldmatrix and addresses
constexpr double kNaiveMicrosecondsPerMac = 2e-6;  // per SM: far above any other candidate

double megahertz(int compute_capability) {  // boost clocks, rounded
  return compute_capability >= 120 ? 2400 : compute_capability >= 90 ? 1700 : compute_capability >= 86 ? 2200 : 1400;
}

// Dense 16-bit operations (2 per multiply-add) of an SM per microsecond through mma.sync, and the share of them that a
// good loop reaches. On 9.0 wgmma alone reaches the rest.
double operations_per_sm_microsecond(int compute_capability, int activation_bytes) {
  const bool is_datacentre = compute_capability == 80 || (compute_capability >= 90 && compute_capability < 120);
  const double per_cycle = !is_datacentre ? 1024 : compute_capability >= 90 ? 4096 : 2048;
  const double share = is_datacentre && compute_capability >= 90 ? 0.60 : 0.80;
  return per_cycle * megahertz(compute_capability) * share * (activation_bytes == 1 ? 2 : 1);
}

// Lane instructions that make an MMA element of a packed code, from weight_decode.cuh; each warp along tokens pays
// them.
double decode_instructions(const GemmKernel& kernel) {
  switch (kernel.scaling) {
    case WeightScaling::kGroup:
      if (kernel.codes == WeightCodes::kU4) return kernel.activations == GpuActivations::kF16 ? 1.7 : 1.9;
      return kernel.activations == GpuActivations::kF16 ? 1.6 : 3.1;
    case WeightScaling::kGroupSum:
      return 0.1 + 0.5 * kernel.tile_tokens / 8 / kernel.warps_tokens;  // 8 for each MMA of 512 weights, 16 per lane
    case WeightScaling::kTwoLevel:
      return 0.9;
    default:
      return kernel.codes == WeightCodes::kU4 ? 0.4 : 0.1;
  }
}

double bytes_per_weight(const GemmKernel& kernel, const PackedWeightView& weight) {
  double bits = kernel.codes == WeightCodes::kU4                                          ? 4
                : kernel.codes == WeightCodes::kF32                                       ? 32
                : kernel.codes == WeightCodes::kF16 || kernel.codes == WeightCodes::kBF16 ? 16
                                                                                          : 8;
  if (weight.group > 0)
    bits += (weight.offset == GroupOffset::kCommonZero && kernel.scaling == WeightScaling::kGroup ? 16.0 : 32.0) /
            weight.group;
  return bits / 8;
}

std::vector<int> split_choices(const GemmKernel& kernel, const GemmProblem& problem, int64_t num_tokens) {
  std::vector<int> choices{1};
  if (!kernel.can_split) return choices;
  if (problem.batch_invariant && kernel.accumulation != GemmKernel::kIntegers) return choices;
  const int64_t k_tiles = divide_up(problem.weight.padded_in_features, kernel.tile_k);
  for (int splits : {2, 3, 4, 5, 6, 8, 12, 16}) {
    if (splits > kMaxSplits || k_tiles / splits < 2) break;
    const int64_t per_split = divide_up(k_tiles, splits);
    if (divide_up(k_tiles, per_split) != splits) continue;  // a split would be empty
    if (num_output_tiles(kernel, problem.weight, num_tokens) > kMaxSplitTiles) break;
    if (partial_bytes(kernel, problem.weight, num_tokens, splits) > kMaxPartialBytes) break;
    choices.push_back(splits);
  }
  return choices;
}

GemmChoice cheapest_split(const GemmKernel& kernel, const GemmProblem& problem, int64_t num_tokens) {
  GemmChoice best{&kernel, 1, 0};
  for (const int splits : split_choices(kernel, problem, num_tokens)) {
    const double cost = predicted_microseconds(kernel, problem, num_tokens, splits);
    if (splits == 1 || cost < best.microseconds) best = {&kernel, splits, cost};
  }
  return best;
}

const TableLine* table_line(const GemmProblem& problem, int64_t num_tokens, const std::vector<TableLine>& table) {
  const TableLine* found = nullptr;
  for (const TableLine& line : table)
    if (line.out_features == problem.weight.out_features && line.in_features == problem.weight.in_features &&
        line.max_tokens >= num_tokens && (!found || line.max_tokens < found->max_tokens))
      found = &line;
  return found;
}

// The table's choice, or no kernel with the reason.
GemmChoice table_choice(const std::vector<const GemmKernel*>& candidates, const GemmProblem& problem,
                        int64_t num_tokens, const std::vector<TableLine>& table, std::string* note) {
  const TableLine* line = table_line(problem, num_tokens, table);
  if (!line) return {};
  for (const GemmKernel* kernel : candidates) {
    if (line->kernel != kernel->info.name) continue;
    const std::vector<int> splits = split_choices(*kernel, problem, num_tokens);
    if (std::find(splits.begin(), splits.end(), line->num_splits) == splits.end()) {
      *note = concat("table: ", line->kernel, " does not take ", line->num_splits, " splits here");
      return {};
    }
    *note = concat("table: ", line->kernel, ", ", line->num_splits, " splits");
    return {kernel, line->num_splits, predicted_microseconds(*kernel, problem, num_tokens, line->num_splits)};
  }
  *note = concat("table: ", line->kernel, " is no candidate");
  return {};
}

}  // namespace

int64_t num_output_tiles(const GemmKernel& kernel, const PackedWeightView& weight, int64_t num_tokens) {
  return divide_up(weight.padded_out_features, kernel.tile_channels) * divide_up(num_tokens, kernel.tile_tokens);
}

size_t partial_bytes(const GemmKernel& kernel, const PackedWeightView& weight, int64_t num_tokens, int num_splits) {
  if (num_splits == 1) return 0;
  return static_cast<size_t>(num_output_tiles(kernel, weight, num_tokens)) * num_splits * kernel.tile_tokens *
         kernel.tile_channels * sizeof(float);
}

double predicted_microseconds(const GemmKernel& kernel, const GemmProblem& problem, int64_t num_tokens,
                              int num_splits) {
  const PackedWeightView& weight = problem.weight;
  const int num_sms = std::max(1, problem.device.num_sms);
  const double k = static_cast<double>(weight.padded_in_features);
  if (std::string(kernel.layout) == kNaiveLayout)
    return kLaunchMicroseconds + kNaiveMicrosecondsPerMac * num_tokens * weight.padded_out_features * k / num_sms;

  const int64_t tiles = num_output_tiles(kernel, weight, num_tokens), work = tiles * num_splits;
  const int64_t slots = static_cast<int64_t>(num_sms) * std::max(1, kernel.ctas_per_sm);
  const double tile_k = k / num_splits;
  const double weight_bytes = kernel.tile_channels * tile_k * bytes_per_weight(kernel, weight);
  const double activation_bytes = kernel.tile_tokens * tile_k * gpu_activation_bytes(problem.activations);
  const double memory =
      (problem.device.memory_gb_per_second > 0 ? problem.device.memory_gb_per_second : kUnknownBandwidth) * 1e3 *
      kReachableBandwidth;  // bytes per microsecond
  const double l2 = memory * kL2OverMemory;
  const double in_flight = (kernel.num_stages - 1) * kernel.tile_k *
                           (kernel.tile_channels * bytes_per_weight(kernel, weight) +
                            kernel.tile_tokens * gpu_activation_bytes(problem.activations));
  const double sm_rate =
      operations_per_sm_microsecond(problem.device.compute_capability, gpu_activation_bytes(problem.activations));
  const double tile_operations = 2.0 * kernel.tile_channels * kernel.tile_tokens * tile_k;
  const double lane_rate = kLanesPerSm * kLaneShare * megahertz(problem.device.compute_capability);
  const double tile_decode = kernel.tile_channels * tile_k * decode_instructions(kernel) * kernel.warps_tokens;
  const int64_t token_tiles = divide_up(num_tokens, kernel.tile_tokens);

  double total = kLaunchMicroseconds;
  for (int64_t begin = 0; begin < work; begin += slots) {
    // Waves after the third repeat the second.
    const int64_t active = std::min(slots, work - begin);
    const int64_t repeats = begin > 0 && begin + slots < work ? (work - begin - 1) / slots : 1;
    const double from_memory = active * weight_bytes / std::min<double>(token_tiles, active);
    const double through_l2 = active * (weight_bytes + activation_bytes);
    const double in_time = active * in_flight / kLatencyMicroseconds;  // bytes per microsecond that are on their way
    const double memory_time = std::max({from_memory / memory, through_l2 / l2, through_l2 / in_time});
    const double ctas_on_busiest = std::ceil(static_cast<double>(active) / num_sms);
    const double arithmetic_time = ctas_on_busiest * std::max(tile_operations / sm_rate, tile_decode / lane_rate);
    total += repeats * (kLatencyMicroseconds + std::max(memory_time, arithmetic_time));
    begin += (repeats - 1) * slots;
  }
  if (num_splits > 1) total += kCombineMicroseconds + 2.0 * partial_bytes(kernel, weight, num_tokens, num_splits) / l2;
  return total;
}

std::string rejection(const GemmKernel& kernel, const GemmProblem& problem) {
  const PackedWeightView& weight = problem.weight;
  if (kernel.activations != problem.activations)
    return concat("takes ", gpu_activations_name(kernel.activations), " activations");
  const int capability = problem.device.compute_capability;
  if (capability < kernel.min_compute_capability)
    return concat("needs compute capability ", kernel.min_compute_capability / 10, ".",
                  kernel.min_compute_capability % 10);
  if (kernel.max_compute_capability && capability > kernel.max_compute_capability)
    return concat("is code for compute capability ", kernel.max_compute_capability / 10, ".",
                  kernel.max_compute_capability % 10, " alone");
  if (kernel.shared_bytes > problem.device.shared_bytes_per_block)
    return concat("needs ", kernel.shared_bytes, " bytes of shared memory, the device gives ",
                  problem.device.shared_bytes_per_block);
  if (problem.quantises_output && !kernel.stores_codes) return "its epilogue stores floats only, not codes";
  const uint32_t group = weight.group < 0 ? GemmKernel::kWholeRow : static_cast<uint32_t>(weight.group);
  if ((kernel.groups & group) == 0)
    return weight.group < 0 ? "takes no scale per row" : concat("takes no groups of ", weight.group);
  if (kernel.why_not) {
    GemmKernelParams params;
    params.weight = weight;
    params.gate = problem.gate;
    if (const char* reason = kernel.why_not(params)) return reason;
  }
  return {};
}

GemmChoice choose_gemm(const std::vector<const GemmKernel*>& candidates, const GemmProblem& problem, int64_t num_tokens,
                       const std::vector<TableLine>& table) {
  std::string note;
  GemmChoice best = table_choice(candidates, problem, num_tokens, table, &note);
  if (best.kernel) return best;
  for (const GemmKernel* kernel : candidates) {
    const GemmChoice choice = cheapest_split(*kernel, problem, num_tokens);
    if (!best.kernel || choice.microseconds < best.microseconds) best = choice;
  }
  return best;
}

std::string describe_gemm(const std::vector<const GemmKernel*>& candidates, const GemmProblem& problem,
                          int64_t num_tokens, const std::vector<TableLine>& table) {
  std::vector<GemmChoice> ranking;
  for (const GemmKernel* kernel : candidates) ranking.push_back(cheapest_split(*kernel, problem, num_tokens));
  std::stable_sort(ranking.begin(), ranking.end(),
                   [](const GemmChoice& a, const GemmChoice& b) { return a.microseconds < b.microseconds; });
  std::ostringstream out;
  std::string note;
  table_choice(candidates, problem, num_tokens, table, &note);
  if (!note.empty()) out << note << "\n";
  for (const GemmChoice& choice : ranking) {
    const GemmKernel& kernel = *choice.kernel;
    out << "  " << std::left << std::setw(24) << kernel.info.name << std::right << std::fixed << std::setprecision(1)
        << std::setw(10) << choice.microseconds << " us predicted, " << choice.num_splits << " splits, "
        << num_output_tiles(kernel, problem.weight, num_tokens) << " tiles of " << kernel.tile_tokens << " tokens x "
        << kernel.tile_channels << ", "
        << (*kernel.info.verified_on ? concat("verified on ", kernel.info.verified_on)
                                     : std::string("never ran on hardware"))
        << "\n";
  }
  return out.str();
}

std::vector<TableLine> parse_selection_table(const std::string& text) {
  std::vector<TableLine> table;
  std::istringstream lines(text);
  std::string line;
  for (int number = 1; std::getline(lines, line); ++number) {
    line = line.substr(0, line.find('#'));
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    std::istringstream words(line);
    TableLine entry;
    std::string rest;
    PARTITA_CHECK(static_cast<bool>(words >> entry.out_features >> entry.in_features >> entry.max_tokens >>
                                    entry.kernel >> entry.num_splits) &&
                      !(words >> rest) && entry.num_splits >= 1 && entry.num_splits <= kMaxSplits,
                  "selection_table: got line ", number, " '", line,
                  "', wanted <out_features> <in_features> <max_tokens> <kernel> <num_splits, 1 to ", kMaxSplits, ">");
    table.push_back(entry);
  }
  return table;
}

}  // namespace partita
