// expect: regular
#include <kvpare/policy/contracts.hpp>

struct NoEquals {
  static constexpr std::string_view name = "no_equals";
  static constexpr auto fields() { return std::tuple{}; }
};

static_assert(kvpare::Policy<NoEquals>);
