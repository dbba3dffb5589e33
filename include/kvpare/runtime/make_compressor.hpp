// Methods by name and text settings: "air_cache(keep=0.1, alpha=0.9)".
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <concepts>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "../pipeline/recipes.hpp"
#include "any.hpp"

namespace kvpare {

using AnyScorer =
    AnyOf<Random, SinksAndRecent, AccumulatedAttention, LastRow, KeyNorm, KeyDiff, ObservationWindow, EliteWindow>;
using AnyBudget = AnyOf<Uniform, Pyramid, StrengthSkewness>;
using AnyCompressor = Compressor<AnyScorer, AnyBudget, TopK>;

/// A method that can be had by name.
struct Recipe {
  std::string_view name, summary, source;
  AnyCompressor compressor;
  bool has_settings = true;
};

inline std::span<const Recipe> known_recipes() {
  const auto any = [](const auto& c) { return AnyCompressor{c.scorer, c.budget, c.selector, c.keep}; };
  static const std::array recipes{
      Recipe{"full", "keeps everything", "", any(full()), false},
      Recipe{"random", "a seeded coin per token", "", any(random_choice())},
      Recipe{"streaming_llm", "the first tokens and the newest", "StreamingLLM, arXiv 2309.17453",
             any(streaming_llm())},
      Recipe{"h2o", "the most attended so far, and the newest", "H2O, arXiv 2306.14048", any(h2o())},
      Recipe{"tova", "what the newest row attends to", "TOVA, arXiv 2401.06104", any(tova())},
      Recipe{"key_norm", "short keys", "Devoto et al., arXiv 2406.11430", any(key_norm())},
      Recipe{"key_diff", "keys unlike the others", "KeyDiff, arXiv 2504.15364", any(key_diff())},
      Recipe{"snap_kv", "the most attended by the last rows of the prompt", "SnapKV, arXiv 2404.14469", any(snap_kv())},
      Recipe{"pyramid_kv", "as snap_kv, less from layer to layer", "PyramidKV, arXiv 2406.02069", any(pyramid_kv())},
      Recipe{"ada_kv", "as snap_kv, with a budget that the heads of a layer share", "Ada-KV, arXiv 2407.11550",
             any(ada_kv())},
      Recipe{"air_cache", "visual tokens that elite text rows attend to, budgets by strength and skewness",
             "AirCache, arXiv 2503.23956", any(air_cache())},
  };
  return recipes;
}

/// One setting of a compressor, as text.
struct SettingText {
  std::string name, value, allowed, help;
};

namespace detail {

template <class E>
concept Enumerated = std::is_enum_v<E> && requires {
  choices(static_cast<E*>(nullptr));
};

inline std::string_view next_word(std::string_view& list, char separator) {
  const auto at = list.find(separator);
  const std::string_view word = list.substr(0, at);
  list.remove_prefix(at == std::string_view::npos ? list.size() : at + 1);
  return word;
}

template <Enumerated E>
bool parse_setting(std::string_view word, E& out) {
  std::string_view list = choices(static_cast<E*>(nullptr));
  for (int i = 0; !list.empty(); ++i)
    if (next_word(list, '|') == word) {
      out = static_cast<E>(i);
      return true;
    }
  return false;
}

template <Enumerated E>
std::string print_setting(E value) {
  std::string_view list = choices(static_cast<E*>(nullptr));
  std::string_view word;
  for (int i = 0; i <= static_cast<int>(value); ++i) word = next_word(list, '|');
  return std::string(word);
}

template <class N>
  requires std::is_arithmetic_v<N>
bool parse_setting(std::string_view word, N& out) {
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), out);
  return error == std::errc{} && end == word.data() + word.size();
}

template <std::integral N>
std::string print_setting(N value) {
  return message(value);
}

template <class E>
std::string allowed_values(const E&) {
  if constexpr (Enumerated<E>)
    return std::string(choices(static_cast<E*>(nullptr)));
  else
    return "all, visual, text, image, video, audio, system, joined by +";
}

inline constexpr std::string_view keep_allowed = "a ratio (0.1, 10%), tokens (512t), pages (32p) or bytes (8MiB)";

/// Calls `f(policy part)` for each part whose fields make up the settings of a compressor.
template <class C, class F>
void for_each_part(C& compressor, F&& f) {
  std::visit(f, compressor.scorer.held);
  std::visit(f, compressor.budget.held);
  f(compressor.selector);
}

template <class P>
bool set_field(P& part, std::string_view recipe, std::string_view key, std::string_view value) {
  bool known = false;
  for_each_field<P>([&](const auto& field) {
    if (known || field.name != key) return;
    known = true;
    using Value = typename std::remove_cvref_t<decltype(field)>::Value;
    Value parsed{};
    using kvpare::parse_setting;
    using detail::parse_setting;
    if constexpr (std::is_arithmetic_v<Value>) {
      require(parse_setting(value, parsed), recipe, ": ", key, " = '", value, "', must be a number within [", field.low,
              ", ", field.high, "]");
      require(parsed >= field.low && parsed <= field.high, recipe, ": ", key, " = ", value, ", must be within [",
              field.low, ", ", field.high, "]");
    } else {
      require(parse_setting(value, parsed), recipe, ": ", key, " = '", value,
              "', must be one of: ", allowed_values(parsed));
    }
    part.*field.member = parsed;
  });
  return known;
}

