// Precision as the literature has it. Each is a plain value with settings; `precision(layers)` says what it means for a model
// of so many layers, as the data that the pipeline carries out.
//
// | expression             | gives              |                                                                  |
// |------------------------|--------------------|------------------------------------------------------------------|
// | `p.name`, `p.fields()` |                    | as of every policy                                               |
// | `p.base`               | text               | the method that goes with it when none is named                  |
// | `p.precision(layers)`  | `Precision`        | throws where the settings do not go with that many layers        |
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <tuple>

#include "../contracts.hpp"
#include "precision.hpp"

namespace kvpare {

template <class P>
concept PrecisionPolicy = Policy<P> && requires(const P& p, Index layers) {
  { P::base } -> std::convertible_to<std::string_view>;
  { p.precision(layers) } -> std::same_as<Precision>;
};

/// Nothing changes its form.
struct AsAppended {
  static constexpr std::string_view name = "as_appended", base = "full";
  static constexpr auto fields() { return std::tuple{}; }
  Precision precision(Index) const { return {}; }
  friend bool operator==(const AsAppended&, const AsAppended&) = default;
};

/// Everything in one form: the common 8- and 4-bit caches.
///
/// Tokens change at the first append or commit after them, `residual` newest ones apart.
struct InForm {
  static constexpr std::string_view name = "in_form", base = "full";
  Form form = Form("int8");
  Index residual = 0;          // newest tokens that stay as appended
  ClassSet only = all_tokens;  // classes that change
  Index sinks = 0;             // first positions that stay as appended
  Index first_layers = 0;      // that stay as appended
  Index last_layers = 0;
  double guard = 0;
  Form guarded = Form("int8");

  static constexpr auto fields() {
    return std::tuple{
        Choice{"form", &InForm::form, "codec of keys and values, or keys/values"},
        Field<InForm, Index>{"residual", &InForm::residual, 0, 1 << 20, "newest tokens that stay as appended"},
        Choice{"only", &InForm::only, "classes of tokens that change their form"},
        Field<InForm, Index>{"sinks", &InForm::sinks, 0, 1 << 20, "first positions that stay as appended"},
        Field<InForm, Index>{"first_layers", &InForm::first_layers, 0, 4096, "first layers that stay as appended"},
        Field<InForm, Index>{"last_layers", &InForm::last_layers, 0, 4096, "last layers that stay as appended"},
        Field<InForm, double>{"guard", &InForm::guard, 0.0, 1e6,
                              "largest key channel over the median one beyond which a layer is guarded; 0 = never"},
        Choice{"guarded", &InForm::guarded, "the form of guarded layers"}};
  }
  Precision precision(Index) const {
    Precision p;
    p.said = name;
    p.kept = form, p.only = only, p.sinks = sinks, p.first_layers = first_layers, p.last_layers = last_layers;
    p.keep_raw_keys = p.keep_raw_values = residual;
    p.guard = guard;
    if (guard > 0) p.guarded = guarded;
    return p;
  }
  friend bool operator==(const InForm&, const InForm&) = default;
};

/// KIVI: keys in groups of tokens per channel, values in groups of channels per token, a float minimum each; the newest
/// `residual` tokens stay as appended: values always, keys until that many have come together.
///
/// Source     Liu et al. 2024, "KIVI", arXiv 2402.02750; defaults of its code
/// Deviation  values leave by whole pages (the paper: one by one), so that up to a page more of them stay as appended; where
///            `residual` is less than a page, keys wait for a page as well
struct Kivi {
  static constexpr std::string_view name = "kivi", base = "full";
  Index bits = 2;        // 8, 4, 3, 2
  Index group = 32;      // numbers that share a scale
  Index residual = 128;  // newest tokens as appended
  Index sinks = 0;       // first positions that stay as appended; the paper has none

  static constexpr auto fields() {
    return std::tuple{
        Field<Kivi, Index>{"bits", &Kivi::bits, 2, 8, "bits of a code: 8, 4, 3 or 2"},
        Field<Kivi, Index>{"group", &Kivi::group, 0, 1024, "numbers that share a scale; 0 = the page, the head"},
        Field<Kivi, Index>{"residual", &Kivi::residual, 1, 1 << 20, "newest tokens that stay as appended"},
        Field<Kivi, Index>{"sinks", &Kivi::sinks, 0, 1 << 20, "first positions that stay as appended"}};
  }
  /// The names of the codecs it takes.
  static Form form(Index key_bits, Index value_bits, Index group) {
    const std::string size = group > 0 ? message("_g", group) : std::string();
    return {message("int", key_bits, "_channel", size, "_min"), message("int", value_bits, size, "_min")};
  }
  Precision precision(Index) const {
    Precision p;
    p.said = name;
    p.kept = form(bits, bits, group);
    p.flush_keys = residual, p.keep_raw_values = residual;
    p.sinks = sinks;
    return p;
  }
  friend bool operator==(const Kivi&, const Kivi&) = default;
};

/// MiKV: tokens that an eviction method would drop are kept in few bits, keys balanced against the queries; the others stay as
/// appended, or take the form `high`.
///
/// Source     Yang et al. 2024, "No Token Left Behind", arXiv 2402.18096. Base: H2O, half of the budget for the newest
/// Deviation  between decode steps tokens go over `block` at a time (the paper: one by one)
struct Mikv {
  static constexpr std::string_view name = "mikv", base = "h2o";
  Form low = Form("balanced_int2_p2_min", "int2_p2_min");
  Form high;  // empty: as appended
  Index block = 16;

