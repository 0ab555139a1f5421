#include "partition/core_set.h"

#include <sched.h>

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "core/parallel_for.h"

namespace partita {

std::vector<int> usable_core_ids() {
  std::vector<int> cores;
  cpu_set_t mask;
  CPU_ZERO(&mask);
  if (sched_getaffinity(0, sizeof mask, &mask) == 0)
    for (int core = 0; core < CPU_SETSIZE; ++core)
      if (CPU_ISSET(core, &mask)) cores.push_back(core);
  if (cores.empty())
    for (int core = 0; core < usable_cores(); ++core) cores.push_back(core);
  if (static_cast<int>(cores.size()) > usable_cores()) cores.resize(usable_cores());
  return cores;
}

CoreSplit split_cores(const std::vector<int>& cores, double share) {
  PARTITA_CHECK(!cores.empty(), "cores: got none, wanted at least one");
  PARTITA_CHECK(share > 0 && share <= 1, "share: got ", share, ", wanted above 0 and at most 1");
  const int num_cores = static_cast<int>(cores.size());
  int num_first = std::max(1, static_cast<int>(std::lround(share * num_cores)));
  if (share < 1 && num_cores > 1) num_first = std::min(num_first, num_cores - 1);
  return {{cores.begin(), cores.begin() + num_first}, {cores.begin() + num_first, cores.end()}};
}

}  // namespace partita