/// Settings that the budget has in common with the scorer, as PyramidKV's window, become the scorer's.
inline void agree(AnyCompressor& compressor, std::string_view recipe) {
  std::visit(
      [&](const auto& scorer) {
        using S = std::remove_cvref_t<decltype(scorer)>;
        for_each_field<S>([&](const auto& field) {
          using kvpare::print_setting;
          using detail::print_setting;
          const std::string value = print_setting(scorer.*field.member);
          std::visit([&](auto& budget) { set_field(budget, recipe, field.name, value); }, compressor.budget.held);
        });
      },
      compressor.scorer.held);
}

inline std::string_view trimmed(std::string_view s) {
  const auto first = s.find_first_not_of(" \t\r\n");
  if (first == std::string_view::npos) return {};
  return s.substr(first, s.find_last_not_of(" \t\r\n") - first + 1);
}

}  // namespace detail

/// The settings of a compressor with their present values; `keep` first. One that several parts have, as PyramidKV's scorer
/// and budget have `window`, comes once: text sets it for all of them.
inline std::vector<SettingText> settings_of(const AnyCompressor& compressor) {
  std::vector<SettingText> out{
      {"keep", print_setting(compressor.keep), std::string(detail::keep_allowed),
       "how much of the chosen classes stays"},
      {"budget", std::string(compressor.budget.held_name()), AnyBudget::names(), "how layers share it"}};
  detail::for_each_part(compressor, [&](const auto& part) {
    using P = std::remove_cvref_t<decltype(part)>;
    for_each_field<P>([&](const auto& field) {
      if (std::any_of(out.begin(), out.end(), [&](const SettingText& s) { return s.name == field.name; })) return;
      const auto& value = part.*field.member;
      using kvpare::print_setting;
      using detail::print_setting;
      std::string allowed;
      if constexpr (requires { field.low; })
        allowed = message("[", field.low, ", ", field.high, "]");
      else
        allowed = detail::allowed_values(value);
      out.push_back({std::string(field.name), print_setting(value), allowed, std::string(field.help)});
    });
  });
  return out;
}

/// Parses `name` or `name(key=value, …)`; keys are those of `settings_of`, in any order, each at most once.
/// Throws InvalidArgument on an unknown name or key, a value out of range, or text that is no such list; the message
/// says what was got and what is known.
inline AnyCompressor make_compressor(std::string_view words) {
  using detail::trimmed;
  const std::string_view whole = trimmed(words);
  const auto open = whole.find('(');
  const std::string_view name = trimmed(whole.substr(0, open));
  const Recipe* recipe = nullptr;
  std::string known;
  for (const Recipe& r : known_recipes()) {
    if (r.name == name) recipe = &r;
    known += ' ';
    known += r.name;
  }
  require(recipe != nullptr, "no policy named '", name, "'; known:", known);
  AnyCompressor compressor = recipe->compressor;
  if (open == std::string_view::npos) return compressor;
  require(whole.back() == ')', name, ": settings must end with ')', got '", whole, "'");
  std::string_view list = trimmed(whole.substr(open + 1, whole.size() - open - 2));

  std::vector<std::pair<std::string_view, std::string_view>> settings;
  for (bool more = !list.empty(); more;) {
    more = list.find(',') != std::string_view::npos;  // what follows a comma must be a setting too
    const std::string_view item = detail::next_word(list, ',');
    const auto equals = item.find('=');
    require(equals != std::string_view::npos, name, ": '", trimmed(item), "' is no setting, must be key=value");
    settings.emplace_back(trimmed(item.substr(0, equals)), trimmed(item.substr(equals + 1)));
  }
  require(recipe->has_settings || settings.empty(), name, ": has no settings, got '",
          settings.empty() ? "" : settings[0].first, "'");
  for (std::size_t i = 0; i < settings.size(); ++i)
    for (std::size_t j = 0; j < i; ++j)
      require(settings[i].first != settings[j].first, name, ": ", settings[i].first, " is set twice");

  for (const auto& [key, value] : settings)  // first, since it brings its own settings
    if (key == "budget") {
      require(compressor.budget.choose(value), name, ": budget = '", value, "', must be one of: ", AnyBudget::names());
      detail::agree(compressor, name);
    }
  for (const auto& [key, value] : settings) {
    if (key == "budget") continue;
    if (key == "keep") {
      require(parse_setting(value, compressor.keep), name, ": keep = '", value, "', must be ", detail::keep_allowed);
      check(compressor.keep);
      continue;
    }
    bool found = false;
    // Named anew in the capture: clang before 16 cannot capture a structured binding.
    detail::for_each_part(
        compressor, [&, k = key, v = value](auto& part) { found = detail::set_field(part, name, k, v) || found; });
    if (!found) {
      std::string keys;
      for (const SettingText& s : settings_of(compressor)) {
        keys += ' ';
        keys += s.name;
      }
      fail(message(name, ": unknown setting '", key, "'; known:", keys));
    }
  }
  check(compressor);
  return compressor;
}

}  // namespace kvpare
