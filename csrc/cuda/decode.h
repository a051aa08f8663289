// The decode body: few queries over many keys, which may lie in pages or in rows that a beam search has
// chosen. The query heads that share a key head are the rows of one tile, so that each key is read once for
// all of them; keys are split over blocks, and within a block over warps that stream tiles of their own and
// meet only at the end. States are merged in a fixed order.
#pragma once
#include "decode_tile.h"

namespace saccade {

// The states of a block's warps, in their order, to one split's state or, of one split, to results.
template <typename T, int kHeadDim>
SACCADE_DEVICE void merge_warps(const DecodeArgs& args, uint32_t warps, int64_t tile, int split) {
  using Shape = DecodeShape<T, kHeadDim>;
  constexpr int kFours = kHeadDim / 4;
  SACCADE_ROLLED
  for (int e = thread_index(); e < kDecodeRows * kFours; e += Shape::kThreads) {
    const int r = e / kFours, column = e % kFours * 4;
    float best = -kInfinity, total = 0;
    for (uint32_t w = 0; w < Shape::kWarps; ++w)
      best = fmaxf(best, load_shared<float>(warps + w * Shape::kWarpBytes + uint32_t(r) * 4));
    const float pivot = best == -kInfinity ? 0.0f : best;
    float4 sum{0, 0, 0, 0};
    for (uint32_t w = 0; w < Shape::kWarps; ++w) {
      const uint32_t at = warps + w * Shape::kWarpBytes, numbers = at + 2 * kDecodeRows * 4;
      const float weight =
          exp2_approx((load_shared<float>(at + uint32_t(r) * 4) - pivot) * args.terms.factor);
      total += load_shared<float>(at + uint32_t(kDecodeRows + r) * 4) * weight;
      add_four(sum, load_shared<float4>(numbers + uint32_t(r * Shape::kPitch + column) * 4), weight);
    }
    const int64_t state = tile * args.splits + split;
    if (args.splits > 1) {
      store_global(reinterpret_cast<float4*>(args.sums + (state * kDecodeRows + r) * kHeadDim + column), sum);
      if (column == 0) {
        store_global(args.peaks + (state * 2) * kDecodeRows + r, best);
        store_global(args.peaks + (state * 2 + 1) * kDecodeRows + r, total);
      }
    } else if (const DecodeRow row = decode_row(args, tile, r); row.alive) {
      finish_four<T>(args, row, column, best, total, sum);
    }
  }
}

// ---- the kernels ----

template <typename T, int kHeadDim, bool kGeneral>
SACCADE_KERNEL((DecodeShape<T, kHeadDim>::kThreads), 1)
decode(SACCADE_PARAM DecodeArgs args) {
  using Shape = DecodeShape<T, kHeadDim>;
  constexpr int kKeys = Shape::kKeys, kColumns = kKeys / 8;
  const Params& p = args.p;
  const int64_t tile = block_index() / args.splits;
  const int split = int(block_index() % args.splits), l = thread_index() % 32, warp = thread_index() / 32;
  const uint32_t queries = shared_memory(), warps = queries + Shape::kQueryBytes;
  const uint32_t stages = warps + uint32_t(warp) * Shape::kWarpBytes;

  // What each row keeps; what some row keeps; what all keep.
  DecodeRow row[2];
  int begin[2], end[2], some_begin = INT32_MAX, some_end = 0, all_begin = 0, all_end = INT32_MAX;
  for (int half = 0; half < 2; ++half) {
    row[half] = decode_row(args, tile, l / 4 + half * 8);
    const Band band = band_of(p.mask, args.terms, row[half].x);
    begin[half] = row[half].alive ? first_key(band, row[half].i) : 0;
    end[half] = row[half].alive ? end_key(band, row[half].i) : 0;
    if (begin[half] < end[half]) {
      some_begin = least(some_begin, begin[half]);
      some_end = most(some_end, end[half]);
    }
    if (row[half].alive) {
      all_begin = most(all_begin, begin[half]);
      all_end = least(all_end, end[half]);
    }
  }
  for (int mask = 4; mask < 32; mask *= 2) {
    some_begin = least(some_begin, shuffle_xor(some_begin, mask));
    some_end = most(some_end, shuffle_xor(some_end, mask));
    all_begin = most(all_begin, shuffle_xor(all_begin, mask));
    all_end = least(all_end, shuffle_xor(all_end, mask));
  }
  some_begin = least(some_begin, some_end);
  // Tiles go to splits in equal runs, and within a split to the warps in turn.
  const int first = some_begin / kKeys / Shape::kWarps * Shape::kWarps, last = (some_end + kKeys - 1) / kKeys;
  const int share =
      (last - first + args.splits * Shape::kWarps - 1) / (args.splits * Shape::kWarps) * Shape::kWarps;
  const int split_end = least(last, first + (split + 1) * share);

  const Head x = row[0].x;  // batch and key head are the block's
  const T* k = rows_at<T>(p.k, 0, x.hk, 0);
  const T* v = rows_at<T>(p.v, 0, x.hk, 0);
  const auto load_keys = [&](int n, int stage) {
    if (n < split_end) {
      const int j0 = n * kKeys, mine = most(some_begin, least(j0 + l % kKeys, some_end - 1));
      const Place place = place_of(p, x.b, mine);
      const uint32_t to = stages + uint32_t(stage) * 2 * Shape::kTileBytes;
      load_cached<T, kKeys, kHeadDim>(to, k, p.k, place, j0, some_begin, some_end, int(p.head_dim),
                                      args.aligned_k);
      load_cached<T, kKeys, kHeadDim>(to + Shape::kTileBytes, v, p.v, place, j0, some_begin, some_end,
                                      int(p.head_dim_v), args.aligned_v);
    }
    copy_commit();  // also where there is nothing: the wait counts groups
  };
  int n = first + split * share + warp;
  load_keys(n, 0);

  SACCADE_ROLLED
  for (int c = thread_index(); c < kDecodeRows * kHeadDim / kVector<T>; c += Shape::kThreads) {
    const int r = c / (kHeadDim / kVector<T>), column = c % (kHeadDim / kVector<T>)*kVector<T>;
    const DecodeRow of = decode_row(args, tile, r);
    const T* from = rows_at<T>(p.q, of.x.b, of.x.h, of.i) + column * p.q.col;
    const uint32_t to = chunk_at<kWidth<T, kHeadDim>>(queries, r, column / kVector<T>);
    if (of.alive && args.aligned_q && column + kVector<T> <= p.head_dim) {
      store_shared(to, load_global(reinterpret_cast<const uint4*>(from)));
      continue;
    }
    SACCADE_ROLLED
    for (int d = 0; d < kVector<T>; ++d)
      store_shared(to + uint32_t(d * sizeof(T)), of.alive && column + d < p.head_dim
                                                     ? load_global(from + d * p.q.col)
                                                     : from_float<T>(0.0f));
  }
  sync_threads();

  const uint64_t seed = kGeneral && args.terms.dropout ? seed_of(args) : 0;
  // Heads with bounds of their own may leave a gap between them.
  const bool may_be_dead = kGeneral && (args.terms.may_be_dead || p.mask.head_bounds);
  const bool many = args.group * p.seqlen_q > kDecodeRows / 2;
  RunningSoftmax softmax;
  float out[kHeadDim / 8][4] = {};
  SACCADE_ROLLED
  for (int stage = 0; n < split_end; n += Shape::kWarps, stage ^= 1) {
    load_keys(n + Shape::kWarps, stage ^ 1);
    copy_wait<1>();
    sync_warp();
    const uint32_t keys = stages + uint32_t(stage) * 2 * Shape::kTileBytes, values = keys + Shape::kTileBytes;
    const int j0 = n * kKeys;
    float s[kColumns][4];
    if constexpr (sizeof(T) == 4)
      multiply_exactly<kHeadDim, kKeys>(s, queries, keys, many);
    else
      multiply_rows<T, kHeadDim, kKeys>(s, queries, 0, keys);
    uint32_t alive = 0;
    if (kGeneral || j0 < all_begin || j0 + kKeys > all_end) {
      SACCADE_UNROLL
      for (int t = 0; t < kColumns; ++t)
        for (int c = 0; c < 4; ++c) {
          const int j = j0 + t * 8 + l % 4 * 2 + c % 2, i = row[c / 2].i;
          bool kept = j >= begin[c / 2] && j < end[c / 2];
          if (kGeneral) {
            kept = kept && keeps_pair(p.mask, x.b, i, j);
            float slope;
            if (kept && !args.terms.bare)
              s[t][c] = logit_of(p, args.terms, row[c / 2].x, s[t][c], i, j, slope);
          }
          if (!kept) s[t][c] = -kInfinity;
          if (kGeneral && s[t][c] != -kInfinity) alive |= 1u << (2 * t + c % 2);
        }
    }
    float rescale[2];
    softmax.weigh<kGeneral>(flat(s), args.terms.factor, rescale);
    SACCADE_UNROLL
    for (int d = 0; d < kHeadDim / 8; ++d)
      for (int c = 0; c < 4; ++c) out[d][c] *= rescale[c / 2];
    if (kGeneral && args.terms.dropout) {
      SACCADE_UNROLL
      for (int t = 0; t < kColumns; ++t)
        for (int half = 0; half < 2; ++half) {
          const uint32_t word = dropout_word(seed, row[half].x, row[half].i, j0 + t * 8 + l % 4 * 2);
          for (int c = 0; c < 2; ++c)
            if (!keeps_half(word, c, args.terms.threshold)) s[t][2 * half + c] = 0;
        }
    }
    if (may_be_dead) zero_dead_values<kKeys, kWidth<T, kHeadDim>>(alive, values);
    if constexpr (sizeof(T) == 4)
      add_exactly<kHeadDim, kKeys>(out, s, values, many);
    else
      add_weighted<T, kHeadDim, kKeys, kHeadDim>(out, s, values, 0);
    sync_warp();  // every lane is done with this stage before one refills it
  }

  // The warp's state takes the place of its tiles.
  SACCADE_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int r = l / 4 + half * 8;
    float total = softmax.sum[half];
    total += shuffle_xor(total, 1);
    total += shuffle_xor(total, 2);
    if (l % 4 == 0) {
      store_shared(stages + uint32_t(r) * 4, softmax.top[half]);
      store_shared(stages + uint32_t(kDecodeRows + r) * 4, total);
    }
    SACCADE_UNROLL
    for (int d = 0; d < kHeadDim / 8; ++d)
      for (int c = 0; c < 2; ++c)
        store_shared(stages + uint32_t(2 * kDecodeRows + r * Shape::kPitch + d * 8 + l % 4 * 2 + c) * 4,
                     out[d][2 * half + c]);
  }
  sync_threads();
  merge_warps<T, kHeadDim>(args, warps, tile, split);
}

