#include "sampling/logit_scan.h"

#include "core/cpu_features.h"
#include "sampling/cpu/logit_scans.h"

namespace partita {

const LogitScan& active_logit_scan() {
  switch (active_cpu_isa()) {
    case CpuIsa::kAvx512:
      return kLogitScanAvx512;
    case CpuIsa::kAvx2:
      return kLogitScanAvx2;
    case CpuIsa::kPortable:
      break;
  }
  return kLogitScanPortable;
}

}  // namespace partita
