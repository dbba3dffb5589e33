// Dictionaries for sparse codes, learnt from the keys and values of recorded prompts.
#pragma once

#include <string>
#include <vector>

#include "support/trace.hpp"

namespace tune {

using kvpare::Index;

struct DictionaryRules {
  Index atoms = 8192, nonzeros = 4;  // of a dictionary; of a vector
  Index rounds = 12;
  std::uint64_t seed = 1;
  friend bool operator==(const DictionaryRules&, const DictionaryRules&) = default;
};

struct Dictionary {
  std::vector<float> atoms;    // [atoms, width], each of length 1, exact as halves
  std::vector<double> errors;  // after each round: power of what is left of the vectors over their power
};

/// Learns atoms for vectors [n, width] by turns: matching pursuit of all vectors, then each atom becomes the direction that suits
/// those that use it best, their coefficients being what they are. The first third of the rounds gives a vector one atom only:
/// that is k-means among lines through 0, which finds the clusters to start from.
///
/// An atom that nothing uses, or that is another one but for its sign (|cosine| above 0.99), starts again as the vector that is
/// coded worst. The best round counts.
/// Deviation  CSR descends the gradient of the error plus β ‖I - WᵀW‖² / N², which keeps atoms apart; here atoms solve for
///            themselves, and those too close start again
Dictionary learn_dictionary(const std::vector<float>& vectors, Index width, const DictionaryRules& rules);

/// Keys and values of all heads of a layer, as codecs see them: chunk by chunk. `before_rope`: keys turned back by the trace's
/// rope.
std::vector<float> key_vectors(const example::Trace& trace, Index layer, bool before_rope);
std::vector<float> value_vectors(const example::Trace& trace, Index layer);

/// A safetensors file with `layers.{l}.keys` and `layers.{l}.values`, halves [atoms, width]; layers that share a dictionary name
/// it each.
struct LayerDictionaries {
  Dictionary keys, values;
  Index key_width = 0, value_width = 0;
};
void write_dictionaries(const std::string& path, const std::vector<LayerDictionaries>& layers);

/// One of them as KvCache::share_state takes it: two halves to a float.
std::vector<float> read_dictionary(const example::Safetensors& file, Index layer, const std::string& side);

}  // namespace tune
