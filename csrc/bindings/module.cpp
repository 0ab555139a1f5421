#include "bindings/register.h"
#include "core/check.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, module) {
  module.doc() = "Partita's kernels, programs and lanes. runtime.ops is the documented face of the ops.";
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const partita::TypeMismatch& error) {
      PyErr_SetString(PyExc_TypeError, error.what());
    }
  });
  using namespace partita::bindings;
  register_core(module);
  register_cuda(module);
  register_gpu(module);
  register_device_test(module);
  register_gemm(module);
  register_packed_layout(module);
  register_gemm_gpu(module);
  register_attention(module);
  register_attention_gpu(module);
  register_norm(module);
  register_activation(module);
  register_embedding(module);
  register_sampling(module);
  register_sampling_gpu(module);
  register_program(module);
  register_norm_gpu(module);
  register_activation_gpu(module);
  register_embedding_gpu(module);
  register_append_gpu(module);
  register_frames(module);
  register_lanes(module);
}
