#include <memory>

#include "bindings/gpu_array.h"
#include "bindings/register.h"
#include "bindings/weight_argument.h"
#include "core/check.h"
#include "embedding/embedding_gpu.h"

namespace py = pybind11;

namespace partita::bindings {
namespace {

void embedding(const GpuEmbeddingTable& table, const py::object& token_ids, const py::object& out, float scale,
               const py::object& stream) {
  Gpu& gpu = *table.gpu();
  const GpuArrayArgument ids_array(gpu, token_ids, "token_ids"), out_array(gpu, out, "out");
  EmbeddingGpuParams params;
  params.table = &table;
  params.token_ids = ids_array.view().expect(DType::kI32, {-1}).as<int32_t>();
  params.num_tokens = ids_array->shape[0];
  params.scale = scale;
  params.out = out_array.view().expect(DType::kF32, {params.num_tokens, table.hidden()}).as<float>();
  params.out_stride = table.hidden();
  const GpuStream gpu_stream = stream_argument(gpu, stream);
  const py::gil_scoped_release no_gil;
  embedding_gpu(gpu, params, gpu_stream);
}

void gather(const py::object& x, const py::object& row_idxs, const py::object& out, const py::object& stream) {
  const std::shared_ptr<Gpu> gpu = gpu_of({x, row_idxs, out});
  const GpuArrayArgument x_array(*gpu, x, "x"), idxs_array(*gpu, row_idxs, "row_idxs"), out_array(*gpu, out, "out");
  GatherRowsParams params;
  params.in = x_array.view().expect(DType::kF32, {-1, -1}).as<float>();
  params.num_in_rows = x_array->shape[0];
  params.width = params.in_stride = params.out_stride = x_array->shape[1];
  params.row_idxs = idxs_array.view().expect(DType::kI32, {-1}).as<int32_t>();
  params.num_rows = idxs_array->shape[0];
  params.out = out_array.view().expect(DType::kF32, {params.num_rows, params.width}).as<float>();
  const GpuStream gpu_stream = stream_argument(*gpu, stream);
  const py::gil_scoped_release no_gil;
  gather_rows(*gpu, params, gpu_stream);
}

}  // namespace

void register_embedding_gpu(py::module_& module) {
  py::class_<GpuEmbeddingTable, std::shared_ptr<GpuEmbeddingTable>>(
      module, "GpuEmbeddingTable", "The rows of a Weight in a Gpu's memory, as their file holds them.")
      .def(py::init([](std::shared_ptr<Gpu> gpu, const SharedWeight& weight) {
             PARTITA_CHECK(weight != nullptr, "weight: got none");
             return std::make_shared<GpuEmbeddingTable>(std::move(gpu), weight->weight);
           }),
           py::arg("gpu"), py::arg("weight"))
      .def_property_readonly("vocab_size", &GpuEmbeddingTable::vocab_size)
      .def_property_readonly("hidden", &GpuEmbeddingTable::hidden)
      .def_property_readonly("packed_bytes", &GpuEmbeddingTable::packed_bytes);
  module.def("embedding_gpu", &embedding, py::arg("table"), py::arg("token_ids"), py::arg("out"), py::arg("scale"),
             py::arg("stream"));
  module.def("gather_rows", &gather, py::arg("x"), py::arg("row_idxs"), py::arg("out"), py::arg("stream"));
}

}  // namespace partita::bindings
