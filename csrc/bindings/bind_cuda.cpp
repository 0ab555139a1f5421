#include "bindings/register.h"
#include "core/check.h"
#include "core/cuda_status.h"

namespace py = pybind11;

namespace partita::bindings {
namespace {

py::object text_or_none(const std::string& text) { return text.empty() ? py::object(py::none()) : py::str(text); }

py::dict status_dict() {
  const CudaStatus& status = cuda_status();
  py::dict dict;
  dict["compiled"] = status.is_compiled;
  dict["toolkit"] = text_or_none(status.toolkit);
  dict["targets"] = text_or_none(status.targets);
  dict["driver"] = text_or_none(status.driver);
  dict["reason"] = text_or_none(status.reason);
  py::list devices;
  for (const CudaDevice& device : status.devices) {
    py::dict entry;
    entry["name"] = device.name;
    entry["compute_capability"] = concat(device.compute_capability_major, ".", device.compute_capability_minor);
    entry["multiprocessors"] = device.num_multiprocessors;
    entry["memory_bytes"] = device.memory_bytes;
    devices.append(entry);
  }
  dict["devices"] = devices;
  return dict;
}

}  // namespace

void register_cuda(py::module_& module) {
  module.def("cuda_status", &status_dict,
             "What CUDA offers: compiled (bool), toolkit and targets of the build, driver (CUDA version or None), "
             "reason (why no kernel can run, or None), devices (name, compute_capability, multiprocessors, "
             "memory_bytes).");
}

}  // namespace partita::bindings
