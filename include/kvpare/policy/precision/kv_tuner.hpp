// KVTuner: one pair of widths per layer, found offline.
#pragma once

#include <array>
#include <charconv>
#include <string>
#include <string_view>
#include <vector>

#include "recipes.hpp"

namespace kvpare {

/// Bits of keys and of values, layer by layer. Text: "8/4 4/4 2/2", keys / values, layer 0 first.
struct LayerBits {
  struct Pair {
    Index keys = 0, values = 0;
    friend bool operator==(const Pair&, const Pair&) = default;
  };
  std::vector<Pair> layers;

  /// (sum of all) / (2 * layers): payload only, as the paper counts.
  double mean() const {
    double sum = 0;
    for (const Pair& p : layers) sum += static_cast<double>(p.keys + p.values);
    return layers.empty() ? 0 : sum / (2 * static_cast<double>(layers.size()));
  }
  friend bool operator==(const LayerBits&, const LayerBits&) = default;
};

inline std::string print_setting(const LayerBits& bits) {
  std::string words;
  for (const LayerBits::Pair& p : bits.layers) {
    if (!words.empty()) words += ' ';
    words += message(p.keys, '/', p.values);
  }
  return words;
}

/// False unless every word is two widths of 8, 4, 3 or 2 bits.
inline bool parse_setting(std::string_view words, LayerBits& out) {
  LayerBits bits;
  const char *at = words.data(), *end = at + words.size();
  const auto width = [&](Index& to) {
    const auto [next, error] = std::from_chars(at, end, to);
    at = next;
    return error == std::errc{} && (to == 8 || to == 4 || to == 3 || to == 2);
  };
  while (at < end) {
    LayerBits::Pair pair;
    if (!width(pair.keys) || at == end || *at++ != '/' || !width(pair.values)) return false;
    bits.layers.push_back(pair);
    if (at < end && *at++ != ' ') return false;
    while (at < end && *at == ' ') ++at;
  }
  out = bits;
  return true;
}

/// How layers are quantised.
enum class TunedMode : std::uint8_t { kivi, token };
inline constexpr std::string_view choices(TunedMode*) { return "kivi|token"; }

/// The configurations that the authors published.
enum class TunedPreset : std::uint8_t {
  none,
  llama3_8b_kivi_3_25,  // Llama-3.1-8B-Instruct, mean 3.25 bits
  llama3_8b_kivi_4_906,  // Llama-3.1-8B-Instruct, mean 4.906 bits
  llama3_8b_token_3_594,  // Llama-3.1-8B-Instruct, mean 3.594 bits
  qwen25_7b_token_4_0,  // Qwen2.5-7B-Instruct, mean 4.0 bits
  qwen25_7b_token_5_0,  // Qwen2.5-7B-Instruct, mean 5.0 bits
  qwen25_7b_token_3_929,  // Qwen2.5-7B-Instruct, mean 3.929 bits
  llama3_8b_kivi_3_0625,  // Llama-3.1-8B-Instruct, mean 3.0625 bits
  qwen25_7b_kivi_3_929,  // Qwen2.5-7B-Instruct, mean 3.929 bits
  qwen25_3b_kivi_3_167,  // Qwen2.5-3B-Instruct, mean 3.167 bits
  mistral_7b_kivi_3_188,  // Mistral-7B-Instruct-v0.3, mean 3.188 bits
};
inline constexpr std::string_view choices(TunedPreset*) {
  return "none|llama3_8b_kivi_3_25|"
         "llama3_8b_kivi_4_906|"
         "llama3_8b_token_3_594|"
         "qwen25_7b_token_4_0|"
         "qwen25_7b_token_5_0|"
         "qwen25_7b_token_3_929|"
         "llama3_8b_kivi_3_0625|"
         "qwen25_7b_kivi_3_929|"
         "qwen25_3b_kivi_3_167|"
         "mistral_7b_kivi_3_188";
}

struct PublishedBits {
  TunedMode mode;
  std::string_view bits;
};
/// Of a preset other than `none`.
inline PublishedBits published_bits(TunedPreset preset) {
  static constexpr std::array<PublishedBits, 10> table{{
      {TunedMode::kivi,
       "2/2 4/4 4/4 4/4 2/2 4/2 4/2 4/4 4/2 4/2 4/2 4/2 4/2 8/4 4/2 4/2 "
       "4/2 8/4 4/2 4/2 4/2 4/2 4/2 4/2 4/2 2/2 4/2 2/2 4/2 4/4 4/2 4/4"},
      {TunedMode::kivi,
       "2/4 4/4 4/4 4/4 8/4 4/2 8/4 4/4 8/4 8/4 8/4 8/4 8/4 2/2 8/4 8/4 "
       "8/4 2/2 8/4 8/4 8/4 4/2 8/4 4/2 4/2 8/4 8/4 8/4 8/4 4/4 8/4 4/4"},
      {TunedMode::token,
       "4/8 4/2 4/2 4/2 4/2 4/4 4/4 4/2 4/4 4/4 4/4 4/4 4/4 4/2 4/4 4/4 "
       "4/4 4/4 4/2 4/2 4/4 4/4 4/2 4/2 4/2 4/2 4/4 4/2 4/4 4/2 4/4 4/2"},
      {TunedMode::token,
       "8/8 4/2 4/2 8/2 4/2 4/2 4/4 4/4 4/2 4/4 4/4 4/4 4/4 8/2 "
       "4/4 4/4 4/4 4/4 4/4 4/4 4/4 4/4 4/4 4/4 4/2 4/2 4/4 8/2"},
      {TunedMode::token,
       "8/2 4/4 4/4 8/2 4/4 4/4 4/4 4/4 8/4 8/4 4/4 4/4 8/4 8/2 "
       "8/4 4/4 8/4 8/4 8/4 4/4 8/4 8/4 8/4 4/4 8/4 4/4 8/4 8/2"},
      {TunedMode::token,
       "8/8 4/2 4/2 8/8 4/2 4/2 8/4 4/2 4/2 4/2 4/2 4/2 4/2 8/8 "
       "4/2 4/2 4/2 4/2 4/2 8/4 4/2 4/2 4/2 4/2 4/2 4/2 4/2 8/8"},
      {TunedMode::kivi,
       "8/8 4/4 4/4 4/4 2/2 2/2 4/2 4/4 4/2 4/2 4/2 4/2 4/2 2/2 4/2 4/2 "
       "4/2 2/2 4/2 4/2 4/2 2/2 4/2 2/2 2/2 2/2 4/2 2/2 4/2 4/4 4/2 4/4"},
      {TunedMode::kivi,
       "8/8 2/2 8/8 2/2 4/4 4/4 8/8 2/2 4/4 2/2 2/2 8/8 4/4 2/2 "
       "2/2 8/8 2/2 8/8 2/2 2/2 2/2 2/2 4/4 4/4 4/4 4/4 4/4 2/2"},
      {TunedMode::kivi,
       "4/8 4/8 2/4 4/2 2/4 4/2 4/2 4/2 4/2 4/2 4/2 4/2 2/2 4/2 4/2 4/2 4/2 4/2 "
       "4/2 4/2 4/2 4/2 4/2 4/2 4/2 4/2 4/2 4/2 2/2 4/2 4/2 4/2 4/2 4/2 4/4 4/4"},
      {TunedMode::kivi,
       "4/8 4/8 4/4 4/4 4/4 2/2 2/2 4/4 4/4 4/4 4/4 4/2 4/2 4/2 4/4 4/2 "
       "4/2 4/2 4/4 4/2 4/2 2/2 2/2 2/2 2/2 2/2 2/2 2/2 2/2 2/2 2/2 4/8"},
  }};
  return table[static_cast<std::size_t>(preset) - 1];
}

/// KVTuner: bits of keys and values layer by layer, from a published preset or a search of your own (examples/tune).
///
/// Mode kivi   keys per channel, values per token, groups of 32, a residual window of 32 tokens
/// Mode token  keys and values per token over the whole head, integer zero, no residual
/// Source      Li et al. 2025, "KVTuner", arXiv 2502.04420; presets from the authors' code
/// Deviation   as of Kivi: values leave by whole pages, keys wait for one
struct KvTuner {
  static constexpr std::string_view name = "kvtuner", base = "full";
  TunedPreset preset = TunedPreset::none;
  TunedMode mode = TunedMode::kivi;  // of `bits`; a preset brings its own
  LayerBits bits;                    // in place of a preset

