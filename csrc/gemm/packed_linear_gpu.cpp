// Packs segments for a device and runs them: check -> parts -> layout -> upload; then check -> select -> launch.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "core/check.h"
#include "core/gpu_library.h"
#include "gemm/canonical_segments.h"
#include "gemm/gemm_gpu.h"
#include "gemm/gemm_kernels_gpu.h"
#include "gemm/select_gpu.h"

namespace partita {
namespace {

constexpr const char* kActivationNames[] = {"f32", "f16", "bf16", "int8", "e4m3"};
constexpr int64_t kRowAlignment = 16;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// What selection said: asked once for each number of tokens, so that a launch costs a look-up.
struct ChoiceMemo {
  std::mutex mutex;
  std::unordered_map<int64_t, GemmChoice> by_tokens;
};

// Segments that lie in one packed matrix, and whose outputs are neighbours.
struct Part {
  CanonicalWeight shape;  // without its data: what unpack() starts from
  const PackedLayout* layout = nullptr;
  GpuBuffer codes, group_params, channel_scale, channel_zero, input_order;
  GemmProblem problem;
  int64_t first_column = 0;
  std::vector<const GemmKernel*> candidates;
  std::unique_ptr<ChoiceMemo> memo = std::make_unique<ChoiceMemo>();
};

// What a layout offers for a part.
struct LayoutChoice {
  const PackedLayout* layout = nullptr;
  std::vector<const GemmKernel*> candidates;
  PackedWeightView view;
  double score = 0;  // log of the predicted microseconds, over the numbers of tokens below
};
constexpr int64_t kScoredTokens[] = {1, 16, 128, 1024};
constexpr double kOwnClassPenalty = 1e3;

PackedWeightView shape_view(const CanonicalWeight& weight, const PackedLayout& layout, bool is_gate_interleaved,
                            int64_t out_features) {
  PackedWeightView view;
  view.out_features = out_features;
  view.padded_out_features = round_up(weight.out_features, layout.channel_multiple);
  view.in_features = weight.in_features;
  view.padded_in_features = round_up(weight.in_features, layout.k_multiple);
  view.group = static_cast<int32_t>(weight.group);
  view.num_groups = static_cast<int32_t>(weight.num_groups());
  view.common_zero = weight.common_zero;
  view.offset = !weight.mins.empty()    ? GroupOffset::kMin
                : !weight.zeros.empty() ? GroupOffset::kZero
                                        : GroupOffset::kCommonZero;
  view.is_gate_interleaved = is_gate_interleaved;
  return view;
}

bool is_verified(const GemmKernel& kernel) { return kernel.info.verified_on && *kernel.info.verified_on; }

class GpuLinear final : public GpuPackedLinear {
 public:
  GpuLinear(std::shared_ptr<Gpu> gpu, std::vector<CanonicalWeight> segments, const GpuPackOptions& options)
      : gpu_(std::move(gpu)), options_(options), table_(parse_selection_table(options.selection_table)) {
    PARTITA_CHECK(gpu_ != nullptr, "gpu: got none");
    PARTITA_CHECK(!segments.empty(), "segments: got none, wanted at least one weight");
    activations = options.activations;
    in_features = segments[0].in_features;
    for (size_t i = 0; i < segments.size(); ++i) {
      const std::string name = concat("segments[", i, "]");
      segments[i].check(name.c_str());
      PARTITA_CHECK(segments[i].in_features == in_features, name, ": got in_features ", segments[i].in_features,
                    ", wanted ", in_features, " as the first segment's");
      out_features += segments[i].out_features;
    }
    if (options.interleaves_gate) {
      PARTITA_CHECK(out_features % 2 == 0, "segments: got ", out_features,
                    " rows, wanted an even number (gate half, up half)");
      add_gated_part(segments);
    } else {
      for (size_t first = 0; first < segments.size();) {
        size_t end = first + 1;
        while (end < segments.size() && is_same_kind(segments[first], segments[end])) ++end;
        std::vector<const CanonicalWeight*> run;
        for (size_t i = first; i < end; ++i) run.push_back(&segments[i]);
        const CanonicalWeight joined = concatenated(run);
        add_part(joined, joined.out_features);
        first = end;
      }
    }
    gpu_->synchronize(gpu_->default_stream());
  }

  size_t packed_bytes() const override {
    size_t bytes = 0;
    for (const Part& part : parts_)
      bytes += part.codes.bytes() + part.group_params.bytes() + part.channel_scale.bytes() + part.channel_zero.bytes() +
               part.input_order.bytes();
    return bytes;
  }

