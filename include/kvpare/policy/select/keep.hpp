// How much stays: always said as what is kept.
#pragma once

#include <charconv>
#include <cmath>
#include <string>
#include <string_view>

#include "../../core/config.hpp"
#include "../../core/error.hpp"

namespace kvpare {

/// An amount to keep: a ratio of the tokens the sequence was given, or tokens, pages or bytes over all layers.
///
/// Text   "0.1" or "10%" = ratio · "512t" = tokens per kv head, all layers together · "32p" = pages per kv head, all
///        layers together · "8MiB", "64KiB", "1GiB", "4096B" = bytes of pages, all layers and heads together
/// Pages and bytes are turned into tokens rounding down to whole pages, so the promise is never exceeded,
/// unless mode = reference asks for rules that may.
struct Keep {
  enum class Unit : std::uint8_t { ratio, tokens, pages, bytes };
  double amount = 1;
  Unit unit = Unit::ratio;

  static constexpr Keep ratio(double r) { return {r, Unit::ratio}; }
  static constexpr Keep tokens(Index n) { return {static_cast<double>(n), Unit::tokens}; }
  static constexpr Keep pages(Index n) { return {static_cast<double>(n), Unit::pages}; }
  static constexpr Keep bytes(Index n) { return {static_cast<double>(n), Unit::bytes}; }
  friend bool operator==(const Keep&, const Keep&) = default;
};

inline void check(const Keep& keep) {
  if (keep.unit == Keep::Unit::ratio)
    require(keep.amount >= 0 && keep.amount <= 1, "keep = ", keep.amount, ", a ratio must be within [0, 1]");
  else
    require(keep.amount >= 0 && keep.amount <= 0x1p53 && keep.amount == std::floor(keep.amount), "keep = ", keep.amount,
            ", must be a whole number that is not negative");
}

/// False when the text is no amount.
inline bool parse_setting(std::string_view words, Keep& out) {
  double amount = 0;
  const auto [end, error] = std::from_chars(words.data(), words.data() + words.size(), amount);
  if (error != std::errc{} || !(amount >= 0)) return false;
  const std::string_view unit(end, static_cast<std::size_t>(words.data() + words.size() - end));
  Keep keep{amount, Keep::Unit::ratio};
  if (unit == "%")
    keep.amount = amount / 100;
  else if (unit == "t")
    keep.unit = Keep::Unit::tokens;
  else if (unit == "p")
    keep.unit = Keep::Unit::pages;
  else if (unit == "B")
    keep.unit = Keep::Unit::bytes;
  else if (unit == "KiB")
    keep = {amount * 0x1p10, Keep::Unit::bytes};
  else if (unit == "MiB")
    keep = {amount * 0x1p20, Keep::Unit::bytes};
  else if (unit == "GiB")
    keep = {amount * 0x1p30, Keep::Unit::bytes};
  else if (!unit.empty())
    return false;
  if (keep.unit == Keep::Unit::bytes) keep.amount = std::floor(keep.amount);
  out = keep;
  return true;
}

/// The shortest text that reads back as the same number.
inline std::string print_setting(double value) {
  char digits[32];
  return {digits, std::to_chars(digits, digits + sizeof digits, value).ptr};
}

inline std::string print_setting(const Keep& keep) {
  const char* unit[] = {"", "t", "p", "B"};
  if (keep.unit == Keep::Unit::ratio) return print_setting(keep.amount);
  return message(static_cast<Index>(keep.amount), unit[static_cast<int>(keep.unit)]);
}

}  // namespace kvpare
