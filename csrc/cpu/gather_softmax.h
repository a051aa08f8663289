// The softmax of rows of edges, and what it leaves of a row: m, l, lse.
#pragma once
#include "gather_logits.h"

namespace saccade {
namespace SACCADE_ISA {
namespace {

// The state of a row, or of a piece of one: m (natural logit) and l per head, in lanes as HeadLanes has them;
// and the padded sums of values and of edge features.
template <typename T>
struct GatherState {
  T *m, *l, *O, *E;
  int64_t ldo, lde, lanes;

  static int64_t size(const GatherParams& p) {
    return round_up(p.heads * (round_up(p.head_dim_v, kLanes<T>) + round_up(p.edge_dim, kLanes<T>)) +
                        2 * HeadLanes<T>(p).lanes(),
                    16);
  }
  GatherState(const GatherParams& p, T* at)
      : ldo(round_up(p.head_dim_v, kLanes<T>)),
        lde(round_up(p.edge_dim, kLanes<T>)),
        lanes(HeadLanes<T>(p).lanes()) {
    O = at;
    E = O + p.heads * ldo;
    m = E + p.heads * lde;
    l = m + lanes;
  }
};

// The softmax of one row of `size` numbers: m and l of its heads, and its weights, not yet normalised. What
// lies in the last vector beyond the row is overwritten, by rows in their order.
template <typename T>
static void row_softmax(const HeadLanes<T>& heads, int64_t size, const T* logits, T* weights, T* m, T* l) {
  constexpr int L = kLanes<T>;
  const int64_t step = heads.lanes(), rest = size % L;
  const VecI<T> inside = iota<T>() < typename VecOf<T>::Int(rest);
  const auto add = [](Vec<T> a, Vec<T> b) { return a + b; };
  const auto larger = [](Vec<T> a, Vec<T> b) { return vmax<T>(a, b); };
  for (int64_t c = 0; c < step; c += L) {
    Vec<T> top = splat<T>(-kInf<T>), sum{}, last{};
    if (step == L) {  // otherwise an edge's numbers are whole vectors
      last = load(logits + size - rest);
      top = inside ? last : top;
    }
    for (int64_t x = c; x + L <= size; x += step) top = vmax<T>(load(logits + x), top);
    top = vmax<T>(fold_heads<T>(top, heads.pitch, larger), splat<T>(-kInf<T>));
    const Vec<T> pivot = top == -kInf<T> ? Vec<T>{} : top;
    const auto weigh = [pivot](Vec<T> x) { return exp2v<T>((x - pivot) * T(kLog2e)); };
    for (int64_t x = c; x + L <= size; x += step) {
      const Vec<T> weight = weigh(load(logits + x));
      store(weights + x, weight);
      sum += weight;
    }
    if (step == L) {
      const Vec<T> weight = inside ? weigh(last) : Vec<T>{};
      store(weights + size - rest, weight);
      sum += weight;
    }
    store(m + c, top);
    store(l + c, fold_heads<T>(sum, heads.pitch, add));
  }
}

// The sums of a row's products a * b by head, to as many lanes as heads fill or a vector has. Where a is 0,
// b, NaN perhaps, does not count.
template <typename T>
static void row_products(const HeadLanes<T>& heads, int64_t size, const T* a, const T* b, T* to) {
  constexpr int L = kLanes<T>;
  const int64_t step = heads.lanes(), rest = size % L;
  const VecI<T> inside = iota<T>() < typename VecOf<T>::Int(rest);
  const auto add = [](Vec<T> x, Vec<T> y) { return x + y; };
  const auto product = [](Vec<T> x, Vec<T> y) { return x == T(0) ? Vec<T>{} : x * y; };
  for (int64_t c = 0; c < step; c += L) {
    Vec<T> sum{};
    for (int64_t x = c; x + L <= size; x += step) sum += product(load(a + x), load(b + x));
    if (step == L && rest) {  // otherwise an edge's numbers are whole vectors
      const Vec<T> last = product(load(a + size - rest), load(b + size - rest));
      sum += inside ? last : Vec<T>{};
    }
    store(to + c, fold_heads<T>(sum, heads.pitch, add));
  }
}

// lse = top + log(sum), the logarithms of many rows together: one alone fills no vector and waits for itself.
template <typename T>
class Logarithms {
 public:
  // Where the next heads' numbers go, up to a vector of them.
  double* tops() { return tops_ + n_; }
  double* sums() { return sums_ + n_; }
  // n heads are there; their lse lie `stride` apart.
  void took(double* to, int64_t stride, int64_t n) {
    rows_[count_++] = {to, stride, n};
    n_ += n;
    if (n_ >= kRoom || count_ == kRoom) finish();
  }
  void finish() {
    log_each<T>(sums_, sums_, n_);
    int64_t at = 0;
    for (int64_t r = 0; r < count_; ++r)
      for (int64_t i = 0; i < rows_[r].n; ++i, ++at) rows_[r].to[i * rows_[r].stride] = tops_[at] + sums_[at];
    n_ = count_ = 0;
  }

 private:
  static constexpr int64_t kRoom = 64;
  struct Heads {
    double* to;
    int64_t stride, n;
  };
  Heads rows_[kRoom];
  double tops_[kRoom + 16], sums_[kRoom + 16];
  int64_t n_ = 0, count_ = 0;
};

// The sink joins a head's top and sum; returns the share of the largest that its edges keep.
template <typename T>
static double add_sink(const GatherParams& p, int64_t h, double& top, double& sum) {
  const double sink = double(sink_of<T>(p, h)), pivot = top > sink ? top : sink;
  const double mine = top == -kInf<double> ? 0 : exp(top - pivot);
  sum = sum * mine + (sink == -kInf<double> ? 0 : exp(sink - pivot));
  top = pivot;
  return mine;
}

// The sums l of a row become the factors that normalise it, in all lanes of their heads; its lse goes to
// `lse`.
template <typename T>
static void finish_sums(const GatherParams& p, int64_t b, int64_t row, const GatherState<T>& s,
                        Logarithms<T>& lse) {
  constexpr int L = kLanes<T>;
  for (int64_t h = 0; h < p.heads; h += L) {
    const int64_t n = min64(L, p.heads - h);
    const Vec<T> sum = load(s.l + h);
    double *tops = lse.tops(), *sums = lse.sums();
    widen<T>(load(s.m + h), tops);
    widen<T>(sum == T(0) ? splat<T>(T(1)) : sum, sums);
    store(s.l + h, sum == T(0) ? Vec<T>{} : T(1) / sum);
    for (int64_t i = 0; has_sink(p) && i < n; ++i) {
      double total = double(sum[int(i)]);
      const double mine = add_sink<T>(p, h + i, tops[i], total);
      s.l[h + i] = total == 0 ? T(0) : T(mine / total);
      sums[i] = total == 0 ? 1 : total;
    }
    lse.took(p.lse + b * p.lse_batch + h * p.lse_head + row, p.lse_head, n);
  }
  const int64_t pitch = HeadLanes<T>(p).pitch;
  if (has_sink(p) && pitch < L) store(s.l, repeat_heads<T>(load(s.l), pitch));
}

}  // namespace
}  // namespace SACCADE_ISA
}  // namespace saccade
