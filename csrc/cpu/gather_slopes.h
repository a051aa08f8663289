// The slopes of GATv2's scores. leaky_relu has one of two: with a bit for each number of q + k + W e, kept
// when the logits are formed, dK and the features' gradients need not form it again.
#pragma once
#include "gather_joint.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

template <typename T>
struct Slopes {
  using Bits = MaskBits<T>;
  Bits* base = nullptr;  // [B][E][H][vectors of head_dim]
  int64_t edges, heads, vectors;
  bool kept;

  Slopes(const GatherParams& p, Arena& a)
      : edges(p.edges), heads(p.heads), vectors((p.head_dim + kLanes<T> - 1) / kLanes<T>) {
    kept = p.score == Score::kGATv2 && p.needs & (kNeedK | kNeedEdgeQ | kNeedEdgeX);
    if (kept) base = a.take<Bits>(p.batch * edges * heads * vectors);
  }
  // The bits of an edge from head h on.
  Bits* of(int64_t b, int64_t edge, int64_t h = 0) const {
    return base + ((b * edges + edge) * heads + h) * vectors;
  }

  // The gradient of head h's w . phi towards what phi is taken of, of one edge or summed over n of them:
  // y += sum_e g_e w phi'(x_e), or y = where it is fresh. g_e = g[e * pitch], slopes[e] = of(edge e).
  void add(const GatherParams& p, int64_t h, const Bits* const* slopes, int64_t n, bool fresh, T* y,
           const T* g, int64_t pitch) const {
    constexpr int L = kLanes<T>;
    const T* w = static_cast<const T*>(p.weight) + h * p.head_dim;
    for (int64_t v = 0; v < vectors; ++v) {
      Vec<T> upper{}, lower{};  // of edges where x > 0, and of the others
      for (int64_t e = 0; e < n; ++e) {
        const VecI<T> above = unpack_mask<T>(slopes[e][h * vectors + v]);
        const Vec<T> grad = splat<T>(g[e * pitch]);
        upper += above ? grad : Vec<T>{};
        lower += above ? Vec<T>{} : grad;
      }
      const int64_t width = min64(L, p.head_dim - v * L);
      const Vec<T> weight = width == L ? load(w + v * L) : load_part<T>(w + v * L, width);
      const Vec<T> sum = weight * (upper + T(p.slope) * lower);
      store(y + v * L, fresh ? sum : load(y + v * L) + sum);
    }
  }
};

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
