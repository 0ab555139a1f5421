#include "program/gpu_lane.h"

#include <pthread.h>

#include <algorithm>
#include <exception>
#include <utility>

#include "core/check.h"

namespace partita {
namespace {

// Of one node: about two launches. Not measured; a launch takes the host some microseconds on every machine.
constexpr double kPlainLaunchSeconds = 5e-6;

}  // namespace

class GpuLaneExecution {
 public:
  GpuLaneExecution(std::shared_ptr<Gpu> gpu, uint64_t ticket, std::shared_ptr<GpuFrame> frame, int first, int last,
                   bool is_traced, RangeSignals after, std::shared_ptr<RangeSignal> signal)
      : ticket(ticket),
        frame(std::move(frame)),
        first(first),
        last(last),
        is_traced(is_traced),
        after(std::move(after)),
        signal(std::move(signal)),
        gpu_(std::move(gpu)) {}
  ~GpuLaneExecution() {
    for (GpuEvent event : events_) gpu_->destroy_event(event);
  }

  // A timed event that lives as long as this.
  GpuEvent mark(GpuStream stream) {
    events_.push_back(gpu_->create_event(/*is_timed=*/true));
    gpu_->record(events_.back(), stream);
    return events_.back();
  }

  struct Span {
    int node;
    GpuEvent begin, end;
  };

  const uint64_t ticket;
  const std::shared_ptr<GpuFrame> frame;
  const int first, last;
  const bool is_traced;
  const RangeSignals after;
  const std::shared_ptr<RangeSignal> signal;
  std::atomic<bool> stop_requested{false};

  // The launching thread's, then the finishing one's.
  GpuEvent begin = nullptr, end = nullptr;  // null: nothing was launched
  std::vector<Span> spans;
  int cursor = 0;
  bool has_begun = false;
  std::string error;
  int64_t launched_ns = 0;   // when launching began
  bool is_launched = false;  // the lane's mutex guards it: from here on the finishing thread has it

 private:
  std::shared_ptr<Gpu> gpu_;
  std::vector<GpuEvent> events_;
};

GpuLane::GpuLane(int lane_idx, std::shared_ptr<Gpu> gpu, const GpuLaneOptions& options,
                 std::shared_ptr<CompletionQueue> completions)
    : lane_idx_(lane_idx),
      gpu_(std::move(gpu)),
      options_(options),
      completions_(std::move(completions)),
      owns_stream_(options.stream == nullptr) {
  PARTITA_CHECK(options_.launch_ahead > 0, "launch_ahead: got ", options_.launch_ahead, ", wanted at least 1");
  PARTITA_CHECK(options_.num_ctas >= 0, "num_ctas: got ", options_.num_ctas, ", wanted at least 0");
  if (owns_stream_) options_.stream = gpu_->create_stream();
  for (int i = 0; i < options_.launch_ahead; ++i) window_.push_back(gpu_->create_event(/*is_timed=*/false));
  launcher_ = std::thread([this] { launch_loop(); });
  finisher_ = std::thread([this] { finish_loop(); });
}

GpuLane::~GpuLane() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_closing_ = true;
    for (const auto& executions : {queue_, in_flight_})
      for (const auto& execution : executions) execution->stop_requested.store(true);
  }
  submitted_.notify_all();
  launcher_.join();
  finisher_.join();
  for (const auto& [key, graph] : graphs_) gpu_->destroy_graph(graph);
  for (GpuEvent event : window_) gpu_->destroy_event(event);
  if (owns_stream_) gpu_->destroy_stream(options_.stream);
}

uint64_t GpuLane::submit(std::shared_ptr<GpuFrame> frame, int first, int last, RangeSignals after) {
  PARTITA_CHECK(frame != nullptr, "frame: got none");
  PARTITA_CHECK(frame->program().gpu() == gpu_, "frame: its program is of another device than the lane");
  std::shared_ptr<RangeSignal> signal = claim_range(*frame, first, last, after);
  return enqueue(std::move(frame), first, last, std::move(after), std::move(signal));
}

