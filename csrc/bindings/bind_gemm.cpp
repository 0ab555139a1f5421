#include <pybind11/stl.h>

#include <optional>

#include "bindings/register.h"
#include "bindings/weight_argument.h"
#include "core/parallel_for.h"
#include "gemm/run_linear.h"

namespace py = pybind11;

namespace partita::bindings {
namespace {

SharedWeight make_weight(const py::object& data, const std::string& format, int64_t out_features, int64_t in_features,
                         const std::optional<std::vector<int32_t>>& row_order) {
  auto bound = std::make_shared<WeightArgument>(WeightArgument{ArrayArgument(data, "data"), Weight{}});
  const TensorView& view = bound->array.view();
  PARTITA_CHECK(view.is_contiguous(), "data: got a strided array of shape ", view.shape_text(),
                ", wanted a contiguous one");
  Weight& weight = bound->weight;
  weight.data = view.as<std::byte>();
  weight.num_bytes = static_cast<size_t>(view.num_elements()) * dtype_bytes(view.dtype);
  weight.format = parse_weight_format(format);
  weight.out_features = out_features;
  weight.in_features = in_features;
  if (row_order) {
    PARTITA_CHECK(!row_order->empty(), "row_order: got no entries, wanted ", out_features, " or None");
    weight.row_order = *row_order;
  }
  weight.check("weight");
  return bound;
}

void dequantize(const WeightArgument& bound, const py::object& out_object, int num_threads) {
  const Weight& weight = bound.weight;
  const ArrayArgument out(out_object, "out", true);
  out->expect(DType::kF32, {weight.out_features, weight.in_features});
  constexpr int64_t kRows = 64;
  const py::gil_scoped_release release;
  parallel_for((weight.out_features + kRows - 1) / kRows, num_threads, [&](int64_t chunk, int) {
    const int64_t end = std::min(weight.out_features, (chunk + 1) * kRows);
    for (int64_t row = chunk * kRows; row < end; ++row)
      weight.dequantize_row(row, out->as<float>() + row * weight.in_features);
  });
}

void dequantize_row(const WeightArgument& bound, int64_t row, const py::object& out_object) {
  const ArrayArgument out(out_object, "out", true);
  out->expect(DType::kF32, {bound.weight.in_features});
  bound.weight.dequantize_row(row, out->as<float>());
}

std::shared_ptr<PackedLinear> pack(const std::vector<SharedWeight>& arguments, const std::string& activations,
                                   int num_threads) {
  const std::vector<Weight> weights = borrowed_weights(arguments);
  const ActivationType type = parse_activation_type(activations);
  const py::gil_scoped_release release;
  return pack_linear(weights, type, num_threads);
}

GateActivation parse_gate(const std::optional<std::string>& gate) {
  if (!gate) return GateActivation::kNone;
  if (*gate == "silu") return GateActivation::kSilu;
  if (*gate == "gelu_tanh") return GateActivation::kGeluTanh;
  throw_value_error("gate: got '", *gate, "', wanted silu, gelu_tanh or None");
}

void run(const PackedLinear& linear, const py::object& x_object, const py::object& out_object,
         const py::object& bias_object, const py::object& norm_weight_object, float norm_eps,
         const std::optional<std::string>& gate, bool add_to_out, int num_threads) {
  LinearEpilogue epilogue;
  epilogue.gate = parse_gate(gate);
  const bool gated = epilogue.gate != GateActivation::kNone;
  PARTITA_CHECK(!gated || linear.out_features % 2 == 0, "gate: got a linear of ", linear.out_features,
                " rows, wanted an even number (gate half, up half)");
  const ArrayArgument x(x_object, "x");
  x->expect(DType::kF32, {-1, linear.in_features});
  const int64_t num_tokens = x->shape[0];
  const int64_t num_outputs = gated ? linear.out_features / 2 : linear.out_features;
  const ArrayArgument out(out_object, "out", true);
  out->expect(DType::kF32, {num_tokens, num_outputs});
  std::optional<ArrayArgument> bias, norm_weight;
  if (!bias_object.is_none()) {
    bias.emplace(bias_object, "bias");
    (*bias)->expect(DType::kF32, {linear.out_features});
    epilogue.bias = (*bias)->as<float>();
  }
  const float* norm = nullptr;
  if (!norm_weight_object.is_none()) {
    norm_weight.emplace(norm_weight_object, "norm_weight");
    (*norm_weight)->expect(DType::kF32, {linear.in_features});
    norm = (*norm_weight)->as<float>();
    PARTITA_CHECK(norm_eps >= 0, "norm_eps: got ", norm_eps, ", wanted a number that is not negative");
  }
  epilogue.out = out->as<float>();
  epilogue.out_stride = num_outputs;
  epilogue.add_to_out = add_to_out;
  const py::gil_scoped_release release;
  run_linear(linear, x->as<float>(), num_tokens, norm, norm_eps, epilogue, num_threads);
}

double bench_linear(const std::vector<std::shared_ptr<PackedLinear>>& linears, int64_t num_tokens, int64_t iterations,
                    int num_threads, const std::optional<std::string>& gate) {
  std::vector<const PackedLinear*> pointers;
  for (const auto& linear : linears) pointers.push_back(linear.get());
  const GateActivation activation = parse_gate(gate);
  const py::gil_scoped_release release;
  return time_linear(pointers, num_tokens, iterations, num_threads, activation);
}

double bench_prepare_rows(const PackedLinear& linear, int64_t num_tokens, int64_t iterations) {
  const py::gil_scoped_release release;
  return time_prepare_rows(linear, num_tokens, iterations);
}

}  // namespace

void register_gemm(py::module_& module) {
  py::class_<WeightArgument, SharedWeight>(module, "Weight")
      .def(py::init(&make_weight), py::arg("data"), py::arg("format"), py::arg("out_features"), py::arg("in_features"),
           py::arg("row_order") = py::none())
      .def("dequantize", &dequantize, py::arg("out"), py::arg("num_threads") = 1)
      .def("dequantize_row", &dequantize_row, py::arg("row"), py::arg("out"))
      .def_property_readonly("format", [](const WeightArgument& w) { return weight_format_name(w.weight.format); })
      .def_property_readonly("out_features", [](const WeightArgument& w) { return w.weight.out_features; })
      .def_property_readonly("in_features", [](const WeightArgument& w) { return w.weight.in_features; })
      .def_property_readonly("num_bytes", [](const WeightArgument& w) { return w.weight.num_bytes; });
  py::class_<PackedLinear, std::shared_ptr<PackedLinear>>(module, "PackedLinear")
      .def_readonly("out_features", &PackedLinear::out_features)
      .def_readonly("in_features", &PackedLinear::in_features)
      .def_readonly("kernel", &PackedLinear::kernel)
      .def_readonly("reason", &PackedLinear::reason)
      .def_property_readonly("packed_bytes", &PackedLinear::packed_bytes)
      .def_property_readonly("prepared_row_bytes", &PackedLinear::prepared_row_bytes)
      .def("run", &run, py::arg("x"), py::arg("out"), py::arg("bias") = py::none(), py::arg("norm_weight") = py::none(),
           py::arg("norm_eps") = 1e-5f, py::arg("gate") = py::none(), py::arg("add_to_out") = false,
           py::arg("num_threads") = 1);
  module.def("pack_linear", &pack, py::arg("weights"), py::arg("activations"), py::arg("num_threads") = 0);
  module.def("bench_linear", &bench_linear, py::arg("linears"), py::arg("num_tokens"), py::arg("iterations"),
             py::arg("num_threads") = 0, py::arg("gate") = py::none());
  module.def("bench_prepare_rows", &bench_prepare_rows, py::arg("linear"), py::arg("num_tokens"),
             py::arg("iterations"));
}

}  // namespace partita::bindings
