#include <pybind11/stl.h>

#include <cstring>
#include <optional>

#include "bindings/array_argument.h"
#include "bindings/gpu_array.h"
#include "bindings/gpu_linear.h"
#include "bindings/register.h"
#include "bindings/weight_argument.h"
#include "core/check.h"
#include "gemm/canonical_weight.h"
#include "gemm/gemm_gpu.h"

namespace py = pybind11;

namespace partita::bindings {
namespace {

// The elements of a contiguous host array as bytes or numbers; None: empty.
template <typename T>
std::vector<T> copied(const py::object& object, const char* name, std::optional<DType> dtype) {
  if (object.is_none()) return {};
  const ArrayArgument array(object, name);
  PARTITA_CHECK(!dtype || array->dtype == *dtype, name, ": got dtype ", dtype_name(array->dtype), ", wanted ",
                dtype ? dtype_name(*dtype) : "");
  PARTITA_CHECK(array->is_contiguous(), name, ": got a strided array, wanted a contiguous one");
  const size_t bytes = static_cast<size_t>(array->num_elements()) * dtype_bytes(array->dtype);
  std::vector<T> values(bytes / sizeof(T));
  std::memcpy(values.data(), array->as<std::byte>(), bytes);
  return values;
}

template <typename T>
py::bytes bytes_of(const std::vector<T>& values) {
  return py::bytes(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

std::shared_ptr<CanonicalWeight> make_canonical(const std::string& codes, const py::object& data, int64_t out_features,
                                                int64_t in_features, int64_t group, const py::object& scales,
                                                const py::object& zeros, int common_zero, const py::object& mins,
                                                const py::object& sub_scales, const py::object& input_order,
                                                int64_t group_rows) {
  auto weight = std::make_shared<CanonicalWeight>();
  weight->codes = parse_weight_codes(codes);
  weight->out_features = out_features;
  weight->in_features = in_features;
  weight->data = copied<uint8_t>(data, "data", std::nullopt);
  weight->group = group;
  weight->group_rows = group_rows;
  weight->scales = copied<float>(scales, "scales", DType::kF32);
  weight->zeros = copied<uint8_t>(zeros, "zeros", DType::kU8);
  weight->common_zero = common_zero;
  weight->mins = copied<float>(mins, "mins", DType::kF32);
  weight->sub_scales = copied<uint8_t>(sub_scales, "sub_scales", DType::kU8);
  weight->input_order = copied<int32_t>(input_order, "input_order", DType::kI32);
  weight->check("weight");
  return weight;
}

void dequantize(const CanonicalWeight& weight, const py::object& out_object) {
  const ArrayArgument out(out_object, "out", true);
  out->expect(DType::kF32, {weight.out_features, weight.in_features});
  for (int64_t row = 0; row < weight.out_features; ++row)
    weight.dequantize_row(row, out->as<float>() + row * weight.in_features);
}

BoundLinear pack(std::shared_ptr<Gpu> gpu, const py::list& weights, const std::string& activations,
                 bool batch_invariant, bool interleaves_gate, bool quantises_output,
                 const std::string& selection_table) {
  PARTITA_CHECK(gpu != nullptr, "gpu: got none");
  GpuPackOptions options;
  options.activations = parse_gpu_activations(activations);
  options.batch_invariant = batch_invariant;
  options.interleaves_gate = interleaves_gate;
  options.quantises_output = quantises_output;
  options.selection_table = selection_table;
  std::vector<CanonicalWeight> segments;
  for (const py::handle& weight : weights) {
    if (py::isinstance<CanonicalWeight>(weight))
      segments.push_back(weight.cast<const CanonicalWeight&>());
    else if (py::isinstance<WeightArgument>(weight))
      segments.push_back(canonical_from(weight.cast<const WeightArgument&>().weight));
    else
      throw TypeMismatch(
          concat("weights: got ", Py_TYPE(weight.ptr())->tp_name, ", wanted Weight or CanonicalWeight objects"));
  }
  const py::gil_scoped_release release;
  return {gpu, pack_linear_gpu(gpu, std::move(segments), options)};
}

GateActivation parse_gate(const std::optional<std::string>& gate) {
  if (!gate) return GateActivation::kNone;
  if (*gate == "silu") return GateActivation::kSilu;
  if (*gate == "gelu_tanh") return GateActivation::kGeluTanh;
  throw_value_error("gate: got '", *gate, "', wanted silu, gelu_tanh or None");
}

void run(const BoundLinear& bound, const py::object& x_object, const py::object& out_object,
         const py::object& workspace_object, const py::object& x_scale_object, const py::object& x_sum_object,
         const py::object& bias_object, const std::optional<std::string>& gate, bool add_to_out, float out_code_scale,
         const py::object& out_scale_object, const py::object& out_sum_object, int num_ctas,
         const py::object& stream_object) {
  const GpuPackedLinear& linear = *bound.linear;
  GpuLinearParams params;
  params.gate = parse_gate(gate);
  params.add_to_out = add_to_out;
  params.num_ctas = num_ctas;
  const GpuArrayArgument x(*bound.gpu, x_object, "x"), out(*bound.gpu, out_object, "out"),
      workspace(*bound.gpu, workspace_object, "workspace");
  // Rows may be longer than the linear needs: what lies behind is left alone.
  x->expect(gpu_activation_dtype(linear.activations), {-1, -1});
  PARTITA_CHECK(x->shape[1] >= linear.in_features, "x: got rows of ", x->shape[1],
                ", wanted in_features = ", linear.in_features);
  params.x = x->data;
  params.num_tokens = x->shape[0];
  params.x_stride = x->shape[1];
  const int64_t outputs = params.gate == GateActivation::kNone ? linear.out_features : linear.out_features / 2;
  out->expect(out->dtype, {params.num_tokens, -1});
  PARTITA_CHECK(out->shape[1] >= outputs, "out: got rows of ", out->shape[1], ", wanted ", outputs);
  params.out = out->data;
  params.out_type = out->dtype;
  params.out_stride = out->shape[1];
  const size_t workspace_bytes = static_cast<size_t>(workspace->num_elements()) * dtype_bytes(workspace->dtype);
  PARTITA_CHECK(workspace_bytes >= linear.workspace_bytes(params.num_tokens), "workspace: got ", workspace_bytes,
                " bytes, wanted ", linear.workspace_bytes(params.num_tokens));
  params.workspace = static_cast<std::byte*>(workspace->data);
  std::optional<GpuArrayArgument> x_scale, x_sum, bias;
  if (!x_scale_object.is_none()) {
    x_scale.emplace(*bound.gpu, x_scale_object, "x_scale");
    PARTITA_CHECK(
        (*x_scale)->dtype == DType::kF32 && (*x_scale)->ndim >= 1 && (*x_scale)->shape[0] == params.num_tokens,
        "x_scale: got ", dtype_name((*x_scale)->dtype), " ", (*x_scale)->shape_text(),
        ", wanted float32, a row for each of ", params.num_tokens, " tokens");
    params.x_scale = static_cast<const float*>((*x_scale)->data);
  }
  if (!x_sum_object.is_none()) {
    x_sum.emplace(*bound.gpu, x_sum_object, "x_sum");
    (*x_sum)->expect(DType::kI32, {params.num_tokens});
    params.x_sum = static_cast<const int32_t*>((*x_sum)->data);
  }
  if (!bias_object.is_none()) {
    bias.emplace(*bound.gpu, bias_object, "bias");
    (*bias)->expect(DType::kF32, {linear.out_features});
    params.bias = static_cast<const float*>((*bias)->data);
  }
  params.out_code_scale = out_code_scale;
  std::optional<GpuArrayArgument> out_scale, out_sum;
  if (!out_scale_object.is_none()) {
    out_scale.emplace(*bound.gpu, out_scale_object, "out_scale");
    (*out_scale)->expect(DType::kF32, {params.num_tokens});
    params.out_scale = static_cast<float*>((*out_scale)->data);
  }
  if (!out_sum_object.is_none()) {
    out_sum.emplace(*bound.gpu, out_sum_object, "out_sum");
    (*out_sum)->expect(DType::kI32, {params.num_tokens});
    params.out_sum = static_cast<int32_t*>((*out_sum)->data);
  }
  const GpuStream stream = stream_argument(*bound.gpu, stream_object);
  const py::gil_scoped_release release;
  linear.run(params, stream);
}

}  // namespace

void register_gemm_gpu(py::module_& module) {
  py::class_<CanonicalWeight, std::shared_ptr<CanonicalWeight>>(
      module, "CanonicalWeight", "A matrix as it is: codes, scales, zeros or mins, before any packing.")
      .def(py::init(&make_canonical), py::arg("codes"), py::arg("data"), py::arg("out_features"),
           py::arg("in_features"), py::arg("group") = -1, py::arg("scales") = py::none(), py::arg("zeros") = py::none(),
           py::arg("common_zero") = 0, py::arg("mins") = py::none(), py::arg("sub_scales") = py::none(),
           py::arg("input_order") = py::none(), py::arg("group_rows") = 1)
      .def_static(
          "of", [](const WeightArgument& weight) { return canonical_from(weight.weight); }, py::arg("weight"))
      .def("dequantize", &dequantize, py::arg("out"))
      .def_property_readonly("codes", [](const CanonicalWeight& w) { return std::string(weight_codes_name(w.codes)); })
      .def_readonly("out_features", &CanonicalWeight::out_features)
      .def_readonly("in_features", &CanonicalWeight::in_features)
      .def_readonly("group", &CanonicalWeight::group)
      .def_readonly("common_zero", &CanonicalWeight::common_zero)
      .def_property_readonly("data", [](const CanonicalWeight& w) { return bytes_of(w.data); })
      .def_property_readonly("scales", [](const CanonicalWeight& w) { return bytes_of(w.scales); })
      .def_property_readonly("zeros", [](const CanonicalWeight& w) { return bytes_of(w.zeros); })
      .def_property_readonly("mins", [](const CanonicalWeight& w) { return bytes_of(w.mins); })
      .def_property_readonly("sub_scales", [](const CanonicalWeight& w) { return bytes_of(w.sub_scales); });
  py::class_<BoundLinear>(module, "GpuPackedLinear", "A linear layer in a Gpu's memory.")
      .def_property_readonly("out_features", [](const BoundLinear& b) { return b.linear->out_features; })
      .def_property_readonly("in_features", [](const BoundLinear& b) { return b.linear->in_features; })
      .def_property_readonly(
          "activations", [](const BoundLinear& b) { return std::string(gpu_activations_name(b.linear->activations)); })
      .def_property_readonly("kernel", [](const BoundLinear& b) { return b.linear->kernel; })
      .def_property_readonly("reason", [](const BoundLinear& b) { return b.linear->reason; })
      .def_property_readonly("packed_bytes", [](const BoundLinear& b) { return b.linear->packed_bytes(); })
      .def_property_readonly("num_parts", [](const BoundLinear& b) { return b.linear->num_parts(); })
      .def(
          "workspace_bytes", [](const BoundLinear& b, int64_t tokens) { return b.linear->workspace_bytes(tokens); },
          py::arg("max_tokens"))
      .def(
          "describe_choice", [](const BoundLinear& b, int64_t tokens) { return b.linear->describe_choice(tokens); },
          py::arg("num_tokens"))
      .def(
          "unpack", [](const BoundLinear& b, int part) { return b.linear->unpack(part); }, py::arg("part") = 0)
      .def("run", &run, py::arg("x"), py::arg("out"), py::arg("workspace"), py::arg("x_scale") = py::none(),
           py::arg("x_sum") = py::none(), py::arg("bias") = py::none(), py::arg("gate") = py::none(),
           py::arg("add_to_out") = false, py::arg("out_code_scale") = 0.0f, py::arg("out_scale") = py::none(),
           py::arg("out_sum") = py::none(), py::arg("num_ctas") = 0, py::arg("stream") = py::none());
  module.def("pack_linear_gpu", &pack, py::arg("gpu"), py::arg("weights"), py::arg("activations"),
             py::arg("batch_invariant") = false, py::arg("interleaves_gate") = false,
             py::arg("quantises_output") = false, py::arg("selection_table") = std::string());
}

}  // namespace partita::bindings
