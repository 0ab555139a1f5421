#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>

#include "bindings/register.h"
#include "core/check.h"
#include "partition/core_set.h"
#include "partition/gpu_ladder.h"
#include "program/gpu_lane.h"
#include "program/lane.h"

namespace py = pybind11;

namespace partita::bindings {
namespace {

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

}  // namespace

void register_lanes(py::module_& module) {
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

  py::class_<RangeSignal, std::shared_ptr<RangeSignal>>(module, "RangeSignal", "The end of a submitted range.")
      .def_property_readonly("has_ended", &RangeSignal::has_ended);

  py::class_<Lane, std::shared_ptr<Lane>>(module, "Lane", "An ordered queue of work on a set of cores.")
      .def(py::init<int, std::vector<int>, int, std::shared_ptr<CompletionQueue>>(), py::arg("lane_idx"),
           py::arg("cores"), py::arg("num_workers"), py::arg("completions"))
      .def_property_readonly("lane_idx", &Lane::lane_idx)
      .def_property_readonly("num_workers", &Lane::num_workers)
      .def_property_readonly("cores", &Lane::cores)
      .def(
          "submit",
          [](Lane& lane, const std::shared_ptr<Frame>& frame, int first, int last, RangeSignals after) {
            auto on_cpu = std::dynamic_pointer_cast<CpuFrame>(frame);
            PARTITA_CHECK(on_cpu != nullptr, "frame: got a GPU's, wanted one of this lane's device");
            return lane.submit(std::move(on_cpu), first, last, std::move(after));
          },
          py::arg("frame"), py::arg("first_node"), py::arg("last_node"), py::arg("after") = RangeSignals{},
          "Queues nodes [first_node, last_node) of the frame; returns a ticket at once. It starts when all the ranges "
          "have ended whose signals `after` lists, and fails when one of them did.")
      .def(
          "submit_with_signal",
          [](Lane& lane, const std::shared_ptr<Frame>& frame, int first, int last, RangeSignals after) {
            auto on_cpu = std::dynamic_pointer_cast<CpuFrame>(frame);
            PARTITA_CHECK(on_cpu != nullptr, "frame: got one of another device, wanted one of this lane's");
            const uint64_t ticket = lane.submit(on_cpu, first, last, std::move(after));
            return py::make_tuple(ticket, on_cpu->last_claimed);
          },
          py::arg("frame"), py::arg("first_node"), py::arg("last_node"), py::arg("after") = RangeSignals{},
          "As submit; returns (ticket, signal of the range's end).")
      .def("request_stop", &Lane::request_stop, py::arg("ticket"),
           "Asks a range to stop before its next node; the frame's cursor tells where it rests.")
      .def("set_tracing", &Lane::set_tracing, py::arg("on"));

  py::class_<GpuLane, std::shared_ptr<GpuLane>>(module, "GpuLane", "An ordered queue of work on a stream of a GPU.")
      .def(py::init([](int lane_idx, std::shared_ptr<Gpu> gpu, std::shared_ptr<CompletionQueue> completions,
                       uintptr_t stream, int num_ctas, int launch_ahead, int max_graph_rows) {
             GpuLaneOptions options;
             options.stream = reinterpret_cast<GpuStream>(stream);
             options.num_ctas = num_ctas;
             options.launch_ahead = launch_ahead;
             options.max_graph_rows = max_graph_rows;
             return std::make_shared<GpuLane>(lane_idx, std::move(gpu), options, std::move(completions));
           }),
           py::arg("lane_idx"), py::arg("gpu"), py::arg("completions"), py::arg("stream") = 0, py::arg("num_ctas") = 0,
           py::arg("launch_ahead") = GpuLaneOptions{}.launch_ahead, py::arg("max_graph_rows") = 0,
           "stream: 0 for one of its own over the whole chip, or a partition's. num_ctas: most thread blocks of a "
           "kernel, 0 for as many as the chip runs. launch_ahead: nodes. max_graph_rows: decode steps of up to so many "
           "rows replay captured graphs.")
      .def_property_readonly("lane_idx", &GpuLane::lane_idx)
      .def_property_readonly("num_graphs", &GpuLane::num_graphs, "Decode graphs captured so far.")
      .def_property_readonly("num_graph_steps", &GpuLane::num_graph_steps, "Steps that replayed one.")
      .def(
          "submit",
          [](GpuLane& lane, const std::shared_ptr<Frame>& frame, int first, int last, RangeSignals after) {
            auto on_gpu = std::dynamic_pointer_cast<GpuFrame>(frame);
            PARTITA_CHECK(on_gpu != nullptr, "frame: got the CPU's, wanted one of this lane's device");
            return lane.submit(std::move(on_gpu), first, last, std::move(after));
          },
          py::arg("frame"), py::arg("first_node"), py::arg("last_node"), py::arg("after") = RangeSignals{},
          "As Lane.submit.")
      .def(
          "submit_with_signal",
          [](GpuLane& lane, const std::shared_ptr<Frame>& frame, int first, int last, RangeSignals after) {
            auto on_gpu = std::dynamic_pointer_cast<GpuFrame>(frame);
            PARTITA_CHECK(on_gpu != nullptr, "frame: got one of another device, wanted one of this lane's");
            const uint64_t ticket = lane.submit(on_gpu, first, last, std::move(after));
            return py::make_tuple(ticket, on_gpu->last_claimed);
          },
          py::arg("frame"), py::arg("first_node"), py::arg("last_node"), py::arg("after") = RangeSignals{},
          "As submit; returns (ticket, signal of the range's end).")
      .def("request_stop", &GpuLane::request_stop, py::arg("ticket"),
           "Asks a range to stop before the next node that is not launched yet.")
      .def(
          "capture_graphs",
          [](GpuLane& lane, const std::shared_ptr<Frame>& frame) {
            auto on_gpu = std::dynamic_pointer_cast<GpuFrame>(frame);
            PARTITA_CHECK(on_gpu != nullptr, "frame: got the CPU's, wanted one of this lane's device");
            return lane.capture_graphs(std::move(on_gpu));
          },
          py::arg("frame"),
          "Queues the capture of every row bucket's decode graph, in a frame that no step was prepared in; returns a "
          "ticket.")
      .def("set_tracing", &GpuLane::set_tracing, py::arg("on"));
  module.def("decode_buckets", &decode_buckets, py::arg("most"), "Row counts for which decode graphs are captured.");

  const auto partition_dict = [](const GpuPartition& partition) {
    py::dict entry;
    entry["stream"] = reinterpret_cast<uintptr_t>(partition.stream);
    entry["num_sms"] = partition.num_sms;
    entry["num_ctas"] = partition.num_ctas;
    return entry;
  };
  py::class_<GpuLadder, std::shared_ptr<GpuLadder>>(
      module, "GpuLadder",
      "Two-way splits of a GPU's SMs, made once; a lane takes a part's stream and num_ctas. Keep it while they run.")
      .def(py::init<std::shared_ptr<Gpu>, std::vector<double>>(), py::arg("gpu"), py::arg("shares"))
      .def_property_readonly("whole",
                             [partition_dict](const GpuLadder& ladder) { return partition_dict(ladder.whole()); })
      .def_property_readonly("rungs",
                             [partition_dict](const GpuLadder& ladder) {
                               py::list rungs;
                               for (const GpuLadderRung& rung : ladder.rungs())
                                 rungs.append(py::make_tuple(partition_dict(rung.first), partition_dict(rung.second)));
                               return rungs;
                             })
      .def_property_readonly("is_isolated", &GpuLadder::is_isolated)
      .def_property_readonly("note", &GpuLadder::note)
      .def("rung_near", &GpuLadder::rung_near, py::arg("share"),
           "Index of the rung whose first part is nearest to this share; -1: there is none.");

  module.def("usable_core_ids", &usable_core_ids, "CPU numbers this process may use.");
  module.def(
      "split_cores",
      [](const std::vector<int>& cores, double share) {
        const CoreSplit split = split_cores(cores, share);
        return py::make_tuple(split.first, split.second);
      },
      py::arg("cores"), py::arg("share"), "Two disjoint core lists: about `share` of the cores, and the rest.");
}

}  // namespace partita::bindings
