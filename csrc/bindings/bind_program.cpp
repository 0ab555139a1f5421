#include <pybind11/stl.h>

#include <memory>
#include <string>

#include "bindings/array_argument.h"
#include "bindings/gpu_linear.h"
#include "bindings/register.h"
#include "bindings/weight_argument.h"
#include "gemm/gemm.h"
#include "gemm/gemm_gpu.h"
#include "program/node_attention.h"
#include "program/node_attention_gpu.h"
#include "program/node_linear.h"
#include "program/node_linear_gpu.h"
#include "program/node_rows.h"
#include "program/node_rows_gpu.h"
#include "program/node_sampling.h"
#include "program/node_sampling_gpu.h"
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

void register_program_class(py::module_& module) {
  py::class_<Program, std::shared_ptr<Program>>(module, "Program",
                                                "A model's forward pass, recorded once; immutable after seal().")
      .def(py::init<std::shared_ptr<Gpu>, bool>(), py::arg("gpu") = nullptr, py::arg("is_batch_invariant") = false,
           "gpu: where its nodes run; None: on the CPU.")
      .def_property_readonly("gpu", &Program::gpu)
      .def(
          "add_buffer",
          [](Program& program, std::string name, const std::string& rows, int64_t width, const std::string& dtype) {
            return program.add_buffer(std::move(name), parse_row_kind(rows), width, dtype_named(dtype));
          },
          py::arg("name"), py::arg("rows"), py::arg("width"), py::arg("dtype") = "float32")
      .def(
          "add_copy_pages",
          [](Program& program, std::string name) {
            if (program.gpu()) return program.add_node(std::move(name), -1, std::make_unique<GpuCopyPagesOp>(), {}, {});
            return program.add_node(std::move(name), -1, std::make_unique<CopyPagesOp>(), {}, {});
          },
          py::arg("name"))
      .def(
          "add_embedding",
          [](Program& program, std::string name, const SharedWeight& table, float scale, BufferId output,
             BufferId token_ids) {
            PARTITA_CHECK(width_of(program, output, "output") == table->weight.in_features, "output: rows hold ",
                          width_of(program, output, "output"), " elements, wanted ", table->weight.in_features);
            if (program.gpu()) {
              spec_of(program, token_ids, "token_ids");
              return program.add_node(
                  std::move(name), -1,
                  std::make_unique<GpuEmbeddingOp>(program, table->weight, scale, token_ids, output), {}, {output});
            }
            return program.add_node(std::move(name), -1,
                                    std::make_unique<EmbeddingOp>(table->weight, owned_by_native(table), scale, output),
                                    {}, {output});
          },
          py::arg("name"), py::arg("table"), py::arg("scale"), py::arg("output"), py::arg("token_ids") = kNoBuffer,
          "token_ids: on a GPU, a buffer [T, 1] of int32.")
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
          "add_linear",
          [](Program& program, std::string name, int layer, const BoundLinear& weights, BufferId input, BufferId output,
             BufferId prepared, const std::string& rows, const py::object& norm_weight, float norm_eps,
             const py::object& bias, bool add_to_output, const std::string& gate, BufferId scales, BufferId sums) {
            GpuLinearNode node;
            PARTITA_CHECK(weights.gpu == program.gpu(), "weights: lie on another device than the program");
            node.weights = weights.linear;
            node.input = input;
            node.output = output;
            node.prepared = prepared;
            node.scales = scales;
            node.sums = sums;
            node.rows = parse_row_kind(rows);
            node.norm_weight = vector_argument(norm_weight, "norm_weight");
            node.norm_eps = norm_eps;
            node.bias = vector_argument(bias, "bias");
            node.add_to_output = add_to_output;
            node.gate = parse_gate(gate);
            for (const auto& [buffer, argument] :
                 {std::pair{input, "input"}, {output, "output"}, {prepared, "prepared"}})
              spec_of(program, buffer, argument);
            std::vector<BufferId> reads = {input};
            if (add_to_output) reads.push_back(output);
            auto op = std::make_unique<GpuLinearOp>(program, std::move(node));
            return program.add_node(std::move(name), layer, std::move(op), std::move(reads), {output});
          },
          py::arg("name"), py::arg("layer"), py::arg("weights"), py::arg("input"), py::arg("output"),
          py::arg("prepared"), py::arg("rows") = "token", py::arg("norm_weight") = py::none(),
          py::arg("norm_eps") = 0.0f, py::arg("bias") = py::none(), py::arg("add_to_output") = false,
          py::arg("gate") = "", py::arg("scales") = kNoBuffer, py::arg("sums") = kNoBuffer)
      .def(
          "add_attention",
          [](Program& program, std::string name, int layer, int group, int layer_in_group, const KvGroupLayout& layout,
             int num_q_heads, const py::object& rope, const py::object& q_norm_weight, const py::object& k_norm_weight,
             float norm_eps, float scale, float soft_cap, bool exact, BufferId qkv, BufferId output) {
            AttentionNode node;
            node.group = group;
            node.layer_in_group = layer_in_group;
            node.plan =
                program.add_attention_plan({group, num_q_heads, layout, spec_of(program, qkv, "qkv").dtype, exact});
            node.layout = layout;
            node.num_q_heads = num_q_heads;
            node.q_norm_weight = vector_argument(q_norm_weight, "q_norm_weight");
            node.k_norm_weight = vector_argument(k_norm_weight, "k_norm_weight");
            node.norm_eps = norm_eps;
            node.scale = scale;
            node.soft_cap = soft_cap;
            node.exact = exact;
            node.qkv = qkv;
            node.output = output;
            spec_of(program, output, "output");
            if (program.gpu()) {
              std::shared_ptr<GpuRopeStorage> table;
              if (!rope.is_none()) table = rope.cast<std::shared_ptr<GpuRopeStorage>>();
              auto op = std::make_unique<GpuAttentionOp>(program, std::move(node), std::move(table));
              return program.add_node(std::move(name), layer, std::move(op), {qkv}, {output});
            }
            if (!rope.is_none()) node.rope = rope.cast<std::shared_ptr<RopeTableStorage>>();
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
            if (program.gpu()) {
              spec_of(program, branch, "branch");
              spec_of(program, residual, "residual");
              auto op =
                  std::make_unique<GpuNormAddOp>(program, vector_argument(weight, "weight"), eps, branch, residual);
              return program.add_node(std::move(name), layer, std::move(op), {branch, residual}, {residual});
            }
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
            if (program.gpu())
              return program.add_node(std::move(name), -1, std::make_unique<GpuGatherLogitRowsOp>(width, input, output),
                                      {input}, {output});
            return program.add_node(std::move(name), -1, std::make_unique<GatherLogitRowsOp>(width, input, output),
                                    {input}, {output});
          },
          py::arg("name"), py::arg("input"), py::arg("output"))
      .def(
          "add_sampling",
          [](Program& program, std::string name, BufferId logits) {
            const int64_t vocab_size = width_of(program, logits, "logits");
            if (program.gpu())
              return program.add_node(std::move(name), -1, std::make_unique<GpuSamplingOp>(program, logits), {logits},
                                      {});
            return program.add_node(std::move(name), -1, std::make_unique<SamplingOp>(vocab_size, logits), {logits},
                                    {});
          },
          py::arg("name"), py::arg("logits"))
      .def(
          "add_soft_cap",
          [](Program& program, std::string name, float cap, BufferId logits) {
            const int64_t vocab_size = width_of(program, logits, "logits");
            if (program.gpu())
              return program.add_node(std::move(name), -1, std::make_unique<GpuSoftCapOp>(program, cap, logits),
                                      {logits}, {logits});
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

}  // namespace

void register_program(py::module_& module) {
  py::class_<GpuRopeStorage, std::shared_ptr<GpuRopeStorage>>(module, "GpuRopeStorage",
                                                              "A rotary table in a GPU's memory.")
      .def(py::init<const std::shared_ptr<Gpu>&, const RopeTableStorage&>(), py::arg("gpu"), py::arg("table"));
  register_program_class(module);
}

}  // namespace partita::bindings
