// What a program is made of: ops that cut their work into chunks any worker may claim.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/aligned_buffer.h"

namespace partita {

class Frame;

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
  AlignedBuffer scratch;                     // at least Op::scratch_bytes
  AlignedBuffer private_rows;                // inputs this worker prepared for itself (few-token linears)
  const void* private_rows_owner = nullptr;  // the stage they were prepared for

  std::byte* scratch_of(size_t bytes) {
    if (scratch.bytes() < bytes) scratch = AlignedBuffer(bytes);
    return scratch.data();
  }
};

// Immutable once recorded. All state of a run is in the Frame and the Worker.
class Op {
 public:
  virtual ~Op() = default;

  virtual const char* kind() const = 0;
  virtual std::string detail() const { return ""; }  // shapes, kernel: for describe()
  virtual ResourceClass resource_class(const StepShape& shape) const = 0;
  virtual NodeCost cost(const StepShape& shape) const = 0;

  // Phases of one node follow each other; chunks of one phase run in any order on any worker.
  virtual int num_phases() const { return 1; }
  virtual int64_t num_chunks(const Frame& frame, int phase) const = 0;
  virtual void run_chunk(Frame& frame, int phase, int64_t chunk, Worker& worker, const void* stage) const = 0;
};

}  // namespace partita
