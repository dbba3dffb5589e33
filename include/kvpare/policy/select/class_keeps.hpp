// Amounts that stay of further classes, each a budget of its own.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>
#include <string_view>

#include "../../cache/tags.hpp"
#include "keep.hpp"

namespace kvpare {

/// How much of some classes stays.
struct ClassKeep {
  ClassSet classes;
  Keep keep;
  friend bool operator==(const ClassKeep&, const ClassKeep&) = default;
};

/// Up to 8 amounts. Text: classes joined by a plus sign, a colon, the amount, and so on: "text:50%+system+audio:512t" are half
/// of the text and 512 tokens of system and audio together; "none".
struct ClassKeeps {
  static constexpr int most = 8;
  ClassKeep of[most] = {};
  int count = 0;

  constexpr ClassKeeps() = default;
  ClassKeeps(std::initializer_list<ClassKeep> parts) {
    require(std::ssize(parts) <= most, "also: ", parts.size(), " amounts, must be at most ", most);
    for (const ClassKeep& part : parts) of[count++] = part;
  }
  constexpr bool empty() const { return count == 0; }
  constexpr const ClassKeep* begin() const { return of; }
  constexpr const ClassKeep* end() const { return of + count; }
  friend bool operator==(const ClassKeeps& a, const ClassKeeps& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
  }
};

inline std::string print_setting(const ClassKeeps& keeps) {
  if (keeps.empty()) return "none";
  std::string words;
  for (const ClassKeep& part : keeps) {
    if (!words.empty()) words += '+';
    words += print_setting(part.classes), words += ':', words += print_setting(part.keep);
  }
  return words;
}

/// False when the text is no such list.
inline bool parse_setting(std::string_view words, ClassKeeps& out) {
  ClassKeeps keeps;
  while (words != "none") {
    const auto colon = words.find(':');
    if (colon == std::string_view::npos || keeps.count == ClassKeeps::most) return false;
    const auto plus = words.find('+', colon);
    ClassKeep& part = keeps.of[keeps.count++];
    if (!parse_setting(words.substr(0, colon), part.classes) ||
        !parse_setting(words.substr(colon + 1, plus == std::string_view::npos ? plus : plus - colon - 1), part.keep))
      return false;
    if (plus == std::string_view::npos) break;
    words.remove_prefix(plus + 1);
    if (words == "none") return false;
  }
  out = keeps;
  return true;
}

}  // namespace kvpare
