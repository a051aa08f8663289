// What one attention call is, in plain pointers and numbers: the only thing the kernels see. No torch header.
#pragma once
#include <stdint.h>

namespace saccade {

enum class DType : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };
enum class Score : int32_t { kDot, kAdditive, kGATv2 };
enum class Activation : int32_t { kSoftmax, kReLU, kSigmoid, kSoftmax1 };

constexpr int64_t kUnbounded = int64_t(1) << 62;
constexpr int64_t kGraphTile = 64;      // rows and columns of a graph tile; one 64-bit word per row
constexpr int64_t kDecodeQueries = 64;  // of each head, at most, that the CPU's decode body takes

// A strided tensor of rows. Strides count elements; packed sequences ([total, H, D]) have batch stride 0.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t batch = 0, head = 0, row = 0, col = 1;
};

struct MaskParams {
  int64_t band[4] = {kUnbounded, kUnbounded, kUnbounded,
                     kUnbounded};        // left_end, right_end, left_start, right_start
  const int64_t* head_bounds = nullptr;  // [H, 4], replaces band
  const int64_t* chunks = nullptr;       // [num_chunks, 2]: size, left
  int64_t num_chunks = 0;
  const int64_t* lengths = nullptr;  // [B]: keys at and beyond lengths[b] are padding
  const bool* keep = nullptr;        // [B, Sk]
  int64_t keep_batch = 0;
  const int32_t* q_ids = nullptr;  // [B, Sq]
  const int32_t* k_ids = nullptr;  // [B, Sk]
  int64_t q_ids_batch = 0, k_ids_batch = 0;
  const int64_t* tile_ptr = nullptr;    // [ceil(Sq / 64) + 1]
  const int32_t* tile_col = nullptr;    // [T]
  const uint64_t* tile_bits = nullptr;  // [T, 64]: bit c of word r keeps (row r, column c) of the tile
};

struct Params {
  int64_t batch = 0, heads = 0, heads_k = 0, seqlen_q = 0, seqlen_k = 0, head_dim = 0, head_dim_v = 0;
  Rows q, k, v, out;
  double* lse = nullptr;  // [B, H, Sq] or [H, total_q]; double, so that exp(S - lse) is as exact as S is
  int64_t lse_batch = 0, lse_head = 0;

  const void* bias = nullptr;  // [B, H, Sq, Sk], stride 0 where broadcast
  DType bias_dtype = DType::kFloat32;
  int64_t bias_stride[4] = {0, 0, 0, 0};
  // Accumulator dtype, with delta = j - (i + sk - sq). By distance: [H, rel_size], entry rel_center + delta.
  // By query, where rel_row is not 0: [B, H, Sq, rel_size] or [H, total_q, rel_size], contiguous, entry
  // rel_center + clip(delta, -rel_center, rel_center).
  const void* rel_bias = nullptr;
  int64_t rel_size = 0, rel_center = 0;
  int64_t rel_batch = 0, rel_head = 0, rel_row = 0;
  const void* weight = nullptr;   // [H, D] accumulator dtype, of the additive scores
  const void* sink = nullptr;     // [H] accumulator dtype
  const void* extra_k = nullptr;  // [H, D] dtype of k: one more key of each head, seen by every query
  const void* extra_v = nullptr;  // [H, Dv]

  const int64_t* cu_seqlens_q = nullptr;  // [B + 1], packed sequences
  const int64_t* cu_seqlens_k = nullptr;
  const int64_t* seqused_k = nullptr;   // [B], decode: keys in use
  const int32_t* page_table = nullptr;  // [B, pages], decode: k and v are [pages, Hk, page_size, D]
  int64_t page_table_batch = 0, page_size = 0;
  const int32_t* beam = nullptr;  // [B, S], decode: key j of row b lies in cache row beam[b, j]
  int64_t beam_batch = 0;

  MaskParams mask;
  Score score = Score::kDot;
  Activation activation = Activation::kSoftmax;
  double scale = 1, softcap = 0, slope = 0, dropout_p = 0;
  uint64_t seed = 0;
};

