#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <vector>

#include "bindings/gpu_array.h"
#include "bindings/register.h"
#include "core/check.h"
#include "core/gpu_library.h"
#include "simt/tests/device_test.h"

namespace py = pybind11;

namespace partita::bindings {
namespace {

void run_device_test(const std::string& name, const std::vector<py::object>& inputs, const py::object& output,
                     const std::vector<int64_t>& numbers) {
  const std::shared_ptr<Gpu> gpu = gpu_of({output});
  PARTITA_CHECK(inputs.size() <= DeviceTestParams::kMaxInputs, "inputs: got ", inputs.size(), ", wanted at most ",
                DeviceTestParams::kMaxInputs);
  PARTITA_CHECK(numbers.size() <= DeviceTestParams::kMaxNumbers, "numbers: got ", numbers.size(), ", wanted at most ",
                DeviceTestParams::kMaxNumbers);
  const DeviceTestKernel* kernel = nullptr;
  for (const DeviceTestKernel* entry : kernels_of(*gpu).all<DeviceTestKernel>())
    if (name == entry->info.name) kernel = entry;
  PARTITA_CHECK(kernel != nullptr, "name: got '", name, "', wanted a kernel of the family device_test");
  DeviceTestParams params{};
  for (size_t i = 0; i < inputs.size(); ++i) params.inputs[i] = GpuArrayArgument(*gpu, inputs[i], "inputs")->data;
  params.output = GpuArrayArgument(*gpu, output, "output")->data;
  for (size_t i = 0; i < numbers.size(); ++i) params.numbers[i] = numbers[i];
  const py::gil_scoped_release no_gil;
  kernel->launch(params, gpu->default_stream());
  gpu->synchronize(gpu->default_stream());
}

std::vector<std::string> device_test_kernels(const Gpu& gpu) {
  std::vector<std::string> names;
  for (const DeviceTestKernel* entry : kernels_of(gpu).all<DeviceTestKernel>()) names.emplace_back(entry->info.name);
  return names;
}

}  // namespace

void register_device_test(py::module_& module) {
  module.def("run_device_test", &run_device_test, py::arg("name"), py::arg("inputs"), py::arg("output"),
             py::arg("numbers") = std::vector<int64_t>{},
             "Runs one of the kernels of csrc/simt/tests to its end: arrays and numbers as its source says.");
  module.def("device_test_kernels", &device_test_kernels, py::arg("gpu"), "Their names.");
}

}  // namespace partita::bindings
