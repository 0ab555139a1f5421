#include "simt/executor.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "simt/code_address.h"
#include "simt/report.h"

namespace partita::simt {

__thread Thread* current_thread __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {

// Blocks that poll each other (a stream-K tile waits for another block's part) must be resident together, as on a GPU.
constexpr size_t kMaxResidentBlocks = 256;

std::atomic<uint64_t> g_num_launches{0}, g_num_threads{0}, g_num_checked{0}, g_num_reports{0};
std::atomic<uint64_t> g_seed{[] {
  const char* text = std::getenv("PARTITA_SIMT_SEED");
  return text ? std::strtoull(text, nullptr, 0) : 0ull;
}()};

bool has_polling(const Block& block) {
  for (uint32_t i = 0; i < block.num_warps; ++i)
    if (block.warps[i].polling != 0) return true;
  return false;
}

// How long all of a launch's blocks may poll; another OS thread's launch may be what they wait for.
std::chrono::seconds polling_limit() {
  static const std::chrono::seconds limit{[] {
    const char* text = std::getenv("PARTITA_SIMT_POLL_SECONDS");
    const long seconds = text ? std::strtol(text, nullptr, 10) : 0;
    return seconds > 0 ? seconds : 60;
  }()};
  return limit;
}

uint64_t scramble(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

char* map_pages(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("simt: no memory for the stacks of a block");
  return static_cast<char*>(memory);
}

Executor& executor_of_this_os_thread() {
  static thread_local std::unique_ptr<Executor> executor = std::make_unique<Executor>();
  return *executor;
}

// Leaves a lane for the next of its warp that can run, or for the scheduler.
void switch_away(Thread& thread) {
  Warp& warp = *thread.warp;
  Executor& executor = *thread.block->executor;
  if (warp.runnable != 0) {
    Thread& next = warp.threads[executor.pick_lane(warp)];
    current_thread = &next;
    switch_fiber(&thread.fiber, next.fiber);
  } else {
    current_thread = nullptr;
    switch_fiber(&thread.fiber, executor.scheduler);
  }
}

void leave_to_scheduler(Thread& thread) {
  current_thread = nullptr;
  switch_fiber(&thread.fiber, thread.block->executor->scheduler);
}

// The first frame of every fiber.
void run_thread() {
  Thread& thread = *current_thread;
  const LaunchRecord& launch = *thread.block->launch;
  launch.thread_body(launch.arguments.get());
  for (uint32_t i = 0; i < thread.num_copies; ++i)
    report(thread, nullptr, "ended with a cp.async under way to shared memory + %u: no cp_async_wait after it",
           thread.copies[i].shared_offset);
  if (thread.num_reads > 0)
    report(thread, thread.reads[0].code, "ended with a wgmma under way: no wgmma_wait after it");
  thread.waiting = Waiting::kEnded;
  thread.warp->alive &= ~(1u << thread.lane);
  thread.warp->runnable &= ~(1u << thread.lane);
  lane_ended(thread);
  switch_away(thread);
  std::abort();  // nobody enters an ended fiber
}

}  // namespace

Block::Block() : shared(map_pages(kMaxSharedBytes)), stacks(map_pages(kMaxThreads * kStackBytes)), threads(), warps() {
  for (uint32_t i = 0; i < kMaxThreads; ++i) {
    Thread& thread = threads[i];
    thread.stack_low = stacks + i * kStackBytes;
    thread.block = this;
    thread.lane = i % kWarpLanes;
    thread.linear_index = i;
    thread.warp = &warps[i / kWarpLanes];
  }
  for (uint32_t i = 0; i < kMaxWarps; ++i) {
    warps[i].block = this;
    warps[i].index = i;
    warps[i].threads = &threads[i * kWarpLanes];
  }
}

Block::~Block() {
  for (Thread& thread : threads) {
    std::free(thread.copies);
    std::free(thread.reads);
  }
  munmap(shared, kMaxSharedBytes);
  munmap(stacks, kMaxThreads * kStackBytes);
}

// ---- services for the running thread -------------------------------------------------------------------------------

void rest(Thread& thread, Waiting waiting, Site site) {
  thread.waiting = waiting;
  thread.wait_site = site;
  thread.warp->runnable &= ~(1u << thread.lane);
  switch_away(thread);
}

void run_again(Warp& warp, uint32_t lanes) {
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) warp.threads[__builtin_ctz(rest)].waiting = Waiting::kNo;
  warp.runnable |= lanes;
  ++warp.block->progress;
}

void poll(Thread& thread) {
  thread.warp->runnable &= ~(1u << thread.lane);
  thread.warp->polling |= 1u << thread.lane;
  switch_away(thread);
}

void maybe_preempt(Thread& thread) {
  Executor& executor = *thread.block->executor;
  if (executor.is_seeded() && executor.random(4) == 0) leave_to_scheduler(thread);
}

void abandon(Thread& thread) {
  thread.block->is_stopped = true;
  leave_to_scheduler(thread);
  std::abort();
}

bool skip_site(Thread& thread, Site site) { return thread.block->executor->sites.visit(site); }

void report(Thread& thread, const void* code, const char* format, ...) {
  current_thread = nullptr;
  Executor& executor = *thread.block->executor;
  if (!executor.has_report) {
    executor.has_report = true;
    char* text = executor.report_text;
    size_t left = sizeof executor.report_text;
    const auto advance = [&](int written) {
      const size_t used = written < 0                           ? 0
                          : static_cast<size_t>(written) < left ? static_cast<size_t>(written)
                                                                : left - 1;
      text += used, left -= used;
    };
    advance(std::snprintf(text, left, "simt: kernel %s, block (%u, %u, %u), thread (%u, %u, %u)",
                          executor.launch->name.c_str(), thread.block->index.x, thread.block->index.y,
                          thread.block->index.z, thread.index.x, thread.index.y, thread.index.z));
    if (code) advance(std::snprintf(text, left, "%s", CodePlace(code_of(code)).text));
    advance(std::snprintf(text, left, ": "));
    va_list arguments;
    va_start(arguments, format);
    advance(std::vsnprintf(text, left, format, arguments));
    va_end(arguments);
  }
  abandon(thread);
}

// ---- scheduling ----------------------------------------------------------------------------------------------------

uint32_t Executor::random(uint32_t below) {
  random_state_ = scramble(random_state_);
  return static_cast<uint32_t>(random_state_ >> 33) % below;
}

uint32_t Executor::pick_lane(const Warp& warp) {
  const uint32_t runnable = warp.runnable;
  if (seed_ == 0) return static_cast<uint32_t>(__builtin_ctz(runnable));
  // Every warp and seed has an order of its own: up from some lane, or down.
  const uint32_t order = static_cast<uint32_t>(scramble(seed_ + warp.index));
  if ((order & 1) != 0) return 31u - static_cast<uint32_t>(__builtin_clz(runnable));
  const uint32_t first = order >> 1 & 31;
  const uint32_t from_first = runnable & (0xffffffffu << first);
  return static_cast<uint32_t>(__builtin_ctz(from_first != 0 ? from_first : runnable));
}

// Warps that can do more than poll come first. Null: there are only those that poll, or none.
Warp* Executor::pick_warp(Block& block) {
  uint32_t candidates[kMaxWarps], count = 0;
  for (uint32_t i = 0; i < block.num_warps; ++i) {
    if (block.warps[i].runnable == 0) continue;
    if (seed_ == 0) return &block.warps[i];
    candidates[count++] = i;
  }
  return count == 0 ? nullptr : &block.warps[candidates[random(count)]];
}

Executor::Progress Executor::advance_block(Block& block) {
  running_block = &block;
  // Lets those that polled look again.
  const auto wake_polling = [&block] {
    uint32_t lanes = 0;
    for (uint32_t i = 0; i < block.num_warps; ++i) {
      lanes |= block.warps[i].polling;
      block.warps[i].runnable |= block.warps[i].polling;
      block.warps[i].polling = 0;
    }
    return lanes != 0;
  };
  wake_polling();
  uint64_t progress_before = block.progress;
  for (;;) {
    Warp* warp = pick_warp(block);
    if (!warp) {
      if (block.num_alive == 0) return Progress::kEnded;
      if (block.progress == progress_before && has_polling(block)) return Progress::kPolls;
      progress_before = block.progress;
      if (wake_polling()) continue;
      report_deadlock(block);
      return Progress::kEnded;
    }
    current_thread = &warp->threads[pick_lane(*warp)];
    switch_fiber(&scheduler, current_thread->fiber);
    if (block.is_stopped) return Progress::kEnded;
  }
}

void Executor::report_deadlock(Block& block) {
  has_report = true;
  std::string text = "simt: kernel " + launch->name + ", block (" + std::to_string(block.index.x) + ", " +
                     std::to_string(block.index.y) + ", " + std::to_string(block.index.z) +
                     "): divergent barrier, no thread can go on:";
  int num_groups = 0;
  for (uint32_t i = 0; i < block.num_threads && num_groups < 12;) {
    const Thread& first = block.threads[i];
    uint32_t end = i + 1;
    while (end < block.num_threads && block.threads[end].waiting == first.waiting &&
           block.threads[end].wait_site.file == first.wait_site.file &&
           block.threads[end].wait_site.line == first.wait_site.line)
      ++end;
    char site[256];
    text += num_groups++ == 0 ? " threads " : "; threads ";
    text += std::to_string(i) + ".." + std::to_string(end - 1);
    if (first.waiting == Waiting::kEnded)
      text += " have ended";
    else
      text +=
          std::string(first.waiting == Waiting::kCollective ? " wait for their warp at " : " wait at the barrier ") +
          describe(first.wait_site, site);
    i = end;
  }
  std::snprintf(report_text, sizeof report_text, "%s", text.c_str());
}

Block& Executor::free_block() {
  if (num_resident_ == blocks_.size()) {
    auto block = std::make_unique<Block>();
    block->executor = this;
    blocks_.push_back(std::move(block));
  }
  return *blocks_[num_resident_++];
}

void Executor::start_block(Block& block, Index3 index) {
  const Dim3 extent = launch->block;
  block.launch = launch;
  block.index = index;
  block.shared_bytes = launch->shared_bytes;
  block.num_threads = extent.x * extent.y * extent.z;
  block.num_warps = (block.num_threads + kWarpLanes - 1) / kWarpLanes;
  block.num_alive = block.num_threads;
  block.num_alive_warps = block.num_warps;
  block.is_stopped = false;
  block.progress = 0;
  std::memset(block.barriers, 0, sizeof block.barriers);
  std::memset(block.shared, 0xff, block.shared_bytes);  // NaN, in every float format
  block.clocks.reset();
  block.shadow.reset(block.shared_bytes, block.num_warps);
  for (uint32_t i = 0; i < block.num_warps; ++i) {
    Warp& warp = block.warps[i];
    const uint32_t lanes = std::min(kWarpLanes, block.num_threads - i * kWarpLanes);
    warp.lanes = warp.alive = warp.runnable = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
    warp.polling = 0;
    warp.num_pending = 0;
    warp.gather.lanes = 0;
  }
  for (uint32_t i = 0; i < block.num_threads; ++i) {
    Thread& thread = block.threads[i];
    thread.index = {i % extent.x, i / extent.x % extent.y, i / (extent.x * extent.y)};
    thread.waiting = Waiting::kNo;
    thread.num_copies = thread.num_groups = 0;
    thread.num_reads = thread.num_read_groups = thread.proxy_fence = 0;
    // Stacks that began at the same offset of their pages would share a few sets of the cache.
    const size_t offset = i * 7 % 64 * 64;
    thread.fiber = prepare_fiber(thread.stack_low, kStackBytes - offset, &run_thread);
  }
}

void Executor::run(const LaunchRecord& record) {
  if (launch) throw std::runtime_error("simt: kernel " + record.name + ": launched from within a kernel");
  launch = &record;
  seed_ = g_seed.load();
  random_state_ = seed_;
  has_report = false;
  num_checked = 0;
  memory.refresh();
  sites.refresh();

  const uint64_t num_blocks = uint64_t{record.grid.x} * record.grid.y * record.grid.z;
  uint64_t next_block = 0;
  num_resident_ = 0;
  auto last_progress = std::chrono::steady_clock::now();
  while (!has_report && (next_block < num_blocks || num_resident_ > 0)) {
    // Those that poll look again; then one more block joins, which may be the one they wait for.
    bool has_ended = false;
    for (size_t i = 0; i < num_resident_ && !has_report;) {
      const uint64_t progress_before = blocks_[i]->progress;
      const Progress progress = advance_block(*blocks_[i]);
      has_ended |= progress == Progress::kEnded || blocks_[i]->progress != progress_before;
      if (progress == Progress::kEnded)
        std::swap(blocks_[i], blocks_[--num_resident_]);
      else
        ++i;
    }
    if (has_report) break;
    if (next_block < num_blocks && num_resident_ < kMaxResidentBlocks) {
      const unsigned x = static_cast<unsigned>(next_block % record.grid.x);
      const uint64_t row = next_block / record.grid.x;
      Block& block = free_block();
      start_block(block, {x, static_cast<unsigned>(row % record.grid.y), static_cast<unsigned>(row / record.grid.y)});
      ++next_block;
      has_ended = true;
      if (advance_block(block) == Progress::kEnded) --num_resident_;
    }
    const auto now = std::chrono::steady_clock::now();
    if (has_ended)
      last_progress = now;
    else if (now - last_progress > polling_limit()) {
      has_report = true;
      std::snprintf(report_text, sizeof report_text,
                    "simt: kernel %s: %zu blocks poll memory that nobody writes, among them block (%u, %u, %u)",
                    record.name.c_str(), num_resident_, blocks_[0]->index.x, blocks_[0]->index.y, blocks_[0]->index.z);
    }
  }
  running_block = nullptr;
  current_thread = nullptr;
  launch = nullptr;
  sites.publish();
  g_num_launches += 1;
  g_num_threads += num_blocks * record.block.x * record.block.y * record.block.z;
  g_num_checked += num_checked;
  if (has_report) {
    g_num_reports += 1;
    throw std::runtime_error(resolve_places(report_text));
  }
}

void run_launch(const LaunchRecord& record) { executor_of_this_os_thread().run(record); }

void check_launch(const char* name, Dim3 grid, Dim3 block, size_t shared_bytes) {
  const auto refuse = [name](const std::string& what) {
    throw std::runtime_error("kernel " + std::string(name) + ": " + what);
  };
  const auto text = [](Dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  };
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    refuse("grid: got " + text(grid) + ", wanted 1..2^31-1, 1..65535, 1..65535");
  if (block.x == 0 || block.y == 0 || block.z == 0 || block.z > 64 ||
      uint64_t{block.x} * block.y * block.z > kMaxThreads)
    refuse("block: got " + text(block) + ", wanted 1..1024 threads and z up to 64");
  if (shared_bytes > kMaxSharedBytes)
    refuse("shared_bytes: got " + std::to_string(shared_bytes) + ", wanted at most " + std::to_string(kMaxSharedBytes));
}

void set_seed(uint64_t seed) { g_seed = seed; }

Statistics statistics() { return {g_num_launches, g_num_threads, g_num_checked, g_num_reports}; }

}  // namespace partita::simt
