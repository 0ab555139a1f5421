// The packed layouts of the GPU kernels without a GPU, for tests: bytes in, bytes out.
#include <pybind11/stl.h>

#include <cstring>

#include "bindings/register.h"
#include "core/check.h"
#include "gemm/gemm_kernels_gpu.h"

namespace py = pybind11;

namespace partita::bindings {
namespace {

// What pack() of a layout gives, in host memory.
struct HostPackedWeight {
  const PackedLayout* layout = nullptr;
  GpuActivations activations = GpuActivations::kBF16;
  std::vector<std::byte> codes, group_params;
  std::vector<float> channel_scale;
  std::vector<int32_t> channel_zero;
  PackedWeightView view;  // its pointers are set when it is used
};

py::bytes bytes_of(const std::vector<std::byte>& data) {
  return py::bytes(reinterpret_cast<const char*>(data.data()), data.size());
}

HostPackedWeight pack_host_weight(const std::string& layout, const std::string& activations, const std::string& codes,
                                  const std::string& data, int64_t out_features, int64_t in_features,
                                  const std::vector<float>& scales, int64_t group, int64_t group_rows, int common_zero,
                                  const std::vector<uint8_t>& zeros, const std::vector<float>& mins) {
  CanonicalWeight weight;
  weight.codes = parse_weight_codes(codes);
  weight.out_features = out_features;
  weight.in_features = in_features;
  weight.data.assign(data.begin(), data.end());
  weight.scales = scales;
  weight.group = group;
  weight.group_rows = group_rows;
  weight.common_zero = common_zero;
  weight.zeros = zeros;
  weight.mins = mins;
  weight.check("weight");
  HostPackedWeight packed;
  packed.layout = find_packed_layout(layout);
  PARTITA_CHECK(packed.layout, "layout: got '", layout, "', wanted one of packed_layouts_gpu.cpp");
  packed.activations = parse_gpu_activations(activations);
  if (const char* reason = packed.layout->why_not(weight, packed.activations))
    throw_value_error("weight: ", layout, " ", reason);
  const PackedLayout::Sizes sizes = packed.layout->sizes(weight, packed.activations);
  PackedWeightView& view = packed.view;
  const auto padded = [](int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; };
  view.out_features = out_features;
  view.in_features = in_features;
  view.padded_out_features = padded(out_features, packed.layout->channel_multiple);
  view.padded_in_features = padded(in_features, packed.layout->k_multiple);
  packed.codes.resize(sizes.codes);
  packed.group_params.resize(sizes.group_params);
  packed.channel_scale.resize(sizes.has_channel_scale ? static_cast<size_t>(view.padded_out_features) : 0);
  packed.channel_zero.resize(sizes.has_channel_zero ? static_cast<size_t>(view.padded_out_features) : 0);
  const py::gil_scoped_release release;
  packed.layout->pack(weight, packed.activations, packed.codes.data(), packed.group_params.data(),
                      packed.channel_scale.data(), packed.channel_zero.data(), &view);
  return packed;
}

// (data, scales, zeros, mins, group, group_rows, common_zero) of the canonical form.
py::tuple unpack_host_weight(HostPackedWeight& packed) {
  packed.view.codes = packed.codes.data();
  packed.view.group_params = packed.group_params.data();
  packed.view.channel_scale = packed.channel_scale.data();
  packed.view.channel_zero = packed.channel_zero.data();
  CanonicalWeight weight;
  weight.out_features = packed.view.out_features;
  weight.in_features = packed.view.in_features;
  packed.layout->unpack(packed.view, packed.activations, &weight);
  return py::make_tuple(py::bytes(reinterpret_cast<const char*>(weight.data.data()), weight.data.size()), weight.scales,
                        weight.zeros, weight.mins, weight.group, weight.group_rows, weight.common_zero);
}

}  // namespace

void register_packed_layout(py::module_& module) {
  py::class_<HostPackedWeight>(module, "HostPackedWeight", "A weight in a GPU layout, in host memory (tests).")
      .def(py::init(&pack_host_weight), py::arg("layout"), py::arg("activations"), py::arg("codes"), py::arg("data"),
           py::arg("out_features"), py::arg("in_features"), py::arg("scales") = std::vector<float>(),
           py::arg("group") = -1, py::arg("group_rows") = 1, py::arg("common_zero") = 0,
           py::arg("zeros") = std::vector<uint8_t>(), py::arg("mins") = std::vector<float>())
      .def("unpack", &unpack_host_weight)
      .def_property_readonly("codes", [](const HostPackedWeight& packed) { return bytes_of(packed.codes); })
      .def_property_readonly("group_params",
                             [](const HostPackedWeight& packed) { return bytes_of(packed.group_params); })
      .def_readonly("channel_scale", &HostPackedWeight::channel_scale)
      .def_property_readonly("shape",
                             [](const HostPackedWeight& packed) {
                               return py::make_tuple(packed.view.padded_out_features, packed.view.padded_in_features);
                             })
      .def_property_readonly("num_groups", [](const HostPackedWeight& packed) { return packed.view.num_groups; });
}

}  // namespace partita::bindings
