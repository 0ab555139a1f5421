// One register call per op folder; each bind_<op>.cpp defines its own.
#pragma once

#include <pybind11/pybind11.h>

namespace partita::bindings {

void register_core(pybind11::module_& module);
void register_cuda(pybind11::module_& module);
void register_gpu(pybind11::module_& module);
void register_device_test(pybind11::module_& module);
void register_gemm(pybind11::module_& module);
void register_packed_layout(pybind11::module_& module);
void register_gemm_gpu(pybind11::module_& module);
void register_attention(pybind11::module_& module);
void register_attention_gpu(pybind11::module_& module);
void register_norm(pybind11::module_& module);
void register_activation(pybind11::module_& module);
void register_embedding(pybind11::module_& module);
void register_sampling(pybind11::module_& module);
void register_sampling_gpu(pybind11::module_& module);
void register_program(pybind11::module_& module);
void register_norm_gpu(pybind11::module_& module);
void register_activation_gpu(pybind11::module_& module);
void register_embedding_gpu(pybind11::module_& module);
void register_append_gpu(pybind11::module_& module);
void register_frames(pybind11::module_& module);
void register_lanes(pybind11::module_& module);

}  // namespace partita::bindings