  // Of any number of tokens up to this one: the counters, the most that split-K's partials may take, a reordered input.
  size_t workspace_bytes(int64_t max_tokens) const override {
    size_t partials = 0;
    bool reorders = false;
    for (const Part& part : parts_) {
      reorders = reorders || part.input_order.bytes() > 0;
      for (const GemmKernel* kernel : part.candidates)
        if (kernel->can_split)
          partials = std::max(partials, partial_bytes(*kernel, part.problem.weight, max_tokens, kMaxSplits));
    }
    return kCounterBytes + std::min(partials, kMaxPartialBytes) +
           (reorders ? static_cast<size_t>(max_tokens) * reordered_stride() : 0);
  }

  void run(const GpuLinearParams& params, GpuStream stream) const override {
    check(params);
    if (params.num_tokens == 0) return;
    if (params.out_sum) gpu_->fill(params.out_sum, 0, params.num_tokens * sizeof(int32_t), stream);
    for (const Part& part : parts_) run_part(part, params, stream);
  }

  std::string describe_choice(int64_t num_tokens) const override {
    PARTITA_CHECK(num_tokens > 0, "num_tokens: got ", num_tokens, ", wanted at least 1");
    std::string text;
    for (const Part& part : parts_)
      text += concat(part.layout->id, " [", part.problem.weight.out_features, ", ", in_features, "], ", num_tokens,
                     " tokens:\n", describe_gemm(part.candidates, part.problem, num_tokens, table_));
    return text + reason;
  }

  int num_parts() const override { return static_cast<int>(parts_.size()); }

  CanonicalWeight unpack(int index) const override {
    PARTITA_CHECK(index >= 0 && index < num_parts(), "part: got ", index, ", wanted one in [0, ", num_parts(), ")");
    const Part& part = parts_[index];
    std::vector<std::byte> codes = downloaded(part.codes), group_params = downloaded(part.group_params),
                           channel_scale = downloaded(part.channel_scale), channel_zero = downloaded(part.channel_zero);
    PackedWeightView view = part.problem.weight;
    view.codes = codes.data();
    view.group_params = group_params.data();
    view.channel_scale = reinterpret_cast<const float*>(channel_scale.data());
    view.channel_zero = reinterpret_cast<const int32_t*>(channel_zero.data());
    CanonicalWeight weight = part.shape;
    part.layout->unpack(view, activations, &weight);
    return weight;
  }

 private:
  // ---- packing

  void add_gated_part(std::vector<CanonicalWeight>& segments) {
    bool is_uniform = true;
    for (const CanonicalWeight& segment : segments) is_uniform = is_uniform && is_same_kind(segments[0], segment);
    if (!is_uniform) {
      segments = unified(segments);
      reason += concat("segments of different kinds become ", weight_codes_name(segments[0].codes),
                       ", as gate and up rows lie in one matrix\n");
    }
    std::vector<const CanonicalWeight*> all;
    for (const CanonicalWeight& segment : segments) all.push_back(&segment);
    add_part(gate_interleaved(concatenated(all)), out_features);
  }

  void add_part(const CanonicalWeight& weight, int64_t part_rows) {
    LayoutChoice best;
    std::string notes;
    for (const LayoutChoice& choice : layout_choices(weight, part_rows, &notes))
      if (!best.layout || choice.score < best.score) best = choice;
    if (!best.layout)
      throw std::runtime_error(
          concat("gemm: no kernel for ", describe(weight), " with ", gpu_activations_name(activations), ":\n", notes));
    reason += concat(describe(weight), " -> ", best.layout->id, "\n", notes);
    kernel += (kernel.empty() ? "" : ", ") + std::string(best.layout->id);

    Part part;
    part.layout = best.layout;
    part.candidates = best.candidates;
    part.problem = problem_of(best.view);
    part.first_column = parts_.empty() ? 0 : parts_.back().first_column + parts_.back().problem.weight.out_features;
    upload(weight, &part);
    part.shape.out_features = weight.out_features;
    part.shape.in_features = weight.in_features;
    part.shape.input_order = weight.input_order;
    part.shape.group_rows = weight.group_rows;
    parts_.push_back(std::move(part));
  }

  std::string describe(const CanonicalWeight& weight) const {
    std::string text =
        concat(weight_codes_name(weight.codes), " [", weight.out_features, ", ", weight.in_features, "]");
    if (weight.group > 0) text += concat(", groups of ", weight.group);
    if (weight.has_two_levels()) text += ", two levels";
    if (!weight.zeros.empty()) text += ", zeros";
    if (!weight.mins.empty()) text += ", mins";
    if (!weight.input_order.empty()) text += ", reordered inputs";
    return text;
  }