uint64_t GpuLane::capture_graphs(std::shared_ptr<GpuFrame> frame) {
  PARTITA_CHECK(frame != nullptr, "frame: got none");
  PARTITA_CHECK(frame->program().gpu() == gpu_, "frame: its program is of another device than the lane");
  PARTITA_CHECK(options_.max_graph_rows > 0, "capture_graphs: the lane was made without graphs");
  PARTITA_CHECK(frame->num_tokens() == 0, "frame: got one with a step, wanted one without");
  PARTITA_CHECK(frame->num_ranges.load() == 0, "frame: is busy");
  frame->num_ranges.fetch_add(1);
  return enqueue(std::move(frame), 0, 0, {}, std::make_shared<RangeSignal>());
}

uint64_t GpuLane::enqueue(std::shared_ptr<GpuFrame> frame, int first, int last, RangeSignals after,
                          std::shared_ptr<RangeSignal> signal) {
  uint64_t ticket;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ticket = ++num_submitted_;
    queue_.push_back(std::make_shared<GpuLaneExecution>(gpu_, ticket, std::move(frame), first, last, is_tracing_.load(),
                                                        std::move(after), std::move(signal)));
  }
  submitted_.notify_one();
  return ticket;
}

void GpuLane::request_stop(uint64_t ticket) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& executions : {queue_, in_flight_})
    for (const auto& execution : executions)
      if (execution->ticket == ticket) execution->stop_requested.store(true);
}

// ---------------------------------------------------------------- launching

void GpuLane::launch_loop() {
  pthread_setname_np(pthread_self(), concat("launch", lane_idx_).substr(0, 15).c_str());
  for (;;) {
    std::shared_ptr<GpuLaneExecution> execution;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      submitted_.wait(lock, [this] { return is_closing_ || !queue_.empty(); });
      if (queue_.empty()) {
        is_launcher_done_ = true;
        break;
      }
      execution = queue_.front();
      queue_.pop_front();
      in_flight_.push_back(execution);
    }
    execution->launched_ns = monotonic_ns();
    execution->cursor = execution->first;
    if (wait_for_turn(*execution)) {
      try {
        launch(*execution);
      } catch (const std::exception& error) {
        // As on the CPU: the range is over, and its error says which node it was.
        if (execution->error.empty()) execution->error = error.what();
        execution->cursor = execution->last;
      }
    }
    try {
      execution->end = execution->mark(options_.stream);
    } catch (const std::exception& error) {
      if (execution->error.empty()) execution->error = error.what();
    }
    // What is not whole is broken, and that is said when the device is done with it.
    if (execution->error.empty() && execution->cursor == execution->last) execution->signal->launch(execution->end);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      execution->is_launched = true;
    }
    launched_.notify_one();
  }
  launched_.notify_one();
}

// The launcher waits until what the range comes after is launched, its stream until that has run. Returns whether the
// range may begin.
bool GpuLane::wait_for_turn(GpuLaneExecution& execution) {
  try {
    const bool are_well = wait_for_all(execution.after, [&] { return !execution.stop_requested.load(); });
    if (execution.stop_requested.load()) return false;
    if (!are_well) execution.error = kBrokenBefore;
    for (const auto& signal : execution.after) signal->order_behind(*gpu_, options_.stream);
  } catch (const std::exception& error) {
    execution.error = error.what();
  }
  execution.has_begun = execution.error.empty();
  return execution.has_begun;
}

// Waits until fewer than launch_ahead launches are not done.
void GpuLane::reserve_launch() {
  const int64_t window = static_cast<int64_t>(window_.size());
  if (num_launched_ >= window) gpu_->wait(window_[num_launched_ % window]);
}

void GpuLane::launch(GpuLaneExecution& execution) {
  GpuFrame& frame = *execution.frame;
  if (execution.stop_requested.load()) return;
  if (execution.last == 0) return capture_all(execution);
  if (replay_graph(execution)) return;
  const GpuStream stream = options_.stream;
  reserve_launch();
  if (execution.stop_requested.load()) return;
  GpuRun run;
  if (execution.first == 0) {
    run = frame.stage(nullptr, 0, stream, options_.num_ctas);
    execution.begin = execution.mark(stream);
    frame.upload(run);
  } else {
    run = frame.resume(stream, options_.num_ctas);
    execution.begin = execution.mark(stream);
  }
  launch_nodes(execution, run, execution.first, execution.last, /*is_stoppable=*/true);
  if (execution.cursor == frame.program().num_nodes()) frame.download_results(run);
}

