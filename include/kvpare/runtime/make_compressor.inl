// Recipes by name, and methods and settings read from text and printed: the definitions of make_compressor.hpp.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <concepts>

#include "make_compressor.hpp"

namespace kvpare {

KVPARE_COMPILED_INLINE std::span<const Recipe> known_recipes() {
  const auto any = [](const auto& c) { return AnyCompressor{c.scorer, c.budget, c.selector, c.keep, {}}; };
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
      Recipe{"vl_cache", "what the text after the image attends to, more for layers that attend to much",
             "VL-Cache, arXiv 2410.23317", any(vl_cache())},
      Recipe{"prefix_kv", "the most attended, the same share of attention in every layer",
             "PrefixKV, arXiv 2412.03409", any(prefix_kv())},
      Recipe{"elastic_cache", "the most attended; what goes is averaged into the nearest that stays",
             "Elastic Cache, arXiv 2407.18121", any(elastic_cache())},
      Recipe{"recent_maximum", "the most attended by one of the newest rows; keeps everything unless told, for qaq",
             "QAQ, arXiv 2403.04643", any(recent_maximum())},
      Recipe{"cam", "as h2o; values of what goes are added to those of the next that stay", "CaM, ICML 2024", any(cam())},
      Recipe{"fixed_point", "after prefix_kv or elastic_cache: each layer's ratio, by dropping at one place of the list",
             "Elastic Cache, PrefixKV", any(fixed_point())},
      Recipe{"corm", "what some of the last rows found important; no budget", "CORM, arXiv 2404.15949", any(corm())},
      Recipe{"kv_crush", "as snap_kv, a quarter of the budget for tokens that stand for those that go",
             "KVCrush, arXiv 2503.00022", any(kv_crush())},
      Recipe{"chunk_kv", "as snap_kv, by chunks of ten neighbours", "ChunkKV, arXiv 2502.00299", any(chunk_kv())},
      Recipe{"zip_vl", "as many tokens as have 97.5 % of a layer's attention", "ZipVL, arXiv 2410.08584",
             any(zip_vl())},
      Recipe{"air_cache", "visual tokens that elite text rows attend to, budgets by strength and skewness",
             "AirCache, arXiv 2503.23956", any(air_cache())},
      Recipe{"csp", "the best by attention within a modality and by attention across modalities, and the newest",
             "CSP, arXiv 2412.04652", any(csp())},
      Recipe{"lag_kv", "keys and values unlike those that follow, and the newest", "LagKV, arXiv 2504.04704",
             any(lag_kv())},
      Recipe{"expected_attention", "what queries like those of the prompt would attend to, times the value's length",
             "Expected Attention, arXiv 2510.00636", any(expected_attention())},
      Recipe{"top_v", "visual tokens that supply most of an early layer's visual output; reads features, not queries",
             "TopV, arXiv 2503.18278", any(top_v())},
      Recipe{"cross_modal", "visual tokens that the text's embeddings point to; reads features, not queries",
             "VidKV, arXiv 2503.16257", any(cross_modal())},
      Recipe{"pare",
             "what the newest text attends to, the longer its values the more; layers and heads get what they need", "",
             any(pare())},
  };
  return recipes;
}

KVPARE_COMPILED_INLINE std::span<const PrecisionRecipe> known_precisions() {
  static const std::array recipes{
      PrecisionRecipe{InForm::name, "one form for all tokens, such as int8, fp8_e4m3 or q4_0", "", InForm::base, InForm{}},
      PrecisionRecipe{Kivi::name, "keys per channel, values per token, the newest tokens as they are",
                      "KIVI, arXiv 2402.02750", Kivi::base, Kivi{}},
      PrecisionRecipe{Mikv::name, "what would be evicted stays in few bits", "MiKV, arXiv 2402.18096", Mikv::base,
                      Mikv{}},
      PrecisionRecipe{ZipCache::name, "more bits for tokens that matter, fewer for the others",
                      "ZipCache, arXiv 2405.14256; ZipVL, arXiv 2410.08584v1", ZipCache::base, ZipCache{}},
      PrecisionRecipe{KvTuner::name, "bits layer by layer, from a search", "KVTuner, arXiv 2502.04420", KvTuner::base,
                      KvTuner{}},
      PrecisionRecipe{Think::name, "keys without the channels that recent queries hardly look at", "ThinK, arXiv 2407.21018",
                      Think::base, Think{}},
      PrecisionRecipe{VidKv::name, "keys of 2 bits and of a spectrum's 1, values of three levels", "VidKV, arXiv 2503.16257",
                      VidKv::base, VidKv{}},
      PrecisionRecipe{QualityAdaptive::name, "bits for every token by the noise that attention bears",
                      "QAQ, arXiv 2403.04643", QualityAdaptive::base, QualityAdaptive{}},
      PrecisionRecipe{Csr::name, "rows as a few atoms of a dictionary", "CSR, arXiv 2412.11741", Csr::base, Csr{}},
      PrecisionRecipe{KvQuant::name, "learned codebooks, outliers beside them, keys before RoPE", "KVQuant, arXiv 2401.18079",
                      KvQuant::base, KvQuant{}},
      PrecisionRecipe{Joint::name, "eviction and forms as one byte budget makes best", "", Joint::base, Joint{}},
  };
  return recipes;
}

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
  requires(std::is_arithmetic_v<N> && !std::is_same_v<N, bool>)
