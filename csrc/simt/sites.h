// The barriers and waits of kernels, by the place of their call: which were reached, and the one that is switched off.
// Internal to csrc/simt; what others use of it stands in simt.h.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "simt/site.h"

namespace partita::simt {

// One executor's part: no locks while kernels run.
class SiteSwitch {
 public:
  void refresh();  // before a launch
  void publish();  // after it

  // Notes the visit; true when the site is switched off.
  bool visit(Site site) {
    const uint32_t slot =
        (static_cast<uint32_t>(site.line) * 31u + static_cast<uint32_t>(reinterpret_cast<uintptr_t>(site.file) >> 3)) %
        kNumSlots;
    if (seen_[slot].file != site.file || seen_[slot].line != site.line) note(slot, site);
    return disabled_line_ == site.line && is_disabled(site);
  }

 private:
  static constexpr uint32_t kNumSlots = 256;
  void note(uint32_t slot, Site site);
  bool is_disabled(Site site) const;

  Site seen_[kNumSlots];  // the latest of each slot
  std::vector<Site> visited_;
  std::string disabled_file_;
  int disabled_line_ = -1;
};

}  // namespace partita::simt