constexpr int kMergeThreads = 128;

// The splits of a row, in their order; a warp for each row.
template <typename T, int kHeadDim>
SACCADE_KERNEL(kMergeThreads, 1)
decode_merge(SACCADE_PARAM DecodeArgs args) {
  const int l = thread_index() % 32;
  const int64_t index = block_index() * (kMergeThreads / 32) + thread_index() / 32;
  const int64_t tile = index / kDecodeRows;
  const int r = int(index % kDecodeRows);
  if (tile >= args.p.batch * args.p.heads_k * args.row_tiles) return;
  const DecodeRow row = decode_row(args, tile, r);
  if (!row.alive) return;
  const float* peaks = args.peaks + tile * args.splits * 2 * kDecodeRows + r;
  const float* sums = args.sums + (tile * args.splits * kDecodeRows + r) * kHeadDim;
  float best = -kInfinity;
  for (int split = l; split < args.splits; split += 32)
    best = fmaxf(best, load_global(peaks + split * 2 * kDecodeRows));
  for (int mask = 16; mask; mask /= 2) best = fmaxf(best, shuffle_xor(best, mask));
  const float pivot = best == -kInfinity ? 0.0f : best;
  SACCADE_ROLLED
  for (int column = l * 4; column < kHeadDim; column += 128) {
    float total = 0;
    float4 sum{0, 0, 0, 0};
    SACCADE_UNROLL_BY(4)
    for (int split = 0; split < args.splits; ++split) {
      const float* at = peaks + split * 2 * kDecodeRows;
      const float weight = exp2_approx((load_global(at) - pivot) * args.terms.factor);
      total += load_global(at + kDecodeRows) * weight;
      add_four(sum,
               load_global(
                   reinterpret_cast<const float4*>(sums + int64_t(split) * kDecodeRows * kHeadDim + column)),
               weight);
    }
    finish_four<T>(args, row, column, best, total, sum);
  }
}

}  // namespace saccade