bool parse_setting(std::string_view word, N& out) {
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), out);
  return error == std::errc{} && end == word.data() + word.size();
}

template <std::integral N>
  requires(!std::is_same_v<N, bool>)
std::string print_setting(N value) {
  return message(value);
}

inline std::string allowed_values(const Form&) {
  return "a codec for keys and values, keys/values, or as_appended";
}
inline std::string allowed_values(const CodecName&) {
  return "the name of a codec, or a part of one: letters, digits, _, - and dots";
}
inline std::string allowed_values(const FormChoice&) { return "codecs, or keys/values, joined by +"; }
inline std::string allowed_values(const ClassKeeps&) {
  return message("none, or classes and amounts, at most ", ClassKeeps::most, ": text:50%+system+audio:512t");
}
inline std::string allowed_values(bool) { return "yes, no"; }
inline std::string allowed_values(const Ratios&) { return "ratios within [0, 1] that are kept, layer by layer: 0.9 0.5 0.31 …"; }
inline std::string allowed_values(const LayerBits&) { return "keys/values layer by layer: 8/4 4/4 2/2 …"; }
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

// Settings are parsed and printed by type of value, not of policy: there are far fewer.
template <class V>
void set_value(V& out, std::string_view recipe, std::string_view key, std::string_view value) {
  V parsed{};
  using kvpare::parse_setting;
  using detail::parse_setting;
  require(parse_setting(value, parsed), recipe, ": ", key, " = '", value, "', must be one of: ", allowed_values(parsed));
  out = parsed;
}
template <class V>
void set_value(V& out, std::string_view recipe, std::string_view key, std::string_view value, V low, V high) {
  V parsed{};
  require(parse_setting(value, parsed), recipe, ": ", key, " = '", value, "', must be a number within [", low, ", ", high,
          "]");
  require(parsed >= low && parsed <= high, recipe, ": ", key, " = ", value, ", must be within [", low, ", ", high, "]");
  out = parsed;
}

template <class P>
bool set_field(P& part, std::string_view recipe, std::string_view key, std::string_view value) {
  bool known = false;
  for_each_field<P>([&](const auto& field) {
    if (known || field.name != key) return;
    known = true;
    if constexpr (requires { field.low; })
      set_value(part.*field.member, recipe, key, value, field.low, field.high);
    else
      set_value(part.*field.member, recipe, key, value);
  });
  return known;
}

template <class V>
std::string printed(const V& value) {
  using kvpare::print_setting;
  using detail::print_setting;
  return print_setting(value);
}

template <class P>
void add_settings(const P& part, std::vector<SettingText>& out) {
  for_each_field<P>([&](const auto& field) {
    if (std::any_of(out.begin(), out.end(), [&](const SettingText& s) { return s.name == field.name; })) return;
    const auto& value = part.*field.member;
    std::string allowed;
    if constexpr (requires { field.low; })
      allowed = message("[", field.low, ", ", field.high, "]");
    else
      allowed = allowed_values(value);
    out.push_back({std::string(field.name), printed(value), std::move(allowed), std::string(field.help)});
  });
}

/// Settings that the budget has in common with the scorer, as PyramidKV's window, become the scorer's.
inline void agree(AnyCompressor& compressor, std::string_view recipe) {
  std::vector<SettingText> settings;
  std::visit([&](const auto& scorer) { add_settings(scorer, settings); }, compressor.scorer.held);
  std::visit(
      [&](auto& budget) {
        for (const SettingText& s : settings) set_field(budget, recipe, s.name, s.value);
      },
      compressor.budget.held);
}

/// One method in a text: its name and settings.
struct MethodText {
  std::string_view name;
  bool in_brackets = false;
  std::vector<std::pair<std::string_view, std::string_view>> settings;
};

inline MethodText read_method(std::string_view words) {
  MethodText method;
  const std::string_view whole = trimmed(words);
  const auto open = whole.find('(');
  method.name = trimmed(whole.substr(0, open));
  if (find_named(known_recipes(), method.name) == nullptr && find_named(known_precisions(), method.name) == nullptr) {
    std::string known;
    for (const Recipe& k : known_recipes()) known += ' ', known += k.name;
    for (const PrecisionRecipe& k : known_precisions()) known += ' ', known += k.name;
    fail(message("no policy named '", method.name, "'; known:", known));
  }
  if (open == std::string_view::npos) return method;
  const std::string_view name = method.name;
  method.in_brackets = true;
  require(whole.back() == ')', name, ": settings must end with ')', got '", whole, "'");
  std::string_view list = trimmed(whole.substr(open + 1, whole.size() - open - 2));
  for (bool more = !list.empty(); more;) {
    more = list.find(',') != std::string_view::npos;  // what follows a comma must be a setting too
    const std::string_view item = next_word(list, ',');
    const auto equals = item.find('=');
    require(equals != std::string_view::npos, name, ": '", trimmed(item), "' is no setting, must be key=value");
    method.settings.emplace_back(trimmed(item.substr(0, equals)), trimmed(item.substr(equals + 1)));
  }
  for (std::size_t i = 0; i < method.settings.size(); ++i)
    for (std::size_t j = 0; j < i; ++j)
      require(method.settings[i].first != method.settings[j].first, name, ": ", method.settings[i].first,
              " is set twice");
  return method;
}

