// Short text that is put together at compile time: names that follow from template parameters.
#pragma once

#include <cstddef>
#include <string_view>

#include "config.hpp"

namespace kvpare {

/// Up to 95 characters. More does not compile where the text is a constant.
struct ShortText {
  char characters[96] = {};
  std::size_t size = 0;

  constexpr ShortText() = default;
  constexpr explicit ShortText(std::string_view words) { *this << words; }
  constexpr ShortText& operator<<(std::string_view words) {
    for (const char c : words) characters[size++] = c;
    return *this;
  }
  constexpr ShortText& operator<<(Index number) {
    if (number < 0) {
      characters[size++] = '-';
      number = -number;
    }
    if (number >= 10) *this << number / 10;
    characters[size++] = static_cast<char>('0' + number % 10);
    return *this;
  }
  constexpr std::string_view view() const { return {characters, size}; }
};

}  // namespace kvpare
