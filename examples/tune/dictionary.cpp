#include "dictionary.hpp"

#include <Eigen/Core>
#include <algorithm>
#include <kvpare/core/dtype.hpp>
#include <kvpare/core/error.hpp>
#include <kvpare/core/random.hpp>
#include <limits>
#include <numeric>

namespace tune {

namespace {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// Divides by its length; false where it has none.
bool normalise(Eigen::Ref<Eigen::RowVectorXf> x) {
  const float length = x.stableNorm();
  if (!(length > 0) || !(length < std::numeric_limits<float>::infinity())) return false;
  x /= length;
  return true;
}

class Learner {
 public:
  Learner(const std::vector<float>& vectors, Index width, const DictionaryRules& rules)
      : rules_(rules), x_(Eigen::Map<const Matrix>(vectors.data(), static_cast<Index>(vectors.size()) / width, width)),
        atoms_(Matrix::Zero(rules.atoms, width)) {
    std::vector<Index> order(static_cast<std::size_t>(x_.rows()));
    std::iota(order.begin(), order.end(), Index{0});
    for (std::size_t i = order.size(); i-- > 1;)
      std::swap(order[i], order[static_cast<std::size_t>(kvpare::random_bits(rules.seed, i) % (i + 1))]);
    Index made = 0;
    for (const Index v : order) {
      if (made == rules.atoms) break;
      atoms_.row(made) = x_.row(v);
      made += normalise(atoms_.row(made));
    }
  }

  Dictionary learn() {
    Dictionary best;
    double least = std::numeric_limits<double>::infinity();
    for (Index round = 0; round < rules_.rounds; ++round) {
      pursue(round < rules_.rounds / 3 ? 1 : rules_.nonzeros);
      update();
      start_again();
      round_to_halves();
      pursue(rules_.nonzeros);
      const double power = x_.cast<double>().squaredNorm(),
                   error = power > 0 ? rest_.cast<double>().squaredNorm() / power : 0;
      best.errors.push_back(error);
      if (error < least) least = error, best.atoms.assign(atoms_.data(), atoms_.data() + atoms_.size());
    }
    kvpare::require(!best.atoms.empty(), "dictionary: the vectors have numbers that are not finite");
    return best;
  }

 private:
  struct Use {
    Index vector;
    float coefficient;
  };

  /// Codes all vectors: `uses_` by atom, and what is left.
  void pursue(Index nonzeros) {
    constexpr Index block = 256;
    rest_ = x_;
    uses_.assign(static_cast<std::size_t>(rules_.atoms), {});
    Matrix products;
    for (Index first = 0; first < x_.rows(); first += block) {
      const Index n = std::min(block, x_.rows() - first);
      for (Index g = 0; g < nonzeros; ++g) {
        products.noalias() = rest_.middleRows(first, n) * atoms_.transpose();
        for (Index v = 0; v < n; ++v) {
          Index atom = 0;
          products.row(v).cwiseAbs().maxCoeff(&atom);
          const float c = products(v, atom);
          rest_.row(first + v) -= c * atoms_.row(atom);
          uses_[static_cast<std::size_t>(atom)].push_back({first + v, c});
        }
      }
    }
  }

  /// d = Σ c (rest + c d), to length 1, atom by atom; what is left follows.
  void update() {
    for (Index n = 0; n < rules_.atoms; ++n) {
      const auto& uses = uses_[static_cast<std::size_t>(n)];
      Eigen::RowVectorXf sum = Eigen::RowVectorXf::Zero(x_.cols());
      for (const Use& u : uses) sum += u.coefficient * (rest_.row(u.vector) + u.coefficient * atoms_.row(n));
      if (!normalise(sum)) continue;
      for (const Use& u : uses) rest_.row(u.vector) += u.coefficient * (atoms_.row(n) - sum);
      atoms_.row(n) = sum;
    }
  }

  void start_again() {
    std::vector<Index> again;
    constexpr Index block = 256;
    Matrix cosines;
    for (Index first = 0; first < rules_.atoms; first += block) {
      const Index n = std::min(block, rules_.atoms - first);
      cosines.noalias() = atoms_.middleRows(first, n) * atoms_.topRows(first + n).transpose();
      for (Index i = 0; i < n; ++i) {
        const bool twin = first + i > 0 && cosines.row(i).head(first + i).cwiseAbs().maxCoeff() > 0.99f;
        if (twin || uses_[static_cast<std::size_t>(first + i)].empty()) again.push_back(first + i);
      }
    }
    if (again.empty()) return;
    const Eigen::VectorXf left = rest_.rowwise().squaredNorm();
    std::vector<Index> worst(static_cast<std::size_t>(x_.rows()));
    std::iota(worst.begin(), worst.end(), Index{0});
    std::stable_sort(worst.begin(), worst.end(), [&](Index a, Index b) { return left(a) > left(b); });
    std::size_t at = 0;
    for (const Index n : again)
      while (at < worst.size()) {
        Eigen::RowVectorXf fresh = x_.row(worst[at++]);
        if (!normalise(fresh)) continue;
        atoms_.row(n) = fresh;
        break;
      }
  }

  void round_to_halves() {
    for (Index i = 0; i < atoms_.size(); ++i) atoms_.data()[i] = static_cast<float>(kvpare::half(atoms_.data()[i]));
  }

  DictionaryRules rules_;
  Matrix x_, atoms_, rest_;
  std::vector<std::vector<Use>> uses_;
};

}  // namespace

Dictionary learn_dictionary(const std::vector<float>& vectors, Index width, const DictionaryRules& rules) {
  kvpare::require(width >= 1 && !vectors.empty() && static_cast<Index>(vectors.size()) % width == 0,
                  "dictionary: ", vectors.size(), " numbers, must be vectors of ", width, " channels, at least one");
  kvpare::require(rules.atoms >= 1 && rules.atoms <= 65536 && rules.nonzeros >= 1 && rules.rounds >= 1,
                  "dictionary: atoms = ", rules.atoms, ", nonzeros = ", rules.nonzeros, ", rounds = ", rules.rounds,
                  ", must be positive, atoms at most 65536");
  return Learner(vectors, width, rules).learn();
}

}  // namespace tune
