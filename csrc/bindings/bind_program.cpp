#include <pybind11/stl.h>

#include <memory>
#include <string>

#include "bindings/array_argument.h"
#include "bindings/register.h"
#include "bindings/weight_argument.h"
#include "gemm/gemm.h"
#include "partition/core_set.h"
#include "program/frame.h"
#include "program/lane.h"
#include "program/node_attention.h"
#include "program/node_linear.h"
#include "program/node_rows.h"
#include "program/node_sampling.h"
#include "program/program.h"

namespace py = pybind11;

namespace partita::bindings {
namespace {

RowKind parse_row_kind(const std::string& rows) {
  if (rows == "token") return RowKind::kToken;
  if (rows == "logit_row") return RowKind::kLogitRow;
  throw_value_error("rows: got '", rows, "', wanted 'token' or 'logit_row'");
}

GateActivation parse_gate(const std::string& gate) {
  if (gate.empty()) return GateActivation::kNone;
  if (gate == "silu") return GateActivation::kSilu;
  if (gate == "gelu_tanh") return GateActivation::kGeluTanh;
  throw_value_error("gate: got '", gate, "', wanted '', 'silu' or 'gelu_tanh'");
}

// Owns a Python object for native code that may let go of it on a thread without the GIL.
std::shared_ptr<const void> owned_by_native(const SharedWeight& weight) {
  auto* held = new SharedWeight(weight);
  return {held, [](const void* pointer) {
            if (!Py_IsInitialized()) return;  // at exit the interpreter took its objects along
            const py::gil_scoped_acquire gil;
            delete static_cast<const SharedWeight*>(pointer);
          }};
}

// None -> empty; else a contiguous fp32 vector.
std::vector<float> vector_argument(const py::object& object, const char* name) {
  if (object.is_none()) return {};
  const ArrayArgument array(object, name);
  array->expect(DType::kF32, {-1});
  const float* data = array->as<float>();
  return {data, data + array->shape[0]};
}

const BufferSpec& spec_of(const Program& program, BufferId buffer, const char* name) {
  PARTITA_CHECK(buffer >= 0 && buffer < static_cast<int>(program.buffers().size()), name, ": got buffer ", buffer,
                ", wanted 0 to ", static_cast<int>(program.buffers().size()) - 1);
  return program.buffers()[buffer];
}

int64_t width_of(const Program& program, BufferId buffer, const char* name) {
  return spec_of(program, buffer, name).width;
}

py::list describe(const Program& program, const StepShape& shape) {
  py::list nodes;
  for (const Node& node : program.nodes()) {
    const NodeCost node_cost = node.op->cost(shape);
    py::dict entry;
    entry["name"] = node.name;
    entry["layer"] = node.layer;
    entry["kind"] = node.op->kind();
    entry["detail"] = node.op->detail();
    entry["class"] = resource_class_name(node.op->resource_class(shape));
    entry["operations"] = node_cost.operations;
    entry["bytes"] = node_cost.bytes;
    py::list live;
    for (BufferId buffer : node.live_after) live.append(program.buffers()[buffer].name);
    entry["live_after"] = live;
    nodes.append(entry);
  }
  return nodes;
}

py::dict completion_dict(const Completion& completion) {
  py::dict entry;
  entry["ticket"] = completion.ticket;
  entry["lane"] = completion.lane;
  entry["first_node"] = completion.first_node;
  entry["cursor"] = completion.cursor;
  entry["was_stopped"] = completion.was_stopped;
  entry["error"] = completion.error;
  entry["start_ns"] = completion.start_ns;
  entry["end_ns"] = completion.end_ns;
  py::list spans;
  for (const NodeSpan& span : completion.spans) spans.append(py::make_tuple(span.node, span.start_ns, span.end_ns));
  entry["spans"] = spans;
  return entry;
}

void register_program_class(py::module_& module) {
  py::class_<Program, std::shared_ptr<Program>>(module, "Program",
                                                "A model's forward pass, recorded once; immutable after seal().")
      .def(py::init<>())
      .def(
          "add_buffer",
          [](Program& program, std::string name, const std::string& rows, int64_t width, const std::string& dtype) {
            return program.add_buffer(std::move(name), parse_row_kind(rows), width, dtype_named(dtype));
          },
          py::arg("name"), py::arg("rows"), py::arg("width"), py::arg("dtype") = "float32")
      .def("add_attention_plan", &Program::add_attention_plan, py::arg("group"), py::arg("num_q_heads"))
      .def(
          "add_copy_pages",
          [](Program& program, std::string name) {
            return program.add_node(std::move(name), -1, std::make_unique<CopyPagesOp>(), {}, {});
          },
          py::arg("name"))
      .def(
          "add_embedding",
          [](Program& program, std::string name, const SharedWeight& table, float scale, BufferId output) {
            PARTITA_CHECK(width_of(program, output, "output") == table->weight.in_features, "output: rows hold ",
                          width_of(program, output, "output"), " elements, wanted ", table->weight.in_features);
            return program.add_node(std::move(name), -1,
                                    std::make_unique<EmbeddingOp>(table->weight, owned_by_native(table), scale, output),
                                    {}, {output});
          },
          py::arg("name"), py::arg("table"), py::arg("scale"), py::arg("output"))
      .def(
          "add_linear",
          [](Program& program, std::string name, int layer, std::shared_ptr<PackedLinear> weights, BufferId input,
             BufferId output, BufferId prepared, const std::string& rows, const py::object& norm_weight, float norm_eps,
             const py::object& bias, bool add_to_output, const std::string& gate) {
            LinearNode node;
            node.weights = std::move(weights);
            node.input = input;
            node.output = output;
            node.prepared = prepared;
            node.rows = parse_row_kind(rows);
            node.norm_weight = vector_argument(norm_weight, "norm_weight");
            node.norm_eps = norm_eps;
            node.bias = vector_argument(bias, "bias");
            node.add_to_output = add_to_output;
            node.gate = parse_gate(gate);
            std::vector<BufferId> reads = {input};
            if (add_to_output) reads.push_back(output);
            auto op = std::make_unique<LinearOp>(std::move(node), width_of(program, input, "input"),
                                                 width_of(program, output, "output"),
                                                 spec_of(program, prepared, "prepared").row_bytes());
            return program.add_node(std::move(name), layer, std::move(op), std::move(reads), {output});
          },
          py::arg("name"), py::arg("layer"), py::arg("weights"), py::arg("input"), py::arg("output"),
          py::arg("prepared"), py::arg("rows") = "token", py::arg("norm_weight") = py::none(),
          py::arg("norm_eps") = 0.0f, py::arg("bias") = py::none(), py::arg("add_to_output") = false,
          py::arg("gate") = "")
      .def(
          "add_attention",
          [](Program& program, std::string name, int layer, int group, int layer_in_group, const KvGroupLayout& layout,
             int num_q_heads, std::shared_ptr<RopeTableStorage> rope, const py::object& q_norm_weight,
             const py::object& k_norm_weight, float norm_eps, float scale, float soft_cap, bool exact, BufferId qkv,
             BufferId output) {
            AttentionNode node;
            node.group = group;
            node.layer_in_group = layer_in_group;
            node.plan = program.add_attention_plan(group, num_q_heads);
            node.layout = layout;
            node.num_q_heads = num_q_heads;
            node.rope = std::move(rope);
            node.q_norm_weight = vector_argument(q_norm_weight, "q_norm_weight");
            node.k_norm_weight = vector_argument(k_norm_weight, "k_norm_weight");
            node.norm_eps = norm_eps;
            node.scale = scale;
            node.soft_cap = soft_cap;
            node.exact = exact;
            node.qkv = qkv;
            node.output = output;
            auto op = std::make_unique<AttentionOp>(std::move(node), width_of(program, qkv, "qkv"),
                                                    width_of(program, output, "output"));
            return program.add_node(std::move(name), layer, std::move(op), {qkv}, {output});
          },
          py::arg("name"), py::arg("layer"), py::arg("group"), py::arg("layer_in_group"), py::arg("layout"),
          py::arg("num_q_heads"), py::arg("rope"), py::arg("q_norm_weight"), py::arg("k_norm_weight"),
          py::arg("norm_eps"), py::arg("scale"), py::arg("soft_cap"), py::arg("exact"), py::arg("qkv"),
          py::arg("output"))
      .def(
          "add_norm_add",
          [](Program& program, std::string name, int layer, const py::object& weight, float eps, BufferId branch,
             BufferId residual) {
            auto op = std::make_unique<NormAddOp>(vector_argument(weight, "weight"), eps, branch, residual);
            return program.add_node(std::move(name), layer, std::move(op), {branch, residual}, {residual});
          },
          py::arg("name"), py::arg("layer"), py::arg("weight"), py::arg("eps"), py::arg("branch"), py::arg("residual"))
      .def(
          "add_gather_logit_rows",
          [](Program& program, std::string name, BufferId input, BufferId output) {
            const int64_t width = width_of(program, input, "input");
            PARTITA_CHECK(width_of(program, output, "output") == width, "output: rows hold ",
                          width_of(program, output, "output"), " elements, wanted ", width);
            return program.add_node(std::move(name), -1, std::make_unique<GatherLogitRowsOp>(width, input, output),
                                    {input}, {output});
          },
          py::arg("name"), py::arg("input"), py::arg("output"))
      .def(
          "add_sampling",
          [](Program& program, std::string name, BufferId logits) {
            const int64_t vocab_size = width_of(program, logits, "logits");
            return program.add_node(std::move(name), -1, std::make_unique<SamplingOp>(vocab_size, logits), {logits},
                                    {});
          },
          py::arg("name"), py::arg("logits"))
      .def(
          "add_soft_cap",
          [](Program& program, std::string name, float cap, BufferId logits) {
            const int64_t vocab_size = width_of(program, logits, "logits");
            return program.add_node(std::move(name), -1, std::make_unique<SoftCapOp>(vocab_size, cap, logits), {logits},
                                    {logits});
          },
          py::arg("name"), py::arg("cap"), py::arg("logits"))
      .def("seal", &Program::seal)
      .def_property_readonly("num_nodes", &Program::num_nodes)
      .def_property_readonly("head_node", &Program::head_node, "First node after the layers: logits and sampling.")
      .def_property_readonly("node_names",
                             [](const Program& program) {
                               std::vector<std::string> names;
                               for (const Node& node : program.nodes()) names.push_back(node.name);
                               return names;
                             })
      .def(
          "describe",
          [](const Program& program, int64_t num_tokens, int64_t num_requests, int64_t num_logit_rows,
             double score_pairs) { return describe(program, {num_tokens, num_requests, num_logit_rows, score_pairs}); },
          py::arg("num_tokens"), py::arg("num_requests"), py::arg("num_logit_rows"), py::arg("score_pairs"),
          "Nodes in order: name, layer, kind, detail, class (compute, memory, network), operations and bytes of a "
          "step of this shape, and the buffers that live after the node.");
}

void register_state_classes(py::module_& module) {
  py::class_<KvArena, std::shared_ptr<KvArena>>(module, "KvArena", "The bytes of all KV pages.")
      .def(py::init<std::vector<KvGroupLayout>, int64_t>(), py::arg("groups"), py::arg("num_pages"))
      .def_property_readonly("num_pages", &KvArena::num_pages)
      .def_property_readonly("page_bytes", &KvArena::page_bytes)
      .def_property_readonly("page_size", &KvArena::page_size)
      .def("release_memory", &KvArena::release_memory)
      .def(
          "page",
          [](const KvArena& arena, int64_t page_id) {
            PARTITA_CHECK(page_id >= 0 && page_id < arena.num_pages(), "page_id: got ", page_id, ", wanted 0 to ",
                          arena.num_pages() - 1);
            return py::memoryview::from_memory(arena.page(page_id), static_cast<py::ssize_t>(arena.page_bytes()));
          },
          py::arg("page_id"), py::keep_alive<0, 1>(), "The page's bytes, writable, uncopied.");

  py::class_<RowStore, std::shared_ptr<RowStore>>(module, "RowStore", "Persistent per-request state.")
      .def(py::init<int, int64_t, int, int, int64_t>(), py::arg("num_rows"), py::arg("max_tokens"),
           py::arg("num_groups"), py::arg("page_size"), py::arg("vocab_size"))
      .def(
          "admit",
          [](RowStore& rows, int row, const py::object& tokens, int64_t num_prompt_tokens,
             const SamplingParams& sampling) {
            const ArrayArgument array(tokens, "tokens");
            array->expect(DType::kI32, {-1});
            rows.admit(row, array->as<int32_t>(), array->shape[0], num_prompt_tokens, sampling);
          },
          py::arg("row"), py::arg("tokens"), py::arg("num_prompt_tokens"), py::arg("sampling"))
      .def(
          "set_pages",
          [](RowStore& rows, int row, int group, int64_t first_page_idx, const std::vector<int32_t>& pages,
             int64_t num_arena_pages) {
            rows.set_pages(row, group, first_page_idx, pages.data(), static_cast<int64_t>(pages.size()),
                           num_arena_pages);
          },
          py::arg("row"), py::arg("group"), py::arg("first_page_idx"), py::arg("pages"), py::arg("num_arena_pages"))
      .def("num_pages", &RowStore::num_pages, py::arg("row"), py::arg("group"))
      .def(
          "append_pages",
          [](RowStore& rows, int row, int group, const std::vector<int32_t>& pages, int64_t num_arena_pages) {
            rows.check_row(row);
            rows.set_pages(row, group, rows.num_pages(row, group), pages.data(), static_cast<int64_t>(pages.size()),
                           num_arena_pages);
          },
          py::arg("row"), py::arg("group"), py::arg("pages"), py::arg("num_arena_pages"))
      .def(
          "tokens",
          [](const RowStore& rows, int row, int64_t num_tokens) {
            rows.check_row(row);
            PARTITA_CHECK(num_tokens >= 0 && num_tokens <= rows.max_tokens(), "num_tokens: got ", num_tokens,
                          ", wanted 0 to ", rows.max_tokens());
            return std::vector<int32_t>(rows.tokens(row), rows.tokens(row) + num_tokens);
          },
          py::arg("row"), py::arg("num_tokens"));

  py::class_<Frame, std::shared_ptr<Frame>>(module, "Frame", "Everything one run of a program owns.")
      .def(py::init([](std::shared_ptr<Program> program, std::shared_ptr<KvArena> arena, std::shared_ptr<RowStore> rows,
                       int64_t max_tokens, int64_t max_logit_rows) {
             return std::make_shared<Frame>(std::move(program), std::move(arena), std::move(rows), max_tokens,
                                            max_logit_rows);
           }),
           py::arg("program"), py::arg("arena"), py::arg("rows"), py::arg("max_tokens"), py::arg("max_logit_rows"))
      .def(
          "prepare",
          [](Frame& frame, const py::object& rows, const std::vector<std::pair<int32_t, int32_t>>& copies,
             bool score_all) {
            const ArrayArgument array(rows, "rows");
            PARTITA_CHECK(array->dtype == DType::kI32 && array->is_contiguous() && array->num_elements() % 4 == 0,
                          "rows: got ", dtype_name(array->dtype), " ", array->shape_text(),
                          ", wanted int32 quadruples (row, start, num_tokens, samples)");
            std::vector<StepRow> step_rows(array->num_elements() / 4);
            const int32_t* quadruple = array->as<int32_t>();
            for (StepRow& step_row : step_rows) {
              step_row = {quadruple[0], quadruple[1], quadruple[2], quadruple[3] != 0};
              quadruple += 4;
            }
            std::vector<PageCopyPair> pairs;
            for (const auto& [source, target] : copies) {
              for (int32_t page : {source, target})
                PARTITA_CHECK(page >= 0 && page < frame.arena().num_pages(), "copies: got page ", page,
                              ", wanted 0 to ", frame.arena().num_pages() - 1);
              pairs.push_back({source, target});
            }
            frame.prepare(step_rows, pairs, score_all);
          },
          py::arg("rows"), py::arg("copies") = std::vector<std::pair<int32_t, int32_t>>{}, py::arg("score_all") = false,
          "Sets the step's inputs: rows is a flat int32 array of (row, start, num_tokens, samples).")
      .def(
          "set_input_embeddings",
          [](Frame& frame, const py::object& embeddings) {
            const ArrayArgument array(embeddings, "input_embeddings");
            array->expect(DType::kF32, {-1, -1});
            frame.set_input_embeddings(array->as<float>(), array->shape[0], array->shape[1]);
          },
          py::arg("embeddings"))
      .def_property_readonly("cursor", &Frame::cursor)
      .def_property_readonly("num_tokens", &Frame::num_tokens)
      .def_property_readonly("score_pairs", [](const Frame& frame) { return frame.shape().score_pairs; })
      .def(
          "sampled_tokens",
          [](const Frame& frame) {
            std::vector<int32_t> tokens(frame.num_logit_rows());
            for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = frame.sampled()[i].token;
            return tokens;
          },
          "One token id per sampling row, in step order; -1 where the logits were not finite.")
      .def(
          "sampled_logprobs",
          [](const Frame& frame, int64_t logit_row) {
            PARTITA_CHECK(logit_row >= 0 && logit_row < frame.num_logit_rows(), "logit_row: got ", logit_row,
                          ", wanted 0 to ", frame.num_logit_rows() - 1);
            const SampledToken& sampled = frame.sampled()[logit_row];
            return py::make_tuple(sampled.token, sampled.logprob, sampled.rank, sampled.top);
          },
          py::arg("logit_row"), "(token, logprob, rank, [(id, logprob), ...]) of one sampling row.")
      .def(
          "scores",
          [](const Frame& frame) {
            return std::vector<float>(frame.scores().begin(), frame.scores().begin() + frame.num_logit_rows());
          },
          "After a score_all step: log probability of each scheduled token's successor in its row.")
      .def(
          "read_buffer",
          [](const Frame& frame, const std::string& name, const py::object& out) {
            const ArrayArgument array(out, "out", true);
            array->expect(DType::kF32, {-1, -1});
            const auto& buffers = frame.program().buffers();
            for (size_t id = 0; id < buffers.size(); ++id) {
              if (buffers[id].name != name) continue;
              const int64_t width = buffers[id].row_bytes / static_cast<int64_t>(sizeof(float));
              const int64_t rows = buffers[id].rows == RowKind::kToken ? frame.num_tokens() : frame.num_logit_rows();
              array->expect(DType::kF32, {rows, width});
              std::copy_n(frame.buffer_as<float>(static_cast<BufferId>(id)), rows * width, array->as<float>());
              return;
            }
            throw_value_error("name: got '", name, "', wanted one of the program's buffers");
          },
          py::arg("name"), py::arg("out"), "Copies a buffer's rows of this step; out: [rows, width] fp32.");
}

void register_lane_classes(py::module_& module) {
  py::class_<CompletionQueue, std::shared_ptr<CompletionQueue>>(module, "CompletionQueue",
                                                                "Where lanes report finished ranges.")
      .def(py::init<>())
      .def("notify", &CompletionQueue::notify, "Makes wait_any return early. Any thread may call it.")
      .def(
          "wait_any",
          [](CompletionQueue& queue, double timeout_s) {
            std::vector<Completion> completions;
            {
              const py::gil_scoped_release release;
              completions = queue.wait_any(timeout_s);
            }
            py::list entries;
            for (const Completion& completion : completions) entries.append(completion_dict(completion));
            return entries;
          },
          py::arg("timeout_s") = -1.0,
          "Sleeps without the GIL until a range finishes or notify() is called; negative: no time limit. Returns "
          "dicts: ticket, lane, first_node, cursor, was_stopped, error, start_ns, end_ns, spans [(node, start, end)].");

  py::class_<Lane, std::shared_ptr<Lane>>(module, "Lane", "An ordered queue of work on a set of cores.")
      .def(py::init<int, std::vector<int>, int, std::shared_ptr<CompletionQueue>>(), py::arg("lane_idx"),
           py::arg("cores"), py::arg("num_workers"), py::arg("completions"))
      .def_property_readonly("lane_idx", &Lane::lane_idx)
      .def_property_readonly("num_workers", &Lane::num_workers)
      .def_property_readonly("cores", &Lane::cores)
      .def("submit", &Lane::submit, py::arg("frame"), py::arg("first_node"), py::arg("last_node"),
           "Queues nodes [first_node, last_node) of the frame; returns a ticket at once.")
      .def("request_stop", &Lane::request_stop, py::arg("ticket"),
           "Asks a range to stop before its next node; the frame's cursor tells where it rests.")
      .def("set_tracing", &Lane::set_tracing, py::arg("on"));

  module.def("usable_core_ids", &usable_core_ids, "CPU numbers this process may use.");
  module.def(
      "split_cores",
      [](const std::vector<int>& cores, double share) {
        const CoreSplit split = split_cores(cores, share);
        return py::make_tuple(split.first, split.second);
      },
      py::arg("cores"), py::arg("share"), "Two disjoint core lists: about `share` of the cores, and the rest.");
}

}  // namespace

void register_program(py::module_& module) {
  register_program_class(module);
  register_state_classes(module);
  register_lane_classes(module);
}

}  // namespace partita::bindings