void GpuLane::launch_nodes(GpuLaneExecution& execution, const GpuRun& run, int first, int last, bool is_stoppable) {
  const auto& nodes = execution.frame->program().nodes();
  for (int node = first; node < last; ++node) {
    if (is_stoppable && execution.stop_requested.load()) return;
    if (nodes[node].gpu_op->has_work(run)) {
      reserve_launch();
      if (is_stoppable && execution.stop_requested.load()) return;
      GpuEvent begin = nullptr;
      if (execution.is_traced) begin = execution.mark(run.stream);
      try {
        nodes[node].gpu_op->launch(run);
      } catch (const std::exception& error) {
        execution.error = concat(nodes[node].name, ": ", error.what());
        throw;
      }
      if (execution.is_traced) execution.spans.push_back({node, begin, execution.mark(run.stream)});
      gpu_->record(window_[num_launched_ % window_.size()], run.stream);
      ++num_launched_;
    }
    execution.cursor = node + 1;
  }
}

// ---------------------------------------------------------------- graphs

void GpuLane::prepare_graph_memory(const GpuFrame& frame) {
  if (graph_memory_) return;
  const int most = static_cast<int>(std::min<int64_t>(options_.max_graph_rows, frame.max_logit_rows()));
  GpuStepLimits limits =
      GpuFrame::step_limits(frame.program(), frame.row_store().num_rows(), frame.row_store().max_tokens(),
                            static_cast<int>(frame.arena().groups().size()), frame.arena().page_size(), most, most);
  limits.graph_rows = most;
  limits.max_requests = most;
  graph_memory_ = std::make_shared<GpuFrameMemory>(frame.program(), limits);
  graph_program_ = frame.shared_program();
}

// Runs the step as one graph where it is a decode step of few enough rows; returns whether it did.
bool GpuLane::replay_graph(GpuLaneExecution& execution) {
  GpuFrame& frame = *execution.frame;
  const int num_nodes = frame.program().num_nodes();
  if (execution.first != 0 || execution.last != num_nodes || options_.max_graph_rows == 0) return false;
  if (execution.is_traced) return false;  // a graph has no nodes to show
  // What launching node by node takes longer than a graph; where reading shared pages once saves more, that is better.
  const double plain_s = kPlainLaunchSeconds * num_nodes, bytes_per_s = gpu_->properties().memory_gb_per_second * 1e9;
  if (bytes_per_s > 0 && frame.shared_prefix_bytes() > plain_s * bytes_per_s) return false;
  if (!frame.is_plain_decode() || frame.num_requests() > options_.max_graph_rows) return false;
  if (graph_program_ && graph_program_ != frame.shared_program()) return false;  // graphs are of one program
  prepare_graph_memory(frame);
  const std::vector<int> buckets = decode_buckets(graph_memory_->limits().graph_rows);
  if (frame.num_requests() > buckets.back()) return false;
  const int rows = *std::lower_bound(buckets.begin(), buckets.end(), static_cast<int>(frame.num_requests()));

  const GpuStream stream = options_.stream;
  reserve_launch();
  if (execution.stop_requested.load()) return true;
  const GpuRun run = frame.stage(graph_memory_, rows, stream, options_.num_ctas);
  execution.begin = execution.mark(stream);
  frame.upload(run);
  const GraphKey key{rows, run.features.adjusts, run.features.draws, run.features.logprobs};
  const auto found = graphs_.find(key);
  if (found == graphs_.end()) {
    capture(execution, run, key);
  } else {
    gpu_->launch_graph(found->second, stream);
    num_graph_steps_.fetch_add(1);
    gpu_->record(window_[num_launched_ % window_.size()], stream);
    ++num_launched_;
  }
  execution.cursor = num_nodes;
  frame.download_results(run);
  return true;
}

