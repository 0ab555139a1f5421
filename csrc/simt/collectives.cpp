// What lanes do together: shuffles, votes, barriers.
#include <cstring>

#include "simt/block.h"
#include "simt/collective.h"
#include "simt/report.h"

namespace partita::simt {

// ---- meeting in a warp
// -----------------------------------------------------------------------------------------------

namespace {

void finish(Warp& warp, uint32_t which, uint32_t own_lane_bit) {
  const Collective done = warp.pending[which];
  warp.pending[which] = warp.pending[--warp.num_pending];
  done.complete(warp, done.arrived, done.parameter);
  run_again(warp, done.arrived & ~own_lane_bit);
}

}  // namespace

void meet(Thread& thread, uint32_t mask, void (*complete)(Warp&, uint32_t, int), int parameter, bool is_aligned,
          Site site) {
  Warp& warp = *thread.warp;
  const uint32_t own = 1u << thread.lane;
  char here[256], there[256];
  if ((mask & own) == 0)
    report(thread, nullptr, "%s: mask 0x%x lacks the calling lane %u", describe(site, here), mask, thread.lane);
  uint32_t which = 0;
  while (which < warp.num_pending && warp.pending[which].mask != mask) ++which;
  if (which == warp.num_pending) {
    warp.pending[warp.num_pending++] = {mask, 0, complete, parameter, site};
  } else {
    const Collective& other = warp.pending[which];
    if (other.complete != complete || other.parameter != parameter ||
        (is_aligned && (other.site.line != site.line || other.site.file != site.file)))
      report(thread, nullptr, "divergent warp: lane %u at %s, others (0x%x) at %s", thread.lane, describe(site, here),
             other.arrived, describe(other.site, there));
  }
  Collective& pending = warp.pending[which];
  pending.arrived |= own;
  if ((mask & warp.alive & ~pending.arrived) != 0) {
    rest(thread, Waiting::kCollective, site);
    return;
  }
  finish(warp, which, own);
  maybe_preempt(thread);
}

// ---- shuffles and votes
// ------------------------------------------------------------------------------------------------

namespace {

template <Shuffle kKind>
void complete_shuffle(Warp& warp, uint32_t lanes, int width) {
  uint64_t values[kWarpLanes];
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    values[lane] = warp.threads[lane].operands.shuffle.value;
  }
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    auto& operands = warp.threads[lane].operands.shuffle;
    const int first = lane & ~(width - 1), end = first + width;
    int source = lane;
    if (kKind == Shuffle::kIndex) source = first + (operands.lane & (width - 1));
    if (kKind == Shuffle::kUp && lane - operands.lane >= first) source = lane - operands.lane;
    if (kKind == Shuffle::kDown && lane + operands.lane < end) source = lane + operands.lane;
    if (kKind == Shuffle::kXor && (lane ^ operands.lane) < end) source = lane ^ operands.lane;
    if ((lanes >> source & 1) == 0)
      report(*current_thread, nullptr, "shuffle: lane %d reads lane %d, which takes no part (lanes 0x%x)", lane, source,
             lanes);
    operands.value = values[source];
  }
}

template <Vote kKind>
void complete_vote(Warp& warp, uint32_t lanes, int) {
  uint32_t ballot = 0;
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    ballot |= static_cast<uint32_t>(warp.threads[lane].operands.vote.value != 0) << lane;
  }
  const uint32_t result = kKind == Vote::kBallot ? ballot : kKind == Vote::kAny ? ballot != 0 : ballot == lanes;
  for (uint32_t rest = lanes; rest != 0; rest &= rest - 1)
    warp.threads[__builtin_ctz(rest)].operands.vote.value = static_cast<int32_t>(result);
}

