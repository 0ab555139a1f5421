#include <string>

#include "activation/activation.h"
#include "bindings/array_argument.h"
#include "bindings/register.h"
#include "core/parallel_for.h"

namespace py = pybind11;

namespace partita::bindings {
namespace {

void gated_activation(const py::object& x, const py::object& out, const std::string& activation, int num_threads) {
  const ArrayArgument x_array(x, "x"), out_array(out, "out", /*writable=*/true);
  x_array->expect(DType::kF32, {-1, -1});
  PARTITA_CHECK(x_array->shape[1] % 2 == 0, "x: got shape ", x_array->shape_text(),
                ", wanted [T, 2F]: gate, then up, of equal width");
  GatedActivationParams params;
  params.num_tokens = x_array->shape[0];
  params.width = x_array->shape[1] / 2;
  out_array->expect(DType::kF32, {params.num_tokens, params.width});
  params.in = x_array->as<float>();
  params.in_stride = 2 * params.width;
  params.out = out_array->as<float>();
  params.out_stride = params.width;
  params.activation = parse_gate_activation(activation);
  activation_check(params);
  const py::gil_scoped_release no_gil;
  parallel_for(activation_num_chunks(params), num_threads,
               [&](int64_t chunk, int) { activation_run_chunk(params, chunk); });
}

}  // namespace

void register_activation(py::module_& module) {
  module.def("gated_activation", &gated_activation, py::arg("x"), py::arg("out"), py::arg("activation"),
             py::arg("num_threads"));
}

}  // namespace partita::bindings
