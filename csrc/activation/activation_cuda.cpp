#include "activation/activation_cuda.h"

#include "core/cuda_status.h"

#if defined(PARTITA_WITH_CUDA)

#include <cstddef>

#include "core/cuda_check.h"

namespace partita {
namespace {

// A piece of device memory that frees itself.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t bytes) { PARTITA_CUDA_CHECK(cudaMalloc(&data_, bytes)); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer() { cudaFree(data_); }
  float* data() const { return static_cast<float*>(data_); }

 private:
  void* data_ = nullptr;
};

}  // namespace

void run_gated_activation_on_gpu(const GatedActivationParams& params) {
  require_cuda("gated_activation");
  activation_check(params);
  if (params.num_tokens == 0) return;
  const size_t out_row_bytes = static_cast<size_t>(params.width) * sizeof(float);
  const size_t in_row_bytes = 2 * out_row_bytes;
  const size_t num_tokens = static_cast<size_t>(params.num_tokens);
  const DeviceBuffer in(num_tokens * in_row_bytes), out(num_tokens * out_row_bytes);
  PARTITA_CUDA_CHECK(cudaMemcpy2D(in.data(), in_row_bytes, params.in, params.in_stride * sizeof(float), in_row_bytes,
                                  num_tokens, cudaMemcpyHostToDevice));
  GatedActivationParams on_device = params;
  on_device.in = in.data();
  on_device.in_stride = 2 * params.width;
  on_device.out = out.data();
  on_device.out_stride = params.width;
  PARTITA_CUDA_CHECK(static_cast<cudaError_t>(launch_gated_activation(on_device, nullptr)));
  PARTITA_CUDA_CHECK(cudaMemcpy2D(params.out, params.out_stride * sizeof(float), out.data(), out_row_bytes,
                                  out_row_bytes, num_tokens, cudaMemcpyDeviceToHost));
}

}  // namespace partita

#else

namespace partita {

void run_gated_activation_on_gpu(const GatedActivationParams&) {
  require_cuda("gated_activation");  // says that this build has none
}

}  // namespace partita

#endif
