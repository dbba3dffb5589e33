// KVTuner's offline search: sensitivities, what is worth considering in a layer, layers that may share a choice, and the front of
// error against bits.
#pragma once

#include <iosfwd>
#include <kvpare/policy/precision/kv_tuner.hpp>
#include <vector>

#include "trial.hpp"

namespace tune {

/// A pair of widths and what it does to one layer.
struct Choice {
  kvpare::LayerBits::Pair bits;
  double e_o = 0, e_a = 0;  // mean over the heads
  double mean_bits() const { return static_cast<double>(bits.keys + bits.values) / 2; }
  friend bool operator==(const Choice&, const Choice&) = default;
};

/// Per layer, every pair of the widths, fewest bits first.
std::vector<std::vector<Choice>> sensitivities(const std::vector<std::vector<HeadData>>& layers, kvpare::TunedMode mode,
                                               const std::vector<Index>& widths, Index group, Index page_tokens);

/// The pairs that no other beats in both bits and e_o, fewest bits first; of equals the one with more bits for keys.
std::vector<Choice> pareto(std::vector<Choice> choices);

/// Layers that choose together: first by the pairs that are left of them, then single linkage by e_o of these pairs, joined while
/// max |x - y| / max(x, y) <= `distance`. Groups and their layers ascend.
std::vector<std::vector<Index>> group_layers(const std::vector<std::vector<Choice>>& surviving, double distance);

/// One point of the front.
struct Found {
  kvpare::LayerBits bits;
  double mean_bits = 0, error = 0;  // error: sum over the layers of e_o
};

/// All configurations that no other beats in both mean bits and error, fewest bits first: exact, by dynamic programming over the
/// groups (the paper samples, since its objective is accuracy and each trial a run of the model).
std::vector<Found> front(const std::vector<std::vector<Choice>>& surviving, const std::vector<std::vector<Index>>& groups);

/// The point of least error with at most so many bits. Throws InvalidArgument where there is none.
const Found& choose(const std::vector<Found>& front, double most_bits);

/// A file that kvpare::read_compressor takes: the choice as a policy text, the front as comments.
void write_result(std::ostream& out, const Found& chosen, const std::vector<Found>& front, kvpare::TunedMode mode,
                  const std::vector<std::vector<Index>>& groups);

}  // namespace tune
