// Append and page moves on a Gpu's arrays: what tests and benches drive.
#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "attention/attention_gpu.h"
#include "attention/pages_gpu.h"
#include "bindings/array_argument.h"
#include "bindings/gpu_array.h"
#include "bindings/register.h"
#include "core/check.h"

namespace py = pybind11;

namespace partita::bindings {
namespace {

void append(const py::object& qkv, const py::object& arena, const py::object& token_positions,
            const py::object& token_requests, const py::object& page_tables, const KvGroupLayout& layout, int layer,
            int num_q_heads, const py::object& cos, const py::object& sin, const py::object& q_norm_weight,
            const py::object& k_norm_weight, float norm_eps, bool exact, int num_ctas, const py::object& stream) {
  const std::shared_ptr<Gpu> gpu = gpu_of({qkv, arena});
  layout.check();
  const GpuArrayArgument qkv_array(*gpu, qkv, "qkv"), arena_array(*gpu, arena, "arena");
  const GpuArrayArgument positions(*gpu, token_positions, "token_positions");
  const GpuArrayArgument requests(*gpu, token_requests, "token_requests"), tables(*gpu, page_tables, "page_tables");
  std::vector<GpuArrayArgument> optional;  // kept until the launch
  const auto floats = [&](const py::object& object, const char* name, std::initializer_list<int64_t> sizes) {
    if (object.is_none()) return static_cast<const float*>(nullptr);
    optional.emplace_back(*gpu, object, name);
    return static_cast<const float*>(optional.back().view().expect(DType::kF32, sizes).as<float>());
  };
  PARTITA_CHECK(
      qkv_array->ndim == 2 && qkv_array->shape[1] >= int64_t{num_q_heads + 2 * layout.num_kv_heads} * layout.head_dim,
      "qkv: got shape ", qkv_array->shape_text(), ", wanted [T, (num_q_heads + 2 * num_kv_heads) * head_dim or more]");
  GpuAttentionBatch batch;
  batch.num_tokens = qkv_array->shape[0];
  batch.token_positions = positions.view().expect(DType::kI32, {batch.num_tokens}).as<int32_t>();
  batch.token_requests = requests.view().expect(DType::kI32, {batch.num_tokens}).as<int32_t>();
  tables.view().expect(DType::kI32, {-1, -1});
  batch.num_requests = static_cast<int>(tables->shape[0]);
  batch.page_tables = tables->as<int32_t>();
  batch.page_table_stride = tables->shape[1];
  arena_array.view().expect(DType::kU8, {-1, -1});
  batch.arena = arena_array->as<std::byte>();
  batch.arena_page_bytes = static_cast<size_t>(arena_array->shape[1]);
  GpuAttentionParams params;
  params.layout = &layout;
  params.layer = layer;
  params.num_q_heads = num_q_heads;
  params.q_norm_weight = floats(q_norm_weight, "q_norm_weight", {layout.head_dim});
  params.k_norm_weight = floats(k_norm_weight, "k_norm_weight", {layout.head_dim});
  params.rope.cos = floats(cos, "cos", {-1, -1});
  if (params.rope.cos) {
    params.rope.num_positions = optional.back()->shape[0];
    params.rope.rotary_dim = static_cast<int>(2 * optional.back()->shape[1]);
    params.rope.sin = floats(sin, "sin", {params.rope.num_positions, params.rope.rotary_dim / 2});
  }
  params.norm_eps = norm_eps;
  params.exact = exact;
  params.num_ctas = num_ctas;
  params.qkv = qkv_array->data;
  params.qkv_type = qkv_array->dtype;
  params.qkv_stride = qkv_array->shape[1];
  const GpuStream gpu_stream = stream_argument(*gpu, stream);
  const py::gil_scoped_release no_gil;
  append_gpu(*gpu, params, batch, gpu_stream);
}

void copy(const py::object& arena, const py::object& pairs, const py::object& num_pairs, const py::object& stream) {
  const std::shared_ptr<Gpu> gpu = gpu_of({arena, pairs});
  const GpuArrayArgument arena_array(*gpu, arena, "arena"), pairs_array(*gpu, pairs, "pairs");
  CopyPagesParams params;
  params.arena = arena_array.view().expect(DType::kU8, {-1, -1}).as<std::byte>();
  params.page_bytes = static_cast<size_t>(arena_array->shape[1]);
  params.pairs = pairs_array.view().expect(DType::kI32, {-1, 2}).as<int32_t>();
  params.max_pairs = pairs_array->shape[0];
  std::optional<GpuArrayArgument> count;
  if (!num_pairs.is_none()) {
    count.emplace(*gpu, num_pairs, "num_pairs");
    params.num_pairs = count->view().expect(DType::kI32, {1}).as<int32_t>();
  }
  const GpuStream gpu_stream = stream_argument(*gpu, stream);
  const py::gil_scoped_release no_gil;
  copy_pages(*gpu, params, gpu_stream);
}

// Waits for the copies, as NumPy memory is not pinned.
int64_t swap(const py::object& arena, const py::object& host_arena, const std::vector<int32_t>& device_page_ids,
             const std::vector<int32_t>& host_page_ids, bool is_out, const py::object& stream) {
  const std::shared_ptr<Gpu> gpu = gpu_of({arena});
  const GpuArrayArgument arena_array(*gpu, arena, "arena");
  const ArrayArgument host_array(host_arena, "host_arena", /*writable=*/is_out);
  arena_array.view().expect(DType::kU8, {-1, -1});
  host_array->expect(DType::kU8, {-1, arena_array->shape[1]});
  PARTITA_CHECK(device_page_ids.size() == host_page_ids.size(), "host_page_ids: got ", host_page_ids.size(),
                " pages, wanted as many as device_page_ids, ", device_page_ids.size());
  const auto check_ids = [](const std::vector<int32_t>& ids, int64_t num_pages, const char* name) {
    for (size_t i = 0; i < ids.size(); ++i)
      PARTITA_CHECK(ids[i] < num_pages, name, "[", i, "]: got ", ids[i], ", wanted a page id from 0 to ",
                    num_pages - 1);
  };
  check_ids(device_page_ids, arena_array->shape[0], "device_page_ids");
  check_ids(host_page_ids, host_array->shape[0], "host_page_ids");
  SwapPagesParams params;
  params.arena = arena_array->as<std::byte>();
  params.page_bytes = static_cast<size_t>(arena_array->shape[1]);
  params.host_arena = host_array->as<std::byte>();
  params.device_page_ids = device_page_ids.data();
  params.host_page_ids = host_page_ids.data();
  params.num_pages = static_cast<int64_t>(device_page_ids.size());
  const GpuStream gpu_stream = stream_argument(*gpu, stream);
  const py::gil_scoped_release no_gil;
  const int64_t num_copies =
      is_out ? swap_pages_out(*gpu, params, gpu_stream) : swap_pages_in(*gpu, params, gpu_stream);
  gpu->synchronize(gpu_stream);
  return num_copies;
}

}  // namespace

void register_append_gpu(py::module_& module) {
  module.def("attention_append_gpu", &append, py::arg("qkv"), py::arg("arena"), py::arg("token_positions"),
             py::arg("token_requests"), py::arg("page_tables"), py::arg("layout"), py::kw_only(), py::arg("layer") = 0,
             py::arg("num_q_heads"), py::arg("cos") = py::none(), py::arg("sin") = py::none(),
             py::arg("q_norm_weight") = py::none(), py::arg("k_norm_weight") = py::none(), py::arg("norm_eps") = 1e-6f,
             py::arg("exact") = false, py::arg("num_ctas") = 0, py::arg("stream") = py::none());
  module.def("copy_pages", &copy, py::arg("arena"), py::arg("pairs"), py::arg("num_pairs"), py::arg("stream"));
  module.def("swap_pages", &swap, py::arg("arena"), py::arg("host_arena"), py::arg("device_page_ids"),
             py::arg("host_page_ids"), py::arg("is_out"), py::arg("stream"));
}

}  // namespace partita::bindings
