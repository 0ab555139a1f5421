// Wrappers that work on one thread's registers: bits, packed halves, conversions, approximations. numbers[0]: how many
// elements; one thread for each.
#include "device/e4m3_bits.cuh"
#include "device/ptx_bits.cuh"
#include "device/ptx_convert.cuh"
#include "device/ptx_half.cuh"
#include "device/ptx_math.cuh"
#include "simt/tests/device_test.h"

namespace partita {
namespace {

constexpr unsigned kThreadsPerCta = 128;

template <typename T>
__device__ __forceinline__ const T* input(const DeviceTestParams& params, int i) {
  return static_cast<const T*>(params.inputs[i]);
}

__device__ __forceinline__ int64_t element() { return static_cast<int64_t>(blockIdx.x) * kThreadsPerCta + threadIdx.x; }

// inputs: a, b, c [n] u32; output [n, 13] u32
__global__ void bits_kernel(const __grid_constant__ DeviceTestParams params) {
  const int64_t i = element();
  if (i >= params.numbers[0]) return;
  const uint32_t a = input<uint32_t>(params, 0)[i], b = input<uint32_t>(params, 1)[i],
                 c = input<uint32_t>(params, 2)[i];
  uint32_t* out = static_cast<uint32_t*>(params.output) + 13 * i;
  out[0] = device::lop3<0xea>(a, b, c);  // (a & b) | c
  out[1] = device::lop3<0x96>(a, b, c);  // a ^ b ^ c
  out[2] = device::lop3<0x35>(a, b, c);
  out[3] = device::prmt(a, b, c);
  out[4] = device::shf_r(a, b, c);
  out[5] = static_cast<uint32_t>(device::dp4a_s8(a, b, static_cast<int32_t>(c)));
  out[6] = static_cast<uint32_t>(device::dp4a_u8s8(a, b, static_cast<int32_t>(c)));
  out[7] = static_cast<uint32_t>(__popc(a));
  out[8] = static_cast<uint32_t>(__ffs(static_cast<int>(a)));
  out[9] = static_cast<uint32_t>(__clz(static_cast<int>(a)));
  out[10] = __brev(a);
  out[11] = __umulhi(a, b);
  out[12] = static_cast<uint32_t>(__float2int_rn(__uint_as_float(a)));
}

// inputs: a, b, c [n] u32; output [n, 12] u32
__global__ void half_kernel(const __grid_constant__ DeviceTestParams params) {
  const int64_t i = element();
  if (i >= params.numbers[0]) return;
  const uint32_t a = input<uint32_t>(params, 0)[i], b = input<uint32_t>(params, 1)[i],
                 c = input<uint32_t>(params, 2)[i];
  uint32_t* out = static_cast<uint32_t*>(params.output) + 12 * i;
  out[0] = device::fma_f16x2(a, b, c);
  out[1] = device::add_f16x2(a, b);
  out[2] = device::sub_f16x2(a, b);
  out[3] = device::mul_f16x2(a, b);
  out[4] = device::min_f16x2(a, b);
  out[5] = device::max_f16x2(a, b);
  out[6] = device::fma_bf16x2(a, b, c);
  out[7] = device::add_bf16x2(a, b);
  out[8] = device::sub_bf16x2(a, b);
  out[9] = device::mul_bf16x2(a, b);
  out[10] = device::min_bf16x2(a, b);
  out[11] = device::max_bf16x2(a, b);
}

// inputs: lo, hi [n] f32; output [n, 5] u32: f16x2, bf16x2, e4m3x2, f16 and bf16 of lo
__global__ void narrow_kernel(const __grid_constant__ DeviceTestParams params) {
  const int64_t i = element();
  if (i >= params.numbers[0]) return;
  const float lo = input<float>(params, 0)[i], hi = input<float>(params, 1)[i];
  uint32_t* out = static_cast<uint32_t*>(params.output) + 5 * i;
  out[0] = device::f32x2_to_f16x2(lo, hi);
  out[1] = device::f32x2_to_bf16x2(lo, hi);
  out[2] = device::f32x2_to_e4m3x2(lo, hi);
  out[3] = device::f32_to_f16(lo);
  out[4] = device::f32_to_bf16(lo);
}

// inputs: codes [n] u16; output [n, 4] u32: the bits of f16 and bf16 widened, the two e4m3 as f16x2, and the same from
// the bits that machines without the conversion use, less their factor of 2^8
__global__ void widen_kernel(const __grid_constant__ DeviceTestParams params) {
  const int64_t i = element();
  if (i >= params.numbers[0]) return;
  const uint16_t code = input<uint16_t>(params, 0)[i];
  uint32_t* out = static_cast<uint32_t*>(params.output) + 4 * i;
  out[0] = __float_as_uint(device::f16_to_f32(code));
  out[1] = __float_as_uint(device::bf16_to_f32(code));
  out[2] = device::e4m3x2_to_f16x2(code);
  // The low bytes hold what must not matter.
  out[3] = device::e4m3_high_bytes_to_scaled_f16x2((code & 0xffu) << 8 | (code & 0xff00u) << 16 | 0x00ff00ffu);
}

// inputs: x [n] f32; output [n, 5] f32
__global__ void math_kernel(const __grid_constant__ DeviceTestParams params) {
  const int64_t i = element();
  if (i >= params.numbers[0]) return;
  const float x = input<float>(params, 0)[i];
  float* out = static_cast<float*>(params.output) + 5 * i;
  out[0] = device::ex2_approx(x);
  out[1] = device::lg2_approx(fabsf(x));
  out[2] = device::rcp_approx(x);
  out[3] = device::rsqrt_approx(fabsf(x));
  out[4] = device::tanh_approx(x);
}

template <void (*kKernel)(DeviceTestParams)>
void launch(const DeviceTestParams& params, void* stream) {
  const auto num_ctas = static_cast<unsigned>((params.numbers[0] + kThreadsPerCta - 1) / kThreadsPerCta);
  device::launch("device_test arithmetic", kKernel, {num_ctas}, {kThreadsPerCta}, 0, stream, params);
}

const KernelRegistration<DeviceTestKernel> kBits({{"bits", ""}, &launch<bits_kernel>});
const KernelRegistration<DeviceTestKernel> kHalf({{"half", ""}, &launch<half_kernel>});
const KernelRegistration<DeviceTestKernel> kNarrow({{"narrow", ""}, &launch<narrow_kernel>});
const KernelRegistration<DeviceTestKernel> kWiden({{"widen", ""}, &launch<widen_kernel>});
const KernelRegistration<DeviceTestKernel> kMath({{"math", ""}, &launch<math_kernel>});

}  // namespace
}  // namespace partita
