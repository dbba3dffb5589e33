// expect: a.allocate(layers, available, n, total, scratch, keep)
#include <kvpare/policy/contracts.hpp>

struct Greedy {
  static constexpr std::string_view name = "greedy";
  static constexpr kvpare::BudgetNeeds needs = {};
  static constexpr auto fields() { return std::tuple{}; }
  void allocate(const kvpare::LayerSummary*, kvpare::Index, kvpare::Index, kvpare::Index*) const {}
  friend bool operator==(const Greedy&, const Greedy&) = default;
};

static_assert(kvpare::BudgetAllocator<Greedy>);
