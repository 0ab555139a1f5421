// Attention and rotary tables in Python: layouts, tables, and the ops on NumPy arrays that tests and benches drive.
#include <pybind11/stl.h>

#include <chrono>
#include <memory>
#include <optional>

#include "attention/attention.h"
#include "attention/attention_plan.h"
#include "bindings/array_argument.h"
#include "bindings/register.h"
#include "core/aligned_buffer.h"
#include "core/check.h"
#include "core/parallel_for.h"

namespace py = pybind11;

namespace partita::bindings {
namespace {

// The arrays of one step, kept alive and checked.
struct BatchArguments {
  BatchArguments(const KvGroupLayout& layout, const py::handle& arena_object, const py::handle& cu_seqlens_object,
                 const py::handle& context_starts_object, const py::handle& page_tables_object, bool writes)
      : arena(arena_object, "arena", writes),
        cu_seqlens_q(cu_seqlens_object, "cu_seqlens_q"),
        context_starts(context_starts_object, "context_starts"),
        page_tables(page_tables_object, "page_tables") {
    layout.check();
    arena->expect(DType::kU8, {-1, -1});
    cu_seqlens_q->expect(DType::kI32, {-1});
    PARTITA_CHECK(cu_seqlens_q->shape[0] >= 1, "cu_seqlens_q: got an empty array, wanted num_requests + 1 values");
    const int64_t num_requests = cu_seqlens_q->shape[0] - 1;
    context_starts->expect(DType::kI32, {num_requests});
    page_tables->expect(DType::kI32, {num_requests, -1});
    const int64_t max_pages = page_tables->shape[1];
    const int64_t num_pages = arena->shape[0];

    batch.num_requests = static_cast<int>(num_requests);
    batch.cu_seqlens_q = cu_seqlens_q->as<int32_t>();
    batch.context_starts = context_starts->as<int32_t>();
    batch.arena = arena->as<std::byte>();
    batch.arena_page_bytes = static_cast<size_t>(arena->shape[1]);
    batch.num_tokens = batch.cu_seqlens_q[num_requests];
    for (int64_t r = 0; r < num_requests; ++r) {
      const int32_t* table = page_tables->as<int32_t>() + r * max_pages;
      tables.push_back(table);
      const int64_t end = int64_t{batch.context_starts[r]} + batch.cu_seqlens_q[r + 1] - batch.cu_seqlens_q[r];
      PARTITA_CHECK(end <= max_pages * layout.page_size, "page_tables[", r, "]: got ", max_pages, " pages of ",
                    layout.page_size, " tokens, wanted room for ", end, " tokens");
      for (int64_t page = 0; page * layout.page_size < end; ++page)
        PARTITA_CHECK(table[page] >= 0 && table[page] < num_pages, "page_tables[", r, "][", page, "]: got ",
                      table[page], ", wanted a page id from 0 to ", num_pages - 1);
    }
    batch.page_tables = tables.data();
  }

