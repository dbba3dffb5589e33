// One of a closed list of policies, chosen while running. It is itself a policy of the same kind.
#pragma once

#include <string>
#include <string_view>
#include <variant>

#include "../pipeline/compressor.hpp"

namespace kvpare {

namespace detail {
template <class P>
concept Reading = requires(const P& p) {
  p.reads();
};
}  // namespace detail

template <class... Ps>
struct AnyOf {
  static constexpr std::string_view name = "any";
  static constexpr auto fields() { return std::tuple{}; }

  std::variant<Ps...> held;

  constexpr AnyOf() = default;
  template <class P>
    requires(std::same_as<P, Ps> || ...)
  constexpr AnyOf(P policy) : held(policy) {}

  constexpr Reads reads() const
    requires(detail::Reading<Ps> && ...)
  {
    return std::visit([](const auto& p) { return p.reads(); }, held);
  }
  void check() const {
    std::visit([](const auto& p) { check_settings(p); }, held);
  }
  std::string_view held_name() const {
    return std::visit([](const auto& p) { return std::remove_cvref_t<decltype(p)>::name; }, held);
  }

  /// "uniform|pyramid": the names of the list.
  static std::string names() {
    std::string joined;
    ((joined += joined.empty() ? "" : "|", joined += Ps::name), ...);
    return joined;
  }
  /// Holds the policy of this name, with its defaults; false when there is none.
  bool choose(std::string_view wanted) {
    bool found = false;
    ((Ps::name == wanted ? (held = Ps{}, found = true) : false), ...);
    return found;
  }

  friend bool operator==(const AnyOf&, const AnyOf&) = default;
};

template <Backend B, class... Ps>
  requires(Scorer<Ps, B>&&...)
void score(B& be, const AnyOf<Ps...>& any, const Observation<B>& seen, Scores out) {
  std::visit([&](const auto& p) { score(be, p, seen, out); }, any.held);
}

template <class... Ps, class F>
decltype(auto) with_policy(const AnyOf<Ps...>& any, F&& f) {
  return std::visit(f, any.held);
}

}  // namespace kvpare
