// A lane on a GPU: an ordered queue of work on one stream, which spans the chip or a part of it.
//
// One thread launches, node after node, a few nodes ahead of the device; another waits for what was launched and
// reports it. So ranges follow each other on the device without a gap, and a stop takes effect within the launch-ahead
// window. Whole decode steps replay captured graphs.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "program/completions.h"
#include "program/gpu_frame.h"

namespace partita {

struct GpuLaneOptions {
  GpuStream stream = nullptr;  // null: one of its own, over the whole chip
  int num_ctas = 0;            // most thread blocks of a kernel; 0: as many as the chip runs at once
  int launch_ahead = 8;        // nodes; at least 1
  int max_graph_rows = 0;      // decode steps of up to so many rows replay graphs; 0: none
};

class GpuLaneExecution;  // one submitted range, gpu_lane.cpp

class GpuLane {
 public:
  GpuLane(int lane_idx, std::shared_ptr<Gpu> gpu, const GpuLaneOptions& options,
          std::shared_ptr<CompletionQueue> completions);
  ~GpuLane();
  GpuLane(const GpuLane&) = delete;
  GpuLane& operator=(const GpuLane&) = delete;

  int lane_idx() const { return lane_idx_; }
  const GpuLaneOptions& options() const { return options_; }
  int num_graphs() const { return num_graphs_.load(); }
  int64_t num_graph_steps() const { return num_graph_steps_.load(); }  // steps that replayed one

  // As Lane's. A stop takes effect before the next node that is not launched yet.
  uint64_t submit(std::shared_ptr<GpuFrame> frame, int first, int last, RangeSignals after = {});
  void request_stop(uint64_t ticket);
  // Queues the capture of every row bucket's decode graph, for greedy rows and for rows that draw, as steps of nothing
  // but padding in this frame's staging block; otherwise a graph is captured when a step first wants it. Its completion
  // has no nodes. Throws ValueError when the frame is busy or the lane has no graphs.
  uint64_t capture_graphs(std::shared_ptr<GpuFrame> frame);
  // With tracing on, every step is launched node by node: a graph has no nodes to show.
  void set_tracing(bool on) { is_tracing_.store(on); }

 private:
  // A decode graph serves any step of up to so many rows that asks for the same of sampling.
  using GraphKey = std::tuple<int, bool, bool, bool>;  // rows; adjusts, draws, logprobs

  void launch_loop();
  void finish_loop();
  void launch(GpuLaneExecution& execution);
  void launch_nodes(GpuLaneExecution& execution, const GpuRun& run, int first, int last, bool is_stoppable);
  bool replay_graph(GpuLaneExecution& execution);
  void prepare_graph_memory(const GpuFrame& frame);
  void capture_all(GpuLaneExecution& execution);
  void capture(GpuLaneExecution& execution, const GpuRun& run, const GraphKey& key);
  uint64_t enqueue(std::shared_ptr<GpuFrame> frame, int first, int last, RangeSignals after,
                   std::shared_ptr<RangeSignal> signal);
  bool wait_for_turn(GpuLaneExecution& execution);
  void reserve_launch();
  void finish(GpuLaneExecution& execution);

  int lane_idx_;
  std::shared_ptr<Gpu> gpu_;
  GpuLaneOptions options_;
  std::shared_ptr<CompletionQueue> completions_;
  bool owns_stream_;

  // The launching thread's.
  std::vector<GpuEvent> window_;  // when each of the last launches was done
  int64_t num_launched_ = 0;
  std::shared_ptr<GpuFrameMemory> graph_memory_;  // of the program that graphs were captured from
  std::shared_ptr<const Program> graph_program_;
  std::map<GraphKey, GpuGraph> graphs_;

  std::mutex mutex_;
  std::condition_variable submitted_, launched_;
  std::deque<std::shared_ptr<GpuLaneExecution>> queue_;      // not yet launched
  std::deque<std::shared_ptr<GpuLaneExecution>> in_flight_;  // launched in part or whole, not yet reported
  uint64_t num_submitted_ = 0;
  bool is_closing_ = false;        // no more ranges come
  bool is_launcher_done_ = false;  // no more launches come
  std::atomic<int> num_graphs_{0};
  std::atomic<int64_t> num_graph_steps_{0};
  std::atomic<bool> is_tracing_{false};
  std::thread launcher_, finisher_;
};

}  // namespace partita
