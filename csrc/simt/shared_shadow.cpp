#include "simt/shared_shadow.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "simt/block.h"
#include "simt/code_address.h"
#include "simt/report.h"

namespace partita::simt {
namespace {

constexpr uint8_t kInitialised = 1, kInFlight = 2, kSplit = 4, kAtomics = 8;
constexpr uint16_t kNobody = 0xffff;
constexpr uint8_t kNoWarp = 0xff, kManyWarps = 0xfe;

uint32_t linear_index(uint16_t writer) { return (writer >> 8) * kWarpLanes + (writer & 0xff); }

const char* name_of(Access kind) {
  return kind == Access::kRead     ? "read"
         : kind == Access::kAtomic ? "atomic"
         : kind == Access::kWrite  ? "write"
                                   : "cp.async";
}

}  // namespace

void Clocks::reset() {
  now = 1;
  block_sync = 0;
  std::memset(warp_sync, 0, sizeof warp_sync);
  std::memset(known, 0, sizeof known);
  std::memset(has_lane_known, 0, sizeof has_lane_known);
}

void Clocks::sync_lanes(uint32_t warp, uint32_t lanes) {
  if (!has_lane_known[warp]) {
    has_lane_known[warp] = true;
    if (!lane_known[warp]) lane_known[warp].reset(new uint32_t[kLanes * kLanes]);
    std::memset(lane_known[warp].get(), 0, kLanes * kLanes * sizeof(uint32_t));
  }
  ++now;
  uint32_t joined[kLanes] = {};
  for (uint32_t lane = 0; lane < kLanes; ++lane)
    if ((lanes >> lane & 1) != 0)
      for (uint32_t of = 0; of < kLanes; ++of) joined[of] = std::max(joined[of], lane_known[warp][lane * kLanes + of]);
  for (uint32_t of = 0; of < kLanes; ++of)
    if ((lanes >> of & 1) != 0) joined[of] = now;
  for (uint32_t lane = 0; lane < kLanes; ++lane)
    if ((lanes >> lane & 1) != 0) std::memcpy(&lane_known[warp][lane * kLanes], joined, sizeof joined);
}

void Clocks::arrive(uint32_t warp, uint32_t (&joined)[kWarps]) {
  for (uint32_t of = 0; of < kWarps; ++of) joined[of] = std::max(joined[of], known[warp][of]);
  joined[warp] = ++now;
}

void Clocks::learn(uint32_t warps, const uint32_t (&joined)[kWarps]) {
  ++now;
  for (uint32_t rest = warps; rest != 0; rest &= rest - 1) {
    const auto warp = static_cast<uint32_t>(__builtin_ctz(rest));
    std::memcpy(known[warp], joined, sizeof joined);
    warp_sync[warp] = now;
  }
}

SharedShadow::~SharedShadow() {
  std::free(sets_);
  std::free(free_sets_);
}

void SharedShadow::reset(size_t shared_bytes, uint32_t num_warps) {
  const size_t num_words = (shared_bytes + 3) / 4;
  if (num_words > words_capacity_) {
    words_.reset(new Cell[num_words]);
    bytes_.reset(new Cell[4 * num_words]);
    async_reads_.reset(new uint16_t[num_words]);
    words_capacity_ = num_words;
  }
  shared_bytes_ = shared_bytes;
  num_warps_ = num_warps;
  const Cell untouched{0, 0, 0, 0, 0, kNobody, kNoWarp, 0};
  std::fill_n(words_.get(), num_words, untouched);
  std::fill_n(async_reads_.get(), num_words, uint16_t{0});
  num_async_reads_ = 0;
  num_sets_ = 0;
  num_free_sets_ = 0;
}

uint32_t SharedShadow::take_set() {
  uint32_t index;
  if (num_free_sets_ > 0) {
    index = free_sets_[--num_free_sets_];
  } else {
    index = num_sets_++;
    if (size_t{num_sets_} * (num_warps_ + 1) > sets_capacity_) {
      sets_capacity_ = std::max<size_t>(2 * sets_capacity_, 4096 * (num_warps_ + 1));
      sets_ = static_cast<Group*>(std::realloc(sets_, sets_capacity_ * sizeof(Group)));
      free_sets_ = static_cast<uint32_t*>(std::realloc(free_sets_, sets_capacity_ * sizeof(uint32_t)));
      if (!sets_ || !free_sets_) std::abort();
    }
  }
  std::memset(set(index), 0, (num_warps_ + 1) * sizeof(Group));
  return index;
}

void SharedShadow::copy_set(uint32_t& index) {
  const uint32_t copy = take_set();
  std::memcpy(set(copy), set(index), (num_warps_ + 1) * sizeof(Group));
  index = copy;
}

void SharedShadow::split(size_t word) {
  Cell& cell = words_[word];
  if ((cell.flags & kSplit) != 0) return;
  for (size_t i = 0; i < 4; ++i) {
    Cell& part = bytes_[4 * word + i];
    part = cell;
    if (i > 0 && cell.reader_warp == kManyWarps) copy_set(part.read_time);
    if (i > 0 && (cell.flags & kAtomics) != 0) copy_set(part.write_time);
  }
  cell.flags |= kSplit;
}

// Whether all of `me` know that all of `other` have passed `time`.
bool SharedShadow::is_ordered(const Clocks& clocks, Who me, Who other, uint32_t time) {
  if (time < clocks.block_sync) return true;
  if (me.warp != other.warp) return time < clocks.known[me.warp][other.warp];
  if (me.lanes == other.lanes && (me.lanes & (me.lanes - 1)) == 0) return true;
  if (time < clocks.warp_sync[me.warp]) return true;
  if (!clocks.has_lane_known[me.warp]) return false;
  for (uint32_t mine = me.lanes; mine != 0; mine &= mine - 1) {
    const auto lane = static_cast<uint32_t>(__builtin_ctz(mine));
    const uint32_t* known = &clocks.lane_known[me.warp][lane * Clocks::kLanes];
    for (uint32_t rest = other.lanes & ~(1u << lane); rest != 0; rest &= rest - 1)
      if (time >= known[__builtin_ctz(rest)]) return false;
  }
  return true;
}

void SharedShadow::note_read(const Clocks& clocks, Cell& cell, uint32_t code, Who who) {
  if (cell.reader_warp == kManyWarps) {
    Group& group = set(cell.read_time)[who.warp];
    const bool replaces = group.lanes == 0 || is_ordered(clocks, who, {who.warp, group.lanes}, group.time);
    group = {clocks.now, code, replaces ? who.lanes : group.lanes | who.lanes};
    return;
  }
  if (cell.reader_warp == kNoWarp || is_ordered(clocks, who, {cell.reader_warp, cell.read_lanes}, cell.read_time)) {
    cell.reader_warp = static_cast<uint8_t>(who.warp);
    cell.read_lanes = who.lanes;
  } else if (cell.reader_warp == who.warp) {
    cell.read_lanes |= who.lanes;
  } else {
    const uint32_t index = take_set();
    set(index)[cell.reader_warp] = {cell.read_time, cell.read_code, cell.read_lanes};
    set(index)[who.warp] = {clocks.now, code, who.lanes};
    cell.reader_warp = kManyWarps;
    cell.read_time = index;
    return;
  }
  cell.read_time = clocks.now;
  cell.read_code = code;
}

// Atomics do not race with each other, so the latest does not stand for those before it, nor for the plain write.
void SharedShadow::note_atomic(const Clocks& clocks, Cell& cell, uint32_t code, Who who) {
  if ((cell.flags & kAtomics) == 0) {
    const uint32_t index = take_set();
    set(index)[num_warps_] = {cell.write_time, cell.write_code, cell.writer};
    cell.write_time = index;
    cell.flags |= kAtomics;
  }
  Group& group = set(cell.write_time)[who.warp];
  const bool replaces = group.lanes == 0 || is_ordered(clocks, who, {who.warp, group.lanes}, group.time);
  group = {clocks.now, code, replaces ? who.lanes : group.lanes | who.lanes};
}

void SharedShadow::check_order(Thread& thread, const char* kind, size_t offset, size_t bytes, uint32_t code, Who who,
                               const char* other_kind, Who other, const Group& group) {
  if (is_ordered(thread.block->clocks, who, other, group.time)) return;
  char name[64];
  if ((other.lanes & (other.lanes - 1)) != 0)
    std::snprintf(name, sizeof name, "warp %u (lanes 0x%x)", other.warp, other.lanes);
  else
    std::snprintf(name, sizeof name, "thread %u",
                  other.warp * kWarpLanes + static_cast<uint32_t>(__builtin_ctz(other.lanes)));
  report(thread, address_of_code(code),
         "race: %s of %zu bytes at shared memory + %zu, and a %s by %s%s; no barrier between", kind, bytes, offset,
         other_kind, name, CodePlace(group.code).text);
}

void SharedShadow::access_cell(Thread& thread, Cell& cell, size_t offset, size_t bytes, Access kind, uint32_t code,
                               Who who) {
  const Clocks& clocks = thread.block->clocks;
  const auto check = [&](const char* other_kind, Who other, const Group& group) {
    check_order(thread, name_of(kind), offset, bytes, code, who, other_kind, other, group);
  };
  const auto writer_of = [](uint32_t writer) { return Who{writer >> 8, 1u << (writer & 0xff)}; };

  if ((cell.flags & kInFlight) != 0)
    report(thread, address_of_code(code),
           "%s of shared memory + %zu, which a cp.async of thread %u%s still writes: no cp_async_wait before",
           name_of(kind), offset, linear_index(cell.writer), CodePlace(cell.write_code).text);
  if ((kind == Access::kRead || kind == Access::kAtomic) && (cell.flags & kInitialised) == 0)
    report(thread, address_of_code(code), "read of %zu bytes at shared memory + %zu, which nobody wrote", bytes,
           offset);

  // Against the writes before.
  if ((cell.flags & kAtomics) != 0) {
    const Group* atomics = set(cell.write_time);
    if (atomics[num_warps_].lanes != kNobody) check("write", writer_of(atomics[num_warps_].lanes), atomics[num_warps_]);
    for (uint32_t warp = 0; kind != Access::kAtomic && warp < num_warps_; ++warp)
      if (atomics[warp].lanes != 0) check("atomic", {warp, atomics[warp].lanes}, atomics[warp]);
  } else if (cell.writer != kNobody) {
    check("write", writer_of(cell.writer), {cell.write_time, cell.write_code, 0});
  }
  if (kind == Access::kRead) {
    note_read(clocks, cell, code, who);
    return;
  }

  // Against the reads before. A write that passes stands for them from now on; an atomic does not.
  if (cell.reader_warp == kManyWarps) {
    const Group* readers = set(cell.read_time);
    for (uint32_t warp = 0; warp < num_warps_; ++warp)
      if (readers[warp].lanes != 0) check("read", {warp, readers[warp].lanes}, readers[warp]);
  } else if (cell.reader_warp != kNoWarp) {
    check("read", {cell.reader_warp, cell.read_lanes}, {cell.read_time, cell.read_code, 0});
  }
  if (kind == Access::kAtomic) {
    note_atomic(clocks, cell, code, who);
    return;
  }
  if (cell.reader_warp == kManyWarps) free_sets_[num_free_sets_++] = cell.read_time;
  if ((cell.flags & kAtomics) != 0) free_sets_[num_free_sets_++] = cell.write_time;
  cell.reader_warp = kNoWarp;
  cell.writer = static_cast<uint16_t>(who.warp << 8 | static_cast<uint32_t>(__builtin_ctz(who.lanes)));
  cell.write_time = clocks.now;
  cell.write_code = code;
  cell.flags = kind == Access::kCopyIssue ? kInFlight : kInitialised;
}

void SharedShadow::access(Thread& thread, size_t offset, size_t bytes, Access kind, const void* code_address,
                          bool is_whole_warp) {
  const uint32_t code = code_of(code_address);
  const Who who{thread.warp->index, is_whole_warp ? thread.warp->alive : 1u << thread.lane};
  if (offset >= shared_bytes_ || bytes > shared_bytes_ - offset)
    report(thread, code_address, "%s of %zu bytes at shared memory + %zu; the launch gave %zu bytes", name_of(kind),
           bytes, offset, shared_bytes_);
  const size_t end = offset + bytes;
  while (offset < end) {
    const size_t word = offset / 4;
    const size_t word_end = std::min(end, 4 * word + 4);
    Cell& cell = words_[word];
    if (num_async_reads_ > 0 && kind != Access::kRead && async_reads_[word] > 0)
      report(thread, code_address, "%s of shared memory + %zu, which a wgmma still reads: no wgmma_wait before",
             name_of(kind), offset);
    if (offset % 4 == 0 && word_end == 4 * word + 4) {
      if ((cell.flags & kSplit) == 0) {
        access_cell(thread, cell, offset, bytes, kind, code, who);
      } else {
        for (size_t i = 0; i < 4; ++i) access_cell(thread, bytes_[4 * word + i], offset + i, bytes, kind, code, who);
        // After a plain write the four agree again, and hold no sets.
        if (kind == Access::kWrite || kind == Access::kCopyIssue) cell = bytes_[4 * word];
      }
    } else {
      split(word);
      for (size_t i = offset; i < word_end; ++i) access_cell(thread, bytes_[i], i, bytes, kind, code, who);
    }
    offset = word_end;
  }
}

void SharedShadow::check_proxy(Thread& thread, const Cell& cell, size_t offset, const void* code) {
  if (cell.writer == kNobody || (cell.flags & kAtomics) != 0) return;
  const Thread& writer = thread.block->threads[linear_index(cell.writer)];
  if (writer.proxy_fence > cell.write_time) return;
  report(thread, code, "wgmma of shared memory + %zu, which thread %u wrote%s: no fence_async_proxy after it", offset,
         writer.linear_index, CodePlace(cell.write_code).text);
}

void SharedShadow::begin_async_read(Thread& thread, size_t offset, size_t bytes, const void* code) {
  access(thread, offset, bytes, Access::kRead, code);
  for (size_t word = offset / 4; word < (offset + bytes) / 4; ++word) {
    const Cell& cell = words_[word];
    if ((cell.flags & kSplit) == 0)
      check_proxy(thread, cell, 4 * word, code);
    else
      for (size_t i = 4 * word; i < 4 * word + 4; ++i) check_proxy(thread, bytes_[i], i, code);
    ++async_reads_[word];
    ++num_async_reads_;
  }
}

// Read once more, now: the barrier that lets others write must come after the wait.
void SharedShadow::end_async_read(Thread& thread, size_t offset, size_t bytes, const void* code) {
  for (size_t word = offset / 4; word < (offset + bytes) / 4; ++word) --async_reads_[word];
  num_async_reads_ -= bytes / 4;
  access(thread, offset, bytes, Access::kRead, code);
}

// Copies cover whole words, and their issue has merged them.
void SharedShadow::finish_copy(Thread& thread, size_t offset, size_t bytes) {
  for (size_t word = offset / 4; word < (offset + bytes) / 4; ++word) {
    words_[word].flags = kInitialised;
    words_[word].write_time = thread.block->clocks.now;
  }
}

}  // namespace partita::simt
