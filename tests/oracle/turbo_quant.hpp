// TurboQuant: rotate a row, divide by its norm, code each coordinate by one codebook; and PolarQuant's pairs beside it.
#pragma once

#include <numbers>

#include "quantisers.hpp"
#include "select_top.hpp"

namespace kvpare::oracle {

// ---- rotations ----------------------------------------------------------------------------------------------------

inline double dot(const std::vector<double>& x, const std::vector<double>& y) {
  require(x.size() == y.size(), "oracle: rows of one width");
  double sum = 0;
  for (Index i = 0; i < count_of(x); ++i) sum += item(x, i) * item(y, i);
  return sum;
}
inline double norm(const std::vector<double>& x) { return std::sqrt(dot(x, x)); }

/// Block-diagonal Walsh-Hadamard in natural (Sylvester) order, each block divided by the root of its size: entry (i, j)
/// of a block is the parity of the bits that i and j share, as a sign. `signs`, where given, multiply x first: H
/// diag(signs).
/// Uncertain  which blocks where the width is no power of two (96 as 64 + 32 or as 3 · 32): said by the caller
inline Array2 hadamard(const std::vector<Index>& blocks, const std::vector<double>& signs = {}) {
  Index width = 0;
  for (const Index n : blocks) {
    require(n > 0 && (n & (n - 1)) == 0, "oracle: blocks are powers of two");
    width += n;
  }
  require(signs.empty() || count_of(signs) == width, "oracle: a sign per channel");
  Array2 h(width, width);
  Index first = 0;
  for (const Index n : blocks) {
    for (Index i = 0; i < n; ++i)
      for (Index j = 0; j < n; ++j) {
        Index shared = i & j, parity = 0;
        for (; shared > 0; shared /= 2) parity ^= shared & 1;
        const double sign = signs.empty() ? 1 : item(signs, first + j);
        h.at(first + i, first + j) = (parity ? -1 : 1) * sign / std::sqrt(static_cast<double>(n));
      }
    first += n;
  }
  return h;
}

/// The largest power of two that divides the width, as often as it goes: 128 -> 128, 96 -> 32 32 32, 80 -> 16 · 5.
inline std::vector<Index> equal_blocks(Index width) {
  const Index n = width & -width;
  return std::vector<Index>(static_cast<std::size_t>(width / n), n);
}

/// The Q factor of a square matrix, by Gram-Schmidt on its rows, twice for the sake of orthogonality.
inline Array2 orthogonalised(Array2 matrix) {
  for (Index i = 0; i < matrix.rows; ++i) {
    std::vector<double> row = matrix.row(i);
    for (int pass = 0; pass < 2; ++pass)
      for (Index k = 0; k < i; ++k) {
        const std::vector<double> before = matrix.row(k);
        const double along = dot(row, before);
        for (Index j = 0; j < matrix.columns; ++j) item(row, j) -= along * item(before, j);
      }
    const double length = norm(row);
    require(length > 1e-9, "oracle: rows that depend on each other");
    for (Index j = 0; j < matrix.columns; ++j) matrix.at(i, j) = item(row, j) / length;
  }
  return matrix;
}

// ---- codebooks ----------------------------------------------------------------------------------------------------

struct Codebook {
  std::vector<double> centroids;  // ascending
  double mse = 0;                 // mean squared error of a coordinate
};

/// Lloyd-Max for a symmetric density on [-limit, limit]: thresholds are midpoints, centroids are means between
/// thresholds, again and again; integrals by the midpoint rule on `cells` cells.
inline Codebook lloyd_max(const std::function<double(double)>& density, double limit, int bits, Index cells = 200000) {
  const Index levels = Index{1} << bits;
  // Running integrals of f, x f and x² f at the cells' edges.
  std::vector<double> mass{0}, moment{0}, square{0};
  const double width = 2 * limit / static_cast<double>(cells);
  for (Index i = 0; i < cells; ++i) {
    const double x = -limit + (static_cast<double>(i) + 0.5) * width, f = density(x) * width;
    mass.push_back(mass.back() + f);
    moment.push_back(moment.back() + x * f);
    square.push_back(square.back() + x * x * f);
  }
  const auto at = [&](const std::vector<double>& integral, double x) {  // between edges: a straight line
    const double cell = std::clamp((x + limit) / width, 0.0, static_cast<double>(cells));
    const Index i = std::min(static_cast<Index>(cell), cells - 1);
    return item(integral, i) + (cell - static_cast<double>(i)) * (item(integral, i + 1) - item(integral, i));
  };
  Codebook book;
  const double deviation = std::sqrt(square.back() / mass.back());
  for (Index k = 0; k < levels; ++k)
    book.centroids.push_back(deviation * 4 * ((static_cast<double>(k) + 0.5) / static_cast<double>(levels) - 0.5));
  for (int round = 0; round < 5000; ++round) {
    double moved = 0;
    book.mse = 0;
    std::vector<double> edges{-limit};
    for (Index k = 1; k < levels; ++k) edges.push_back((item(book.centroids, k - 1) + item(book.centroids, k)) / 2);
    edges.push_back(limit);
    for (Index k = 0; k < levels; ++k) {
      const auto between = [&](const std::vector<double>& integral) {
        return at(integral, item(edges, k + 1)) - at(integral, item(edges, k));
      };
      const double m0 = between(mass), m1 = between(moment), centroid = m1 / m0;
      book.mse += between(square) - m1 * centroid;
      moved = std::max(moved, std::abs(centroid - item(book.centroids, k)));
      item(book.centroids, k) = centroid;
    }
    if (moved < 1e-12 * deviation) break;
  }
  book.mse /= mass.back();
  return book;
}

inline double normal_density(double x) {
  return std::exp(-x * x / 2) / std::sqrt(2 * std::numbers::pi);
}
/// f(x) = Γ(d/2) / (√π Γ((d-1)/2)) · (1 - x²)^((d-3)/2): a coordinate of a random unit vector of d dimensions.
inline double coordinate_density(double x, Index d) {
  const auto half = static_cast<double>(d) / 2;
  const double log_factor = std::lgamma(half) - std::lgamma(half - 0.5) - std::log(std::numbers::pi) / 2;
  return std::exp(log_factor) * std::pow(1 - x * x, half - 1.5);
}

/// What engines ship, for deviation 1; divide by √d.
inline std::vector<double> printed_codebook(int bits) {
  static const std::vector<std::vector<double>> positive{
      {0.7978846},
      {0.4527800, 1.5104176},
      {0.2450942, 0.7560053, 1.3439093, 2.1519457},
      {0.1283950, 0.3880483, 0.6567591, 0.9423405, 1.2562312, 1.6180464, 2.0690172, 2.7325896}};
  const std::vector<double>& half = item(positive, bits - 1);
  std::vector<double> all;
  for (Index i = count_of(half) - 1; i >= 0; --i) all.push_back(-item(half, i));
  all.insert(all.end(), half.begin(), half.end());
  return all;
}

// ---- a row --------------------------------------------------------------------------------------------------------

struct TurboSettings {
  Array2 rotation;                // Π, orthogonal [width, width]
  std::vector<double> codebook;   // ascending, already divided by √width
  Stored norms = Stored::f16;
  bool norm_corrected = false;    // the decoded unit vector is made one: "nc"
  Array2 sketch;                  // S [width, width], or nothing: the stage of residual signs
};

struct TurboRow {
  double norm = 0;
  std::vector<int> indices;
  std::vector<int> signs;       // of S r, +1 or -1; sign(0) = +1
  double residual_norm = 0;     // γ = ‖x / n - x̃‖, of the unit vector
  std::vector<double> from_tie;  // distance of a rotated coordinate to the nearest threshold
};

/// n = ‖x‖, y = Π x / n, idx_j = argmin_k |y_j - c_k|; with a sketch, z = sign(S r) and γ = ‖r‖ of r = x / n - Πᵀ
/// c_idx.
/// Ties       to the lower index, as the first of the smallest is
/// Zeros      n = 0: y = 0; the row decodes to zeros whatever its codes
/// Uncertain  how the norms are stored (half precision here); whether y is formed with the stored norm: no, with the
///            exact
/// Source     TurboQuant, arXiv 2504.19874
inline TurboRow turbo_encoded(const std::vector<double>& x, const TurboSettings& how) {
  TurboRow row;
  const double n = norm(x);
  row.norm = stored(n, how.norms);
  std::vector<double> unit = x;
  for (double& v : unit) v = n == 0 ? 0 : v / n;
  const std::vector<double> y = times(how.rotation, unit);
  std::vector<double> chosen;
  for (const double v : y) {
    Index best = 0;
    double least = infinity, tie = infinity;
    for (Index k = 0; k < count_of(how.codebook); ++k) {
      const double distance = std::abs(v - item(how.codebook, k));
      if (distance < least) best = k, least = distance;
      if (k > 0) tie = std::min(tie, std::abs(v - (item(how.codebook, k - 1) + item(how.codebook, k)) / 2));
    }
    row.indices.push_back(static_cast<int>(best));
    row.from_tie.push_back(tie);
    chosen.push_back(item(how.codebook, best));
  }
  if (how.sketch.rows > 0) {
    std::vector<double> residual = times(transposed(how.rotation), chosen);
    for (Index j = 0; j < count_of(residual); ++j) item(residual, j) = item(unit, j) - item(residual, j);
    row.residual_norm = stored(norm(residual), how.norms);
    for (const double v : times(how.sketch, residual)) row.signs.push_back(v < 0 ? -1 : 1);
  }
  return row;
}

/// x' = n (Πᵀ c_idx [/ ‖c_idx‖] + (√(π/2) / d) γ Sᵀ z)
inline std::vector<double> turbo_decoded(const TurboRow& row, const TurboSettings& how) {
  std::vector<double> chosen;
  for (const int i : row.indices) chosen.push_back(item(how.codebook, i));
  if (how.norm_corrected) {
    const double length = norm(chosen);
    for (double& v : chosen) v /= length;
  }
  std::vector<double> x = times(transposed(how.rotation), chosen);
  if (!row.signs.empty()) {
    const std::vector<double> z(row.signs.begin(), row.signs.end());
    const std::vector<double> guess = times(transposed(how.sketch), z);
    const double factor = std::sqrt(std::numbers::pi / 2) / static_cast<double>(count_of(x)) * row.residual_norm;
    for (Index j = 0; j < count_of(x); ++j) item(x, j) += factor * item(guess, j);
  }
  for (double& v : x) v *= row.norm;
  return x;
}

/// q · x' without decoding: n (Σ (Π q)_j c_idx_j [/ ‖c_idx‖] + (√(π/2) / d) γ Σ (S q)_i z_i).
inline double turbo_score(const std::vector<double>& q, const TurboRow& row, const TurboSettings& how) {
  const std::vector<double> rotated = times(how.rotation, q);
  std::vector<double> chosen;
  for (const int i : row.indices) chosen.push_back(item(how.codebook, i));
  double score = dot(rotated, chosen) / (how.norm_corrected ? norm(chosen) : 1);
  if (!row.signs.empty()) {
    const std::vector<double> z(row.signs.begin(), row.signs.end());
    score += std::sqrt(std::numbers::pi / 2) / static_cast<double>(count_of(q)) * row.residual_norm *
             dot(times(how.sketch, q), z);
  }
  return row.norm * score;
}

/// Values as vLLM keeps them beside such keys: affine over the whole row, halves up, scale and minimum in half
/// precision.
inline Coded turbo_value(const std::vector<double>& x, int bits) {
  return affine(x, {.bits = bits, .rounding = Rounding::half_up});
}

/// Bytes of `count` codes, packed without gaps.
inline Index code_bytes(int bits, Index count) { return (bits * count + 7) / 8; }

/// The `count` channels of largest root mean square over the prompt's rows, ascending; ties to the lower channel. They
/// make one instance, the others a second, each with its own rotation and codebook.
/// Uncertain  how the paper chooses them
inline std::vector<Index> outlier_channels(const Array2& rows, Index count) {
  std::vector<double> squares(static_cast<std::size_t>(rows.columns), 0.0);
  for (Index t = 0; t < rows.rows; ++t)
    for (Index c = 0; c < rows.columns; ++c) item(squares, c) += rows.at(t, c) * rows.at(t, c);
  return select_top(squares, count);
}

// ---- PolarQuant (arXiv 2502.00527) --------------------------------------------------------------------------------

/// One pair of channels over the tokens of a group: φ = atan2 mod 2π and ρ, each floor-coded between its least and
/// largest, decoded at the middle of a step; byte = ρ code · 2^t + φ code.
struct PolarPair {
  double angle_least = 0, angle_step = 0, radius_least = 0, radius_step = 0;
  std::vector<int> angles, radii;
  int angle_bits = 0;

