#include "search.hpp"

#include <algorithm>
#include <cmath>
#include <kvpare/core/error.hpp>
#include <limits>
#include <map>
#include <numeric>
#include <ostream>

namespace tune {

namespace {

kvpare::Form form_of(kvpare::LayerBits::Pair bits, kvpare::TunedMode mode, Index group) {
  if (mode == kvpare::TunedMode::kivi) return kvpare::Kivi::form(bits.keys, bits.values, group);
  return {kvpare::message("int", bits.keys, "_zero"), kvpare::message("int", bits.values, "_zero")};
}

}  // namespace

std::vector<std::vector<Choice>> sensitivities(const std::vector<std::vector<HeadData>>& layers, kvpare::TunedMode mode,
                                               const std::vector<Index>& widths, Index group, Index page_tokens) {
  std::vector<std::vector<Choice>> all;
  for (const auto& heads : layers) {
    std::vector<Choice>& choices = all.emplace_back();
    for (const Index k : widths)
      for (const Index v : widths) choices.push_back({{k, v}});
    for (const HeadData& head : heads) {
      const Trial trial(head);
      std::map<Index, std::vector<float>> keys, values;
      for (const Index w : widths) {
        const kvpare::Form form = form_of({w, w}, mode, group);
        const CodecEntry &of_keys = find_codec(form.keys, group), &of_values = find_codec(form.values, group);
        kvpare::require(of_keys.fits({page_tokens, head.key_dim}) && of_values.fits({page_tokens, head.value_dim}),
                        "search: ", form.keys, "/", form.values, " has no tiles of ", page_tokens, " tokens with ",
                        head.key_dim, " and ", head.value_dim, " channels; try --group 8");
        keys[w] = of_keys.round_trip(head.keys, head.key_dim, page_tokens, head.facts(kvpare::Side::keys));
        values[w] = of_values.round_trip(head.values, head.value_dim, page_tokens, head.facts(kvpare::Side::values));
      }
      for (Choice& c : choices) {
        const Difference d = trial.compare(keys[c.bits.keys], values[c.bits.values]);
        c.e_o += d.e_o / static_cast<double>(heads.size()), c.e_a += d.e_a / static_cast<double>(heads.size());
      }
    }
    std::stable_sort(choices.begin(), choices.end(),
                     [](const Choice& a, const Choice& b) { return a.mean_bits() < b.mean_bits(); });
  }
  return all;
}

std::vector<Choice> pareto(std::vector<Choice> choices) {
  std::stable_sort(choices.begin(), choices.end(), [](const Choice& a, const Choice& b) {
    if (a.mean_bits() != b.mean_bits()) return a.mean_bits() < b.mean_bits();
    return a.e_o != b.e_o ? a.e_o < b.e_o : a.bits.keys > b.bits.keys;
  });
  std::vector<Choice> left;
  for (const Choice& c : choices)
    if (left.empty() || c.e_o < left.back().e_o) left.push_back(c);
  return left;
}

std::vector<std::vector<Index>> group_layers(const std::vector<std::vector<Choice>>& surviving, double distance) {
  const Index n = static_cast<Index>(surviving.size());
  const auto near = [&](Index a, Index b) {
    const auto &x = surviving[static_cast<std::size_t>(a)], &y = surviving[static_cast<std::size_t>(b)];
    if (x.size() != y.size()) return false;
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double most = std::max(x[i].e_o, y[i].e_o);
      if (!(x[i].bits == y[i].bits) || std::abs(x[i].e_o - y[i].e_o) > distance * most) return false;
    }
    return true;
  };
  std::vector<Index> group(static_cast<std::size_t>(n));
  std::iota(group.begin(), group.end(), Index{0});
  for (Index a = 0; a < n; ++a)
    for (Index b = 0; b < a; ++b) {
      if (!near(a, b)) continue;
      const Index from = group[static_cast<std::size_t>(a)], to = group[static_cast<std::size_t>(b)];
      std::replace(group.begin(), group.end(), std::max(from, to), std::min(from, to));
    }
  std::vector<std::vector<Index>> groups;
  for (Index g = 0; g < n; ++g) {
    std::vector<Index> members;
    for (Index l = 0; l < n; ++l)
      if (group[static_cast<std::size_t>(l)] == g) members.push_back(l);
    if (!members.empty()) groups.push_back(std::move(members));
  }
  return groups;
}

std::vector<Found> front(const std::vector<std::vector<Choice>>& surviving, const std::vector<std::vector<Index>>& groups) {
  struct Point {
    double error = std::numeric_limits<double>::infinity();
    std::vector<std::size_t> picked;  // per group
  };
  std::map<Index, Point> best{{0, {0, {}}}};  // bits of keys and values over all layers -> least error
  for (const auto& members : groups) {
    std::map<Index, Point> next;
    const auto& choices = surviving[static_cast<std::size_t>(members[0])];
    for (const auto& [bits, point] : best)
      for (std::size_t c = 0; c < choices.size(); ++c) {
        double error = point.error;
        for (const Index l : members) error += surviving[static_cast<std::size_t>(l)][c].e_o;
        const Index total = bits + static_cast<Index>(members.size()) * (choices[c].bits.keys + choices[c].bits.values);
        Point& at = next[total];
        if (error >= at.error) continue;
        at.error = error, at.picked = point.picked;
        at.picked.push_back(c);
      }
    best = std::move(next);
  }
  std::vector<Found> found;
  for (const auto& [bits, point] : best) {
    if (!found.empty() && point.error >= found.back().error) continue;
    Found f;
    f.bits.layers.resize(surviving.size());
    for (std::size_t g = 0; g < groups.size(); ++g)
      for (const Index l : groups[g])
        f.bits.layers[static_cast<std::size_t>(l)] = surviving[static_cast<std::size_t>(l)][point.picked[g]].bits;
    f.mean_bits = f.bits.mean(), f.error = point.error;
    found.push_back(std::move(f));
  }
  return found;
}

const Found& choose(const std::vector<Found>& front, double most_bits) {
  const Found* chosen = nullptr;
  for (const Found& f : front)
    if (f.mean_bits <= most_bits + 1e-9) chosen = &f;
  kvpare::require(chosen != nullptr, "search: no configuration has at most ", most_bits, " bits; the least is ",
                  front.empty() ? 0.0 : front[0].mean_bits);
  return *chosen;
}

void write_result(std::ostream& out, const Found& chosen, const std::vector<Found>& front, kvpare::TunedMode mode,
                  const std::vector<std::vector<Index>>& groups) {
  const char* name = mode == kvpare::TunedMode::kivi ? "kivi" : "token";
  out << "# Bits of keys and values, layer by layer: mean " << chosen.mean_bits << ", error " << chosen.error
      << " (sum over layers of e_o)\n";
  out << "# Layers that chose together:";
  for (const auto& members : groups) {
    out << " {";
    for (std::size_t i = 0; i < members.size(); ++i) out << (i > 0 ? "," : "") << members[i];
    out << '}';
  }
  out << "\nkvtuner(mode=" << name << ", bits=" << kvpare::print_setting(chosen.bits) << ")\n";
  out << "# The front, mean bits and error:\n";
  for (const Found& f : front)
    out << "#   " << f.mean_bits << "  " << f.error << "  " << kvpare::print_setting(f.bits) << '\n';
}

}  // namespace tune
