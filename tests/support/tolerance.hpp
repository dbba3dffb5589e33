// How far a result may be from the oracle's, by kind of operation and by the type in which it is written.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <kvpare/core/dtype.hpp>
#include <limits>

namespace kvpare::test {

/// Inputs are exact on both sides: oracles read the very numbers that were rounded to the element type. What differs is
/// the arithmetic, always in float, and the rounding of what is written.
///
/// | operation      | tolerance for float                   | reason                                                         |
/// |----------------|---------------------------------------|----------------------------------------------------------------|
/// | logit          | 2e-5 absolute                         | 256 products of size 1, float sums: 256 * 2^-24, doubled for exp2 units |
/// | probability    | 4e-5 relative, 1e-7 absolute          | e^(error of a logit), twice: in the numerator and in the sum   |
/// | attended       | 4e-5 absolute per unit of |value|     | a mean of values with these probabilities                      |
/// | mass           | 1e-4 relative, 2e-6 absolute          | probabilities summed over some hundred rows in float           |
/// | product        | 1e-5 absolute                         | some hundred products of size 1 in float                       |
/// | exact          | 0                                     | copies and conversions                                         |
///
/// Written as half or bfloat16, half a unit in the last place is added: 2^-11 or 2^-8, relative.
enum class Operation { logit, probability, attended, mass, product, exact };

struct Tolerance {
  double absolute = 0, relative = 0;
  double of(double wanted) const { return absolute + relative * std::abs(wanted); }
};

inline Tolerance tolerance(Operation operation, DType written = DType::f32) {
  Tolerance t;
  switch (operation) {
    case Operation::logit: t = {2e-5, 1e-6}; break;
    case Operation::probability: t = {1e-7, 4e-5}; break;
    case Operation::attended: t = {4e-5, 4e-5}; break;
    case Operation::mass: t = {2e-6, 1e-4}; break;
    case Operation::product: t = {1e-5, 1e-6}; break;
    case Operation::exact: break;
  }
  if (written == DType::f16) t.relative += 0x1p-11, t.absolute += 0x1p-25;
  if (written == DType::bf16) t.relative += 0x1p-8;
  return t;
}

/// NaN agrees with NaN, an infinity with itself, a number with what is near.
inline ::testing::AssertionResult close(double got, double wanted, Tolerance t) {
  if (std::isnan(got) && std::isnan(wanted)) return ::testing::AssertionSuccess();
  if (got == wanted) return ::testing::AssertionSuccess();
  if (std::isfinite(wanted) && std::abs(got - wanted) <= t.of(wanted)) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "got " << got << ", wanted " << wanted << ", off by " << std::abs(got - wanted)
                                       << ", allowed " << t.of(wanted);
}

}  // namespace kvpare::test
