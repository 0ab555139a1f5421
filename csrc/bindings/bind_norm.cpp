#include "bindings/array_argument.h"
#include "bindings/register.h"
#include "core/parallel_for.h"
#include "norm/norm.h"

namespace py = pybind11;

namespace partita::bindings {
namespace {

void rms_norm(const py::object& x, const py::object& weight, const py::object& out, float eps, bool add_to_out,
              int num_threads) {
  const ArrayArgument x_array(x, "x"), weight_array(weight, "weight"), out_array(out, "out", /*writable=*/true);
  x_array->expect(DType::kF32, {-1, -1});
  RmsNormParams params;
  params.num_tokens = x_array->shape[0];
  params.hidden = x_array->shape[1];
  weight_array->expect(DType::kF32, {params.hidden});
  out_array->expect(DType::kF32, {params.num_tokens, params.hidden});
  params.in = x_array->as<float>();
  params.in_stride = params.out_stride = params.hidden;
  params.weight = weight_array->as<float>();
  params.eps = eps;
  params.out = out_array->as<float>();
  params.add_to_out = add_to_out;
  norm_check(params);
  const py::gil_scoped_release no_gil;
  parallel_for(norm_num_chunks(params), num_threads, [&](int64_t chunk, int) { norm_run_chunk(params, chunk); });
}

}  // namespace

void register_norm(py::module_& module) {
  module.def("rms_norm", &rms_norm, py::arg("x"), py::arg("weight"), py::arg("out"), py::arg("eps"),
             py::arg("add_to_out"), py::arg("num_threads"));
}

}  // namespace partita::bindings
