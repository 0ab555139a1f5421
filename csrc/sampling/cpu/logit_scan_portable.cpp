#include "sampling/cpu/logit_scan_body.h"
#include "sampling/cpu/logit_scans.h"

namespace partita {

const LogitScan kLogitScanPortable = {stripe_maxima, stripe_weights,   collect_range,
                                      count_greater, measure_at_least, keep_at_least};

}  // namespace partita
