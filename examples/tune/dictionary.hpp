// Dictionaries for sparse codes, learnt from the keys and values of recorded prompts.
#pragma once

#include <kvpare/core/shape.hpp>
#include <vector>

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

}  // namespace tune
