// What the verbs take. Pointers marked [backend] are memory of the backend that only verbs may follow; everything else
// is ordinary host memory. Rows of scores are indexed by column: a column is a slot where all heads of a layer hold the
// same tokens, else the rank of the token among those any head holds (see cache/columns.hpp).
#pragma once

#include <cmath>
#include <limits>
#include <span>

#include "../cache/compaction.hpp"
#include "../cache/pages.hpp"
#include "../cache/reform.hpp"
#include "../core/shape.hpp"
#include "../core/view.hpp"

namespace kvpare {

namespace detail {
/// Backends keep logits in units of log2.
inline constexpr float log2_e = 1.44269504088896340736f, ln_2 = 0.69314718055994530942f;
}  // namespace detail

/// A row of floats with a bitmap: bit b of word w stands for column w * word_tokens + b. No bitmap = all columns.
struct MaskedRow {
  const float* values = nullptr;        // [backend] [columns]
  const std::uint64_t* mask = nullptr;  // [backend] [ceil(columns / word_tokens)] or null
  Index columns = 0;
  Index word_tokens = 64;
};

/// What `reduce` says of one row. NaN values are counted and left out of everything else.
struct RowSummary {
  double sum = 0, mean = 0;
  double moment2 = 0, moment3 = 0;  // sums of (x - mean)^2 and (x - mean)^3
  float min = std::numeric_limits<float>::infinity(), max = -std::numeric_limits<float>::infinity();
  Index argmax = -1;  // lowest column of the maximum; -1 when the row is empty
  Index count = 0, nan_count = 0;

  /// Bias-adjusted sample skewness n / ((n-1)(n-2)) * sum(((x - mean) / s)^3), s the sample deviation; 0 when n < 3 or
  /// the row is constant.
  KVPARE_HD double skewness() const;
};

/// One row of `select_top`.
struct TopRow {
  const float* scores = nullptr;              // [backend] [columns]
  const std::uint64_t* candidates = nullptr;  // [backend] bitmap as in MaskedRow
  const Index* k = nullptr;                   // [backend] how many to take; negative counts as 0
  std::uint64_t* chosen = nullptr;            // [backend] bitmap written: the best min(k, candidates)
  Index* nan_count = nullptr;                 // [backend] candidates whose score is NaN, or null
  Index columns = 0;
  Index word_tokens = 64;
};

/// One row of `sort_rows`.
struct SortRow {
  MaskedRow row;
  Index* columns = nullptr;  // [backend] candidates in descending order of value, ties to the lower column, NaN last
  float* values = nullptr;   // [backend] their values, or null
  double* running_sum = nullptr;  // [backend] inclusive sum of the values (NaN count as 0), or null
  Index* count = nullptr;         // [backend] how many
};

enum class Side : std::uint8_t { keys, values };

/// One list of `statistics`: per channel over tokens, or per slot over channels.
struct StatisticsRow {
  HeadPages pages;
  Side side = Side::keys;
  const std::uint64_t* mask = nullptr;  // [backend] a word per entry, or null for all live tokens
  Index width = 0;
  bool per_slot = false;
  float *min = nullptr, *max = nullptr, *sum = nullptr,
        *sum_squares = nullptr;  // [backend] [width] or [slots]; null = not wanted
};

/// One list of `gather`: rows of live tokens, in order, as floats.
struct GatherRow {
  HeadPages pages;
  Side side = Side::keys;
  const std::uint64_t* mask = nullptr;  // [backend] a word per entry, or null for all live tokens
  Index width = 0;
  float* out = nullptr;  // [backend] [tokens that are live and in the mask, width]
};

/// C[b] = A[b] * B[b], or A[b] * B[b]^T; row-major floats.
struct ProductArguments {
  const float *a = nullptr, *b = nullptr;  // [backend] [batch][m, k] and [batch][k, n] (or [n, k] when transposed)
  float* c = nullptr;                      // [backend] [batch][m, n]
  Index batch = 1, m = 0, n = 0, k = 0;
  bool b_transposed = false;
};

/// Source rows [row, row + count) of one head go to slots [slot, slot + count) of a page.
struct WriteRun {
  Index head = 0, row = 0;
  PageId page = 0;
  std::uint16_t format = 0, slot = 0, count = 0;
};

struct AppendArguments {
  ConstTensor keys, values;               // [backend] [rows, kv_heads, width], any element type
  std::span<const PageGeometry> formats;  // pool pages: the same for all heads
  std::span<const WriteRun> runs;         // of formats that move their rows and take no state
  Index page_tokens = 64;
};

/// The moves of one head's list, carried out in order; a move never writes what a later one reads.
struct CompactList {
  std::span<const PageGeometry> formats;
  std::span<const Move> moves;
  Index key_dim = 0, value_dim = 0;
  Index page_tokens = 64;
};

/// Rows of one head that change their form. Per side: where the codec and its state stay the same and the rows keep their
/// slots, or the codec moves rows, bytes are copied and nothing is rounded twice; else rows are decoded and coded anew. A
/// page of a codec that does not move rows is written whole; slots that no piece fills come to hold a neighbour's row. No
/// page is both read and written, but for slots that a page had free.
struct EncodeList {
  std::span<const PageGeometry> formats;
  std::span<const CodecState> states;
  std::span<const EncodePage> pages;
  std::span<const EncodePiece> pieces;
  Index key_dim = 0, value_dim = 0;
  Index page_tokens = 64;
  std::span<const Position> positions = {};  // [pages, page_tokens] of the slots written; for codecs that read them
  const float* attention = nullptr;          // [backend] [pages, page_tokens] see TokenFacts; or null
};

/// One tile of a page as its codec's canonical bytes, or back.
struct RepackTile {
  const PageGeometry* geometry = nullptr;
  Side side = Side::keys;
  PageId page = 0;
  Index width = 0, page_tokens = 64;
  std::byte* canonical = nullptr;  // [backend] key_tile_bytes or value_tile_bytes
};
enum class RepackTo : std::uint8_t { canonical, page };

enum class MassKind : std::uint8_t { none, sum, mean, max };  // over the query heads of a kv head's group

/// One sequence of `attend`, one layer.
struct AttendSequence {
  std::span<const HeadPages> heads;     // per kv head
  ConstTensor queries;                  // [backend] [rows 1..64, q_heads, key_dim], not pre-scaled
  std::span<const Position> positions;  // host; per row: the largest key position it sees
  Tensor out;                           // [backend] [rows, q_heads, value_dim]
  float* lse = nullptr;                 // [backend] [rows, q_heads] natural log, sink included; or null
  std::span<float* const> mass = {};    // [backend] per kv head [slots], added to; or empty
};

enum class HeadGroups : std::uint8_t {
  query_head,
  kv_head,
  layer
};  // one output row per …; mean over the query heads joined

/// The plain logit: scale and softcap of the layer.
struct PlainLogit {
  static constexpr bool plain = true;
};
/// The plain entry: the probability itself.
struct Probability {
  static constexpr bool plain = true;
};

/// `attention_mass`: how much attention each key gets from chosen rows. One layer.
///
///   visible(r, j)  key mask has j, position_j <= position_r, inside the layer's window
///   s              logit(scale * q_r·k_j (softcapped), row, column)
///   p              exp(s - lse_r);  lse_r over exactly the visible keys, plus exp(extra_r) when given
///   out[part, head, j]  +=  sum (or max) over rows of w_r * entry(p, row, column), mean over the heads joined
///
/// A row of weight 0, or one that sees nothing, adds nothing. Ties none; a NaN logit makes its row NaN.
template <class Logit = PlainLogit, class EntryOf = Probability>
struct MassArguments {
  const LayerShape* shape = nullptr;
  std::span<const HeadPages> keys;                      // per kv head: cache, engine pages or any dense tensor
  std::span<const std::uint64_t* const> key_mask = {};  // [backend] per kv head, a word per entry; empty = all live
  std::span<const std::int32_t* const> column_of =
      {};             // [backend] per kv head, slot -> column; empty = the slot itself
  Index columns = 0;  // width of the output rows

