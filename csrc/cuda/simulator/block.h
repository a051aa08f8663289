// The running block: its memory, its threads and the schedule. Warps take turns in a seeded and deliberately
// unfair order, so that one runs as far ahead of the others as synchronisation lets it; what is copied
// asynchronously lands at a random moment between its issue and the wait for it.
#pragma once
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <bitset>
#include <deque>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "fiber.h"

namespace saccade {
namespace sim {

constexpr uint32_t kSharedBytes = 227 << 10, kSharedBase = 1024;  // address 0 is nobody's
constexpr uint32_t kPoison = 0x7FFF7FFF;                          // NaN as fp32, bf16 and fp16
constexpr int kMaxThreads = 1024;

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename... Args>
[[noreturn]] void fail(const char* format, Args... args) {
  char text[512];
  snprintf(text, sizeof(text), format, args...);
  throw Fault(text);
}

struct AsyncCopy {
  uint32_t to;
  const void* from;
  int bytes;
  bool landed;
};

struct Bulk {  // a store of the bulk copy engine: reads shared memory, then writes global memory
  std::function<void()> run;
  bool landed;
};

template <typename Operation>
struct Groups {
  std::vector<Operation> open;
  std::deque<std::vector<Operation>> closed;
  void commit() {
    closed.push_back(std::move(open));
    open.clear();
  }
};

struct Fiber {
  Context context;
  char* stack = nullptr;
  int thread = 0;
  bool done = false;
  const char* waits_for = "";  // for the report of a deadlock
  uint32_t where = 0, detail = 0;
  uint32_t fences = 0;  // between the generic and the async proxy
  Groups<AsyncCopy> copies;
  Groups<Bulk> bulk;
};

struct Barrier {
  int arrived = 0, count = 0;
  unsigned generation = 0;
  const char* what = nullptr;
  void* slot[128] = {};
  std::bitset<kMaxThreads> there;  // of a named barrier
};

struct Mbarrier {
  int count, pending;
  int64_t bytes;
  unsigned phase;
};

struct TmaLoad {
  std::function<void()> run;
  uint32_t barrier;
  int bytes;
};

// The registers that products under way add to.
struct Accumulator {
  std::vector<float> values;
  int products = 0;
};

struct Range {
  const char* begin;
  const char* end;
};

struct Block {
  alignas(1024) unsigned char shared[kSharedBytes];
  uint32_t written[kSharedBytes / 4];  // of each word the thread that stored it, and its fences until then
  uint32_t shared_bytes = 0;
  int64_t index = 0, blocks = 0;
  int threads = 0;
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  Context scheduler;
  std::function<void()> body;
  std::string fault;
  uint64_t progress = 0, random = 1;