// Runs a staged step node by node in the graphs' memory, because a kernel is loaded by its first launch, which must not
// lie within a capture; then captures the same launches, which runs nothing. The step is not stopped in between:
// nothing may rest in memory that the lane's next decode step takes.
void GpuLane::capture(GpuLaneExecution& execution, const GpuRun& run, const GraphKey& key) {
  const auto& nodes = execution.frame->program().nodes();
  launch_nodes(execution, run, 0, static_cast<int>(nodes.size()), /*is_stoppable=*/false);
  gpu_->begin_capture(run.stream);
  std::exception_ptr failure;
  try {
    for (const Node& node : nodes)
      if (node.gpu_op->has_work(run)) node.gpu_op->launch(run);
  } catch (...) {
    failure = std::current_exception();
  }
  GpuGraph captured = nullptr;
  try {
    captured = gpu_->end_capture(run.stream);
  } catch (...) {
    if (!failure) failure = std::current_exception();
  }
  if (failure) {
    if (captured) gpu_->destroy_graph(captured);
    std::rethrow_exception(failure);
  }
  graphs_[key] = captured;
  num_graphs_.fetch_add(1);
}

void GpuLane::capture_all(GpuLaneExecution& execution) {
  GpuFrame& frame = *execution.frame;
  prepare_graph_memory(frame);
  for (int rows : decode_buckets(graph_memory_->limits().graph_rows))
    for (bool draws : {false, true}) {
      const GraphKey key{rows, false, draws, false};
      if (graphs_.count(key)) continue;
      gpu_->synchronize(options_.stream);  // the staging block is written anew
      GpuRun run = frame.stage(graph_memory_, rows, options_.stream, options_.num_ctas);
      run.features = {false, draws, false};
      frame.upload(run);
      capture(execution, run, key);
    }
  execution.cursor = 0;
}

// ---------------------------------------------------------------- finishing

void GpuLane::finish_loop() {
  pthread_setname_np(pthread_self(), concat("finish", lane_idx_).substr(0, 15).c_str());
  for (;;) {
    std::shared_ptr<GpuLaneExecution> execution;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      launched_.wait(lock, [this] {
        return (!in_flight_.empty() && in_flight_.front()->is_launched) || (is_launcher_done_ && in_flight_.empty());
      });
      if (in_flight_.empty()) return;
      execution = in_flight_.front();
    }
    finish(*execution);
  }
}

void GpuLane::finish(GpuLaneExecution& execution) {
  GpuFrame& frame = *execution.frame;
  try {
    if (execution.end) gpu_->wait(execution.end);
    // A later range of the frame, on another lane, may have asked for results that are not here yet.
    if (execution.error.empty() && execution.cursor == frame.program().num_nodes()) frame.take_results();
  } catch (const std::exception& error) {
    if (execution.error.empty()) {
      const auto& nodes = frame.program().nodes();
      const int last = std::max(execution.first, execution.cursor - 1);
      execution.error = concat(nodes[execution.first].name, " to ", nodes[last].name, ": ", error.what());
    }
  }
  Completion completion;
  completion.ticket = execution.ticket;
  completion.lane = lane_idx_;
  completion.first_node = execution.first;
  completion.cursor = execution.cursor;
  completion.was_stopped = execution.error.empty() && execution.cursor < execution.last;
  completion.end_ns = monotonic_ns();
  completion.start_ns = execution.launched_ns;
  if (execution.error.empty() && execution.begin) {
    // The device's times, laid so that its end is the host's.
    const auto before_end = [&](GpuEvent event) {
      return completion.end_ns - static_cast<int64_t>(1e6 * gpu_->elapsed_ms(event, execution.end));
    };
    completion.start_ns = before_end(execution.begin);
    for (const GpuLaneExecution::Span& span : execution.spans)
      completion.spans.push_back({span.node, before_end(span.begin), before_end(span.end)});
  }
  completion.error = std::move(execution.error);
  if (execution.has_begun) frame.advance_cursor(execution.cursor);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    in_flight_.pop_front();
  }
  frame.num_ranges.fetch_sub(1);
  const bool is_whole = completion.error.empty() && !completion.was_stopped;
  completions_->push(std::move(completion));
  execution.signal->end(is_whole);
}

}  // namespace partita
