#include "gemm/select.h"

#include "core/check.h"
#include "core/cpu_features.h"
#include "gemm/weight_blocks.h"

namespace partita {
namespace {

struct Candidate {
  const char* name;
  CpuIsa isa;
  const char* verified_on;  // real hardware that the tests ran on
  TileKernels kernels;
};

// Best first within an activation type.
const Candidate kCandidates[] = {
#if defined(__x86_64__)
    {"int8_avx512",
     CpuIsa::kAvx512,
     "Emerald Rapids",
     {ActivationType::kInt8, 8, 96, prepare_int8_row_avx512, multiply_int8_avx512, store_sums_avx512}},
    {"int8_avx2",
     CpuIsa::kAvx2,
     "Emerald Rapids",
     {ActivationType::kInt8, 4, 64, prepare_int8_row_avx2, multiply_int8_avx2, store_sums_avx2}},
#endif
    {"int8_portable",
     CpuIsa::kPortable,
     "Emerald Rapids",
     {ActivationType::kInt8, 4, 64, prepare_int8_row_portable, multiply_int8_portable, store_sums_portable}},
#if defined(__x86_64__)
    {"bf16_avx512",
     CpuIsa::kAvx512,
     "Emerald Rapids",
     {ActivationType::kBF16, 8, 96, prepare_bf16_row_avx512, multiply_f32_avx512, store_sums_avx512}},
    {"bf16_avx2",
     CpuIsa::kAvx2,
     "Emerald Rapids",
     {ActivationType::kBF16, 4, 48, prepare_bf16_row_avx2, multiply_f32_avx2, store_sums_avx2}},
#endif
    {"bf16_portable",
     CpuIsa::kPortable,
     "Emerald Rapids",
     {ActivationType::kBF16, 4, 64, prepare_bf16_row_portable, multiply_f32_portable, store_sums_portable}},
#if defined(__x86_64__)
    {"fp32_avx512",
     CpuIsa::kAvx512,
     "Emerald Rapids",
     {ActivationType::kF32, 8, 96, prepare_f32_row_avx512, multiply_f32_avx512, store_sums_avx512}},
    {"fp32_avx2",
     CpuIsa::kAvx2,
     "Emerald Rapids",
     {ActivationType::kF32, 4, 48, prepare_f32_row_avx2, multiply_f32_avx2, store_sums_avx2}},
#endif
    {"fp32_portable",
     CpuIsa::kPortable,
     "Emerald Rapids",
     {ActivationType::kF32, 4, 64, prepare_f32_row_portable, multiply_f32_portable, store_sums_portable}},
};

const char* activation_name(ActivationType type) {
  return type == ActivationType::kInt8 ? "int8" : type == ActivationType::kBF16 ? "bf16" : "fp32";
}

// Why this candidate cannot serve these segments, or empty.
std::string rejection(const Candidate& candidate, const std::vector<Weight>& segments, ActivationType requested,
                      bool has_float_weight) {
  const ActivationType type = candidate.kernels.activation_type;
  if (type == ActivationType::kInt8 && requested == ActivationType::kInt8 && has_float_weight) {
    for (size_t i = 0; i < segments.size(); ++i)
      if (!is_quantized(segments[i].format))
        return concat("segment ", i, " is ", weight_format_name(segments[i].format), ", which has no integer codes");
  }
  const ActivationType wanted =
      requested == ActivationType::kInt8 && has_float_weight ? ActivationType::kBF16 : requested;
  if (type != wanted) return concat("activations are ", activation_name(wanted));
  if (candidate.isa > active_cpu_isa()) return concat("needs ", cpu_isa_name(candidate.isa));
  return "";
}

}  // namespace

KernelChoice select_gemm_kernels(const std::vector<Weight>& segments, ActivationType requested) {
  bool has_float_weight = false;
  for (const Weight& segment : segments) has_float_weight |= !is_quantized(segment.format);
  KernelChoice choice;
  for (const Candidate& candidate : kCandidates) {
    std::string reason = rejection(candidate, segments, requested, has_float_weight);
    if (reason.empty()) {
      if (choice.kernels) {
        reason = "not needed: " + choice.name + " comes first";
      } else {
        choice.kernels = &candidate.kernels;
        choice.name = candidate.name;
        reason =
            concat("chosen (best for ", cpu_isa_name(active_cpu_isa()), "; verified on ", candidate.verified_on, ")");
        if (candidate.kernels.activation_type != requested)
          reason += concat("; ", activation_name(requested), " was asked for, but a segment is not quantised");
      }
    }
    choice.reason += concat(choice.reason.empty() ? "" : "\n", candidate.name, ": ", reason);
  }
  PARTITA_CHECK(choice.kernels, "activations: no kernel fits\n", choice.reason);
  return choice;
}

}  // namespace partita