  GemmProblem problem_of(const PackedWeightView& view) const {
    GemmProblem problem;
    problem.weight = view;
    problem.activations = activations;
    problem.gate = options_.interleaves_gate ? GateActivation::kSilu : GateActivation::kNone;
    problem.batch_invariant = options_.batch_invariant;
    problem.quantises_output = options_.quantises_output;
    problem.device = gpu_->properties();
    return problem;
  }

  // Every layout that takes the weight, with its kernels; why the others do not goes to the notes.
  std::vector<LayoutChoice> layout_choices(const CanonicalWeight& weight, int64_t part_rows, std::string* notes) const {
    const std::vector<const GemmKernel*> kernels = kernels_of(*gpu_).all<GemmKernel>();
    std::vector<LayoutChoice> choices;
    for (const PackedLayout* layout : all_packed_layouts()) {
      const auto note = [&](const std::string& why) { *notes += concat("  ", layout->id, ": ", why, "\n"); };
      const bool is_naive = std::string(layout->id) == kNaiveLayout;
      if (is_naive && !choices.empty()) {
        note("the last resort");
        continue;
      }
      if (const char* why = layout->why_not(weight, activations)) {
        note(why);
        continue;
      }
      LayoutChoice choice;
      choice.layout = layout;
      choice.view = shape_view(weight, *layout, options_.interleaves_gate, part_rows);
      if (is_naive) choice.view.group = -1, choice.view.offset = GroupOffset::kCommonZero;
      bool is_compiled = false;
      for (const GemmKernel* kernel : kernels) {
        if (std::string(kernel->layout) != layout->id) continue;
        if (kernel->activations == activations) is_compiled = true;
        GemmProblem problem = problem_of(choice.view);
        // simt stands for any architecture, but takes code for one alone only when it is named.
        if (problem.device.world == "simt" && is_named(*kernel, choice.view))
          problem.device.compute_capability = kernel->min_compute_capability;
        const std::string why = rejection(*kernel, problem);
        if (why.empty())
          choice.candidates.push_back(kernel);
        else if (kernel->activations == activations)
          *notes += concat("  ", kernel->info.name, ": ", why, "\n");
      }
      if (choice.candidates.empty()) {
        note(is_compiled ? "no kernel takes it" : "not built in this library");
        continue;
      }
      choices.push_back(choice);
    }
    if (!keep_named(&choices)) keep_verified(&choices, notes);
    if (options_.batch_invariant) keep_one_class(&choices, notes);
    for (LayoutChoice& choice : choices) choice.score = score(choice);
    return choices;
  }

  bool is_named(const GemmKernel& kernel, const PackedWeightView& view) const {
    return std::any_of(table_.begin(), table_.end(), [&](const TableLine& line) {
      return line.out_features == view.out_features && line.in_features == view.in_features &&
             line.kernel == kernel.info.name;
    });
  }

  // A kernel that the table names for this shape brings its layout, whatever it would cost.
  bool keep_named(std::vector<LayoutChoice>* choices) const {
    for (const LayoutChoice& choice : *choices)
      for (const GemmKernel* candidate : choice.candidates) {
        if (!is_named(*candidate, choice.view)) continue;
        *choices = std::vector<LayoutChoice>{LayoutChoice(choice)};
        return true;
      }
    return false;
  }

  // What never ran on hardware is no default while a verified kernel fits. Where none is verified, code for one
  // architecture alone, which no other machine runs, stands behind the family that simt runs.
  void keep_verified(std::vector<LayoutChoice>* choices, std::string* notes) const {
    if (gpu_->properties().world != "cuda") return;
    bool has_verified = false, has_family = false;
    for (const LayoutChoice& choice : *choices)
      for (const GemmKernel* candidate : choice.candidates) {
        has_verified = has_verified || is_verified(*candidate);
        has_family = has_family || candidate->max_compute_capability == 0;
      }
    if (has_verified)
      keep(
          choices, notes, [](const GemmKernel& candidate) { return is_verified(candidate); },
          "never ran on hardware while a verified one fits");
    else if (has_family)
      keep(
          choices, notes, [](const GemmKernel& candidate) { return candidate.max_compute_capability == 0; },
          "never ran anywhere while one that simt runs fits");
  }

