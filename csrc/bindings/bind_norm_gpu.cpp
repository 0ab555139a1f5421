#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "bindings/gpu_array.h"
#include "bindings/register.h"
#include "core/check.h"
#include "norm/norm_gpu.h"

namespace py = pybind11;

namespace partita::bindings {
namespace {

// An array of 2 dimensions whose rows hold at least `width` elements of any type.
void check_rows(const TensorView& rows, int64_t num_rows, int64_t width) {
  PARTITA_CHECK(rows.ndim == 2 && rows.shape[0] == num_rows && rows.shape[1] >= width, rows.name, ": got shape ",
                rows.shape_text(), ", wanted [", num_rows, ", ", width, " or more]");
}

struct PrepareRowsArguments {
  PrepareRowsArguments(const py::object& x_object, const py::object& out_object, const py::object& norm_weight_object,
                       float eps, const py::object& scale_object, const py::object& sum_object, int64_t group,
                       const std::optional<int64_t>& width, float code_scale)
      : gpu(gpu_of({x_object, out_object})), x(*gpu, x_object, "x"), out(*gpu, out_object, "out") {
    PARTITA_CHECK(x->ndim == 2, "x: got shape ", x->shape_text(), ", wanted [T, K]");
    params.num_rows = x->shape[0];
    params.width = width.value_or(x->shape[1]);
    check_rows(x.view(), params.num_rows, params.width);
    check_rows(out.view(), params.num_rows, params.width);
    params.in = x->data;
    params.in_type = x->dtype;
    params.in_stride = x->shape[1];
    params.out = out->data;
    params.out_type = out->dtype;
    params.out_stride = out->shape[1];
    params.norm_eps = eps;
    params.group = group;
    params.code_scale = code_scale;
    if (!norm_weight_object.is_none()) {
      norm_weight.emplace(*gpu, norm_weight_object, "norm_weight");
      params.norm_weight = norm_weight->view().expect(DType::kF32, {params.width}).as<float>();
    }
    const int64_t num_scales = params.num_rows * (group > 0 ? params.width / group : 1);
    const auto check_scales = [&](const TensorView& view, DType type) {
      if (view.dtype != type)
        throw TypeMismatch(concat(view.name, ": got dtype ", dtype_name(view.dtype), ", wanted ", dtype_name(type)));
      PARTITA_CHECK(view.num_elements() == num_scales, view.name, ": got shape ", view.shape_text(),
                    ", wanted one for each ", group > 0 ? "group" : "row", ", ", num_scales);
    };
    if (!scale_object.is_none()) {
      scale.emplace(*gpu, scale_object, "scale");
      check_scales(scale->view(), DType::kF32);
      params.out_scale = scale->view().as<float>();
    }
    if (!sum_object.is_none()) {
      sum.emplace(*gpu, sum_object, "code_sum");
      check_scales(sum->view(), DType::kI32);
      params.out_sum = sum->view().as<int32_t>();
    }
  }

  std::shared_ptr<Gpu> gpu;
  GpuArrayArgument x, out;
  std::optional<GpuArrayArgument> norm_weight, scale, sum;
  PrepareRowsParams params;
};

void prepare(const py::object& x, const py::object& out, const py::object& norm_weight, float eps,
             const py::object& scale, const py::object& sum, int64_t group, const std::optional<int64_t>& width,
             float code_scale, const py::object& stream) {
  const PrepareRowsArguments arguments(x, out, norm_weight, eps, scale, sum, group, width, code_scale);
  const GpuStream gpu_stream = stream_argument(*arguments.gpu, stream);
  const py::gil_scoped_release no_gil;
  prepare_rows(*arguments.gpu, arguments.params, gpu_stream);
}

std::string describe(const py::object& x, const py::object& out, const py::object& norm_weight, float eps,
                     const py::object& scale, const py::object& sum, int64_t group,
                     const std::optional<int64_t>& width) {
  return describe_prepare_rows(PrepareRowsArguments(x, out, norm_weight, eps, scale, sum, group, width, 0).params);
}

void rms_norm_gpu(const py::object& x, const py::object& weight, const py::object& out, float eps, bool add_to_out,
                  const py::object& stream) {
  if (!add_to_out) return prepare(x, out, weight, eps, py::none(), py::none(), 0, std::nullopt, 0, stream);
  const std::shared_ptr<Gpu> gpu = gpu_of({x, weight, out});
  const GpuArrayArgument x_array(*gpu, x, "x"), weight_array(*gpu, weight, "weight"), out_array(*gpu, out, "out");
  PARTITA_CHECK(x_array->ndim == 2, "x: got shape ", x_array->shape_text(), ", wanted [T, H]");
  NormAddGpuParams params;
  params.num_rows = x_array->shape[0];
  params.width = x_array->shape[1];
  params.branch = x_array->data;
  params.branch_type = x_array->dtype;
  params.branch_stride = params.width;
  params.norm_weight = weight_array.view().expect(DType::kF32, {params.width}).as<float>();
  params.norm_eps = eps;
  params.residual = out_array.view().expect(DType::kF32, {params.num_rows, params.width}).as<float>();
  params.residual_stride = params.width;
  const GpuStream gpu_stream = stream_argument(*gpu, stream);
  const py::gil_scoped_release no_gil;
  norm_add_gpu(*gpu, params, gpu_stream);
}

}  // namespace

void register_norm_gpu(py::module_& module) {
  module.def("rms_norm_gpu", &rms_norm_gpu, py::arg("x"), py::arg("weight"), py::arg("out"), py::arg("eps"),
             py::arg("add_to_out"), py::arg("stream"));
  module.def("prepare_rows", &prepare, py::arg("x"), py::arg("out"), py::arg("norm_weight"), py::arg("eps"),
             py::arg("scale"), py::arg("code_sum"), py::arg("group"), py::arg("width"), py::arg("code_scale"),
             py::arg("stream"));
  module.def("describe_prepare_rows", &describe, py::arg("x"), py::arg("out"), py::arg("norm_weight") = py::none(),
             py::arg("eps") = 1e-6f, py::arg("scale") = py::none(), py::arg("code_sum") = py::none(),
             py::arg("group") = 0, py::arg("width") = std::nullopt,
             "The schedule that prepare_rows would choose, with its reason.");
}

}  // namespace partita::bindings
