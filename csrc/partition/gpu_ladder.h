// Shares of a GPU: a ladder of two-way splits of its SMs, made once at start. Moving the border between two lanes is
// submitting to another rung's streams; nothing is created or moved for it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/gpu.h"

namespace partita {

// One part of the chip, as a lane takes it.
struct GpuPartition {
  GpuStream stream = nullptr;
  int num_sms = 0;   // that its kernels run on
  int num_ctas = 0;  // GpuLaneOptions::num_ctas: keeps kernels to their part where nothing else does
};

struct GpuLadderRung {
  GpuPartition first, second;
};

class GpuLadder {
 public:
  // shares: wanted sizes of the first part, each above 0 and below 1; rounded to what the device grants, ascending,
  // without duplicates. Where the driver cannot split the chip the parts are plain streams over all of it, kept apart
  // only by the number of thread blocks that their kernels use: note() says so. Throws ValueError for a bad share.
  GpuLadder(std::shared_ptr<Gpu> gpu, std::vector<double> shares);
  ~GpuLadder();
  GpuLadder(const GpuLadder&) = delete;
  GpuLadder& operator=(const GpuLadder&) = delete;

  const GpuPartition& whole() const { return whole_; }  // always there
  const std::vector<GpuLadderRung>& rungs() const { return rungs_; }
  // The rung whose first part is nearest to this share of the chip; -1: there is none.
  int rung_near(double share) const;
  bool is_isolated() const { return is_isolated_; }  // parts have SMs of their own
  std::string note() const { return note_; }

 private:
  std::shared_ptr<Gpu> gpu_;
  GpuPartition whole_;
  std::vector<GpuLadderRung> rungs_;
  std::vector<GpuRung> gpu_rungs_;  // lent until the end
  std::vector<GpuStream> own_streams_;
  bool is_isolated_ = false;
  std::string note_;
};

}  // namespace partita