  ConstTensor queries;                      // [backend] [rows, q_heads, key_dim], not pre-scaled
  const Position* row_positions = nullptr;  // [backend] [rows]
  const Index* row_list = nullptr;          // [backend] which rows to use, ascending; null = all
  const Index* row_count = nullptr;         // [backend] how many of the list
  const float* row_weights = nullptr;       // [backend] [rows], or [rows, q_heads] with per_head_weights; null = 1
  bool per_head_weights = false;
  const float* lse = nullptr;    // [backend] [rows, q_heads] given; null = computed
  const float* extra = nullptr;  // [backend] [rows, q_heads]: exp(extra) joins the denominator

  const std::uint8_t* row_class = nullptr;  // [backend] with key_class: two parts, same class and other class
  const std::uint8_t* key_class = nullptr;  // [backend] [columns]

  HeadGroups heads = HeadGroups::kv_head;
  bool take_max = false;           // max over rows (of w * entry, at least 0) instead of the sum
  float* out = nullptr;            // [backend] [parts][heads][columns], added to (max: joined)
  float* seen = nullptr;           // [backend] [kv_heads][columns] += weight of the rows that see it
  float* row_lse = nullptr;        // [backend] [rows, q_heads] written for the rows used; -inf: sees nothing
  float* row_peak = nullptr;       // [backend] [rows, q_heads] the largest p
  float peak_share = 0;            // with row_near_peak: entries with p >= peak_share * peak
  Index* row_near_peak = nullptr;  // [backend] [rows, q_heads]
  float* row_part_mass = nullptr;  // [backend] [parts][rows, q_heads] sum of p per part

  Logit logit = {};
  EntryOf entry = {};

  Index parts() const { return key_class != nullptr ? 2 : 1; }
  Index out_heads() const {
    return heads == HeadGroups::layer ? 1 : heads == HeadGroups::kv_head ? shape->kv_heads : shape->q_heads;
  }
};

KVPARE_HD inline double RowSummary::skewness() const {
  if (count < 3 || !(moment2 > 0)) return 0;
  const double n = static_cast<double>(count);
  const double deviation = std::sqrt(moment2 / (n - 1));
  return n / ((n - 1) * (n - 2)) * moment3 / (deviation * deviation * deviation);
}

}  // namespace kvpare
