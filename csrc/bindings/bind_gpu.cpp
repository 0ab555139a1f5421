#include <pybind11/stl.h>

#include <cstring>
#include <string>

#include "bindings/array_argument.h"
#include "bindings/gpu_array.h"
#include "bindings/register.h"
#include "core/check.h"
#include "core/cuda_status.h"
#include "core/gpu_library.h"

namespace py = pybind11;

namespace partita::bindings {

GpuArray::GpuArray(std::shared_ptr<Gpu> gpu, std::vector<int64_t> shape, DType dtype) {
  PARTITA_CHECK(shape.size() <= TensorView::kMaxDims, "shape: got ", shape.size(), " dimensions, wanted at most ",
                TensorView::kMaxDims);
  view_.dtype = dtype;
  view_.ndim = static_cast<int>(shape.size());
  int64_t running = 1;
  for (int d = view_.ndim - 1; d >= 0; --d) {
    PARTITA_CHECK(shape[d] >= 0, "shape: got a negative size ", shape[d]);
    view_.shape[d] = shape[d];
    view_.strides[d] = running;
    running *= shape[d];
  }
  // One element more than nothing, so that an empty array has an address.
  buffer_ = GpuBuffer(std::move(gpu), std::max<size_t>(running * dtype_bytes(dtype), 1), "GpuArray");
  view_.data = buffer_.data();
}

void GpuArray::upload(py::handle host) {
  const ArrayArgument source(host, "host");
  std::vector<int64_t> sizes(view_.shape.begin(), view_.shape.begin() + view_.ndim);
  PARTITA_CHECK(source->num_elements() == view_.num_elements() && source->ndim == view_.ndim, "host: got shape ",
                source->shape_text(), ", wanted ", view_.shape_text());
  for (int d = 0; d < view_.ndim; ++d)
    PARTITA_CHECK(source->shape[d] == view_.shape[d], "host: got shape ", source->shape_text(), ", wanted ",
                  view_.shape_text());
  PARTITA_CHECK(source->dtype == view_.dtype, "host: got dtype ", dtype_name(source->dtype), ", wanted ",
                dtype_name(view_.dtype));
  PARTITA_CHECK(source->is_contiguous(), "host: got a strided array, wanted a contiguous one");
  Gpu& gpu = *buffer_.gpu();
  const py::gil_scoped_release no_gil;
  gpu.copy(view_.data, source->data, view_.num_elements() * dtype_bytes(view_.dtype), GpuCopy::kHostToDevice,
           gpu.default_stream());
  gpu.synchronize(gpu.default_stream());
}

void GpuArray::download(py::handle host) const {
  const ArrayArgument target(host, "host", /*writable=*/true);
  PARTITA_CHECK(
      target->dtype == view_.dtype && target->num_elements() == view_.num_elements() && target->is_contiguous(),
      "host: got ", dtype_name(target->dtype), " ", target->shape_text(), ", wanted a contiguous ",
      dtype_name(view_.dtype), " ", view_.shape_text());
  Gpu& gpu = *buffer_.gpu();
  const py::gil_scoped_release no_gil;
  gpu.copy(target->data, view_.data, view_.num_elements() * dtype_bytes(view_.dtype), GpuCopy::kDeviceToHost,
           gpu.default_stream());
  gpu.synchronize(gpu.default_stream());
}

GpuArrayArgument::GpuArrayArgument(const Gpu& gpu, py::handle object, const char* name) {
  if (py::isinstance<GpuArray>(object)) {
    const auto& array = object.cast<const GpuArray&>();
    PARTITA_CHECK(array.gpu().get() == &gpu, name, ": lies on another device than the other arguments");
    view_ = array.view();
    owner_ = py::reinterpret_borrow<py::object>(object);
  } else {
    PARTITA_CHECK(gpu.properties().world == "cuda", name, ": got ", Py_TYPE(object.ptr())->tp_name,
                  ", wanted a GpuArray of the same device");
    // Held by the caller's argument list for the length of the call.
    const ArrayArgument argument = ArrayArgument::on_cuda(object, name, gpu.properties().ordinal);
    view_ = argument.view();
    owner_ = py::reinterpret_borrow<py::object>(object);
  }
  view_.name = name;
  PARTITA_CHECK(view_.is_contiguous(), name, ": got a strided array of shape ", view_.shape_text(),
                ", wanted a contiguous one");
}

bool is_gpu_array(py::handle object) { return py::isinstance<GpuArray>(object); }

bool is_on_gpu(py::handle object) {
  constexpr int32_t kDlCuda = 2;
  if (is_gpu_array(object)) return true;
  return py::hasattr(object, "__dlpack_device__") &&
         py::tuple(object.attr("__dlpack_device__")())[0].cast<int32_t>() == kDlCuda;
}

std::shared_ptr<Gpu> gpu_of(std::initializer_list<py::handle> objects) {
  for (py::handle object : objects)
    if (is_gpu_array(object)) return object.cast<const GpuArray&>().gpu();
  // Arrays of other libraries only: they name their CUDA device.
  for (py::handle object : objects)
    if (py::hasattr(object, "__dlpack_device__")) {
      const auto device = py::tuple(object.attr("__dlpack_device__")());
      if (device[0].cast<int32_t>() == 2) return open_gpu("cuda", device[1].cast<int32_t>());
    }
  throw TypeMismatch("arrays: got none on a GPU, wanted a GpuArray or an array that speaks DLPack on a CUDA device");
}

GpuStream stream_argument(Gpu& gpu, const py::object& stream) {
  if (stream.is_none()) return gpu.default_stream();
  return reinterpret_cast<GpuStream>(stream.cast<uintptr_t>());
}

namespace {

// Device time of launches, as a replayed graph gives it: no host between two of them.
std::vector<float> time_launches(const std::shared_ptr<Gpu>& gpu, const std::vector<py::function>& launches,
                                 int num_runs) {
  PARTITA_CHECK(gpu != nullptr, "gpu: got none");
  PARTITA_CHECK(!launches.empty(), "launches: got none, wanted at least one");
  PARTITA_CHECK(num_runs > 0, "num_runs: got ", num_runs, ", wanted a positive number");
  struct Timing {
    explicit Timing(Gpu& g)
        : gpu(g), stream(g.create_stream()), begin(g.create_event(true)), end(g.create_event(true)) {}
    ~Timing() {
      if (graph) gpu.destroy_graph(graph);
      gpu.destroy_event(begin);
      gpu.destroy_event(end);
      gpu.destroy_stream(stream);
    }
    Gpu& gpu;
    GpuStream stream;
    GpuEvent begin, end;
    GpuGraph graph = nullptr;
  } timing(*gpu);
  const py::int_ stream(reinterpret_cast<uintptr_t>(timing.stream));
  for (const py::function& launch : launches) launch(stream);  // modules are loaded now, not in the capture
  gpu->synchronize(timing.stream);
  gpu->begin_capture(timing.stream);
  try {
    for (const py::function& launch : launches) launch(stream);
  } catch (...) {
    gpu->destroy_graph(gpu->end_capture(timing.stream));
    throw;
  }
  timing.graph = gpu->end_capture(timing.stream);
  const py::gil_scoped_release no_gil;
  gpu->launch_graph(timing.graph, timing.stream);  // warm-up
  std::vector<float> times_ms;
  for (int run = 0; run < num_runs; ++run) {
    gpu->record(timing.begin, timing.stream);
    gpu->launch_graph(timing.graph, timing.stream);
    gpu->record(timing.end, timing.stream);
    gpu->wait(timing.end);
    times_ms.push_back(gpu->elapsed_ms(timing.begin, timing.end) / static_cast<float>(launches.size()));
  }
  return times_ms;
}

py::object text_or_none(const std::string& text) { return text.empty() ? py::object(py::none()) : py::str(text); }

py::dict library_dict(const std::string& world) {
  const GpuLibrary& found = gpu_library(world);
  py::dict dict;
  dict["world"] = world;
  dict["compiled"] = found.library != nullptr;
  dict["toolkit"] = found.library ? py::object(py::str(found.library->toolkit)) : py::object(py::none());
  dict["targets"] = found.library ? py::object(py::str(found.library->targets)) : py::object(py::none());
  dict["num_devices"] = found.num_devices;
  dict["reason"] = text_or_none(found.reason);
  py::dict families, verified;
  if (found.library)
    for (const auto& [family, entries] : found.library->registry->families()) {
      families[py::str(family)] = entries.size();
      size_t num_verified = 0;
      for (const void* entry : entries) num_verified += *KernelRegistry::info_of(entry).verified_on != '\0';
      verified[py::str(family)] = num_verified;
    }
  dict["kernels"] = families;
  dict["verified"] = verified;
  return dict;
}

const SimtControls& simt_controls() {
  const GpuLibrary& found = gpu_library("simt");
  if (!found.library || !found.library->simt) throw std::runtime_error(concat("simt: ", found.reason));
  return *found.library->simt;
}

}  // namespace

void register_gpu(py::module_& module) {
  module.def("gpu_library", &library_dict, py::arg("world"),
             "What the device library of a world (\"cuda\", \"simt\") offers: compiled (bool), toolkit, targets, "
             "num_devices, reason (why none can be opened, or None), kernels (family -> how many), verified (family -> "
             "how many of them have "
             "passed their tests on hardware).");
  py::class_<Gpu, std::shared_ptr<Gpu>>(module, "Gpu", "One device of a world. Made by open_gpu.")
      .def_property_readonly("world", [](const Gpu& gpu) { return gpu.properties().world; })
      .def_property_readonly("name", [](const Gpu& gpu) { return gpu.properties().name; })
      .def_property_readonly("ordinal", [](const Gpu& gpu) { return gpu.properties().ordinal; })
      .def_property_readonly("compute_capability", [](const Gpu& gpu) { return gpu.properties().compute_capability; })
      .def_property_readonly("num_sms", [](const Gpu& gpu) { return gpu.properties().num_sms; })
      .def_property_readonly("memory_bytes", [](const Gpu& gpu) { return gpu.properties().memory_bytes; })
      .def_property_readonly("l2_bytes", [](const Gpu& gpu) { return gpu.properties().l2_bytes; })
      .def_property_readonly("memory_gb_per_second",
                             [](const Gpu& gpu) { return gpu.properties().memory_gb_per_second; })
      .def_property_readonly("free_bytes", [](Gpu& gpu) { return gpu.free_bytes(); })
      .def_property_readonly("default_stream",
                             [](Gpu& gpu) { return reinterpret_cast<uintptr_t>(gpu.default_stream()); })
      .def_property_readonly("partition_note", [](const Gpu& gpu) { return gpu.partition_note(); })
      .def(
          "synchronize", [](Gpu& gpu) { gpu.synchronize(gpu.default_stream()); },
          py::call_guard<py::gil_scoped_release>(), "Waits for the default stream.");
  module.def("open_gpu", &open_gpu, py::arg("world"), py::arg("ordinal") = 0,
             "The device, shared by all who ask. Raises RuntimeError with the reason where it cannot be had.");

  py::class_<GpuArray, std::shared_ptr<GpuArray>>(module, "GpuArray", "A contiguous array in a Gpu's memory.")
      .def(py::init([](std::shared_ptr<Gpu> gpu, std::vector<int64_t> shape, const std::string& dtype) {
             PARTITA_CHECK(gpu != nullptr, "gpu: got none");
             return std::make_shared<GpuArray>(std::move(gpu), std::move(shape), dtype_named(dtype));
           }),
           py::arg("gpu"), py::arg("shape"), py::arg("dtype"))
      .def_property_readonly("shape",
                             [](const GpuArray& array) {
                               py::tuple shape(array.view().ndim);
                               for (int d = 0; d < array.view().ndim; ++d) shape[d] = array.view().shape[d];
                               return shape;
                             })
      .def_property_readonly("dtype", [](const GpuArray& array) { return std::string(dtype_name(array.view().dtype)); })
      .def_property_readonly("gpu", [](const GpuArray& array) { return array.gpu(); })
      .def_property_readonly("address",
                             [](const GpuArray& array) { return reinterpret_cast<uintptr_t>(array.view().data); })
      .def("upload", &GpuArray::upload, py::arg("host"), "Copies a host array of the same shape and dtype here.")
      .def("download", &GpuArray::download, py::arg("host"), "Copies this array into a host array.");

  module.def("is_on_gpu", [](const py::object& array) { return is_on_gpu(array); }, py::arg("array"));
  module.def("time_gpu_launches", &time_launches, py::arg("gpu"), py::arg("launches"), py::arg("num_runs"),
             "Milliseconds of one launch, for each of num_runs replays of a graph that holds every launch once. "
             "launches: callables that take a stream's address and enqueue on it.");
  module.def(
      "simt_set_seed", [](uint64_t seed) { simt_controls().set_seed(seed); }, py::arg("seed"),
      "The order in which warps run from the next launch on; 0: ascending.");
  module.def(
      "simt_set_disabled_site", [](const std::string& site) { simt_controls().set_disabled_site(site); },
      py::arg("site"), "This barrier or wait (\"file.cu:12\") does nothing; \"\" switches all on again.");
  module.def(
      "simt_take_visited_sites", [] { return simt_controls().take_visited_sites(); },
      "Barriers and waits that ran since the last call.");
  module.def("simt_statistics", [] {
    const SimtControls::Statistics s = simt_controls().statistics();
    py::dict dict;
    dict["num_launches"] = s.num_launches;
    dict["num_threads"] = s.num_threads;
    dict["num_checked_accesses"] = s.num_checked_accesses;
    dict["num_reports"] = s.num_reports;
    return dict;
  });
}

}  // namespace partita::bindings
