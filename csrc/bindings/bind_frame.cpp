#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <string>

#include "bindings/array_argument.h"
#include "bindings/register.h"
#include "core/check.h"
#include "program/cpu_frame.h"
#include "program/gpu_frame.h"

namespace py = pybind11;

namespace partita::bindings {
void register_frames(py::module_& module) {
  py::class_<KvArena, std::shared_ptr<KvArena>>(module, "KvArena", "The bytes of all KV pages.")
      .def(py::init<std::vector<KvGroupLayout>, int64_t, std::shared_ptr<Gpu>>(), py::arg("groups"),
           py::arg("num_pages"), py::arg("gpu") = nullptr)
      .def_property_readonly("num_pages", &KvArena::num_pages)
      .def_property_readonly("page_bytes", &KvArena::page_bytes)
      .def_property_readonly("page_size", &KvArena::page_size)
      .def("release_memory", &KvArena::release_memory)
      .def(
          "page",
          [](const KvArena& arena, int64_t page_id) {
            PARTITA_CHECK(page_id >= 0 && page_id < arena.num_pages(), "page_id: got ", page_id, ", wanted 0 to ",
                          arena.num_pages() - 1);
            PARTITA_CHECK(!arena.gpu(), "page: the arena lies on a GPU; read_page copies a page out of it");
            return py::memoryview::from_memory(arena.page(page_id), static_cast<py::ssize_t>(arena.page_bytes()));
          },
          py::arg("page_id"), py::keep_alive<0, 1>(), "The page's bytes, writable, uncopied.")
      .def(
          "read_page",
          [](const KvArena& arena, int64_t page_id) {
            std::string bytes(arena.page_bytes(), '\0');
            arena.read_page(page_id, reinterpret_cast<std::byte*>(bytes.data()));
            return py::bytes(bytes);
          },
          py::arg("page_id"), "A copy of the page's bytes, from whatever device the arena is on.");

  py::class_<RowStore, std::shared_ptr<RowStore>>(module, "RowStore", "Persistent per-request state.")
      .def(py::init<int, int64_t, int, int, int64_t, std::shared_ptr<Gpu>>(), py::arg("num_rows"),
           py::arg("max_tokens"), py::arg("num_groups"), py::arg("page_size"), py::arg("vocab_size"),
           py::arg("gpu") = nullptr)
      .def("check_sampling", &RowStore::check_sampling, py::arg("sampling"),
           "Raises ValueError for parameters that this device does not take.")
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
                       int64_t max_tokens, int64_t max_logit_rows) -> std::shared_ptr<Frame> {
             if (program->gpu())
               return std::make_shared<GpuFrame>(std::move(program), std::move(arena), std::move(rows), max_tokens,
                                                 max_logit_rows);
             return std::make_shared<CpuFrame>(std::move(program), std::move(arena), std::move(rows), max_tokens,
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
      .def_property_readonly(
          "num_shared_prefixes",
          [](const Frame& frame) {
            const auto* on_gpu = dynamic_cast<const GpuFrame*>(&frame);
            return on_gpu ? on_gpu->num_shared_prefixes() : 0;
          },
          "On a GPU: runs of the step's requests whose first pages are read once for all of them.")
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
              array->expect(DType::kF32, {frame.num_rows(buffers[id].rows), buffers[id].width});
              const py::gil_scoped_release no_gil;
              frame.read_buffer(static_cast<BufferId>(id), array->as<float>());
              return;
            }
            throw_value_error("name: got '", name, "', wanted one of the program's buffers");
          },
          py::arg("name"), py::arg("out"), "Copies a buffer's rows of this step; out: [rows, width] fp32.");

  module.def(
      "gpu_frame_bytes",
      [](const Program& program, int num_rows, int64_t max_context, int num_groups, int page_size, int64_t max_tokens,
         int64_t max_logit_rows, int max_graph_rows) {
        GpuStepLimits limits =
            GpuFrame::step_limits(program, num_rows, max_context, num_groups, page_size, max_tokens, max_logit_rows);
        if (max_graph_rows > 0) {
          limits.max_tokens = limits.max_logit_rows = limits.max_requests = max_graph_rows;
          limits.graph_rows = max_graph_rows;
        }
        return GpuFrame::device_bytes(program, limits);
      },
      py::arg("program"), py::arg("num_rows"), py::arg("max_context"), py::arg("num_groups"), py::arg("page_size"),
      py::arg("max_tokens"), py::arg("max_logit_rows"), py::arg("max_graph_rows") = 0,
      "Device memory of one frame of a sealed GPU program; with max_graph_rows, of a lane's decode graphs.");
}

}  // namespace partita::bindings