  // Batch invariance: all candidates of a layout sum an output alike. The class that costs least stays; one kernel of
  // an order of its own, good at one number of tokens only, is the last resort.
  void keep_one_class(std::vector<LayoutChoice>* choices, std::string* notes) const {
    for (LayoutChoice& choice : *choices) {
      LayoutChoice best;
      for (const GemmKernel* first : choice.candidates) {
        LayoutChoice of_class = choice;
        of_class.candidates.clear();
        for (const GemmKernel* candidate : choice.candidates)
          if (candidate->accumulation == first->accumulation &&
              (first->accumulation != GemmKernel::kOwn || candidate == first))
            of_class.candidates.push_back(candidate);
        of_class.score = score(of_class) + (first->accumulation == GemmKernel::kOwn ? kOwnClassPenalty : 0);
        if (!best.layout || of_class.score < best.score) best = of_class;
      }
      for (const GemmKernel* candidate : choice.candidates)
        if (std::find(best.candidates.begin(), best.candidates.end(), candidate) == best.candidates.end())
          *notes += concat("  ", candidate->info.name, ": batch invariance; it sums in another order\n");
      choice = best;
    }
  }

  template <typename Wanted>
  static void keep(std::vector<LayoutChoice>* choices, std::string* notes, const Wanted& wanted, const char* why) {
    for (LayoutChoice& choice : *choices) {
      std::vector<const GemmKernel*> kept;
      for (const GemmKernel* candidate : choice.candidates) {
        if (wanted(*candidate))
          kept.push_back(candidate);
        else
          *notes += concat("  ", candidate->info.name, ": ", why, "\n");
      }
      choice.candidates = kept;
    }
    choices->erase(std::remove_if(choices->begin(), choices->end(),
                                  [](const LayoutChoice& choice) { return choice.candidates.empty(); }),
                   choices->end());
  }

  double score(const LayoutChoice& choice) const {
    double total = 0;
    for (const int64_t tokens : kScoredTokens)
      total += std::log(choose_gemm(choice.candidates, problem_of(choice.view), tokens, {}).microseconds);
    return total;
  }

  void upload(const CanonicalWeight& weight, Part* part) {
    const PackedLayout::Sizes sizes = part->layout->sizes(weight, activations);
    PackedWeightView& view = part->problem.weight;
    std::vector<std::byte> codes(sizes.codes), group_params(sizes.group_params);
    std::vector<float> channel_scale(sizes.has_channel_scale ? view.padded_out_features : 0);
    std::vector<int32_t> channel_zero(sizes.has_channel_zero ? view.padded_out_features : 0);
    part->layout->pack(weight, activations, codes.data(), group_params.data(), channel_scale.data(),
                       channel_zero.data(), &view);
    part->codes = uploaded(codes.data(), codes.size(), "weight codes");
    part->group_params = uploaded(group_params.data(), group_params.size(), "weight scales");
    part->channel_scale = uploaded(channel_scale.data(), channel_scale.size() * sizeof(float), "channel scales");
    part->channel_zero = uploaded(channel_zero.data(), channel_zero.size() * sizeof(int32_t), "channel zeros");
    if (std::string(part->layout->id) != kNaiveLayout)  // where the order is undone by packing
      part->input_order =
          uploaded(weight.input_order.data(), weight.input_order.size() * sizeof(int32_t), "input order");
    gpu_->synchronize(gpu_->default_stream());  // the host arrays end here
    view.codes = part->codes.data();
    view.group_params = part->group_params.data();
    view.channel_scale = part->channel_scale.as<float>();
    view.channel_zero = part->channel_zero.as<int32_t>();
  }

  GpuBuffer uploaded(const void* host, size_t bytes, const char* label) {
    GpuBuffer buffer(gpu_, bytes, label);
    if (bytes) gpu_->copy(buffer.data(), host, bytes, GpuCopy::kHostToDevice, gpu_->default_stream());
    return buffer;
  }

  std::vector<std::byte> downloaded(const GpuBuffer& buffer) const {
    std::vector<std::byte> host(buffer.bytes());
    if (!host.empty())
      gpu_->copy(host.data(), buffer.data(), host.size(), GpuCopy::kDeviceToHost, gpu_->default_stream());
    gpu_->synchronize(gpu_->default_stream());
    return host;
  }

  // ---- running

  bool has_token_scale() const { return activations == GpuActivations::kInt8 || activations == GpuActivations::kE4M3; }
  // Bytes of a row of a reordered input.
  int64_t reordered_stride() const { return round_up(in_features * gpu_activation_bytes(activations), kRowAlignment); }

