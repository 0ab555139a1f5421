// out = f(gate) * up over [T, 2F] -> [T, F] fp32; one thread makes kPerThread neighbours of one row.
// Bound by memory: 12 bytes move for each element of `out`.
#include "activation/activation_cuda.h"
#include "device/vector.cuh"

namespace partita {
namespace {

constexpr int kThreadsPerCta = 256;
constexpr int kMaxCtas = 1 << 16;

// As in activation/cpu/gated_kernel.h. expf overflows to infinity, which gives the right 0.
template <GateActivation kActivation>
__device__ __forceinline__ float gated(float gate, float up) {
  const float z = kActivation == GateActivation::kSilu
                      ? gate
                      : 2.0f * 0.7978845608028654f * (gate + 0.044715f * (gate * gate * gate));
  return gate / (1.0f + expf(-z)) * up;
}

template <GateActivation kActivation, int kPerThread>
__global__ void __launch_bounds__(kThreadsPerCta)
    gated_activation_kernel(const __grid_constant__ GatedActivationParams params) {
  const int64_t per_row = params.width / kPerThread;
  const int64_t total = params.num_tokens * per_row;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreadsPerCta;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreadsPerCta + threadIdx.x; i < total; i += stride) {
    const int64_t token = i / per_row;
    const int64_t column = (i - token * per_row) * kPerThread;
    const float* gate = params.in + token * params.in_stride + column;
    float* out = params.out + token * params.out_stride + column;
    if constexpr (kPerThread == 4) {
      const float4 g = device::load_read_only_4(gate);
      const float4 u = device::load_read_only_4(gate + params.width);
      device::store_4(out, {gated<kActivation>(g.x, u.x), gated<kActivation>(g.y, u.y), gated<kActivation>(g.z, u.z),
                            gated<kActivation>(g.w, u.w)});
    } else {
      out[0] = gated<kActivation>(gate[0], gate[params.width]);
    }
  }
}

template <GateActivation kActivation, int kPerThread>
cudaError_t launch(const GatedActivationParams& params, cudaStream_t stream) {
  const int64_t total = params.num_tokens * (params.width / kPerThread);
  const int64_t wanted = (total + kThreadsPerCta - 1) / kThreadsPerCta;
  const unsigned num_ctas = static_cast<unsigned>(wanted < kMaxCtas ? wanted : kMaxCtas);
  gated_activation_kernel<kActivation, kPerThread><<<num_ctas, kThreadsPerCta, 0, stream>>>(params);
  return cudaGetLastError();
}

bool is_multiple_of_16(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

}  // namespace

int launch_gated_activation(const GatedActivationParams& params, void* stream_pointer) {
  if (params.num_tokens == 0) return cudaSuccess;
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const bool in_fours = params.width % 4 == 0 && params.in_stride % 4 == 0 && params.out_stride % 4 == 0 &&
                        is_multiple_of_16(params.in) && is_multiple_of_16(params.out);
  if (params.activation == GateActivation::kSilu)
    return in_fours ? launch<GateActivation::kSilu, 4>(params, stream)
                    : launch<GateActivation::kSilu, 1>(params, stream);
  return in_fours ? launch<GateActivation::kGeluTanh, 4>(params, stream)
                  : launch<GateActivation::kGeluTanh, 1>(params, stream);
}

}  // namespace partita
