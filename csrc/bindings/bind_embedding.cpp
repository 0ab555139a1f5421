#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "bindings/array_argument.h"
#include "bindings/register.h"
#include "core/parallel_for.h"
#include "embedding/embedding.h"

namespace py = pybind11;

namespace partita::bindings {
namespace {

WeightFormat format_of(const TensorView& table, const std::optional<std::string>& format) {
  if (format) {
    if (table.dtype != DType::kU8)
      throw TypeMismatch(concat("table: got dtype ", dtype_name(table.dtype), ", wanted uint8 with a weight_format"));
    return parse_weight_format(*format);
  }
  switch (table.dtype) {
    case DType::kF32:
      return WeightFormat::kF32;
    case DType::kF16:
      return WeightFormat::kF16;
    case DType::kBF16:
      return WeightFormat::kBF16;
    default:
      throw TypeMismatch(concat("table: got dtype ", dtype_name(table.dtype),
                                ", wanted float32, float16 or bfloat16, or uint8 with a weight_format"));
  }
}

void embedding(const py::object& table, const py::object& token_ids, const py::object& out, float scale,
               const std::optional<std::string>& format, int num_threads) {
  const ArrayArgument table_array(table, "table"), ids_array(token_ids, "token_ids");
  const ArrayArgument out_array(out, "out", /*writable=*/true);
  ids_array->expect(DType::kI32, {-1});
  out_array->expect(DType::kF32, {ids_array->shape[0], -1});
  Weight weight;
  weight.format = format_of(table_array.view(), format);
  const int64_t hidden = out_array->shape[1];
  table_array->expect(table_array->dtype, {-1, format ? -1 : hidden});
  weight.data = table_array->as<const std::byte>();
  weight.num_bytes = static_cast<size_t>(table_array->num_elements()) * dtype_bytes(table_array->dtype);
  weight.out_features = table_array->shape[0];
  weight.in_features = hidden;
  const EmbeddingTable embedding_table(weight);
  EmbeddingParams params;
  params.table = &embedding_table;
  params.num_tokens = ids_array->shape[0];
  params.token_ids = ids_array->as<int32_t>();
  params.scale = scale;
  params.out = out_array->as<float>();
  params.out_stride = hidden;
  embedding_check(params);
  const py::gil_scoped_release no_gil;
  parallel_for(embedding_num_chunks(params), num_threads,
               [&](int64_t chunk, int) { embedding_run_chunk(params, chunk); });
}

}  // namespace

void register_embedding(py::module_& module) {
  module.def("embedding", &embedding, py::arg("table"), py::arg("token_ids"), py::arg("out"), py::arg("scale"),
             py::arg("weight_format"), py::arg("num_threads"));
}

}  // namespace partita::bindings
