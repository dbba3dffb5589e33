// What coded keys and values do to attention: one kv head with its query heads, exact and coded side by side.
#pragma once

#include <kvpare/kvpare.hpp>
#include <optional>
#include <string>
#include <vector>

#include "codecs.hpp"
#include "support/trace.hpp"

namespace tune {

/// One kv head of one layer.
struct HeadData {
  Index tokens = 0, key_dim = 0, value_dim = 0, group = 1;
  float scale = 1;
  std::vector<float> keys, values;           // [tokens, width]
  std::vector<float> queries;                // [rows, group, key_dim]
  std::vector<Index> sees;                   // per row: how many tokens, from the first on
  std::vector<kvpare::Position> positions;   // [tokens]
  std::optional<kvpare::Rope> rope;          // how keys were turned, where that is known
  std::vector<float> query_peak;             // [key_dim]
  std::vector<float> query_squares;          // [key_dim] sums of q^2 over the newest rows, of so many vectors:
  Index query_vectors = 0;

  Index rows() const { return static_cast<Index>(sees.size()); }
  kvpare::RoundTripFacts facts(kvpare::Side side) const;
};

/// Differences of attention with coded keys and values from exact attention, over all rows and query heads.
struct Difference {
  double key_snr = 0, value_snr = 0;  // see snr
  double relative = 0;                // ||o - o'|| / ||o||, over all outputs
  double cosine = 0;                  // mean over outputs
  double largest = 0;                 // largest |o - o'| over the root mean square of o
  double e_a = 0, e_o = 0;            // KVTuner: mean |a - a'|; mean of |o - o'| / |o|, where o is not 0
};

/// dB: power of the numbers over power of their error; infinite where nothing changed.
double snr(const std::vector<float>& exact, const std::vector<float>& coded);

/// Exact attention of a head, to compare with again and again.
class Trial {
 public:
  explicit Trial(HeadData data);
  const HeadData& data() const { return data_; }

  /// `keys`, `values`: as decoded, in the shape of the data.
  Difference compare(const std::vector<float>& keys, const std::vector<float>& values) const;

 private:
  struct Attention {
    std::vector<float> shares;   // [rows, group, tokens]
    std::vector<float> outputs;  // [rows, group, value_dim]
  };
  Attention attend(const std::vector<float>& keys, const std::vector<float>& values) const;

  HeadData data_;
  Attention exact_;
};

/// Independent normal numbers; `outliers` key channels are 20 times as large, as some of Qwen's are.
HeadData normal_data(Index tokens, Index width, Index group, Index rows, Index outliers, std::uint64_t seed);

/// The heads of a layer of a trace, layer by layer; the last `rows` rows ask.
std::vector<std::vector<HeadData>> trace_data(const example::Trace& trace, Index rows);

}  // namespace tune
