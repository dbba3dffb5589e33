// CSR: matching pursuit over a dictionary, and attention over the codes as its algebra has it.
#pragma once

#include <cmath>

#include "dense.hpp"

namespace kvpare::oracle {

/// One choice of the pursuit.
struct CsrPair {
  Index atom = 0;
  double coefficient = 0;
};

/// R <- x; s times: n = argmax |<R, d_n>|, the lowest where several are the largest; c = <R, d_n>; R <- R - c d_n.
/// `rounded` is what becomes of a coefficient when it is stored, before it is taken off the rest.
/// Uncertain  the printed formula shows no magnitude in the argmax; whether the rest sees stored coefficients is not said
template <class Rounded>
std::vector<CsrPair> csr_encode(const Array2& atoms, std::vector<double> x, Index s, Rounded rounded) {
  std::vector<CsrPair> pairs;
  for (Index g = 0; g < s; ++g) {
    CsrPair best{-1, 0};
    for (Index n = 0; n < atoms.rows; ++n) {
      double product = 0;
      for (Index i = 0; i < atoms.columns; ++i) product += x[static_cast<std::size_t>(i)] * atoms.at(n, i);
      if (best.atom < 0 || std::abs(product) > std::abs(best.coefficient)) best = {n, product};
    }
    best.coefficient = rounded(best.coefficient);
    for (Index i = 0; i < atoms.columns; ++i)
      x[static_cast<std::size_t>(i)] -= best.coefficient * atoms.at(best.atom, i);
    pairs.push_back(best);
  }
  return pairs;
}

/// x^ = sum over g of c_g d_{n_g}
inline std::vector<double> csr_decode(const Array2& atoms, const std::vector<CsrPair>& pairs) {
  std::vector<double> x(static_cast<std::size_t>(atoms.columns));
  for (const CsrPair& p : pairs)
    for (Index i = 0; i < atoms.columns; ++i) x[static_cast<std::size_t>(i)] += p.coefficient * atoms.at(p.atom, i);
  return x;
}

/// 32 bits per pair.
inline double csr_bits(Index s, Index chunks, Index head_dim) {
  return 32.0 * static_cast<double>(s) * static_cast<double>(chunks) / static_cast<double>(head_dim);
}

}  // namespace kvpare::oracle
