// Methods by name and text settings: "air_cache(keep=0.1, alpha=0.9)", "snap_kv(keep=0.2) + kivi(bits=4)".
#pragma once

#include <istream>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "../core/compiled.hpp"
#include "../pipeline/recipes.hpp"
#include "../policy/precision/kv_tuner.hpp"
#include "../policy/precision/odd_forms.hpp"
#include "../policy/precision/recipes.hpp"
#include "any.hpp"

namespace kvpare {

using AnyScorer =
    AnyOf<Random, SinksAndRecent, AccumulatedAttention, LastRow, KeyNorm, KeyDiff, ObservationWindow, PostVision,
          DynamicShare, RecentMessage, FixedPoint, EliteWindow, CrossSelf, LagKv, ExpectedAttention,
          Transport, RecentMaximum, CrossModal>;
using AnyBudget = AnyOf<Uniform, Pyramid, StrengthSkewness, Density, Prefix, LayerRatios, AsCompressed>;
using AnyPrecision = AnyOf<AsAppended, InForm, Kivi, Mikv, ZipCache, KvTuner, Joint, Think, VidKv, QualityAdaptive,
                           Csr, KvQuant>;
using AnyCompressor = Compressor<AnyScorer, AnyBudget, TopK, AnyPrecision>;

/// A method that can be had by name.
struct Recipe {
  std::string_view name, summary, source;
  AnyCompressor compressor;
  bool has_settings = true;
};

KVPARE_COMPILED_INLINE std::span<const Recipe> known_recipes();

/// A precision that can be had by name.
struct PrecisionRecipe {
  std::string_view name, summary, source, base;  // base: the method that goes with it when none is named
  AnyPrecision precision;
};

KVPARE_COMPILED_INLINE std::span<const PrecisionRecipe> known_precisions();

/// One setting of a compressor, as text.
struct SettingText {
  std::string name, value, allowed, help;
};

/// The settings of a precision with their present values.
KVPARE_COMPILED_INLINE std::vector<SettingText> settings_of(const AnyPrecision& precision);

/// The settings of a compressor with their present values; `keep` first. One that several parts have, as PyramidKV's scorer
/// and budget have `window`, comes once: text sets it for all of them. Those of its precision are not among them.
KVPARE_COMPILED_INLINE std::vector<SettingText> settings_of(const AnyCompressor& compressor);

/// Parses `name` or `name(key=value, …)`, or two such joined by a plus sign: a method that evicts and a precision, in either
/// order ("air_cache(keep=0.1) + kivi(bits=2)"). Keys are those of `settings_of`, in any order, each at most once. A precision
/// alone goes with the method it was published with (`base`), whose settings it then takes as well: "mikv(keep=0.2)".
/// Without a text it is `pare`, ours.
/// Throws InvalidArgument on an unknown name or key, a value out of range, or text that is no such list; the message
/// says what was got and what is known.
KVPARE_COMPILED_INLINE AnyCompressor make_compressor(std::string_view words = "pare");

/// A method from a file: lines that begin with # are comments, the others are joined and taken as make_compressor does.
KVPARE_COMPILED_INLINE AnyCompressor read_compressor(std::istream& in);

namespace detail {

inline std::string_view trimmed(std::string_view s) {
  const auto first = s.find_first_not_of(" \t\r\n");
  if (first == std::string_view::npos) return {};
  return s.substr(first, s.find_last_not_of(" \t\r\n") - first + 1);
}

template <class Known>
auto find_named(const Known& known, std::string_view name) -> decltype(&known[0]) {
  for (const auto& recipe : known)
    if (recipe.name == name) return &recipe;
  return nullptr;
}

/// What stands between the plus signs outside of brackets.
inline std::vector<std::string_view> split_methods(std::string_view words) {
  std::vector<std::string_view> methods;
  std::size_t begin = 0;
  int depth = 0;
  for (std::size_t i = 0; i < words.size(); ++i) {
    depth += words[i] == '(' ? 1 : words[i] == ')' ? -1 : 0;
    if (words[i] != '+' || depth > 0) continue;
    methods.push_back(words.substr(begin, i - begin));
    begin = i + 1;
  }
  methods.push_back(words.substr(begin));
  return methods;
}

}  // namespace detail
}  // namespace kvpare

#if KVPARE_COMPILED_HERE
#include "make_compressor.inl"
#endif
