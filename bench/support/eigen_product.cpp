// The yardstick of products: Eigen, compiled for this very machine.
//
// The rest of the program is compiled for any machine of the family, and instantiates the same templates of Eigen.
// Under a name of its own this copy is never mixed up with the other by the linker.
#define Eigen EigenForThisMachine
#include <Eigen/Core>
#undef Eigen

#include <vector>

#include "timing.hpp"
#include "yardstick.hpp"

namespace bench {

double product_rate(const ProductShape& p, Index threads) {
  using Matrix = EigenForThisMachine::Matrix<float, EigenForThisMachine::Dynamic, EigenForThisMachine::Dynamic,
                                             EigenForThisMachine::RowMajor>;
  struct Operands {
    Matrix a, b, c;
  };
  std::vector<Operands> operands;
  for (Index thread = 0; thread < threads; ++thread)
    operands.push_back({Matrix::Ones(p.m, p.k), p.b_transposed ? Matrix::Ones(p.n, p.k) : Matrix::Ones(p.k, p.n),
                        Matrix::Zero(p.m, p.n)});
  const double flops = 2.0 * static_cast<double>(p.m) * static_cast<double>(p.n) * static_cast<double>(p.k);
  constexpr double enough = 3e9;
  const Index pieces = std::max<Index>(5, static_cast<Index>(enough / flops));
  return rate_of(threads, pieces, flops, [&](Index thread, Index) {
    Operands& o = operands[static_cast<std::size_t>(thread)];
    if (p.b_transposed)
      o.c.noalias() = o.a * o.b.transpose();
    else
      o.c.noalias() = o.a * o.b;
  });
}

}  // namespace bench
