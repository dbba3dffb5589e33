// expect: score(be, s, seen, out)
#include <kvpare/backend/cpu/backend.hpp>
#include <kvpare/policy/contracts.hpp>

struct Oldest {
  static constexpr std::string_view name = "oldest";
  static constexpr auto fields() { return std::tuple{}; }
  constexpr kvpare::Reads reads() const { return {}; }
  friend bool operator==(const Oldest&, const Oldest&) = default;
};

static_assert(kvpare::Scorer<Oldest, kvpare::cpu::Backend>);
