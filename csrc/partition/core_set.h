// Shares of a CPU: disjoint sets of the cores this process may use.
#pragma once

#include <vector>

namespace partita {

// CPU numbers of the process's affinity mask, ascending, cut to what the cgroup quota pays for.
std::vector<int> usable_core_ids();

// Cuts `cores` in two disjoint runs: about `share` of them (at least one, and at least one left over when there are
// two or more cores), then the rest. Throws ValueError unless 0 < share <= 1.
struct CoreSplit {
  std::vector<int> first;
  std::vector<int> second;
};
CoreSplit split_cores(const std::vector<int>& cores, double share);

}  // namespace partita
