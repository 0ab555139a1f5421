#include "simt/shared_shadow.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "simt/block.h"
#include "simt/code_address.h"
#include "simt/report.h"

namespace partita::simt {
namespace {

constexpr uint8_t kInitialised = 1, kInFlight = 2, kSplit = 4, kAtomicWrite = 8;
constexpr uint16_t kNobody = 0xffff, kReaderSet = 0xfffe, kManyLanes = 0xff;

uint32_t warp_of(uint16_t who) { return who >> 8; }
uint32_t lane_of(uint16_t who) { return who & 0xff; }

// Whether the warp's `lane` (or all its lanes) is known to have passed `time` by `me` (or by all of its warp).
bool is_ordered(const Clocks& clocks, uint16_t me, uint16_t other, uint32_t time) {
  if (time < clocks.block_sync || (me == other && lane_of(me) != kManyLanes)) return true;
  const uint32_t warp = warp_of(me);
  if (warp != warp_of(other)) return time < clocks.known[warp][warp_of(other)];
  if (time < clocks.warp_sync[warp]) return true;
  if (!clocks.has_lane_known[warp] || lane_of(me) == kManyLanes) return false;
  const uint32_t* known = &clocks.lane_known[warp][lane_of(me) * Clocks::kLanes];
  if (lane_of(other) != kManyLanes) return time < known[lane_of(other)];
  for (uint32_t lane = 0; lane < Clocks::kLanes; ++lane)
    if (lane != lane_of(me) && time >= known[lane]) return false;
  return true;
}

[[noreturn]] void report_race(Thread& thread, Access kind, size_t offset, size_t bytes, const char* other_kind,
                              uint16_t other, uint32_t code, uint32_t other_code) {
  char who[64];
  if (lane_of(other) == kManyLanes)
    std::snprintf(who, sizeof who, "warp %u", warp_of(other));
  else
    std::snprintf(who, sizeof who, "thread %u", warp_of(other) * kWarpLanes + lane_of(other));
  report(thread, address_of_code(code),
         "race: %s of %zu bytes at shared memory + %zu, and a %s by %s%s; no barrier between",
         kind == Access::kRead     ? "read"
         : kind == Access::kAtomic ? "atomic"
         : kind == Access::kWrite  ? "write"
                                   : "cp.async",
         bytes, offset, other_kind, who, CodePlace(other_code).text);
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

void Clocks::sync_warps(uint32_t waiting, uint32_t arrived, const uint32_t* release_times) {
  ++now;
  uint32_t joined[kWarps] = {};
  for (uint32_t warp = 0; warp < kWarps; ++warp)
    if ((arrived >> warp & 1) != 0)
      for (uint32_t of = 0; of < kWarps; ++of) joined[of] = std::max(joined[of], known[warp][of]);
  for (uint32_t of = 0; of < kWarps; ++of)
    if ((arrived >> of & 1) != 0) joined[of] = std::max(joined[of], (waiting >> of & 1) != 0 ? now : release_times[of]);
  for (uint32_t warp = 0; warp < kWarps; ++warp) {
    if ((waiting >> warp & 1) == 0) continue;
    std::memcpy(known[warp], joined, sizeof joined);
    warp_sync[warp] = now;
  }
}

SharedShadow::~SharedShadow() {
  std::free(reader_sets_);
  std::free(free_sets_);
}

void SharedShadow::reset(size_t shared_bytes, uint32_t num_warps) {
  const size_t num_words = (shared_bytes + 3) / 4;
  if (num_words > words_capacity_) {
    words_.reset(new Cell[num_words]);
    bytes_.reset(new Cell[4 * num_words]);
    words_capacity_ = num_words;
  }
  shared_bytes_ = shared_bytes;
  num_warps_ = num_warps;
  const Cell untouched{0, 0, 0, 0, kNobody, kNobody, 0};
  std::fill_n(words_.get(), num_words, untouched);
  num_reader_sets_ = 0;
  num_free_sets_ = 0;
}

uint32_t SharedShadow::take_reader_set() {
  uint32_t index;
  if (num_free_sets_ > 0) {
    index = free_sets_[--num_free_sets_];
  } else {
    index = num_reader_sets_++;
    const size_t wanted = size_t{num_reader_sets_} * num_warps_;
    if (wanted > reader_sets_capacity_) {
      reader_sets_capacity_ = std::max<size_t>(2 * reader_sets_capacity_, 4096 * num_warps_);
      reader_sets_ = static_cast<Reader*>(std::realloc(reader_sets_, reader_sets_capacity_ * sizeof(Reader)));
      free_sets_ = static_cast<uint32_t*>(std::realloc(free_sets_, reader_sets_capacity_ * sizeof(uint32_t)));
      if (!reader_sets_ || !free_sets_) std::abort();
    }
  }
  Reader* set = reader_sets_ + size_t{index} * num_warps_;
  for (uint32_t warp = 0; warp < num_warps_; ++warp) set[warp] = {0, 0, kNobody};
  return index;
}

void SharedShadow::split(size_t word) {
  Cell& cell = words_[word];
  if ((cell.flags & kSplit) != 0) return;
  for (int i = 0; i < 4; ++i) {
    Cell& part = bytes_[4 * word + static_cast<size_t>(i)];
    part = cell;
    if (cell.reader == kReaderSet && i > 0) {
      part.read_time = take_reader_set();
      std::memcpy(reader_sets_ + size_t{part.read_time} * num_warps_,
                  reader_sets_ + size_t{cell.read_time} * num_warps_, num_warps_ * sizeof(Reader));
    }
  }
  cell.flags |= kSplit;
}

void SharedShadow::note_read(Thread& thread, Cell& cell, uint32_t code, uint16_t who) {
  const Clocks& clocks = thread.block->clocks;
  if (cell.reader == kReaderSet) {
    Reader& reader = reader_sets_[size_t{cell.read_time} * num_warps_ + warp_of(who)];
    const bool replaces =
        reader.who == kNobody || reader.who == who || is_ordered(clocks, who, reader.who, reader.time);
    reader = {clocks.now, code, replaces ? who : static_cast<uint16_t>(who | kManyLanes)};
    return;
  }
  if (cell.reader == kNobody || cell.reader == who || is_ordered(clocks, who, cell.reader, cell.read_time)) {
    cell.reader = who;
  } else if (warp_of(cell.reader) == warp_of(who)) {
    cell.reader = static_cast<uint16_t>(who | kManyLanes);
  } else {
    const uint32_t set = take_reader_set();
    Reader* readers = reader_sets_ + size_t{set} * num_warps_;
    readers[warp_of(cell.reader)] = {cell.read_time, cell.read_code, cell.reader};
    readers[warp_of(who)] = {clocks.now, code, who};
    cell.reader = kReaderSet;
    cell.read_time = set;
    return;
  }
  cell.read_time = clocks.now;
  cell.read_code = code;
}

void SharedShadow::access_cell(Thread& thread, Cell& cell, size_t offset, size_t bytes, Access kind, uint32_t code,
                               uint16_t who) {
  const Clocks& clocks = thread.block->clocks;
  if ((cell.flags & kInFlight) != 0)
    report(thread, address_of_code(code),
           "%s of shared memory + %zu, which a cp.async of thread %u%s still writes: no cp_async_wait before",
           kind == Access::kRead ? "read" : "write", offset, warp_of(cell.writer) * kWarpLanes + lane_of(cell.writer),
           CodePlace(cell.write_code).text);
  if ((kind == Access::kRead || kind == Access::kAtomic) && (cell.flags & kInitialised) == 0)
    report(thread, address_of_code(code), "read of %zu bytes at shared memory + %zu, which nobody wrote", bytes,
           offset);
  if (cell.writer != kNobody && cell.writer != who && !(kind == Access::kAtomic && (cell.flags & kAtomicWrite) != 0) &&
      !is_ordered(clocks, who, cell.writer, cell.write_time))
    report_race(thread, kind, offset, bytes, (cell.flags & kAtomicWrite) != 0 ? "atomic" : "write", cell.writer, code,
                cell.write_code);
  if (kind == Access::kRead) {
    note_read(thread, cell, code, who);
    return;
  }
  if (cell.reader == kReaderSet) {
    const Reader* readers = reader_sets_ + size_t{cell.read_time} * num_warps_;
    for (uint32_t warp = 0; warp < num_warps_; ++warp)
      if (readers[warp].who != kNobody && readers[warp].who != who &&
          !is_ordered(clocks, who, readers[warp].who, readers[warp].time))
        report_race(thread, kind, offset, bytes, "read", readers[warp].who, code, readers[warp].code);
    free_sets_[num_free_sets_++] = cell.read_time;
  } else if (cell.reader != kNobody && cell.reader != who && !is_ordered(clocks, who, cell.reader, cell.read_time)) {
    report_race(thread, kind, offset, bytes, "read", cell.reader, code, cell.read_code);
  }
  cell.reader = kNobody;
  cell.writer = who;
  cell.write_time = clocks.now;
  cell.write_code = code;
  cell.flags = kind == Access::kCopyIssue ? kInFlight
               : kind == Access::kAtomic  ? kInitialised | kAtomicWrite
                                          : kInitialised;
}

void SharedShadow::access(Thread& thread, size_t offset, size_t bytes, Access kind, const void* code_address,
                          bool is_whole_warp) {
  const uint32_t code = code_of(code_address);
  const uint16_t who = static_cast<uint16_t>(thread.warp->index << 8 | (is_whole_warp ? kManyLanes : thread.lane));
  if (offset >= shared_bytes_ || bytes > shared_bytes_ - offset)
    report(thread, code_address, "%s of %zu bytes at shared memory + %zu; the launch gave %zu bytes",
           kind == Access::kRead ? "read" : "write", bytes, offset, shared_bytes_);
  const size_t end = offset + bytes;
  while (offset < end) {
    const size_t word = offset / 4;
    const size_t word_end = std::min(end, 4 * word + 4);
    Cell& cell = words_[word];
    if (offset % 4 == 0 && word_end == 4 * word + 4) {
      if ((cell.flags & kSplit) == 0) {
        access_cell(thread, cell, offset, bytes, kind, code, who);
      } else {
        for (size_t i = 0; i < 4; ++i) access_cell(thread, bytes_[4 * word + i], offset + i, bytes, kind, code, who);
        if (kind != Access::kRead) cell = bytes_[4 * word];  // the four agree again, and no one has read since
      }
    } else {
      split(word);
      for (size_t i = offset; i < word_end; ++i) access_cell(thread, bytes_[i], i, bytes, kind, code, who);
    }
    offset = word_end;
  }
}

// Copies cover whole words, and their issue has merged them.
void SharedShadow::finish_copy(Thread& thread, size_t offset, size_t bytes) {
  for (size_t word = offset / 4; word < (offset + bytes) / 4; ++word) {
    words_[word].flags = kInitialised;
    words_[word].write_time = thread.block->clocks.now;
  }
}

}  // namespace partita::simt
