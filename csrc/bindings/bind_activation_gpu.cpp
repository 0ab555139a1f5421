#include <optional>
#include <string>

#include "activation/activation_gpu.h"
#include "bindings/gpu_array.h"
#include "bindings/register.h"
#include "core/check.h"

namespace py = pybind11;

namespace partita::bindings {
namespace {

void gated_activation(const py::object& x, const py::object& out, const std::string& activation,
                      const py::object& scale, const py::object& sum, int64_t group, float code_scale,
                      const py::object& stream) {
  const std::shared_ptr<Gpu> gpu = gpu_of({x, out});
  const GpuArrayArgument x_array(*gpu, x, "x"), out_array(*gpu, out, "out");
  PARTITA_CHECK(x_array->ndim == 2 && x_array->shape[1] % 2 == 0, "x: got shape ", x_array->shape_text(),
                ", wanted [T, 2F]: gate, then up, of equal width");
  GatedActivationGpuParams params;
  params.num_tokens = x_array->shape[0];
  params.width = x_array->shape[1] / 2;
  params.in = x_array->data;
  params.in_type = x_array->dtype;
  params.in_stride = 2 * params.width;
  params.out = out_array.view().expect(out_array->dtype, {params.num_tokens, params.width}).data;
  params.out_type = out_array->dtype;
  params.out_stride = params.width;
  params.group = group;
  params.code_scale = code_scale;
  params.activation = parse_gate_activation(activation);
  const int64_t num_scales = params.num_tokens * (group > 0 ? params.width / group : 1);
  std::optional<GpuArrayArgument> scale_array, sum_array;
  if (!scale.is_none()) {
    scale_array.emplace(*gpu, scale, "scale");
    params.out_scale = scale_array->view().as<float>();
    PARTITA_CHECK((*scale_array)->dtype == DType::kF32 && (*scale_array)->num_elements() == num_scales, "scale: got ",
                  dtype_name((*scale_array)->dtype), " ", (*scale_array)->shape_text(), ", wanted float32, ",
                  num_scales, " of them");
  }
  if (!sum.is_none()) {
    sum_array.emplace(*gpu, sum, "code_sum");
    params.out_sum = sum_array->view().as<int32_t>();
    PARTITA_CHECK((*sum_array)->dtype == DType::kI32 && (*sum_array)->num_elements() == num_scales, "code_sum: got ",
                  dtype_name((*sum_array)->dtype), " ", (*sum_array)->shape_text(), ", wanted int32, ", num_scales,
                  " of them");
  }
  const GpuStream gpu_stream = stream_argument(*gpu, stream);
  const py::gil_scoped_release no_gil;
  gated_activation_gpu(*gpu, params, gpu_stream);
}

}  // namespace

void register_activation_gpu(py::module_& module) {
  module.def("gated_activation_gpu", &gated_activation, py::arg("x"), py::arg("out"), py::arg("activation"),
             py::arg("scale"), py::arg("code_sum"), py::arg("group"), py::arg("code_scale"), py::arg("stream"));
}

}  // namespace partita::bindings
