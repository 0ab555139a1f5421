// What a program is made of. On a CPU an op cuts its work into chunks that any worker may claim; on a GPU it launches
// kernels on a stream.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/aligned_buffer.h"

namespace partita {

class CpuFrame;
struct GpuRun;
struct GpuStepLimits;

// What an op mostly waits for; nano-batches interleave nodes of different classes.
enum class ResourceClass { kCompute, kMemory, kNetwork };
const char* resource_class_name(ResourceClass resource_class);

// The size of one run, from which every cost follows.
struct StepShape {
  int64_t num_tokens = 0;      // T
  int64_t num_requests = 0;    // R
  int64_t num_logit_rows = 0;  // S: token rows whose logits are computed
  double score_pairs = 0;      // sum over token rows of visible KV tokens
};

struct NodeCost {
  double operations = 0;  // 2 * multiply-adds, and comparable work
  double bytes = 0;       // moved from and to memory when nothing is cached
};

// One thread of a lane: memory of its own, reused by every op it runs.
struct Worker {
  int worker_idx = 0;
  int num_workers = 1;                       // of its lane
  int64_t run_end = 0;                       // of the chunk in hand: see ClaimedChunk
  AlignedBuffer scratch;                     // at least Op::scratch_bytes
  AlignedBuffer private_rows;                // inputs this worker prepared for itself (few-token linears)
  const void* private_rows_owner = nullptr;  // the stage they were prepared for

  std::byte* scratch_of(size_t bytes) {
    if (scratch.bytes() < bytes) scratch = AlignedBuffer(bytes);
    return scratch.data();
  }
};

// Immutable once recorded. All state of a run is in the frame and its workers or stream.
class Op {
 public:
  virtual ~Op() = default;

  virtual const char* kind() const = 0;
  virtual std::string detail() const { return ""; }  // shapes, kernel: for describe()
  virtual ResourceClass resource_class(const StepShape& shape) const = 0;
  virtual NodeCost cost(const StepShape& shape) const = 0;
};

class CpuOp : public Op {
 public:
  // Phases of one node follow each other; chunks of one phase run in any order on any worker.
  virtual int num_phases() const { return 1; }
  virtual int64_t num_chunks(const CpuFrame& frame, int phase) const = 0;
  // Neighbouring chunks read neighbouring memory: each worker begins with a run of them of its own. Otherwise all
  // workers take the lowest chunk left, which suits chunks sorted by cost.
  virtual bool claims_in_runs(int phase) const { return static_cast<void>(phase), false; }
  virtual void run_chunk(CpuFrame& frame, int phase, int64_t chunk, Worker& worker, const void* stage) const = 0;
};

class GpuOp : public Op {
 public:
  // Enqueues the node's kernels on the run's stream and returns. Nothing here may wait for the device or allocate its
  // memory: the stream may be being captured.
  virtual void launch(const GpuRun& run) const = 0;
  // False: nothing is launched for this step, and the trace shows no such node.
  virtual bool has_work(const GpuRun& run) const { return static_cast<void>(run), true; }
  // Device memory that one run within these limits needs beside its buffers. It is zero at first, and each run leaves
  // zero what it counts in. Nodes of equal key share it: their kernels follow each other on one stream and count in the
  // same places.
  virtual size_t workspace_bytes(const GpuStepLimits& limits) const { return static_cast<void>(limits), 0; }
  virtual std::string workspace_key() const { return kind(); }
};

}  // namespace partita