  Barrier all, named[16], warp[kMaxThreads / 32], group[kMaxThreads / 128];
  std::map<uint32_t, Mbarrier> mbarriers;
  std::vector<TmaLoad> loads;
  Groups<std::function<void()>> products[kMaxThreads / 128];
  std::unordered_map<float*, Accumulator> accumulators[kMaxThreads / 128];
  std::vector<Range> memory;  // global memory that kernels may touch
};
inline Block block;

inline uint32_t random_below(uint32_t n) {
  block.random = block.random * 6364136223846793005ull + 1442695040888963407ull;
  return uint32_t((block.random >> 33) % n);
}

// ---- memory ----

inline void* shared_at(uint32_t address, uint32_t bytes, uint32_t align) {
  if (address < kSharedBase || address + bytes > kSharedBase + block.shared_bytes)
    fail("shared address %d (+%u bytes) outside the block's %u bytes", int(address) - int(kSharedBase), bytes,
         block.shared_bytes);
  if (address % align) fail("shared address %u is not aligned to %u bytes", address - kSharedBase, align);
  return block.shared + (address - kSharedBase);
}

// What threads store reaches the copy engine and wgmma only behind a fence of the thread that stored it.
inline void note_store(uint32_t address, uint32_t bytes) {
  for (uint32_t word = (address - kSharedBase) / 4; word * 4 < address - kSharedBase + bytes; ++word)
    block.written[word] = 1 + uint32_t(block.current->thread) + kMaxThreads * block.current->fences;
}
inline void check_fenced(uint32_t address, uint32_t bytes, const char* what) {
  for (uint32_t word = (address - kSharedBase) / 4; word * 4 < address - kSharedBase + bytes; ++word) {
    const uint32_t mark = block.written[word], thread = (mark - 1) % kMaxThreads;
    if (mark && (mark - 1) / kMaxThreads == block.fibers[thread].fences)
      fail("%s: no async fence since thread %d stored to shared address %u", what, int(thread), word * 4);
  }
}

inline void check_global(const void* p, int64_t bytes, int64_t align, const char* what) {
  const char* at = static_cast<const char*>(p);
  if (reinterpret_cast<uintptr_t>(at) % uintptr_t(align))
    fail("%s: global address not aligned to %d bytes", what, int(align));
  for (size_t i = 0; i < block.memory.size(); ++i) {
    const Range r = block.memory[i];
    if (at < r.begin || at + bytes > r.end) continue;
    if (i) std::swap(block.memory[i], block.memory[i - 1]);  // what is used most comes first
    return;
  }
  int64_t past = INT64_MAX;
  for (const Range& r : block.memory)
    if (at >= r.end - bytes && at - r.end + bytes < past) past = at - r.end + bytes;
  fail("%s: global address out of bounds: %lld bytes, ending %lld bytes past the nearest tensor", what,
       (long long)bytes, (long long)past);
}

// ---- threads ----

inline void yield() {
  block.current->context.switch_to(block.scheduler);
  if (!block.fault.empty()) throw Fault(block.fault);
}

inline void wait_while(const std::function<bool()>& blocked, const char* what, uint32_t where,
                       uint32_t detail) {
  Fiber* self = block.current;
  while (blocked()) {
    self->waits_for = what;
    self->where = where;
    self->detail = detail;
    yield();
  }
  self->waits_for = "";
  ++block.progress;
}

inline void complete(uint32_t address, int64_t bytes) {
  Mbarrier& m = block.mbarriers.at(address);
  m.bytes -= bytes;
  if (m.pending == 0 && m.bytes == 0) {
    ++m.phase;
    m.pending = m.count;
  }
}

inline void land(AsyncCopy& copy) {
  if (copy.landed) return;
  copy.landed = true;
  void* to = shared_at(copy.to, 16, 16);
  memset(to, 0, 16);
  if (copy.bytes) memcpy(to, copy.from, size_t(copy.bytes));
}
inline void land(Bulk& bulk) {
  if (!bulk.landed) bulk.run();
  bulk.landed = true;
}
template <typename Operation>
void land_some(Groups<Operation>& groups) {
  for (auto& group : groups.closed)
    for (Operation& operation : group)
      if (random_below(2)) land(operation);
  for (Operation& operation : groups.open)
    if (random_below(2)) land(operation);
}
template <int kLeft, typename Operation>
void wait_groups(Groups<Operation>& groups) {
  for (; groups.closed.size() > kLeft; groups.closed.pop_front())
    for (Operation& operation : groups.closed.front()) land(operation);
}

inline void land_load(size_t i) {
  const TmaLoad load = block.loads[i];
  block.loads.erase(block.loads.begin() + int64_t(i));
  load.run();
  complete(load.barrier, load.bytes);
  ++block.progress;
}

// What the copy engines may do at any time.
inline void land_anything() {
  if (!block.loads.empty() && random_below(3) == 0) land_load(random_below(uint32_t(block.loads.size())));
  Fiber& fiber = block.fibers[random_below(uint32_t(block.threads))];
  land_some(fiber.copies);
  land_some(fiber.bulk);
}

// Every one of `count` threads arrives; the last runs `action` on what they brought.
template <typename Action>
void collective(Barrier& b, int count, int place, void* mine, const char* what, Action action) {
  if (b.arrived == 0) b.what = what;
  if (b.what != what) fail("thread %d is at %s where others are at %s", block.current->thread, what, b.what);
  b.slot[place] = mine;
  const unsigned generation = b.generation;
  ++block.progress;
  if (++b.arrived == count) {
    action(b.slot);
    b.arrived = 0;
    ++b.generation;
    return;
  }
  Fiber* self = block.current;
  self->waits_for = what;
  self->where = self->detail = 0;
  while (b.generation == generation) yield();
  self->waits_for = "";
}

inline int lane() { return block.current->thread % 32; }
template <typename Action>
void warp_collective(void* mine, const char* what, Action action) {
  collective(block.warp[block.current->thread / 32], 32, lane(), mine, what, action);
}
template <typename Action>
void group_collective(void* mine, const char* what, Action action) {
  const int thread = block.current->thread;
  collective(block.group[thread / 128], 128, thread % 128, mine, what, action);
}

}  // namespace sim
}  // namespace saccade
