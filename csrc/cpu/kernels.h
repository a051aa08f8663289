// What a compiled kernel offers to ops.cpp: its work as numbered items that may run on any thread in any
// order, phase after phase. How the work is split depends on shapes alone, so results repeat bitwise for any
// number of threads.
#pragma once
#include <stddef.h>

#include "../params.h"

namespace saccade {

template <typename P>
struct Phase {
  int64_t items = 0;
  void (*run)(const P& p, int64_t item, char* scratch, char* workspace) = nullptr;
};

template <typename P>
struct Plan {
  static constexpr int kMaxPhases = 9;
  Phase<P> phase[kMaxPhases];
  int phases = 0;
  size_t scratch_bytes = 0;    // per thread
  size_t workspace_bytes = 0;  // shared

  void add(int64_t items, void (*run)(const P&, int64_t, char*, char*)) { phase[phases++] = {items, run}; }
};

// One instruction set's kernels for one kind of arithmetic.
struct KernelTable {
  const char* name;
  Plan<Params> (*forward)(const Params&);
  Plan<GradParams> (*backward)(const GradParams&);
  Plan<WeightParams> (*weights)(const WeightParams&);
  Plan<WeightParams> (*forward_weights)(const WeightParams&);
  Plan<Params> (*decode)(const Params&);
};

// The gather body and the maps beside it take every dtype.
struct GatherTable {
  Plan<GatherParams> (*forward)(const GatherParams&);
  Plan<GatherParams> (*backward)(const GatherParams&);
  Plan<RowMapParams> (*row_map)(const RowMapParams&);
  Plan<RowMapParams> (*row_outer)(const RowMapParams&);
};

}  // namespace saccade
