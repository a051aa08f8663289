// Runs blocks one after another, each from poisoned shared memory to the end of its last thread.
#pragma once
#include <algorithm>

#include "block.h"

namespace saccade {
namespace sim {

inline void thread_entry() {
  try {
    block.body();
    Fiber& self = *block.current;
    for (auto& group : self.copies.closed)
      for (AsyncCopy& copy : group)
        if (!copy.landed) land(copy);
    wait_groups<0>(self.bulk);
  } catch (const Fault& fault) {
    if (block.fault.empty()) block.fault = fault.what();
  }
  block.current->done = true;
  ++block.progress;
  block.current->context.switch_to(block.scheduler);
  abort();  // a finished thread is never resumed
}

inline void reset_block(int64_t index) {
  Block& b = block;
  b.index = index;
  for (uint32_t at = 0; at < kSharedBytes; at += 4) memcpy(b.shared + at, &kPoison, 4);
  b.all = Barrier();
  for (Barrier& x : b.named) x = Barrier();
  for (Barrier& x : b.warp) x = Barrier();
  for (Barrier& x : b.group) x = Barrier();
  memset(b.written, 0, sizeof(b.written));
  b.mbarriers.clear();
  b.loads.clear();
  for (auto& x : b.products) x = {};
  for (auto& x : b.accumulators) x.clear();
  if (int(b.fibers.size()) < b.threads) b.fibers.resize(size_t(b.threads));
  for (int i = 0; i < b.threads; ++i) {
    Fiber& f = b.fibers[size_t(i)];
    if (!f.stack) f.stack = static_cast<char*>(aligned_alloc(64, kStackBytes));
    f.thread = i;
    f.done = false;
    f.waits_for = "";
    f.fences = 0;
    f.copies = {};
    f.bulk = {};
    f.context.start(f.stack, &thread_entry);
  }
}

// Which threads wait for what, runs of equals joined.
inline std::string deadlock_report() {
  std::string text = "deadlock in block " + std::to_string(block.index) + ":";
  for (int i = 0; i < block.threads;) {
    const Fiber& f = block.fibers[size_t(i)];
    int end = i + 1;
    const auto same = [&](const Fiber& x) {
      return x.done == f.done && x.waits_for == f.waits_for && x.where == f.where && x.detail == f.detail;
    };
    while (end < block.threads && same(block.fibers[size_t(end)])) ++end;
    char line[160];
    if (f.done)
      snprintf(line, sizeof(line), " threads %d-%d ended;", i, end - 1);
    else
      snprintf(line, sizeof(line), " threads %d-%d wait at %s (%u, %u);", i, end - 1, f.waits_for, f.where,
               f.detail);
    text += line;
    i = end;
  }
  return text;
}

inline bool run_warp(int warp) {
  bool live = false;
  const int first = warp * 32, count = block.threads - first < 32 ? block.threads - first : 32;
  const bool backwards = random_below(2);  // lanes are in no order either
  for (int l = 0; l < count; ++l) {
    Fiber& f = block.fibers[size_t(first + (backwards ? count - 1 - l : l))];
    if (f.done) continue;
    live = true;
    block.current = &f;
    block.scheduler.switch_to(f.context);
  }
  return live;
}

// Warps that stand still until the others can do nothing more: an aligned run of 1, 2 or 4 of them, all but
// such a run, or none. A favourite alone would not do, since a warpgroup advances only with all of its warps.
inline std::vector<bool> draw_held(int warps) {
  const int run = 1 << random_below(3), first = int(random_below(uint32_t(warps))) / run * run;
  const bool inside = random_below(2), some = random_below(4);
  std::vector<bool> held;
  for (int w = 0; w < warps; ++w) held.push_back(some && (w >= first && w < first + run) == inside);
  return held;
}

inline void run_block(int64_t index) {
  reset_block(index);
  const int warps = (block.threads + 31) / 32;
  std::vector<int> order;
  for (int w = 0; w < warps; ++w) order.push_back(w);
  std::vector<bool> held = draw_held(warps);
  int favourite = -1, idle = 0;
  for (bool live = true; live;) {
    const uint64_t before = block.progress;
    if (favourite >= 0 && !held[size_t(favourite)] && random_below(16)) {
      run_warp(favourite);
    } else {
      for (int w = warps - 1; w > 0; --w) std::swap(order[size_t(w)], order[random_below(uint32_t(w) + 1)]);
      live = false;
      for (int w : order) live |= held[size_t(w)] || run_warp(w);
      idle = block.progress == before ? idle + 1 : 0;
    }
    land_anything();
    // The favourite changes when it is stuck, and now and then for no reason.
    if (block.progress == before || random_below(64) == 0)
      favourite = favourite < 0 || random_below(4) ? int(random_below(uint32_t(warps))) : -1;
    if (idle > 2 && !block.loads.empty()) {
      land_load(0);
      idle = 0;
    } else if (idle > 2 && std::find(held.begin(), held.end(), true) != held.end()) {
      held.assign(size_t(warps), false);
      idle = 0;
    } else if (random_below(32) == 0 && std::find(held.begin(), held.end(), true) == held.end()) {
      held = draw_held(warps);
    }
    if (idle > 4 && live && block.fault.empty()) block.fault = deadlock_report();
  }
  if (block.fault.empty() && !block.loads.empty())
    block.fault = "the block ended before its TMA loads had landed";
  if (!block.fault.empty()) throw Fault(block.fault);
}

inline void run_grid(int64_t blocks, int threads, uint32_t shared_bytes, const std::function<void()>& body) {
  if (shared_bytes > kSharedBytes)
    fail("%u bytes of shared memory asked for, %u are there", shared_bytes, kSharedBytes);
  block.fault.clear();
  block.blocks = blocks;
  block.threads = threads;
  block.shared_bytes = shared_bytes;
  block.body = body;
  for (int64_t i = 0; i < blocks; ++i) run_block(i);
}

}  // namespace sim
}  // namespace saccade
