#include "learn.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <kvpare/codec/unrotated.hpp>
#include <kvpare/runtime/make_compressor.hpp>

#include "dictionary.hpp"
#include "support/format_list.hpp"
#include "trial.hpp"

namespace tune {
namespace {

using kvpare::require;
using kvpare::Side;

using LayerHeads = std::vector<std::vector<HeadData>>;  // [layer][kv head] of a trace

/// Rows of one head of one side, of all prompts, one after the other.
struct Rows {
  std::vector<float> numbers;
  Index width = 0;
  kvpare::RoundTripFacts facts;

  void add(const Rows& more) {
    numbers.insert(numbers.end(), more.numbers.begin(), more.numbers.end());
    facts.positions.insert(facts.positions.end(), more.facts.positions.begin(), more.facts.positions.end());
  }
};

struct LearntSide {
  std::vector<float> states;
  double snr = 0;
};

/// The codec of rows, and whether these are as they were before RoPE.
template <class C>
struct CodesOf {
  using type = C;
  static constexpr bool before_rope = false;
};
template <class Inner>
struct CodesOf<kvpare::Unrotated<Inner>> {
  using type = Inner;
  static constexpr bool before_rope = true;
};

/// Does a codec take atoms that are learnt for many prompts?
template <class C>
constexpr bool takes_atoms() {
  if constexpr (requires { C::shared_atoms; })
    return C::shared_atoms > 0;
  else
    return false;
}

template <class C>
LearntSide learn_atoms(Rows all, Index rounds) {
  using Codes = typename CodesOf<C>::type;
  if constexpr (CodesOf<C>::before_rope)
    for (std::size_t t = 0; t < all.facts.positions.size(); ++t)
      all.facts.rope.unrotate(all.numbers.data() + static_cast<Index>(t) * all.width, all.facts.positions[t]);
  const Dictionary learnt =
      learn_dictionary(all.numbers, all.width / Codes::chunk_count,
                       {.atoms = Codes::shared_atoms, .nonzeros = Codes::atoms_per_chunk, .rounds = rounds});
  const Index given = kvpare::given_floats<C>(all.width);
  LearntSide side;
  side.states.resize(static_cast<std::size_t>(given > 0 ? given : kvpare::state_floats<C>(all.width)));
  float* atoms = side.states.data();
  if constexpr (CodesOf<C>::before_rope)
    if (given == 0) {  // else the cache adds the rotation, with the atoms of the prompt
      kvpare::Rotation::write_state(all.width, all.facts.rope, atoms);
      atoms += C::own_state_floats(all.width);
    }
  const std::vector<kvpare::half> halves(learnt.atoms.begin(), learnt.atoms.end());
  std::memcpy(atoms, halves.data(), halves.size() * 2);
  side.snr = -10 * std::log10(*std::min_element(learnt.errors.begin(), learnt.errors.end()));
  return side;
}

/// What the codec makes of each head's rows, or of those of all.
template <class C>
LearntSide learn_own(const std::vector<Rows>& heads, Index page_tokens) {
  LearntSide side;
  std::vector<float> given, coded;
  for (const Rows& head : heads) {
    const std::vector<float> state = kvpare::made_state<C>(head.numbers, head.width, head.facts);
    const auto back = kvpare::round_trip_with<C>(state.data(), head.numbers, head.width, page_tokens, head.facts);
    given.insert(given.end(), head.numbers.begin(), head.numbers.end());
    coded.insert(coded.end(), back.begin(), back.end());
    side.states.insert(side.states.end(), state.begin(), state.end());
  }
  side.snr = snr(given, coded);
  return side;
}

template <kvpare::Codec C>
LearntSide learn_side(std::vector<Rows> heads, const LearnRules& rules) {
  if constexpr (kvpare::state_of_layer<C>()) {
    for (std::size_t h = 1; h < heads.size(); ++h) heads[0].add(heads[h]);
    heads.resize(1);
  }
  if constexpr (takes_atoms<typename CodesOf<C>::type>())
    return learn_atoms<C>(std::move(heads[0]), rules.rounds);
  else if constexpr (kvpare::MakesState<C>)
    return learn_own<C>(heads, rules.page_tokens);
  else
    return {};
}

/// Rows of all heads of layers [first, end), of all traces one after the other: [layers * heads].
std::vector<Rows> rows_of(const std::vector<LayerHeads>& traces, Index first, Index end, Side side,
                          const std::vector<float>& numbers) {
  std::vector<Rows> heads;
  for (Index l = first; l < end; ++l)
    for (std::size_t h = 0; h < traces[0][static_cast<std::size_t>(l)].size(); ++h) {
      Rows& all = heads.emplace_back();
      for (const LayerHeads& layers : traces) {
        const HeadData& head = layers[static_cast<std::size_t>(l)][h];
        all.width = side == Side::keys ? head.key_dim : head.value_dim;
        all.facts.positions.insert(all.facts.positions.end(), head.positions.begin(), head.positions.end());
        const std::vector<float>& rows = side == Side::keys ? head.keys : head.values;
        all.numbers.insert(all.numbers.end(), rows.begin(), rows.end());
        if (side == Side::keys && head.rope) all.facts.rope = head.rope->view();
      }
      all.facts.numbers = numbers;
    }
  return heads;
}

/// Does a codec make a state that another prompt's tokens could have as well? Not where it goes by queries, or by tokens that stay
/// as they are. One without a state has nothing against it.
template <kvpare::Codec C>
constexpr bool learns() {
  return !kvpare::needs_query_peak<C>() && !kvpare::needs_query_window<C>() && !kvpare::ranges_of_all<C>();
}
template <kvpare::Codec C>
constexpr bool has_state() {
  return kvpare::state_floats<C>(64) > 0 && (kvpare::MakesState<C> || takes_atoms<typename CodesOf<C>::type>());
}

template <kvpare::Codec C>
void check_share(Index share) {
  require(share == 1 || kvpare::state_of_layer<C>() || !has_state<C>(), "--share = ", share, ": of ", C::name,
          " every head has a state, must be 1");
}

template <class P>
void learn_layers(const std::vector<LayerHeads>& traces, const kvpare::Model& model,
                  const std::vector<float>& numbers, const LearnRules& rules, Learnt& learnt) {
  using K = typename P::Key;
  using V = typename P::Value;
  check_share<K>(rules.share), check_share<V>(rules.share);
  const Index layers = std::ssize(model.layers);
  for (Index first = 0, end; first < layers; first = end) {
    end = std::min(first + rules.share, layers);
    for (Index l = first; l < end; ++l) {
      const kvpare::LayerShape &shape = model.layers[static_cast<std::size_t>(l)],
                               &of_first = model.layers[static_cast<std::size_t>(first)];
      require(shape.kv_heads == of_first.kv_heads && shape.key_dim == of_first.key_dim && shape.value_dim == of_first.value_dim,
              "--share: layer ", l, " has ", shape.kv_heads, " kv heads, ", shape.key_dim, " and ", shape.value_dim,
              " channels, layer ", first, " has not; layers that share must be alike");
      require(K::fits({rules.page_tokens, shape.key_dim}) && V::fits({rules.page_tokens, shape.value_dim}), "--learn: layer ", l, ": no ",
              print_setting(learnt.states.form), " of ", shape.key_dim, " and ", shape.value_dim, " channels");
      if (kvpare::needs_rope<K>()) kvpare::plain_rope_of(shape, l, "--learn");
    }
    const LearntSide keys = learn_side<K>(rows_of(traces, first, end, Side::keys, numbers), rules);
    const LearntSide values = learn_side<V>(rows_of(traces, first, end, Side::values, numbers), rules);
    for (Index l = first; l < end; ++l) {
      learnt.states.layers.push_back({keys.states, values.states});
      learnt.key_snr.push_back(keys.snr), learnt.value_snr.push_back(values.snr);
    }
  }
}

}  // namespace

Learnt learn_states(const std::string& policy, const std::vector<example::Trace>& traces, const LearnRules& rules) {
  require(!traces.empty(), "--learn needs --trace FILE: what should it learn from?");
  const kvpare::Model model = traces[0].model();
  std::vector<LayerHeads> data;
  for (const example::Trace& trace : traces) {
    require(trace.model().layers == model.layers, "--learn: the traces are of different models");
    data.push_back(trace_data(trace, 1));
  }
  const kvpare::Precision precision = kvpare::precision_of(kvpare::make_compressor(policy), std::ssize(model.layers));
  require(precision.rest.as_appended() && precision.layers.empty() && precision.choice.empty(), "--learn: ", policy,
          " gives tokens more than one form; learn of one that gives them one");
  Learnt learnt;
  learnt.states.form = precision.kept;
  bool found = false;
  example::ModelFormats<float, 32>::for_each([&](int, auto pair) {
    using P = decltype(pair);
    if (found || learnt.states.form != kvpare::Form(P::Key::name, P::Value::name)) return;
    found = true;
    using K = typename P::Key;
    using V = typename P::Value;
    if constexpr ((has_state<K>() || has_state<V>()) && learns<K>() && learns<V>())
      learn_layers<P>(data, model, precision.numbers, rules, learnt);
    else
      kvpare::fail(kvpare::message("--learn: ", print_setting(learnt.states.form),
                                   " has nothing to learn that is not a prompt's own"));
  });
  require(found, "--learn: ", policy, " gives tokens the form ", print_setting(precision.kept),
          ", which is none of those that kvpare_story --list and kvpare_vlm --list show");
  return learnt;
}

}  // namespace tune