  static constexpr auto fields() {
    return std::tuple{Choice{"preset", &KvTuner::preset, "a published configuration; the number of layers must agree"},
                      Choice{"mode", &KvTuner::mode, "how layers are quantised, for `bits`"},
                      Choice{"bits", &KvTuner::bits, "keys/values layer by layer, such as 8/4 4/4 2/2"}};
  }
  Precision precision(Index model_layers) const {
    LayerBits chosen = bits;
    TunedMode how = mode;
    require((preset == TunedPreset::none) != bits.layers.empty(), "kvtuner: give a preset or bits, ",
            bits.layers.empty() ? "got none" : "got both");
    if (preset != TunedPreset::none) {
      how = published_bits(preset).mode;
      parse_setting(published_bits(preset).bits, chosen);
    }
    require(static_cast<Index>(chosen.layers.size()) == model_layers, "kvtuner: bits for ", chosen.layers.size(),
            " layers, the model has ", model_layers);
    Precision p;
    p.said = name;
    for (const LayerBits::Pair& layer : chosen.layers)
      p.layers.push_back(how == TunedMode::kivi ? Kivi::form(layer.keys, layer.values, 32)
                                                : Form(message("int", layer.keys, "_zero"), message("int", layer.values, "_zero")));
    if (how == TunedMode::kivi) p.flush_keys = p.keep_raw_values = 32;
    return p;
  }
  friend bool operator==(const KvTuner&, const KvTuner&) = default;
};

static_assert(PrecisionPolicy<KvTuner>);

}  // namespace kvpare
