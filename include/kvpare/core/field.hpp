// Settings of a policy as data: parsing, printing, range checks and tables all read `fields()`.
#pragma once

#include <string>
#include <string_view>
#include <tuple>
#include <utility>

namespace kvpare {

/// A number among a policy's settings: its name in text, where it lives, its range (both ends allowed), what it means.
template <class P, class M>
struct Field {
  using Value = M;
  std::string_view name;
  M P::*member;
  M low, high;
  std::string_view help;
};

/// A setting that is not a number (a choice, a budget): its type brings `parse_setting` and `print_setting`.
template <class P, class M>
struct Choice {
  using Value = M;
  std::string_view name;
  M P::*member;
  std::string_view help;
};

template <class P, class M>
Choice(std::string_view, M P::*, std::string_view) -> Choice<P, M>;

inline std::string print_setting(bool yes) { return yes ? "yes" : "no"; }
inline bool parse_setting(std::string_view word, bool& out) {
  if (word != "yes" && word != "no") return false;
  out = word == "yes";
  return true;
}

/// Calls `f(field)` for every setting of `P`.
template <class P, class F>
constexpr void for_each_field(F&& f) {
  std::apply([&](const auto&... field) { (f(field), ...); }, P::fields());
}

}  // namespace kvpare
