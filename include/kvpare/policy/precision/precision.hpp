// Which form tokens take: the fourth part of a method. Data that the pipeline carries out.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "../../cache/tags.hpp"
#include "../../core/error.hpp"

namespace kvpare {

/// The form of a page, by the names of its codecs. Empty: as appended.
///
/// Text   "int4_g32" = keys and values alike · "int4_channel_g32_min/int4_g32_min" = keys / values · "as_appended"
struct Form {
  std::string keys, values;

  Form() = default;
  Form(std::string_view both) : keys(both), values(both) {}
  Form(std::string_view k, std::string_view v) : keys(k), values(v) {}
  bool as_appended() const { return keys.empty() && values.empty(); }
  friend bool operator==(const Form&, const Form&) = default;
};

inline std::string print_setting(const Form& form) {
  if (form.as_appended()) return "as_appended";
  return form.keys == form.values ? form.keys : message(form.keys, '/', form.values);
}

/// Letters, digits, _, - and dots.
inline bool is_codec_name(std::string_view name) {
  return !name.empty() && std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-' || c == '.';
  });
}

/// The name of a codec, or a part of one. Where it is as_appended, alone or at the end of a name, it is that of the codec which
/// append writes on that side.
struct CodecName {
  std::string text;
  friend bool operator==(const CodecName&, const CodecName&) = default;
};
inline std::string print_setting(const CodecName& name) { return name.text; }
inline bool parse_setting(std::string_view word, CodecName& out) {
  if (!is_codec_name(word)) return false;
  out.text = word;
  return true;
}

/// False when the text is no form, its names being letters, digits, _, - and dots; whether a cache lists it is found out when a plan is made.
inline bool parse_setting(std::string_view words, Form& out) {
  if (words == "as_appended") {
    out = Form();
    return true;
  }
  const auto slash = words.find('/');
  const std::string_view keys = words.substr(0, slash),
                         values = slash == std::string_view::npos ? keys : words.substr(slash + 1);
  if (!is_codec_name(keys) || !is_codec_name(values)) return false;
  out = Form(keys, values);
  return true;
}

/// What becomes of tokens once it is known which of them matter.
///
/// kept     tokens that stay take this form as they grow old (see Aging): the newest keep_raw_… stay as appended, older ones
///          change flush_… at a time. Keys and values by rules of their own where these differ
/// rest     tokens that the selector would evict take this form at once instead, and never go back; empty: they are evicted
/// choice   tokens take the form, as appended, one of these or none at all (evicted), that a byte budget makes best: the method's
///          `keep` must be in bytes; see kv_cache_joint.hpp. In place of all of the above
/// layers   forms layer by layer, in place of `kept`
/// numbers  go to the codecs of these forms, as part of the layer's Aging
/// guard    a layer whose keys have a channel that reaches more than `guard` times its median channel (largest |k| each, over
///          all heads and tokens) takes `guarded` in place of its form; 0 = no guard. The report says which and why
struct Precision {
  std::string said;  // as text, for people; empty = nothing changes its form

  Form kept;
  Form rest;
  std::vector<Form> choice;
  bool may_evict = true;  // with `choice`: false = every token stays, in the smallest form at worst
  double trust = 1;       // with `choice`: share of coming attention that the scores foretell; the rest falls on any token alike
  std::vector<Form> layers;
  Index keep_raw_keys = 0, flush_keys = 1;      // tokens of one head
  Index keep_raw_values = 0, flush_values = 1;  // tokens of one head
  ClassSet only = all_tokens;                   // classes that change; others stay as appended
  Index sinks = 0;                              // first positions that stay as appended
  Index first_layers = 0, last_layers = 0;      // layers at either end that stay as appended, evictions aside
  double guard = 0;
  Form guarded;
  std::vector<float> numbers;  // what codecs make their state of, see Measured::numbers; empty = nothing is said
  bool recode = false;         // see Aging
  bool fresh_state = false;  // codec state is made anew of every lot of tokens that take the form `rest`
  Index block = 16;          // between decode steps tokens go over into `rest` so many at a time

  /// A Precision is itself a policy.
  Precision precision(Index) const { return *this; }
  bool changes_forms() const { return !kept.as_appended() || !rest.as_appended() || !layers.empty() || !choice.empty(); }
  friend bool operator==(const Precision&, const Precision&) = default;
};

inline void check(const Precision& p) {
  require(p.keep_raw_keys >= 0 && p.keep_raw_values >= 0 && p.flush_keys >= 1 && p.flush_values >= 1,
          "precision: keep_raw_keys = ", p.keep_raw_keys, ", keep_raw_values = ", p.keep_raw_values, ", flush_keys = ",
          p.flush_keys, ", flush_values = ", p.flush_values, "; counts must not be negative, flushes at least 1");
  require(p.sinks >= 0 && p.first_layers >= 0 && p.last_layers >= 0 && p.block >= 1, "precision: sinks = ", p.sinks,
          ", first_layers = ", p.first_layers, ", last_layers = ", p.last_layers, ", block = ", p.block,
          "; must not be negative, block at least 1");
  require(p.guard == 0 || p.guard > 1, "precision: guard = ", p.guard, ", must be 0 (none) or above 1");
  require(p.choice.empty() || (p.kept.as_appended() && p.rest.as_appended() && p.layers.empty() && p.guard == 0),
          "precision: a choice of forms stands alone, got `kept`, `rest`, `layers` or `guard` as well");
  require(p.guard == 0 || !p.guarded.as_appended() || p.changes_forms(),
          "precision: guard without a form to guard");
}

}  // namespace kvpare
