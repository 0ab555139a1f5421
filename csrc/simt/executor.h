// Runs launches: blocks, and in them warps and lanes, each lane a fiber. One executor per OS thread. Internal to
// csrc/simt.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "simt/allocations.h"
#include "simt/block.h"
#include "simt/sites.h"

namespace partita::simt {

class Executor {
 public:
  void run(const LaunchRecord& record);

  // For the running fibers.
  FiberState scheduler = nullptr;
  char report_text[2048] = {};
  bool has_report = false;
  GlobalMemory memory;  // allocations as they were when the launch began
  SiteSwitch sites;
  uint64_t num_checked = 0;
  const LaunchRecord* launch = nullptr;
  Block* running_block = nullptr;

  bool is_seeded() const { return seed_ != 0; }
  uint32_t random(uint32_t below);
  uint32_t pick_lane(const Warp& warp);

 private:
  // How far a block got: to its end, or until all that can run of it polls.
  enum class Progress { kEnded, kPolls };

  void start_block(Block& block, Index3 index);
  Progress advance_block(Block& block);
  Warp* pick_warp(Block& block);
  void report_deadlock(Block& block);
  Block& free_block();

  uint64_t seed_ = 0, random_state_ = 0;
  std::vector<std::unique_ptr<Block>> blocks_;  // those in use first
  size_t num_resident_ = 0;
};

}  // namespace partita::simt