void complete_sync(Warp& warp, uint32_t lanes, int) {
  Clocks& clocks = warp.block->clocks;
  if (lanes == warp.lanes)  // not those that have ended
    clocks.sync_warp(warp.index);
  else
    clocks.sync_lanes(warp.index, lanes);
}

}  // namespace

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int lane, int width, Site site) {
  static constexpr void (*kComplete[])(Warp&, uint32_t, int) = {
      &complete_shuffle<Shuffle::kIndex>, &complete_shuffle<Shuffle::kUp>, &complete_shuffle<Shuffle::kDown>,
      &complete_shuffle<Shuffle::kXor>};
  Thread& thread = *current_thread;
  if (width < 1 || width > 32 || (width & (width - 1)) != 0)
    report(thread, nullptr, "shuffle: width got %d, wanted a power of two up to 32", width);
  thread.operands.shuffle = {value, lane};
  meet(thread, mask, kComplete[static_cast<int>(kind)], width, false, site);
  return thread.operands.shuffle.value;
}

unsigned vote(Vote kind, unsigned mask, bool predicate, Site site) {
  static constexpr void (*kComplete[])(Warp&, uint32_t, int) = {&complete_vote<Vote::kBallot>,
                                                                &complete_vote<Vote::kAny>, &complete_vote<Vote::kAll>};
  Thread& thread = *current_thread;
  thread.operands.vote.value = predicate;
  meet(thread, mask, kComplete[static_cast<int>(kind)], 0, false, site);
  return static_cast<unsigned>(thread.operands.vote.value);
}

void sync_warp(unsigned mask, Site site) {
  Thread& thread = *current_thread;
  if (skip_site(thread, site)) return;
  meet(thread, mask, &complete_sync, 0, false, site);
}

// ---- barriers of the block
// ---------------------------------------------------------------------------------------------

namespace {

void release(Block& block, Barrier& barrier, const Thread& current) {
  uint32_t waiting_warps = 0;
  for (uint32_t i = 0; i < block.num_warps; ++i)
    if (barrier.waiting[i] != 0) waiting_warps |= 1u << i;
  if (barrier.num_threads == 0)
    block.clocks.sync_block();
  else
    block.clocks.learn(waiting_warps, barrier.joined);
  for (uint32_t rest = waiting_warps; rest != 0; rest &= rest - 1) {
    Warp& warp = block.warps[__builtin_ctz(rest)];
    const uint32_t lanes = barrier.waiting[warp.index];
    if (barrier.votes > 0)
      for (uint32_t left = lanes; left != 0; left &= left - 1) {
        auto& vote = warp.threads[__builtin_ctz(left)].operands.vote;
        vote.value = vote.kind == BlockVote::kCount ? barrier.count
                     : vote.kind == BlockVote::kAnd ? barrier.count == barrier.votes
                                                    : barrier.count > 0;
      }
    run_again(warp,
              &warp == current.warp && current.waiting != Waiting::kEnded ? lanes & ~(1u << current.lane) : lanes);
  }
  std::memset(&barrier, 0, sizeof barrier);
}

bool is_complete(const Block& block, const Barrier& barrier) {
  if (barrier.num_warps == 0) return false;
  return barrier.num_warps == (barrier.num_threads == 0 ? block.num_alive_warps : barrier.num_threads / kWarpLanes);
}

// All lanes of a warp that live have come to a barrier. Returns whether the current thread, one of them, goes on.
bool warp_arrives(Warp& warp, Thread& current) {
  Block& block = *warp.block;
  const auto gather = warp.gather;
  warp.gather.lanes = 0;
  Barrier& barrier = block.barriers[gather.id];
  if (barrier.num_warps > 0 && barrier.num_threads != static_cast<uint32_t>(gather.num_threads))
    report(current, nullptr, "barrier %d: some threads wait for %u, this one for %d (0: all)", gather.id,
           barrier.num_threads, gather.num_threads);
  barrier.num_threads = static_cast<uint32_t>(gather.num_threads);
  ++barrier.num_warps;
  block.clocks.arrive(warp.index, barrier.joined);
  const uint32_t own = current.waiting == Waiting::kEnded ? 0 : 1u << current.lane;
  if (gather.is_waiting) {
    barrier.waiting[warp.index] = gather.lanes;
    for (uint32_t rest = gather.lanes; rest != 0; rest &= rest - 1)
      warp.threads[__builtin_ctz(rest)].waiting = Waiting::kBarrier;
    if (own != 0) current.waiting = Waiting::kNo;
  } else {
    run_again(warp, gather.lanes & ~own);
  }
  const bool completes = is_complete(block, barrier);
  if (completes) release(block, barrier, current);
  return completes || !gather.is_waiting;
}

void come_to_barrier(Thread& thread, int id, int num_threads, bool is_waiting, Site site) {
  Warp& warp = *thread.warp;
  auto& gather = warp.gather;
  char here[256], there[256];
  if (gather.lanes == 0) {
    gather.id = id;
    gather.num_threads = num_threads;
    gather.is_waiting = is_waiting;
    gather.site = site;
  } else if (gather.site.line != site.line || gather.site.file != site.file || gather.id != id ||
             gather.num_threads != num_threads) {
    report(thread, nullptr, "divergent barrier: lane %u at %s, other lanes of its warp (0x%x) at %s", thread.lane,
           describe(site, here), gather.lanes, describe(gather.site, there));
  }
  gather.lanes |= 1u << thread.lane;
  if ((warp.alive & ~gather.lanes) != 0)
    rest(thread, Waiting::kWarpAtBarrier, site);
  else if (!warp_arrives(warp, thread))
    rest(thread, Waiting::kBarrier, site);
  else
    maybe_preempt(thread);
}

}  // namespace

