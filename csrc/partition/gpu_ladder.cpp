#include "partition/gpu_ladder.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"

namespace partita {
namespace {

// A kernel that fills an SM with one block runs them in two even waves; one that needs two for that runs them at once.
constexpr int kCtasPerSm = 2;

GpuPartition partition_of(GpuStream stream, int num_sms) { return {stream, num_sms, kCtasPerSm * num_sms}; }

}  // namespace

GpuLadder::GpuLadder(std::shared_ptr<Gpu> gpu, std::vector<double> shares) : gpu_(std::move(gpu)) {
  const int num_sms = gpu_->properties().num_sms;
  std::sort(shares.begin(), shares.end());
  std::vector<int> wanted;
  for (double share : shares) {
    PARTITA_CHECK(share > 0 && share < 1, "shares: got ", share, ", wanted above 0 and below 1");
    wanted.push_back(std::clamp(static_cast<int>(std::lround(share * num_sms)), 1, num_sms - 1));
  }
  own_streams_.push_back(gpu_->create_stream());
  whole_ = {own_streams_.back(), num_sms, 0};
  gpu_rungs_ = gpu_->make_rungs(wanted);
  for (const GpuRung& rung : gpu_rungs_)
    rungs_.push_back({partition_of(rung.first, rung.first_sms), partition_of(rung.second, rung.second_sms)});
  note_ = gpu_->partition_note();
  is_isolated_ = !rungs_.empty();
  if (is_isolated_ || wanted.empty()) return;
  wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());
  for (int first_sms : wanted) {
    GpuLadderRung rung;
    for (auto [part, sms] : {std::pair{&rung.first, first_sms}, {&rung.second, num_sms - first_sms}}) {
      own_streams_.push_back(gpu_->create_stream());
      *part = {own_streams_.back(), num_sms, kCtasPerSm * sms};
    }
    rungs_.push_back(rung);
  }
}

GpuLadder::~GpuLadder() {
  gpu_->return_rungs(gpu_rungs_);
  for (GpuStream stream : own_streams_) gpu_->destroy_stream(stream);
}

int GpuLadder::rung_near(double share) const {
  int nearest = -1;
  double least = 2;
  for (size_t i = 0; i < rungs_.size(); ++i) {
    const double first = rungs_[i].first.num_ctas, second = rungs_[i].second.num_ctas;
    const double distance = std::abs(first / (first + second) - share);
    if (distance < least) {
      least = distance;
      nearest = static_cast<int>(i);
    }
  }
  return nearest;
}

}  // namespace partita
