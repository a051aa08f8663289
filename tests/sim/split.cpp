// Planted faults of work that is split: warps that stream rows of their own through two stages and meet only
// at the end, as in the decode body.
#include "check.h"

using namespace saccade;

enum Omitted {
  kNothing,
  kEmptyCommit,   // the last stage's wait counts a group that was never committed
  kWarpSync,      // a lane reads what another lane has asked for and not yet waited for
  kStageRelease,  // a stage is refilled while a slower lane still reads it
  kStateSync,     // the warps' states are merged before every warp has left its own
};

constexpr int kWarps = 4, kRowsOfWarp = 7;

// Rows of 32 numbers; warp w takes rows w, w + kWarps, ...; each lane sums a column that other lanes loaded.
template <Omitted kOmitted>
SACCADE_KERNEL(kWarps * 32, 1)
split_rows(const float* x, float* sums) {
  const int l = thread_index() % 32, warp = thread_index() / 32, rows = kWarps * kRowsOfWarp;
  const uint32_t stages = shared_memory() + uint32_t(warp) * 256, states = shared_memory() + kWarps * 256;
  const auto load = [&](int row, int stage) {
    if (row < rows && l < 8) copy_async(stages + uint32_t(stage * 128 + l * 16), x + row * 32 + l * 4, 16);
    if (row < rows || kOmitted != kEmptyCommit) copy_commit();
  };
  float sum = 0;
  load(warp, 0);
  for (int row = warp, stage = 0; row < rows; row += kWarps, stage ^= 1) {
    load(row + kWarps, stage ^ 1);
    copy_wait<1>();
    if (kOmitted != kWarpSync) sync_warp();
    sum += load_shared<float>(stages + uint32_t(stage * 128 + (31 - l) * 4));
    if (kOmitted != kStageRelease) sync_warp();
  }
  store_shared(states + uint32_t(warp * 32 + l) * 4, sum);
  if (kOmitted != kStateSync) sync_threads();
  if (warp) return;
  float all = 0;
  for (int w = 0; w < kWarps; ++w) all += load_shared<float>(states + uint32_t(w * 32 + l) * 4);
  store_global(sums + l, all);
}
template <Omitted kOmitted>
void check_split() {
  constexpr int kRows = kWarps * kRowsOfWarp;
  Numbers<float> x(kRows * 32);
  Array<float> sums(32);
  expect_ok(launch("split_rows", &split_rows<kOmitted>, 1, kWarps * 32, kWarps * 384, nullptr, x.data(),
                   sums.data()));
  for (int l = 0; l < 32; ++l) {
    double sum = 0;
    for (int row = 0; row < kRows; ++row) sum += x[size_t(row * 32 + 31 - l)];
    expect_equal(sums[size_t(l)], sum, "sum");
  }
}
TEST(split_whole) { check_split<kNothing>(); }
TEST(fault_empty_commit) { check_split<kEmptyCommit>(); }
TEST(fault_warp_sync) { check_split<kWarpSync>(); }
TEST(fault_stage_release) { check_split<kStageRelease>(); }
TEST(fault_state_sync) { check_split<kStateSync>(); }