inline std::string names_of(const std::vector<SettingText>& settings) {
  std::string names;
  for (const SettingText& s : settings) names += ' ', names += s.name;
  return names;
}

}  // namespace detail

KVPARE_COMPILED_INLINE std::vector<SettingText> settings_of(const AnyPrecision& precision) {
  std::vector<SettingText> out;
  std::visit([&](const auto& p) { detail::add_settings(p, out); }, precision.held);
  return out;
}

KVPARE_COMPILED_INLINE std::vector<SettingText> settings_of(const AnyCompressor& compressor) {
  std::vector<SettingText> out{
      {"keep", print_setting(compressor.keep), std::string(detail::keep_allowed),
       "how much of the chosen classes stays"},
      {"budget", std::string(compressor.budget.held_name()), AnyBudget::names(), "how layers share it"}};
  detail::for_each_part(compressor, [&](const auto& part) { detail::add_settings(part, out); });
  return out;
}

namespace detail {

/// Settings of a method that evicts; `also` names further ones that are known elsewhere, for the message.
inline void apply_settings(AnyCompressor& compressor, std::string_view name,
                           std::span<const std::pair<std::string_view, std::string_view>> settings,
                           const std::string& also) {
  for (const auto& [key, value] : settings)  // first, since it brings its own settings
    if (key == "budget") {
      require(compressor.budget.choose(value), name, ": budget = '", value, "', must be one of: ", AnyBudget::names());
      agree(compressor, name);
    }
  for (const auto& [key, value] : settings) {
    if (key == "budget") continue;
    if (key == "keep") {
      require(parse_setting(value, compressor.keep), name, ": keep = '", value, "', must be ", keep_allowed);
      kvpare::check(compressor.keep);
      continue;
    }
    bool found = false;
    // Named anew in the capture: clang before 16 cannot capture a structured binding.
    for_each_part(compressor,
                  [&, k = key, v = value](auto& part) { found = set_field(part, name, k, v) || found; });
    require(found, name, ": unknown setting '", key, "'; known:", names_of(settings_of(compressor)), also);
  }
}

}  // namespace detail

KVPARE_COMPILED_INLINE AnyCompressor make_compressor(std::string_view words) {
  using namespace detail;
  const std::vector<std::string_view> texts = split_methods(words);
  require(texts.size() <= 2, "'", words, "': ", texts.size(), " methods, must be one that evicts, a precision, or both");
  const Recipe* recipe = nullptr;
  const PrecisionRecipe* precision = nullptr;
  MethodText evicts, forms;
  for (const std::string_view part : texts) {
    MethodText method = read_method(part);
    if (const Recipe* r = find_named(known_recipes(), method.name)) {
      require(recipe == nullptr, "'", words, "': ", evicts.name, " and ", r->name, " both evict, must be one method");
      recipe = r, evicts = std::move(method);
    } else {
      const PrecisionRecipe* p = find_named(known_precisions(), method.name);
      require(precision == nullptr, "'", words, "': ", forms.name, " and ", p->name,
              " are both precisions, must be one");
      precision = p, forms = std::move(method);
    }
  }
  const bool alone = recipe == nullptr;
  if (alone) recipe = find_named(known_recipes(), precision->base);
  AnyCompressor compressor = recipe->compressor;
  require(alone || recipe->has_settings || evicts.settings.empty(), recipe->name, ": has no settings, got '",
          evicts.settings.empty() ? "" : evicts.settings[0].first, "'");
  if (precision != nullptr) {
    compressor.precision = precision->precision;
    for (const auto& [key, value] : forms.settings) {
      bool found = false;
      std::visit([&, k = key, v = value](auto& p) { found = set_field(p, forms.name, k, v); },
                 compressor.precision.held);
      if (found) continue;
      require(alone && recipe->has_settings, forms.name, ": unknown setting '", key,
              "'; known:", names_of(settings_of(compressor.precision)));
      evicts.settings.emplace_back(key, value);
    }
  }
  apply_settings(compressor, alone ? forms.name : recipe->name, evicts.settings,
                 alone ? names_of(settings_of(compressor.precision)) : "");
  check(compressor);
  return compressor;
}

KVPARE_COMPILED_INLINE AnyCompressor read_compressor(std::istream& in) {
  std::string words;
  for (std::string line; std::getline(in, line);)
    if (const std::string_view said = detail::trimmed(line); !said.empty() && said[0] != '#') words += line + ' ';
  require(!detail::trimmed(words).empty(), "the file holds no policy");
  return make_compressor(words);
}

}  // namespace kvpare
