#include "sampling/cpu/logit_scan_body.h"
#include "sampling/cpu/logit_scans.h"

namespace partita {

const LogitScan kLogitScanAvx2 = {stripe_maxima, stripe_weights, collect_at_least, count_greater};

}  // namespace partita