void block_barrier(Site site) {
  Thread& thread = *current_thread;
  if (skip_site(thread, site)) return;
  come_to_barrier(thread, 0, 0, true, site);
}

int block_barrier_vote(BlockVote kind, bool predicate, Site site) {
  Thread& thread = *current_thread;
  if (skip_site(thread, site)) return predicate;
  Barrier& barrier = thread.block->barriers[0];
  thread.operands.vote = {kind, predicate};
  barrier.count += predicate;
  ++barrier.votes;
  come_to_barrier(thread, 0, 0, true, site);
  return thread.operands.vote.value;
}

namespace {

void named(int id, int num_threads, bool is_waiting, Site site) {
  Thread& thread = *current_thread;
  if (id < 1 || id >= static_cast<int>(kNumBarriers) || num_threads < 32 || num_threads > 1024 || num_threads % 32 != 0)
    report(thread, nullptr, "barrier: got id %d, %d threads, wanted 1..15 and a multiple of 32 up to 1024", id,
           num_threads);
  if (skip_site(thread, site)) return;
  come_to_barrier(thread, id, num_threads, is_waiting, site);
}

}  // namespace

void named_barrier(int id, int num_threads, Site site) { named(id, num_threads, true, site); }
void named_barrier_arrive(int id, int num_threads, Site site) { named(id, num_threads, false, site); }

// ---- ends
// ----------------------------------------------------------------------------------------------------------------

void lane_ended(Thread& thread) {
  Warp& warp = *thread.warp;
  Block& block = *thread.block;
  ++block.progress;
  --block.num_alive;
  for (uint32_t i = 0; i < warp.num_pending;) {
    if ((warp.pending[i].mask & warp.alive & ~warp.pending[i].arrived) == 0)
      finish(warp, i, 0);
    else
      ++i;
  }
  if (warp.gather.lanes != 0 && warp.gather.lanes == warp.alive) warp_arrives(warp, thread);
  if (warp.alive == 0) {
    --block.num_alive_warps;
    if (block.barriers[0].num_threads == 0 && is_complete(block, block.barriers[0]))
      release(block, block.barriers[0], thread);
  }
}

}  // namespace partita::simt