  static constexpr auto fields() {
    return std::tuple{Choice{"low", &Mikv::low, "form of tokens that do not matter"},
                      Choice{"high", &Mikv::high, "form of tokens that do; none = as appended"},
                      Field<Mikv, Index>{"block", &Mikv::block, 1, 4096, "tokens that go over at a time"}};
  }
  Precision precision(Index) const {
    Precision p;
    p.said = name;
    p.rest = low;
    // int2 alone stands for the paper's quantiser: two groups per head, keys balanced.
    for (const char* bits : {"int4", "int3", "int2"})
      if (low == Form(bits)) p.rest = Form(message("balanced_", bits, "_p2_min"), message(bits, "_p2_min"));
    p.kept = high;
    p.block = block;
    return p;
  }
  friend bool operator==(const Mikv&, const Mikv&) = default;
};

/// ZipVL and ZipCache: tokens that matter in `high`, the others in `low`; keys per channel with one range for all tokens
/// that go over together, values divided by a factor per channel and then per token.
///
/// Source     He et al. 2024, "ZipVL", arXiv 2410.08584v1, and "ZipCache", arXiv 2405.14256
/// Deviation  of a prompt's tokens that matter, too, whole lots of `residual` go over; what is left waits for more. Keys of
///            later lots keep the ranges of the first in `high`. Scales of values are per token and head (the paper: per
///            token over all heads). How many tokens matter is the base method's `keep` (ZipCache's fixed share), not the
///            share of attention
struct ZipCache {
  static constexpr std::string_view name = "zip_cache", base = "snap_kv";
  Index high = 4, low = 2;  // bits
  Index residual = 100;     // tokens go over after so many steps

  static constexpr auto fields() {
    return std::tuple{Field<ZipCache, Index>{"high", &ZipCache::high, 2, 8, "bits of tokens that matter: 8, 4 or 2"},
                      Field<ZipCache, Index>{"low", &ZipCache::low, 2, 8, "bits of the others: 8, 4 or 2"},
                      Field<ZipCache, Index>{"residual", &ZipCache::residual, 1, 4096,
                                             "tokens of decode steps that change form together"}};
  }
  static Form form(Index bits) {
    return {message("affine_fixed", bits), message("scaled_int", bits, "_min")};
  }
  Precision precision(Index) const {
    Precision p;
    p.said = name;
    p.kept = form(high), p.rest = form(low);
    p.keep_raw_keys = p.keep_raw_values = 0;
    p.flush_keys = p.flush_values = residual, p.block = residual;
    p.fresh_state = true;
    return p;
  }
  friend bool operator==(const ZipCache&, const ZipCache&) = default;
};

/// Forms to choose among. Text: names joined by a plus sign, "int8+int4_g32+kivi…/…".
struct FormChoice {
  std::vector<Form> forms;
  friend bool operator==(const FormChoice&, const FormChoice&) = default;
};
inline std::string print_setting(const FormChoice& choice) {
  std::string words;
  for (const Form& f : choice.forms) {
    if (!words.empty()) words += '+';
    words += print_setting(f);
  }
  return words;
}
inline bool parse_setting(std::string_view words, FormChoice& out) {
  FormChoice choice;
  while (!words.empty()) {
    const auto plus = words.find('+');
    Form form;
    if (!parse_setting(words.substr(0, plus), form)) return false;
    choice.forms.push_back(form);
    if (plus == std::string_view::npos) break;
    words.remove_prefix(plus + 1);
    if (words.empty()) return false;
  }
  out = choice;
  return !choice.forms.empty();
}

/// One byte budget over eviction and precision: each token stays as appended, takes one of some forms, or goes, so that the
/// estimated error of attention is least for the bytes (the formula is in pipeline/kv_cache_joint.hpp; it is ours).
/// Scores must be shares of attention, as those of h2o are; ranks that put some tokens first (the window of snap_kv) count as
/// attention too. The base method's `keep` is the budget, in bytes, "joint(keep=2MiB)"; of the base only scores and the classes
/// it is `among` count, no rule that shares out a number of tokens (budget, recent_share).
struct Joint {
  static constexpr std::string_view name = "joint", base = "snap_kv";
  FormChoice forms{{Form("int8"), Form("hadamard_lloyd4"), Form("hadamard_lloyd3")}};
  bool evict = true;
  double trust = 0.9;

  static constexpr auto fields() {
    return std::tuple{Choice{"forms", &Joint::forms, "forms to choose among, joined by +"},
                      Choice{"evict", &Joint::evict, "may tokens go altogether?"},
                      Field<Joint, double>{"trust", &Joint::trust, 0.0, 1.0,
                                           "share of coming attention that scores foretell; 0 = they only put tokens in order"}};
  }
  Precision precision(Index) const {
    Precision p;
    p.said = name;
    p.choice = forms.forms, p.may_evict = evict, p.trust = trust;
    return p;
  }
  friend bool operator==(const Joint&, const Joint&) = default;
};

static_assert(PrecisionPolicy<Joint>);
static_assert(PrecisionPolicy<InForm> && PrecisionPolicy<Kivi> && PrecisionPolicy<Mikv> && PrecisionPolicy<ZipCache>);

}  // namespace kvpare