  ArrayArgument arena, cu_seqlens_q, context_starts, page_tables;
  std::vector<const int32_t*> tables;
  AttentionBatch batch;
};

const float* norm_weight(const std::optional<ArrayArgument>& weight, int head_dim) {
  return weight ? weight->view().expect(DType::kF32, {head_dim}).as<float>() : nullptr;
}

void check_rows(const TensorView& rows, int64_t num_tokens) {
  if (rows.dtype != DType::kF32)
    throw TypeMismatch(concat(rows.name, ": got dtype ", dtype_name(rows.dtype), ", wanted float32"));
  PARTITA_CHECK(rows.ndim == 2 && rows.shape[0] == num_tokens && (rows.shape[1] <= 1 || rows.strides[1] == 1),
                rows.name, ": got shape ", rows.shape_text(), ", wanted [", num_tokens,
                ", width] with contiguous rows");
}

void append(py::object qkv_object, py::object arena, py::object cu_seqlens_q, py::object context_starts,
            py::object page_tables, const KvGroupLayout& layout, int layer, int num_q_heads,
            const RopeTableStorage* rope, py::object q_norm, py::object k_norm, float norm_eps, int num_threads) {
  const ArrayArgument qkv(qkv_object, "qkv", true);
  const BatchArguments arguments(layout, arena, cu_seqlens_q, context_starts, page_tables, true);
  std::optional<ArrayArgument> q_weight, k_weight;
  if (!q_norm.is_none()) q_weight.emplace(q_norm, "q_norm_weight");
  if (!k_norm.is_none()) k_weight.emplace(k_norm, "k_norm_weight");
  const RopeTable table = rope ? rope->table() : RopeTable{};
  AttentionParams params;
  params.layout = &layout;
  params.layer = layer;
  params.num_q_heads = num_q_heads;
  params.rope = rope ? &table : nullptr;
  params.q_norm_weight = norm_weight(q_weight, layout.head_dim);
  params.k_norm_weight = norm_weight(k_weight, layout.head_dim);
  params.norm_eps = norm_eps;
  params.scale = 1;
  check_rows(qkv.view(), arguments.batch.num_tokens);
  PARTITA_CHECK(qkv->shape[1] == int64_t{num_q_heads + 2 * layout.num_kv_heads} * layout.head_dim, "qkv: got ",
                qkv->shape[1], " columns, wanted (num_q_heads + 2 * num_kv_heads) * head_dim = ",
                int64_t{num_q_heads + 2 * layout.num_kv_heads} * layout.head_dim);
  params.qkv = qkv->as<float>();
  params.qkv_stride = qkv->strides[0];
  params.out_stride = int64_t{num_q_heads} * layout.head_dim;
  check_attention(params, arguments.batch);
  const py::gil_scoped_release release;
  parallel_for(append_num_chunks(params, arguments.batch), num_threads,
               [&](int64_t chunk, int) { append_run_chunk(params, arguments.batch, chunk, nullptr); });
}

// Runs `layers` layers of attend in one team of threads, layer i reading layer i of the pages; seconds of each round.
std::vector<double> attend_layers(py::object qkv_object, py::object out_object, py::object arena,
                                  py::object cu_seqlens_q, py::object context_starts, py::object page_tables,
                                  const KvGroupLayout& layout, int first_layer, int num_layers, int num_q_heads,
                                  float scale, float soft_cap, bool exact, int num_threads, int num_rounds) {
  const ArrayArgument qkv(qkv_object, "qkv");
  const ArrayArgument out(out_object, "out", true);
  const BatchArguments arguments(layout, arena, cu_seqlens_q, context_starts, page_tables, false);
  check_rows(qkv.view(), arguments.batch.num_tokens);
  check_rows(out.view(), arguments.batch.num_tokens);
  PARTITA_CHECK(out->shape[1] == int64_t{num_q_heads} * layout.head_dim, "out: got ", out->shape[1],
                " columns, wanted num_q_heads * head_dim = ", int64_t{num_q_heads} * layout.head_dim);
  AttentionParams base;
  base.layout = &layout;
  base.num_q_heads = num_q_heads;
  base.scale = scale;
  base.soft_cap = soft_cap;
  base.exact = exact;
  base.qkv = qkv->as<float>();
  base.qkv_stride = qkv->strides[0];
  base.out = out->as<float>();
  base.out_stride = out->strides[0];
  std::vector<AttentionParams> params(num_layers, base);
  for (int i = 0; i < num_layers; ++i) {
    params[i].layer = first_layer + i;
    check_attention(params[i], arguments.batch);
  }
  if (num_threads <= 0) num_threads = usable_cores();
  AttentionPlan plan;
  plan.build(layout, num_q_heads, arguments.batch);
  const size_t workspace_bytes = (plan.workspace_bytes() + 63) / 64 * 64;
  const size_t scratch_bytes = (plan.worker_scratch_bytes() + 63) / 64 * 64;
  const AlignedBuffer workspaces(workspace_bytes * num_layers);
  const AlignedBuffer scratches(scratch_bytes * num_threads);
  for (int i = 0; i < num_layers; ++i)
    std::fill_n(workspaces.data() + workspace_bytes * i, plan.counter_bytes(), std::byte{0});
  std::vector<double> seconds;
  const py::gil_scoped_release release;
  for (int round = 0; round < num_rounds; ++round) {
    const auto begin = std::chrono::steady_clock::now();
    parallel_for(plan.num_chunks() * num_layers, num_threads, [&](int64_t index, int worker_idx) {
      const int64_t layer = index / plan.num_chunks();
      const int64_t chunk = index % plan.num_chunks();
      attend_run_chunk(params[layer], arguments.batch, plan, chunk, chunk + num_threads,
                       workspaces.data() + workspace_bytes * layer, scratches.data() + scratch_bytes * worker_idx);
    });
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  return seconds;
}

py::dict describe_plan(py::object cu_seqlens_object, py::object context_starts_object, const KvGroupLayout& layout,
                       int num_q_heads, int num_builds) {
  const ArrayArgument cu_seqlens_q(cu_seqlens_object, "cu_seqlens_q");
  const ArrayArgument context_starts(context_starts_object, "context_starts");
  layout.check();
  cu_seqlens_q->expect(DType::kI32, {-1});
  context_starts->expect(DType::kI32, {cu_seqlens_q->shape[0] - 1});
  AttentionBatch batch;
  batch.num_requests = static_cast<int>(cu_seqlens_q->shape[0] - 1);
  batch.cu_seqlens_q = cu_seqlens_q->as<int32_t>();
  batch.context_starts = context_starts->as<int32_t>();
  batch.num_tokens = batch.cu_seqlens_q[batch.num_requests];
  AttentionPlan plan;
  double best_us = 1e30;
  for (int i = 0; i < num_builds; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    plan.build(layout, num_q_heads, batch);
    best_us =
        std::min(best_us, std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count());
  }
  py::list items;
  for (int64_t i = 0; i < plan.num_chunks(); ++i) {
    const AttentionPlan::Item& item = plan.item(i);
    py::dict entry;
    entry["request"] = item.request;
    entry["kv_head"] = item.kv_head;
    entry["tokens"] = py::make_tuple(item.token_begin, item.token_end);
    entry["splits"] = py::make_tuple(item.split_begin, item.split_end);
    entry["num_items"] = item.num_items;
    items.append(entry);
  }
  py::dict result;
  result["items"] = items;
  result["workspace_bytes"] = plan.workspace_bytes();
  result["counter_bytes"] = plan.counter_bytes();
  result["worker_scratch_bytes"] = plan.worker_scratch_bytes();
  result["score_pairs"] = plan.score_pairs();
  result["build_us"] = best_us;
  return result;
}

int64_t code_bytes(KvCodec codec, int64_t head_dim) {
  KvGroupLayout layout;
  layout.num_layers = layout.num_kv_heads = 1;
  layout.head_dim = static_cast<int>(head_dim);
  layout.check();
  return static_cast<int64_t>(kv_row_bytes(codec, layout.head_dim));
}

void encode_rows(const std::string& codec_name, py::object x_object, py::object codes_object,
                 py::object params_object) {
  const KvCodec codec = parse_kv_codec(codec_name);
  const ArrayArgument x(x_object, "x");
  const ArrayArgument codes(codes_object, "codes", true);
  const ArrayArgument params(params_object, "params", true);
  x->expect(DType::kF32, {-1, -1});
  codes->expect(DType::kU8, {x->shape[0], code_bytes(codec, x->shape[1])});
  params->expect(DType::kF16, {x->shape[0], 2});
  encode_kv_rows(codec, x->as<float>(), x->shape[0], static_cast<int>(x->shape[1]), codes->as<std::byte>(),
                 params->as<uint16_t>());
}

void decode_rows(const std::string& codec_name, py::object codes_object, py::object params_object,
                 py::object x_object) {
  const KvCodec codec = parse_kv_codec(codec_name);
  const ArrayArgument x(x_object, "x", true);
  const ArrayArgument codes(codes_object, "codes");
  const ArrayArgument params(params_object, "params");
  x->expect(DType::kF32, {-1, -1});
  codes->expect(DType::kU8, {x->shape[0], code_bytes(codec, x->shape[1])});
  params->expect(DType::kF16, {x->shape[0], 2});
  decode_kv_rows(codec, codes->as<std::byte>(), params->as<uint16_t>(), x->shape[0], static_cast<int>(x->shape[1]),
                 x->as<float>());
}

void decode_page(const KvGroupLayout& layout, py::object arena_object, int64_t page_id, int layer, int kv_head,
                 const std::string& stream, py::object out_object) {
  const ArrayArgument arena(arena_object, "arena");
  const ArrayArgument out(out_object, "out", true);
  layout.check();
  arena->expect(DType::kU8, {-1, -1});
  PARTITA_CHECK(arena->shape[1] >= static_cast<int64_t>(layout.page_bytes()), "arena: got pages of ", arena->shape[1],
                " bytes, wanted at least ", layout.page_bytes());
  PARTITA_CHECK(page_id >= 0 && page_id < arena->shape[0], "page_id: got ", page_id, ", wanted 0 to ",
                arena->shape[0] - 1);
  PARTITA_CHECK(layer >= 0 && layer < layout.num_layers, "layer: got ", layer, ", wanted 0 to ", layout.num_layers - 1);
  PARTITA_CHECK(kv_head >= 0 && kv_head < layout.num_kv_heads, "kv_head: got ", kv_head, ", wanted 0 to ",
                layout.num_kv_heads - 1);
  PARTITA_CHECK(stream == "k" || stream == "v", "stream: got '", stream, "', wanted 'k' or 'v'");
  out->expect(DType::kF32, {layout.page_size, layout.head_dim});
  decode_page_stream(layout, arena->as<std::byte>() + page_id * arena->shape[1], layer, kv_head, stream == "k",
                     out->as<float>());
}

KvGroupLayout make_layout(int num_layers, int num_kv_heads, int head_dim, int page_size, const std::string& kv_dtype,
                          int window) {
  KvGroupLayout layout;
  layout.num_layers = num_layers;
  layout.num_kv_heads = num_kv_heads;
  layout.head_dim = head_dim;
  layout.page_size = page_size;
  layout.window = window;
  const size_t colon = kv_dtype.find(':');
  layout.k_codec = parse_kv_codec(kv_dtype.substr(0, colon));
  layout.v_codec = colon == std::string::npos ? layout.k_codec : parse_kv_codec(kv_dtype.substr(colon + 1));
  layout.check();
  return layout;
}

}  // namespace

void register_attention(py::module_& module) {
  py::class_<KvGroupLayout>(module, "KvGroupLayout",
                            "Byte image of one KV group's page. kv_dtype: a codec (fp32, bf16, fp16, fp8, int8, int4, "
                            "int4-plain) or a pair k:v. Raises ValueError naming the bad field.")
      .def(py::init(&make_layout), py::arg("num_layers"), py::arg("num_kv_heads"), py::arg("head_dim"),
           py::arg("page_size") = 64, py::arg("kv_dtype") = "bf16", py::arg("window") = 0)
      .def_readonly("num_layers", &KvGroupLayout::num_layers)
      .def_readonly("num_kv_heads", &KvGroupLayout::num_kv_heads)
      .def_readonly("head_dim", &KvGroupLayout::head_dim)
      .def_readonly("page_size", &KvGroupLayout::page_size)
      .def_readonly("window", &KvGroupLayout::window)
      .def_property_readonly("k_codec", [](const KvGroupLayout& layout) { return kv_codec_name(layout.k_codec); })
      .def_property_readonly("v_codec", [](const KvGroupLayout& layout) { return kv_codec_name(layout.v_codec); })
      .def("k_stream_bytes", &KvGroupLayout::k_stream_bytes)
      .def("v_stream_bytes", &KvGroupLayout::v_stream_bytes)
      .def("layer_bytes", &KvGroupLayout::layer_bytes)
      .def("page_bytes", &KvGroupLayout::page_bytes)
      .def("k_offset", &KvGroupLayout::k_offset, py::arg("layer"))
      .def("v_offset", &KvGroupLayout::v_offset, py::arg("layer"));

  py::class_<RopeTableStorage, std::shared_ptr<RopeTableStorage>>(module, "RopeTableStorage",
                                                                  "Owns the cosines and sines of every position.")
      .def(py::init<const std::vector<double>&, int64_t, double>(), py::arg("inv_freq"), py::arg("num_positions"),
           py::arg("attention_factor") = 1.0)
      .def_property_readonly("num_positions", [](const RopeTableStorage& rope) { return rope.table().num_positions; })
      .def_property_readonly("rotary_dim", [](const RopeTableStorage& rope) { return rope.table().rotary_dim; })
      .def(
          "row",
          [](const RopeTableStorage& rope, int64_t position) {
            const RopeTable table = rope.table();
            PARTITA_CHECK(position >= 0 && position < table.num_positions, "position: got ", position, ", wanted 0 to ",
                          table.num_positions - 1);
            const int half = table.rotary_dim / 2;
            const float* cos = table.cos + position * half;
            const float* sin = table.sin + position * half;
            return py::make_tuple(std::vector<float>(cos, cos + half), std::vector<float>(sin, sin + half));
          },
          py::arg("position"), "(cosines, sines) of one position, [rotary_dim / 2] each.");

  module.def("attention_append", &append, py::arg("qkv"), py::arg("arena"), py::arg("cu_seqlens_q"),
             py::arg("context_starts"), py::arg("page_tables"), py::arg("layout"), py::kw_only(), py::arg("layer") = 0,
             py::arg("num_q_heads"), py::arg("rope") = nullptr, py::arg("q_norm_weight") = py::none(),
             py::arg("k_norm_weight") = py::none(), py::arg("norm_eps") = 1e-6f, py::arg("num_threads") = 0);
  module.def(
      "attention_attend",
      [](py::object qkv, py::object out, py::object arena, py::object cu_seqlens_q, py::object context_starts,
         py::object page_tables, const KvGroupLayout& layout, int layer, int num_q_heads, float scale, float soft_cap,
         bool exact, int num_threads) {
        attend_layers(qkv, out, arena, cu_seqlens_q, context_starts, page_tables, layout, layer, 1, num_q_heads, scale,
                      soft_cap, exact, num_threads, 1);
      },
      py::arg("qkv"), py::arg("out"), py::arg("arena"), py::arg("cu_seqlens_q"), py::arg("context_starts"),
      py::arg("page_tables"), py::arg("layout"), py::kw_only(), py::arg("layer") = 0, py::arg("num_q_heads"),
      py::arg("scale"), py::arg("soft_cap") = 0.0f, py::arg("exact") = false, py::arg("num_threads") = 0);
  module.def(
      "attention_bench",
      [](py::object qkv, py::object out, py::object arena, py::object cu_seqlens_q, py::object context_starts,
         py::object page_tables, const KvGroupLayout& layout, int num_q_heads, float scale, float soft_cap, bool exact,
         int num_threads, int num_rounds) {
        PARTITA_CHECK(num_rounds >= 1, "num_rounds: got ", num_rounds, ", wanted at least 1");
        return attend_layers(qkv, out, arena, cu_seqlens_q, context_starts, page_tables, layout, 0, layout.num_layers,
                             num_q_heads, scale, soft_cap, exact, num_threads, num_rounds);
      },
      py::arg("qkv"), py::arg("out"), py::arg("arena"), py::arg("cu_seqlens_q"), py::arg("context_starts"),
      py::arg("page_tables"), py::arg("layout"), py::kw_only(), py::arg("num_q_heads"), py::arg("scale"),
      py::arg("soft_cap") = 0.0f, py::arg("exact") = false, py::arg("num_threads") = 0, py::arg("num_rounds") = 1);
  module.def("attention_plan", &describe_plan, py::arg("cu_seqlens_q"), py::arg("context_starts"), py::arg("layout"),
             py::kw_only(), py::arg("num_q_heads"), py::arg("num_builds") = 1);
  module.def("encode_kv_rows", &encode_rows, py::arg("codec"), py::arg("x"), py::arg("codes"), py::arg("params"));
  module.def("decode_kv_rows", &decode_rows, py::arg("codec"), py::arg("codes"), py::arg("params"), py::arg("x"));
  module.def("decode_page_stream", &decode_page, py::arg("layout"), py::arg("arena"), py::arg("page_id"),
             py::arg("layer"), py::arg("kv_head"), py::arg("stream"), py::arg("out"));
}

}  // namespace partita::bindings
