#include "program/gpu_step_layout.h"

namespace partita {

GpuStepLayout::GpuStepLayout(const GpuStepSizes& sizes) {
  int64_t end = 0;
  const auto section = [&end](int64_t entries) {
    const int64_t begin = end;
    end += (entries * static_cast<int64_t>(sizeof(int32_t)) + 15) / 16 * 16;
    return begin;
  };
  token_rows = section(sizes.num_tokens);
  token_positions = section(sizes.num_tokens);
  token_requests = section(sizes.num_tokens);
  cu_seqlens_q = section(sizes.num_requests + 1);
  context_starts = section(sizes.num_requests);
  logit_tokens = section(sizes.num_logit_rows);
  logit_rows = section(sizes.num_logit_rows);
  logit_num_tokens = section(sizes.num_logit_rows);
  num_copies = section(1);
  copies = section(2 * sizes.num_copies);
  for (int group = 0; group < sizes.num_groups; ++group)
    page_tables.push_back(section(sizes.num_requests * sizes.page_table_stride));
  for (int64_t entries : sizes.plan_entries) plan_tables.push_back(section(entries));
  num_bytes = end;
}

}  // namespace partita