// Which gradients are wanted, by bit, in the order in which the operator returns them.
enum Needs : int64_t {
  kNeedQ = 1,
  kNeedK = 2,
  kNeedV = 4,
  kNeedBias = 8,
  kNeedRelBias = 16,
  kNeedWeight = 32,
  kNeedExtraK = 64,
  kNeedExtraV = 128,
};

struct GradParams : Params {
  Rows dout, dq, dk, dv;
  const double* dlse = nullptr;  // strides of lse
  void* dbias = nullptr;         // accumulator dtype, contiguous, size 1 where bias_stride is 0
  int64_t dbias_size[4] = {1, 1, 1, 1};
  void* drel_bias = nullptr;  // as rel_bias
  void* dweight = nullptr;    // [H, D]
  void* dextra_k = nullptr;   // [H, D]
  void* dextra_v = nullptr;   // [H, Dv]
  int64_t needs = 0;
};

struct WeightParams : Params {
  Rows weights;  // [B, H, Sq, columns]; head stride 0 when averaged
  bool average = false;
  int64_t columns = 0;  // Sk, then the extra key, then softmax1's zero column
};

// The gather body: a graph in CSR form, and what belongs to its edges.
struct GatherParams : GradParams {
  const int64_t* indptr = nullptr;    // [Sq + 1]
  const int32_t* indices = nullptr;   // [E] key of each stored edge
  const int64_t* edge_ids = nullptr;  // [E] the user's number of each stored edge; null where they agree
  int64_t edges = 0;                  // stored edges
  int64_t num_edges = 0;              // edges as the user counts them: length of edge_bias and edge_x
  const int64_t* t_indptr = nullptr;  // [Sk + 1] the transpose
  const int32_t* t_rows = nullptr;    // [E] query of each edge
  const int64_t* t_edges = nullptr;   // [E] its place in the CSR
  const void* edge_bias = nullptr;    // [H or 1, num_edges] accumulator dtype
  int64_t edge_bias_head = 0;         // 0 or num_edges
  Rows edge_q, edge_x, out_edge;      // [B, H, Sq, De], [num_edges, De] (row stride only), [B, H, Sq, De]
  int64_t edge_dim = 0;               // De; 0 without edge features, or where they join an additive score
  int64_t joint_dim = 0;              // De where they do: edge_q is then W [1, H, D, De]
  Rows dout_edge, dedge_q;
  void* dedge_bias = nullptr;  // as edge_bias
  void* dedge_x = nullptr;     // [num_edges, De] accumulator dtype
};
enum : int64_t { kNeedEdgeBias = 256, kNeedEdgeQ = 512, kNeedEdgeX = 1024 };

// Linear maps of rows by head, y[b, h, i] = base[b, h, i] + w[h] x[b, h, i], and their gradient towards w,
// the sum over b and i of y x^T: what features of edges cost for every node.
struct RowMapParams {
  Rows x, w, base, y;  // [B, H, N, Dx], [1, H, Dy, Dx], [B, H, N, Dy] or null, [B, H, N, Dy]
  int64_t batch = 0, heads = 0, rows = 0, dim_x = 0, dim_y = 0;
  void* dw = nullptr;  // [H, Dy, Dx] accumulator dtype
};

// One sequence of the batch: its lengths and where its rows begin in a packed tensor.
struct Sequence {
  int64_t seqlen_q, seqlen_k, q_begin, k_begin;
};

static inline Sequence sequence_of(const Params& p, int64_t b) {
  Sequence s{p.seqlen_q, p.seqlen_k, 0, 0};
  if (p.cu_seqlens_q) {
    s.q_begin = p.cu_seqlens_q[b];
    s.seqlen_q = p.cu_seqlens_q[b + 1] - s.q_begin;
  }
  if (p.cu_seqlens_k) {
    s.k_begin = p.cu_seqlens_k[b];
    s.seqlen_k = p.cu_seqlens_k[b + 1] - s.k_begin;
  }
  if (p.seqused_k) s.seqlen_k = p.seqused_k[b];
  return s;
}

}  // namespace saccade
