// A caller's mistake: what, got, wanted. Found before any work; after a throw nothing has changed.
#pragma once

#include <charconv>
#include <concepts>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>

namespace kvpare {

struct InvalidArgument : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

/// Called with the message instead of a throw where exceptions are off (-fno-exceptions). Must not return; if it does,
/// or if none is set, the program aborts.
using ErrorHandler = void (*)(const char* message);

inline ErrorHandler& error_handler() {
  static ErrorHandler handler = nullptr;
  return handler;
}

[[noreturn]] inline void fail(const std::string& what) {
#if defined(__cpp_exceptions)
  throw InvalidArgument(what);
#else
  if (error_handler() != nullptr) error_handler()(what.c_str());
  std::abort();
#endif
}

namespace detail {

/// An argument of a message: what it is, not its type, so that messages are joined by one function for all of them.
class Part {
 public:
  Part(std::string_view text) : kind_(Kind::text), text_(text) {}
  Part(const std::string& text) : Part(std::string_view(text)) {}
  Part(const char* text) : Part(std::string_view(text)) {}
  Part(char c) : kind_(Kind::character), character_(c) {}
  template <std::signed_integral N>
  Part(N n) : kind_(Kind::integer), integer_(n) {}
  template <std::unsigned_integral N>
  Part(N n) : kind_(Kind::natural), natural_(n) {}
  template <std::floating_point N>
  Part(N x) : kind_(Kind::real), real_(static_cast<double>(x)) {}

  void append_to(std::string& words) const {
    if (kind_ == Kind::text)
      words += text_;
    else if (kind_ == Kind::character)
      words += character_;
    else if (kind_ == Kind::integer)
      words += std::to_string(integer_);
    else if (kind_ == Kind::natural)
      words += std::to_string(natural_);
    else
      append_real(words);
  }

 private:
  enum class Kind : unsigned char { text, character, integer, natural, real };

  void append_real(std::string& words) const {
    char digits[32];
    const auto [end, error] = std::to_chars(digits, digits + sizeof digits, real_, std::chars_format::general, 6);
    words.append(digits, end);
  }

  Kind kind_;
  union {
    std::string_view text_;
    char character_;
    long long integer_;
    unsigned long long natural_;
    double real_;
  };
};

inline std::string joined(std::initializer_list<Part> parts) {
  std::string words;
  for (const Part& part : parts) part.append_to(words);
  return words;
}

}  // namespace detail

/// Joins text, characters and numbers; numbers as an ostream prints them in the "C" locale (real ones: six digits, %g).
template <class... Parts>
std::string message(const Parts&... parts) {
  return detail::joined({detail::Part(parts)...});
}

/// `require(rows <= 64, "attend: rows = ", rows, ", must be within [1, 64]")`
template <class... Parts>
inline void require(bool holds, const Parts&... parts) {
  if (!holds) [[unlikely]]
    fail(detail::joined({detail::Part(parts)...}));
}

}  // namespace kvpare