  void check(const GpuLinearParams& params) const {
    PARTITA_CHECK(params.num_tokens >= 0 && params.num_tokens < (int64_t{1} << 31), "num_tokens: got ",
                  params.num_tokens, ", wanted 0 to 2^31 - 1");
    if (params.num_tokens == 0) return;
    PARTITA_CHECK(params.x && params.out, "x, out: got a null pointer");
    PARTITA_CHECK(params.x_stride >= in_features, "x: got a stride of ", params.x_stride,
                  " elements, wanted at least in_features = ", in_features);
    PARTITA_CHECK(
        reinterpret_cast<uintptr_t>(params.x) % kRowAlignment == 0 &&
            (params.num_tokens == 1 || params.x_stride * gpu_activation_bytes(activations) % kRowAlignment == 0),
        "x: got rows that do not begin at multiples of ", kRowAlignment, " bytes (stride ", params.x_stride,
        " elements)");
    const bool is_gated = params.gate != GateActivation::kNone;
    PARTITA_CHECK(is_gated == options_.interleaves_gate, "gate: got ", is_gated ? "one" : "none", ", but was packed ",
                  options_.interleaves_gate ? "with its gate and up rows interleaved" : "for runs without a gate");
    const int64_t num_outputs = is_gated ? out_features / 2 : out_features;
    const bool is_coded = params.out_type == DType::kI8 || params.out_type == DType::kE4M3;
    if (options_.quantises_output) {
      PARTITA_CHECK(is_coded, "out: got dtype ", dtype_name(params.out_type),
                    ", wanted int8 or float8_e4m3fn, as it was packed with quantises_output");
      PARTITA_CHECK(params.out_code_scale > 0 && std::isfinite(params.out_code_scale) &&
                        std::isfinite(1.0f / params.out_code_scale),
                    "out_code_scale: got ", params.out_code_scale, ", wanted a normal positive number");
    } else {
      PARTITA_CHECK(params.out_type == DType::kF32 || params.out_type == DType::kF16 || params.out_type == DType::kBF16,
                    "out: got dtype ", dtype_name(params.out_type), ", wanted float32, float16 or bfloat16",
                    is_coded ? " (codes where it was packed with quantises_output)" : "");
      PARTITA_CHECK(params.out_code_scale == 0 && !params.out_scale, "out_code_scale, out_scale: given with an out of ",
                    dtype_name(params.out_type), ", wanted none");
    }
    PARTITA_CHECK(!params.out_sum || params.out_type == DType::kI8, "out_sum: given with an out of ",
                  dtype_name(params.out_type), ", wanted none: only int8 codes have sums");
    PARTITA_CHECK(params.out_stride >= num_outputs, "out: got a stride of ", params.out_stride,
                  " elements, wanted at least ", num_outputs);
    PARTITA_CHECK(!params.add_to_out || (params.out_type == DType::kF32 && !is_gated),
                  "add_to_out: wanted a float32 out and no gate");
    PARTITA_CHECK(!has_token_scale() || params.x_scale, "x_scale: got none, wanted one for each token of ",
                  gpu_activations_name(activations), " activations");
    PARTITA_CHECK(params.num_ctas >= 0, "num_ctas: got ", params.num_ctas, ", wanted 0 or more");
    for (const Part& part : parts_)
      PARTITA_CHECK(!part.problem.weight.channel_zero || params.x_sum,
                    "x_sum: got none, wanted the sum of each token's codes, which the weight's zeros meet");
    PARTITA_CHECK(params.workspace && reinterpret_cast<uintptr_t>(params.workspace) % 256 == 0,
                  "workspace: wanted workspace_bytes(num_tokens) bytes at a multiple of 256");
  }

  GemmChoice remembered_choice(const Part& part, int64_t num_tokens) const {
    const std::lock_guard<std::mutex> lock(part.memo->mutex);
    GemmChoice& choice = part.memo->by_tokens[num_tokens];
    if (!choice.kernel) choice = choose_gemm(part.candidates, part.problem, num_tokens, table_);
    return choice;
  }

