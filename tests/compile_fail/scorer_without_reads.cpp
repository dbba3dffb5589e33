// expect: s.reads()
#include <kvpare/backend/cpu/backend.hpp>
#include <kvpare/policy/contracts.hpp>

struct Oldest {
  static constexpr std::string_view name = "oldest";
  static constexpr auto fields() { return std::tuple{}; }
  friend bool operator==(const Oldest&, const Oldest&) = default;
};
template <kvpare::Backend B>
void score(B&, const Oldest&, const kvpare::Observation<B>&, kvpare::Scores) {}

static_assert(kvpare::Scorer<Oldest, kvpare::cpu::Backend>);
