// Every method of the library has its place and its colour in pictures.
#include "support/line_styles.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <kvpare/runtime/make_compressor.hpp>

namespace {

using namespace example;

TEST(LineStylesTest, EveryMethodHasAFamilyAndAColourOfItsOwnThere) {
  std::vector<std::string> policies;
  for (const kvpare::Recipe& recipe : kvpare::known_recipes())
    if (recipe.name != "full") policies.emplace_back(recipe.name);
  const std::vector<LineStyle> styles = line_styles(policies);
  for (std::size_t i = 0; i < policies.size(); ++i) {
    EXPECT_NE(family_of(policies[i]), Family::other) << policies[i];
    for (std::size_t j = 0; j < i; ++j) {
      if (family_of(policies[i]) != family_of(policies[j])) continue;
      const Rgb a = styles[i].colour, b = styles[j].colour;
      EXPECT_GT(std::hypot(a.r - b.r, a.g - b.g, a.b - b.b), 50) << policies[i] << ", " << policies[j];
    }
  }
}

TEST(LineStylesTest, VariantsOfARecipeShareItsFamilyAndDifferInLook) {
  EXPECT_EQ(family_of("air_cache(alpha=0.2)"), family_of("air_cache"));
  EXPECT_EQ(family_of("air_cache + kivi(bits=4)"), Family::pictures);
  EXPECT_EQ(family_of("no_such"), Family::other);
  const auto styles = line_styles({"h2o", "h2o(recent_share=0)"});
  EXPECT_NE(look(styles[0], false), look(styles[1], false));
  EXPECT_NE(look_of_point(styles[0]), look_of_point(styles[1]));
}

}  // namespace