  void run_part(const Part& part, const GpuLinearParams& params, GpuStream stream) const {
    const GemmChoice choice = remembered_choice(part, params.num_tokens);
    const GemmKernel& chosen = *choice.kernel;
    GemmKernelParams launch;
    launch.weight = part.problem.weight;
    launch.x = params.x;
    launch.x_stride = params.x_stride;
    launch.x_scale = params.x_scale;
    launch.x_sum = params.x_sum;
    launch.num_tokens = static_cast<int32_t>(params.num_tokens);
    launch.out = static_cast<std::byte*>(params.out) + part.first_column * dtype_bytes(params.out_type);
    launch.out_type = params.out_type;
    launch.out_stride = params.out_stride;
    launch.bias = params.bias ? params.bias + part.first_column : nullptr;
    launch.up_bias = params.bias ? params.bias + part.first_column + part.problem.weight.out_features / 2 : nullptr;
    launch.add_to_out = params.add_to_out;
    launch.gate = params.gate;
    if (options_.quantises_output) {
      launch.out_code_scale = params.out_code_scale;
      launch.out_inverse_scale = 1.0f / params.out_code_scale;
      launch.out_scale = part.first_column == 0 ? params.out_scale : nullptr;
      launch.out_sum = params.out_sum;
    }
    if (has_block_scales(part)) launch.x_scale_groups = static_cast<int32_t>((in_features + 127) / 128);
    launch.num_splits = choice.num_splits;
    launch.counters = reinterpret_cast<uint32_t*>(params.workspace);
    launch.partials = reinterpret_cast<float*>(params.workspace + kCounterBytes);
    const int64_t work = num_output_tiles(chosen, part.problem.weight, params.num_tokens) * choice.num_splits;
    const int64_t resident = static_cast<int64_t>(part.problem.device.num_sms) * std::max(1, chosen.ctas_per_sm);
    const int64_t most = params.num_ctas > 0 ? params.num_ctas : resident;
    launch.num_ctas = static_cast<int32_t>(std::min({work, most, int64_t{1} << 30}));
    if (part.input_order.bytes()) reorder_input(part, params, &launch, stream);
    chosen.launch(launch, stream);
  }

  void reorder_input(const Part& part, const GpuLinearParams& params, GemmKernelParams* launch,
                     GpuStream stream) const {
    const auto* gather = kernels_of(*gpu_).only<GatherInputsKernel>();
    if (!gather) throw std::runtime_error("gemm: this device library was built without gather_inputs");
    const int element_bytes = gpu_activation_bytes(activations);
    std::byte* reordered = params.workspace + workspace_bytes(params.num_tokens) -
                           static_cast<size_t>(params.num_tokens) * reordered_stride();
    GatherInputsParams gathered{params.x,
                                params.x_stride,
                                reordered,
                                reordered_stride() / element_bytes,
                                part.input_order.as<int32_t>(),
                                params.num_tokens,
                                in_features,
                                element_bytes,
                                launch->num_ctas};
    if (params.num_ctas == 0) gathered.num_ctas = part.problem.device.num_sms * 8;
    gather->launch(gathered, stream);
    launch->x = reordered;
    launch->x_stride = gathered.out_stride;
  }

  bool has_block_scales(const Part& part) const {
    return activations == GpuActivations::kE4M3 && part.shape.group_rows == 128;
  }

  std::shared_ptr<Gpu> gpu_;
  GpuPackOptions options_;
  std::vector<TableLine> table_;
  std::vector<Part> parts_;
};

}  // namespace

const char* gpu_activations_name(GpuActivations activations) { return kActivationNames[static_cast<int>(activations)]; }

GpuActivations parse_gpu_activations(const std::string& name) {
  for (int i = 0; i < 5; ++i)
    if (name == kActivationNames[i]) return static_cast<GpuActivations>(i);
  throw_value_error("activations: got '", name, "', wanted f32, f16, bf16, int8 or e4m3");
}

const char* weight_scaling_name(WeightScaling scaling) {
  constexpr const char* kNames[] = {"none", "group", "channel", "group sum", "two levels", "128 x 128 blocks"};
  return kNames[static_cast<int>(scaling)];
}

std::shared_ptr<GpuPackedLinear> pack_linear_gpu(std::shared_ptr<Gpu> gpu, std::vector<CanonicalWeight> segments,
                                                 const GpuPackOptions& options) {
  return std::make_shared<GpuLinear>(std::move(gpu), std::move(segments), options);
}

std::shared_ptr<GpuPackedLinear> pack_linear_gpu(std::shared_ptr<Gpu> gpu, const std::vector<Weight>& segments,
                                                 const GpuPackOptions& options) {
  std::vector<CanonicalWeight> canonical;
  for (const Weight& segment : segments) canonical.push_back(canonical_from(segment));
  return pack_linear_gpu(std::move(gpu), std::move(canonical), options);
}

}  // namespace partita