  int byte(Index i) const { return (item(radii, i) << angle_bits) + item(angles, i); }
  double first(Index i) const { return radius(i) * std::cos(angle(i)); }
  double second(Index i) const { return radius(i) * std::sin(angle(i)); }
  double angle(Index i) const { return angle_least + (item(angles, i) + 0.5) * angle_step; }
  double radius(Index i) const { return radius_least + (item(radii, i) + 0.5) * radius_step; }
};
inline PolarPair polar_pair(const std::vector<double>& first, const std::vector<double>& second, int radius_bits,
                            int angle_bits) {
  std::vector<double> phi, rho;
  for (Index i = 0; i < count_of(first); ++i) {
    const double angle = std::atan2(item(second, i), item(first, i));
    phi.push_back(angle < 0 ? angle + 2 * std::numbers::pi : angle);
    rho.push_back(std::hypot(item(first, i), item(second, i)));
  }
  PolarPair pair;
  pair.angle_bits = angle_bits;
  const auto code = [](const std::vector<double>& x, int bits, double& least, double& step) {
    const double last = std::ldexp(1.0, bits) - 1;
    least = *std::min_element(x.begin(), x.end());
    step = (*std::max_element(x.begin(), x.end()) - least) / (last + 1);
    std::vector<int> codes;
    for (const double v : x)
      codes.push_back(step == 0 ? 0 : static_cast<int>(std::min(last, std::floor((v - least) / step))));
    return codes;
  };
  pair.angles = code(phi, angle_bits, pair.angle_least, pair.angle_step);
  pair.radii = code(rho, radius_bits, pair.radius_least, pair.radius_step);
  return pair;
}

}  // namespace kvpare::oracle
