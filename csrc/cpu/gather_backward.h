// The gather body, backward. Rows first: dQ, and per edge and head its weight and score gradient. Then
// columns, over the transposed graph: dK and dV are sums of those over the queries that attend to a key. No
// atomics; every sum has one order.
#pragma once
#include "gather_rows.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

template <typename T, typename S>
static Plan<GatherParams> gather_backward_plan(const GatherParams& p) {
  Plan<GatherParams> plan;
  const RowSplit rows = row_split<T>(p), columns = column_split<T>(p);
  Arena a{nullptr}, b{nullptr}, c{nullptr}, d{nullptr}, shared{nullptr};
  const RowPass<T, S> row_pass(p, a);
  const ColumnPass<T, S> column_pass(p, b);
  const JointPass<T, S> joint_pass(p, c);
  const FeaturePass<T, S> feature_pass(p, d);
  const EdgeNumbers<T> numbers(p, shared);
  plan.scratch_bytes = size_t(max64(max64(a.used, b.used), max64(c.used, d.used)));
  plan.workspace_bytes = shared.used;
  if (row_pass.w.far) plan.add(p.batch * rows.items(), &gather_values_item<T, S>);
  plan.add(p.batch * rows.items(), &gather_rows_item<T, S>);
  if (rows.items() > 1) plan.add(p.batch * rows.items(), &gather_rows_merge<T, S>);
  if (const int64_t both = p.needs & (kNeedK | kNeedV)) {
    if (both == (kNeedK | kNeedV) && !column_pass.far)
      plan.add(p.batch * columns.items(), &gather_columns_item<T, S, kNeedK | kNeedV>);
    else {
      if (both & kNeedK) plan.add(p.batch * columns.items(), &gather_columns_item<T, S, kNeedK>);
      if (both & kNeedV) plan.add(p.batch * columns.items(), &gather_columns_item<T, S, kNeedV>);
    }
    if (columns.items() > 1) plan.add(p.batch * columns.items(), &gather_columns_merge<T, S>);
  }
  if (p.needs & (kNeedEdgeBias | kNeedWeight) || (p.edge_dim && p.needs & kNeedEdgeX))
    plan.add(edge_items(p) + 1, &gather_edges_item<T, S>);
  if (p.joint_dim && p.needs & (kNeedEdgeQ | kNeedEdgeX)) {
    plan.add(edge_items(p), &gather_joint_item<T, S>);
    if (p.needs & kNeedEdgeQ) plan.add(p.heads, &gather_joint_sum<T>);
  }
  return plan;
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
