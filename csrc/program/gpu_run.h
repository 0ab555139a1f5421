// What a GPU op launches with: where the step lies in device memory, how many rows it has, and the stream.
#pragma once

#include <cstdint>
#include <vector>

#include "attention/attention_gpu.h"
#include "core/gpu.h"
#include "program/gpu_frame_memory.h"
#include "program/gpu_step_layout.h"
#include "program/kv_arena.h"
#include "program/row_store.h"

namespace partita {

// Row counts are what the kernels run over: of a captured graph the bucket's, padded rows included.
struct GpuRun {
  Gpu* gpu = nullptr;
  GpuStream stream = nullptr;
  int num_ctas = 0;  // most thread blocks to use; 0: as many as the chip runs at once
  int64_t num_tokens = 0;
  int64_t num_logit_rows = 0;
  int num_requests = 0;
  int64_t num_copies = 0;
  bool scores_all = false;
  GpuSamplingFeatures features;       // that some row of the step asks for
  bool has_input_embeddings = false;  // they lie in the embedding's output already

  const GpuFrameMemory* memory = nullptr;
  const GpuStepLayout* layout = nullptr;
  int64_t page_table_stride = 0;
  const KvArena* arena = nullptr;
  const RowStore* rows = nullptr;
  const std::vector<GpuAttentionPlan>* plans = nullptr;  // as in Program::attention_plans, built for this step

  int64_t num_rows(RowKind kind) const { return kind == RowKind::kToken ? num_tokens : num_logit_rows; }
  const int32_t* input(int64_t offset) const { return GpuStepLayout::at(memory->inputs(), offset); }
};

}  // namespace partita
