// A caller's mistake: what, got, wanted. Found before any work; after a throw nothing has changed.
#pragma once

#include <cstdlib>
#include <locale>
#include <sstream>
#include <stdexcept>
#include <string>

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

/// Joins its arguments as an ostream would print them, in the "C" locale whatever the program's.
template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream out;
  out.imbue(std::locale::classic());
  (out << ... << parts);
  return out.str();
}

/// `require(rows <= 64, "attend: rows = ", rows, ", must be within [1, 64]")`
template <class... Parts>
inline void require(bool holds, const Parts&... parts) {
  if (!holds) [[unlikely]]
    fail(message(parts...));
}

}  // namespace kvpare
