// Plans and attend on a GPU in Python, on GpuArrays; append is bind_append_gpu.cpp's.
#include <pybind11/stl.h>

#include <chrono>
#include <memory>
#include <tuple>

#include "attention/attend_gpu_kernels.h"
#include "attention/attention_gpu.h"
#include "bindings/array_argument.h"
#include "bindings/gpu_array.h"
#include "bindings/register.h"
#include "core/check.h"

namespace py = pybind11;

namespace partita::bindings {
namespace {

DType row_dtype(const std::string& name) {
  for (DType type : {DType::kF32, DType::kF16, DType::kBF16})
    if (name == dtype_name(type)) return type;
  throw_value_error("qkv_dtype: got '", name, "', wanted float32, float16 or bfloat16");
}

std::shared_ptr<GpuAttentionPlan> make_plan(std::shared_ptr<Gpu> gpu, const KvGroupLayout& layout, int num_q_heads,
                                            const std::string& qkv_dtype, bool exact) {
  PARTITA_CHECK(gpu != nullptr, "gpu: got none");
  GpuAttentionDesc desc;
  desc.layout = layout;
  desc.num_q_heads = num_q_heads;
  desc.qkv_type = row_dtype(qkv_dtype);
  desc.exact = exact;
  return std::make_shared<GpuAttentionPlan>(std::move(gpu), desc);
}

GpuPlanOptions plan_options(int num_ctas, bool batch_invariant, int graph_rows, int64_t max_context,
                            const std::vector<std::tuple<int, int, int64_t>>& shared_prefixes) {
  GpuPlanOptions options;
  options.num_ctas = num_ctas;
  options.is_batch_invariant = batch_invariant;
  options.graph_rows = graph_rows;
  options.max_context = max_context;
  for (const auto& [first_request, num_requests, num_tokens] : shared_prefixes)
    options.shared_prefixes.push_back({first_request, num_requests, num_tokens});
  return options;
}

double build_plan(GpuAttentionPlan& plan, py::object cu_seqlens_object, py::object context_starts_object, int num_ctas,
                  bool batch_invariant, int graph_rows, int64_t max_context,
                  const std::vector<std::tuple<int, int, int64_t>>& shared_prefixes) {
  const ArrayArgument cu_seqlens_q(cu_seqlens_object, "cu_seqlens_q");
  const ArrayArgument context_starts(context_starts_object, "context_starts");
  cu_seqlens_q->expect(DType::kI32, {-1});
  PARTITA_CHECK(cu_seqlens_q->shape[0] >= 1, "cu_seqlens_q: got an empty array, wanted num_requests + 1 values");
  context_starts->expect(DType::kI32, {cu_seqlens_q->shape[0] - 1});
  const GpuPlanOptions options = plan_options(num_ctas, batch_invariant, graph_rows, max_context, shared_prefixes);
  const auto begin = std::chrono::steady_clock::now();
  plan.build(static_cast<int>(context_starts->shape[0]), cu_seqlens_q->as<int32_t>(), context_starts->as<int32_t>(),
             options);
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count();
}

py::dict launch_dict(const GpuAttentionPlan& plan, const GpuAttentionPlan::Launch& launch) {
  py::dict dict;
  dict["num_ctas"] = launch.num_ctas;
  dict["num_columns"] = launch.num_columns;
  py::list queues, items;
  const std::vector<int32_t>& tables = plan.tables();
  if (launch.num_ctas > 0) {
    for (int i = 0; i <= launch.num_ctas; ++i) queues.append(tables[launch.queues + i]);
    const auto* all = reinterpret_cast<const GpuAttendItem*>(tables.data() + launch.items);
    for (int32_t i = 0; i < tables[launch.queues + launch.num_ctas]; ++i) {
      py::dict entry;
      entry["request"] = all[i].request;
      entry["kv_head"] = all[i].kv_head;
      entry["tokens"] = py::make_tuple(all[i].token_begin, all[i].token_begin + all[i].num_tokens);
      entry["kv"] = py::make_tuple(all[i].kv_begin, all[i].kv_end);
      entry["partial_row"] = all[i].partial_row;
      items.append(entry);
    }
  }
  dict["queues"] = queues;
  dict["items"] = items;
  return dict;
}

py::list merge_list(const GpuAttentionPlan& plan) {
  py::list merges;
  if (plan.merge().num_ctas == 0) return merges;
  const std::vector<int32_t>& tables = plan.tables();
  const auto* all = reinterpret_cast<const GpuAttendMerge*>(tables.data() + plan.merge().merges);
  for (int32_t i = 0; i < tables[plan.merge().count]; ++i) {
    py::dict entry;
    entry["token"] = all[i].token;
    entry["kv_head"] = all[i].kv_head;
    py::list parts;
    for (int part = 0; part < all[i].num_parts; ++part)
      parts.append(tables[plan.merge().parts + all[i].first_part + part]);
    entry["parts"] = parts;
    merges.append(entry);
  }
  return merges;
}

void attend(const GpuAttentionPlan& plan, py::object qkv_object, py::object out_object, py::object arena_object,
            py::object positions_object, py::object requests_object, py::object page_tables_object,
            py::object tables_object, py::object workspace_object, int layer, float scale, float soft_cap, int num_ctas,
            py::object stream) {
  const std::shared_ptr<Gpu> gpu = gpu_of({qkv_object, out_object, arena_object});
  const KvGroupLayout& layout = plan.desc().layout;
  const GpuArrayArgument qkv(*gpu, qkv_object, "qkv"), out(*gpu, out_object, "out"), arena(*gpu, arena_object, "arena");
  const GpuArrayArgument positions(*gpu, positions_object, "token_positions");
  const GpuArrayArgument requests(*gpu, requests_object, "token_requests");
  const GpuArrayArgument page_tables(*gpu, page_tables_object, "page_tables");
  const GpuArrayArgument tables(*gpu, tables_object, "tables");
  const int64_t q_width = int64_t{plan.desc().num_q_heads} * layout.head_dim;
  const int64_t qkv_width = q_width + int64_t{2} * layout.num_kv_heads * layout.head_dim;
  positions->expect(DType::kI32, {-1});
  const int64_t num_tokens = positions->shape[0];
  requests->expect(DType::kI32, {num_tokens});
  page_tables->expect(DType::kI32, {-1, -1});
  const int64_t num_requests = page_tables->shape[0];
  PARTITA_CHECK(qkv->ndim == 2 && qkv->shape[0] == num_tokens && qkv->shape[1] >= qkv_width, "qkv: got shape ",
                qkv->shape_text(), ", wanted [", num_tokens, ", ", qkv_width, " or more]");
  out->expect(out->dtype, {num_tokens, q_width});
  arena->expect(DType::kU8, {-1, -1});
  tables->expect(DType::kI32, {-1});
  PARTITA_CHECK(tables->shape[0] >= static_cast<int64_t>(plan.tables().size()), "tables: got ", tables->shape[0],
                " entries, wanted the plan's ", plan.tables().size());
  std::byte* workspace = nullptr;
  if (!workspace_object.is_none()) {
    const GpuArrayArgument array(*gpu, workspace_object, "workspace");
    array->expect(DType::kU8, {-1});
    PARTITA_CHECK(array->shape[0] >= static_cast<int64_t>(plan.workspace_bytes()), "workspace: got ", array->shape[0],
                  " bytes, wanted the plan's ", plan.workspace_bytes());
    workspace = array->as<std::byte>();
  }

  GpuAttentionBatch batch;
  batch.num_tokens = num_tokens;
  batch.num_requests = static_cast<int>(num_requests);
  batch.token_positions = positions->as<int32_t>();
  batch.token_requests = requests->as<int32_t>();
  batch.page_tables = page_tables->as<int32_t>();
  batch.page_table_stride = page_tables->shape[1];
  batch.arena = arena->as<std::byte>();
  batch.arena_page_bytes = static_cast<size_t>(arena->shape[1]);
  GpuAttentionParams params;
  params.layout = &layout;
  params.layer = layer;
  params.num_q_heads = plan.desc().num_q_heads;
  params.scale = scale;
  params.soft_cap = soft_cap;
  params.exact = plan.desc().exact;
  params.qkv = qkv->as<void>();
  params.qkv_type = qkv->dtype;
  params.qkv_stride = qkv->shape[1];
  params.out = out->as<void>();
  params.out_type = out->dtype;
  params.out_stride = q_width;
  params.num_ctas = num_ctas;
  const GpuStream gpu_stream = stream_argument(*gpu, stream);
  const py::gil_scoped_release release;
  attend_gpu(*gpu, params, batch, plan, tables->as<int32_t>(), workspace, gpu_stream);
}

}  // namespace

void register_attention_gpu(py::module_& module) {
  py::class_<GpuAttentionPlan, std::shared_ptr<GpuAttentionPlan>>(
      module, "GpuAttentionPlan", "Which kernels serve a KV group on a GPU, and how a step's work is cut for them.")
      .def(py::init(&make_plan), py::arg("gpu"), py::arg("layout"), py::arg("num_q_heads"),
           py::arg("qkv_dtype") = "bfloat16", py::arg("exact") = false)
      .def("build", &build_plan, py::arg("cu_seqlens_q"), py::arg("context_starts"), py::kw_only(),
           py::arg("num_ctas") = 0, py::arg("batch_invariant") = false, py::arg("graph_rows") = 0,
           py::arg("max_context") = 0, py::arg("shared_prefixes") = std::vector<std::tuple<int, int, int64_t>>{},
           "Plans a step of host arrays [R + 1] and [R] int32; microseconds it took. shared_prefixes: (first_request, "
           "num_requests, num_tokens) of requests that begin with the same pages.")
      .def(
          "tables",
          [](const GpuAttentionPlan& plan) {
            return py::bytes(reinterpret_cast<const char*>(plan.tables().data()), plan.tables().size() * 4);
          },
          "The int32 tables that the device reads, as bytes.")
      .def_property_readonly("workspace_bytes", &GpuAttentionPlan::workspace_bytes)
      .def(
          "max_table_entries",
          [](const GpuAttentionPlan& plan, int64_t tokens, int64_t requests, int64_t context, bool batch_invariant,
             int graph_rows, bool has_prefixes) {
            GpuPlanOptions options = plan_options(0, batch_invariant, graph_rows, context, {});
            if (has_prefixes) options.shared_prefixes.emplace_back();
            return py::make_tuple(plan.max_table_entries(tokens, requests, context, options),
                                  plan.max_workspace_bytes(tokens, requests, context, options));
          },
          py::arg("max_tokens"), py::arg("max_requests"), py::arg("max_context"), py::kw_only(),
          py::arg("batch_invariant") = false, py::arg("graph_rows") = 0, py::arg("has_prefixes") = false,
          "(table entries, workspace bytes) that no plan of such steps exceeds.")
      .def("describe", &GpuAttentionPlan::describe)
      .def_property_readonly("kernels",
                             [](const GpuAttentionPlan& plan) {
                               const AttendSelection& chosen = plan.selection();
                               py::list names;
                               if (chosen.decode) names.append(chosen.decode->info.name);
                               if (chosen.prefill) names.append(chosen.prefill->info.name);
                               if (!chosen.prefill) names.append(chosen.naive->info.name);
                               return names;
                             })
      .def_property_readonly("decode", [](const GpuAttentionPlan& plan) { return launch_dict(plan, plan.decode()); })
      .def_property_readonly("prefill", [](const GpuAttentionPlan& plan) { return launch_dict(plan, plan.prefill()); })
      .def_property_readonly("merges", &merge_list)
      .def_property_readonly("merge_num_ctas", [](const GpuAttentionPlan& plan) { return plan.merge().num_ctas; });
  module.def("attend_gpu", &attend, py::arg("plan"), py::arg("qkv"), py::arg("out"), py::arg("arena"),
             py::arg("token_positions"), py::arg("token_requests"), py::arg("page_tables"), py::arg("tables"),
             py::arg("workspace") = py::none(), py::kw_only(), py::arg("layer") = 0, py::arg("scale"),
             py::arg("soft_cap") = 0.0f, py::arg("num_ctas") = 0, py::arg("stream") = py::none());
}

}  // namespace partita::bindings
