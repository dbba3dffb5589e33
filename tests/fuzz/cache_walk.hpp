// A walk over the operations of KvCache, each beside a naive model that keeps every token of every sequence for itself.
// Who chooses the next step is a parameter: random numbers in a test, the bytes of an input in a fuzz target.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include <kvpare/codec/group.hpp>

#include "support/checked_cache.hpp"
#include "support/ranged_codec.hpp"

namespace kvpare::test {

using WalkedFormats = Formats<Pair<Raw<float>, Raw<half>>, Pair<Raw<half>, Raw<half>>>;
using WalkedCache = CheckedCache<WalkedFormats>;

/// Three page sizes, grouped and single heads, a window, a softcap, sinks, and a layer that policies leave alone.
inline Model small_model() {
  const LayerShape plain{.q_heads = 4, .kv_heads = 2, .key_dim = 8, .value_dim = 8, .scale = 0.35f};
  LayerShape sliding{.q_heads = 2, .kv_heads = 2, .key_dim = 4, .value_dim = 12, .scale = 0.5f, .window = 40};
  sliding.softcap = 5;
  LayerShape single{.q_heads = 3, .kv_heads = 1, .key_dim = 16, .value_dim = 4, .scale = 0.25f};
  single.sink_logits = {0.5f, -1, 2};
  LayerShape fixed{.q_heads = 1, .kv_heads = 1, .key_dim = 3, .value_dim = 5, .scale = 0.6f};
  fixed.compress = false;
  return {{plain, sliding, single, fixed}};
}

/// Rows that move and rows that do not, keys coded before their values, a state; the last is keys per row with values in
/// groups of tokens.
using MixedFormats = Formats<Pair<Raw<float>, Raw<half>>, Pair<Int8, Int8>, Pair<Symmetric<4, 16>, Int3>,
                             Pair<KiviKeys<2, 16>, Raw<half>>, Pair<KiviKeys<2, 16>, KiviValues<2, 16>>,
                             Pair<Ranged, Ranged>, Pair<Int8, Raw<half>>, Pair<Int8, KiviKeys<4, 16>>>;
enum : int {
  mixed_raw,
  mixed_int8,
  mixed_int4,
  mixed_kivi_keys,
  mixed_kivi,
  mixed_ranged,
  mixed_row_keys,
  mixed_row_tile
};
using MixedCache = CheckedCache<MixedFormats>;

/// As small_model, in widths that all codecs have tiles for.
inline Model mixed_model() {
  const LayerShape plain{.q_heads = 4, .kv_heads = 2, .key_dim = 16, .value_dim = 16, .scale = 0.35f};
  LayerShape sliding{.q_heads = 2, .kv_heads = 2, .key_dim = 16, .value_dim = 32, .scale = 0.5f, .window = 40};
  sliding.softcap = 5;
  LayerShape single{.q_heads = 3, .kv_heads = 1, .key_dim = 32, .value_dim = 16, .scale = 0.25f};
  single.sink_logits = {0.5f, -1, 2};
  LayerShape fixed{.q_heads = 1, .kv_heads = 1, .key_dim = 16, .value_dim = 16, .scale = 0.6f};
  fixed.compress = false;
  return {{plain, sliding, single, fixed}};
}

struct WalkOptions {
  std::size_t most_sequences = 6;
  Index most_tokens = 150;  // per head; then a sequence is more often made shorter
  bool alone = true;        // the pool is nobody else's, so its totals are ours
};

/// One thread's walk over its sequences. `Choices` draws like Dice: unit, below, within, chance.
template <class Choices, class Checked = WalkedCache>
class Walk {
 public:
  Walk(Checked& checked, Choices& choices, WalkOptions options) : c_(checked), dice_(choices), options_(options) {}

  Index steps_that_evicted = 0;  // of decode
  Index tokens_tiered = 0, steps_that_demoted = 0;

  void step(Index number) {
    if (c_.held.empty() || (c_.held.size() < options_.most_sequences && dice_.chance(0.02))) c_.create();
    const SequenceId id = any_sequence();
    if constexpr (Checked::mixed) {
      if (dice_.chance(0.25)) return change_forms(id, number);
    }
    const Index kind = dice_.below(100);
    const bool tight = full_ || longest(id) > options_.most_tokens;
    if (kind < 45 && !tight)
      append(id);
    else if (kind < 55 && !full_)
      decode(id);
    else if (kind < 63)
      truncate(id);
    else if (kind < 70)
      c_.commit(c_.random_plan(id, dice_.unit()), options_.alone);
    else if (kind < 78)
      partial_commit(id);
    else if (kind < 88)
      compress(id);
    else if (kind < 91)
      tag(id);
    else if (kind < 95 && c_.held.size() < options_.most_sequences)
      c_.fork(id);
    else if (kind < 97 && (tight || dice_.chance(0.3)))
      c_.release(id);
    else if (kind < 98)
      stale_plan(id);
    else if (c_.held.size() < options_.most_sequences)
      full_ = !c_.reload(id, options_.alone);

    verify(id, number);
  }

 private:
  void verify(SequenceId id, Index number) {
    if (!c_.held.contains(id)) return;
    c_.verify(id);
    if (number % 8 == 0) c_.verify_attend(id, dice_.below(c_.cache.layers()));
    if (number % 16 == 0) c_.verify_rows(id);
    if (number % 16 == 0 && options_.alone) c_.verify_pool();
  }

  // ---- forms

  void change_forms(SequenceId id, Index number) {
    const Index kind = dice_.below(10);
    if (kind < 4)
      commit_tiers(id);
    else if (kind < 6)
      c_.set_aging(id, dice_.below(c_.cache.layers()), any_aging());
    else if (kind < 7)
      c_.age(id, options_.alone);
    else if (!full_)
      demote(id);
    verify(id, number);
  }

  Aging any_aging() {
    Aging a;
    if (dice_.chance(0.1)) return a;
    constexpr int forms[] = {mixed_int8, mixed_int4, mixed_kivi, mixed_ranged, mixed_row_tile};
    a.format = forms[dice_.below(5)];
    a.keep_raw_values = dice_.below(30), a.flush_values = dice_.within(1, 20);
    if (dice_.chance(0.5))
      a.keys_first = a.format == mixed_kivi                                 ? mixed_kivi_keys
                     : a.format == mixed_int8 || a.format == mixed_row_tile ? mixed_row_keys
                                                                            : -1;
    if (a.keys_first >= 0) a.keep_raw_keys = dice_.below(20), a.flush_keys = dice_.within(1, 40);
    if (dice_.chance(0.2)) a.classes = visual;
    if (dice_.chance(0.3)) a.sinks = dice_.below(20);
    return a;
  }

  /// Some tokens into one to three forms, some evicted in the same plan, at times with a rule for their age.
  void commit_tiers(SequenceId id) {
    Plan plan = dice_.chance(0.4) ? c_.random_plan(id, dice_.unit()) : c_.empty_plan(id);
    for (Index l = 0; l < c_.cache.layers(); ++l) {
      LayerPlan& lp = plan.layers[static_cast<std::size_t>(l)];
      if (dice_.chance(0.3)) continue;
      const auto lists = c_.cache.pages(id, l);
      const Index count = dice_.within(1, 3);
      std::vector<int> formats{mixed_int8,   mixed_int4,     mixed_kivi_keys, mixed_kivi,
                               mixed_ranged, mixed_row_keys, mixed_row_tile};
      for (Index t = 0; t < count; ++t) {
        const auto at = formats.begin() + dice_.below(std::ssize(formats));
        lp.tiers.push_back({.format = *at, .fresh_state = dice_.chance(0.3)});
        formats.erase(at);
      }
      const double share = dice_.unit();
      const Index stretch = dice_.chance(0.5) ? 1 : dice_.within(1, 40);  // neighbours that go together
      for (std::size_t h = 0; h < lists.size(); ++h) {
        for (Tier& tier : lp.tiers) tier.tokens.emplace_back(static_cast<Index>(lists[h].entries.size()));
        Index chosen = -1, left = 0;
        for (std::size_t e = 0; e < lists[h].entries.size(); ++e)
          for_each_bit(lists[h].entries[e].live, [&](Index slot) {
            if (left-- <= 0) chosen = dice_.chance(share) ? dice_.below(count) : -1, left = stretch;
            if (chosen >= 0)
              lp.tiers[static_cast<std::size_t>(chosen)].tokens[h].insert(static_cast<Index>(e), slot), ++tokens_tiered;
          });
      }
      if (dice_.chance(0.2)) lp.aging = any_aging();
    }
    c_.commit(plan, options_.alone);
    full_ = false;
  }

  /// A decode step whose method keeps the rest in another form.
  void demote(SequenceId id) {
    AnyCompressor method = make_compressor(dice_.chance(0.5) ? "h2o" : dice_.chance(0.5) ? "streaming_llm" : "tova");
    method.keep = Keep::tokens(dice_.below(200));
    constexpr int forms[] = {mixed_int8, mixed_int4, mixed_ranged};
    const int to = forms[dice_.below(3)];
    MixedFormats::for_each([&]<class P>(int format, P) {
      if (format == to)
        method.precision = Mikv{.low = Form(P::Key::name, P::Value::name), .high = {}, .block = dice_.within(1, 20)};
    });
    const Index l = dice_.below(c_.cache.layers());
    if (method.scorer.reads().streams) c_.observe(id, l, method, std::numeric_limits<Index>::max());
    const Position next = static_cast<Position>(c_.model(id, l).last() + 1);
    full_ = c_.append(id, l, Positions{next}) == Outcome::pool_full;
    if (full_) return;
    const Index before = c_.model(id, l).tokens();
    const auto settled = [&] {
      Index n = 0;
      for (const HeadPages& list : c_.cache.pages(id, l))
        for (const Entry& e : list.entries) n += e.format == to ? std::popcount(e.live) : 0;
      return n;
    };
    const Index settled_before = settled();
    const std::string refusal = c_.decode(id, l, method, {next}, options_.alone);
    if (!refusal.empty()) {
      EXPECT_TRUE(refusal.find("has not seen") != std::string::npos ||
                  refusal.find("holds other tokens") != std::string::npos)
          << refusal;
      return;
    }
    EXPECT_EQ(c_.model(id, l).tokens(), before);
    steps_that_demoted += settled() > settled_before;
  }

  SequenceId any_sequence() {
    auto at = c_.held.begin();
    std::advance(at, dice_.below(std::ssize(c_.held)));
    return at->first;
  }

  Index longest(SequenceId id) {
    Index n = 0;
    for (const oracle::CachedLayer& layer : c_.held.at(id)) n = std::max(n, layer.most_tokens());
    return n;
  }

  /// Mostly single tokens and short prompts; mostly the next positions, at times a few left out, or so many that a page
  /// cannot span them.
  void append(SequenceId id) {
    const bool all_layers = dice_.chance(0.3);
    const Index only = dice_.below(c_.cache.layers());
    const Index count = dice_.chance(0.6) ? 1 : dice_.within(0, 70);
    for (Index l = 0; l < c_.cache.layers(); ++l) {
      if (!all_layers && l != only) continue;
      Index next = c_.model(id, l).last() + 1;
      if (next > 1 << 30) return c_.truncate(id, 0);
      const double gaps = dice_.chance(0.7) ? 0 : dice_.unit();
      Positions positions;
      for (Index t = 0; t < count; ++t) {
        if (dice_.chance(gaps)) next += dice_.chance(0.05) ? dice_.within(60000, 70000) : dice_.within(1, 9);
        positions.push_back(static_cast<Position>(next++));
      }
      full_ = c_.append(id, l, positions, dice_.chance(0.5) ? DType::f32 : DType::f16) == Outcome::pool_full;
    }
  }

  void truncate(SequenceId id) {
    const Index last = c_.model(id, dice_.below(c_.cache.layers())).last();
    c_.truncate(id, static_cast<Position>(dice_.chance(0.8) ? std::max<Index>(0, last - dice_.below(12))
                                                            : dice_.within(0, last + 2)));
    full_ = false;
  }

  /// Some layers only, some heads down to nothing.
  void partial_commit(SequenceId id) {
    Plan plan = c_.random_plan(id, dice_.chance(0.5) ? 0.95 : 0.3);
    for (LayerPlan& layer : plan.layers) {
      if (dice_.chance(0.5)) layer = {};
      for (Selection& keep : layer.keep)
        if (dice_.chance(0.2)) keep = Selection(keep.entries());
    }
    c_.commit(plan, options_.alone);
    full_ = false;
  }

  void stale_plan(SequenceId id) {
    Plan plan = c_.random_plan(id, 0.5);
    c_.tag(id, {.begin = 0, .end = 1});
    const Counted before = c_.counted(id);
    EXPECT_NE(error_of([&] { (void)c_.cache.commit(plan); }).find("stale"), std::string::npos);
    EXPECT_EQ(c_.counted(id), before);
  }

  void tag(SequenceId id) {
    const Index begin = dice_.within(0, std::max<Index>(1, c_.model(id, 0).last()));
    c_.tag(id,
           {.begin = static_cast<Position>(begin),
            .end = static_cast<Position>(begin + dice_.within(1, 60)),
            .token_class = dice_.chance(0.6) ? TokenClass::image : static_cast<TokenClass>(dice_.below(token_classes)),
            .is_protected = dice_.chance(0.2)});
  }

  AnyCompressor any_method() {
    const auto recipes = known_recipes();
    AnyCompressor method = recipes[static_cast<std::size_t>(dice_.below(std::ssize(recipes)))].compressor;
    const Index amount = dice_.below(300);
    switch (dice_.below(4)) {
      case 0:
        method.keep = Keep::tokens(amount);
        break;
      case 1:
        method.keep = Keep::pages(amount / 8);
        break;
      case 2:
        method.keep = Keep::bytes(amount * 512);
        break;
      default:
        method.keep = Keep::ratio(dice_.unit());
    }
    const ClassSet classes[] = {all_tokens, visual, text, visual | text};
    method.selector.among = classes[dice_.below(4)];
    if (dice_.chance(0.5)) method.selector.heads = static_cast<SelectHeads>(dice_.below(3));
    if (dice_.chance(0.3)) method.selector.recent_share = dice_.unit();
    method.selector.skip_layers = 0;  // there are few
    return method;
  }

  /// Some tokens and their rows, mostly with a method that acts here.
  void decode(SequenceId id) {
    const Index l = dice_.below(c_.cache.layers());
    AnyCompressor method = any_method();
    for (int tries = 0; tries < 20 && !acts_at_decode(method); ++tries) method = any_method();
    if (method.scorer.reads().streams && dice_.chance(0.7))
      c_.observe(id, l, method, std::numeric_limits<Index>::max());  // else it may find tokens it has not seen
    Positions positions(static_cast<std::size_t>(dice_.chance(0.7) ? 1 : dice_.within(1, 4)));
    std::iota(positions.begin(), positions.end(), static_cast<Position>(c_.model(id, l).last() + 1));
    full_ = c_.append(id, l, positions) == Outcome::pool_full;
    if (full_) return;

    const oracle::CachedLayer before = c_.model(id, l);
    const Index held = before.tokens();
    const std::string refusal = c_.decode(id, l, method, positions, options_.alone);
    if (refusal.empty()) {
      steps_that_evicted += c_.model(id, l).tokens() < held;
      verify_evicted(id, l, method, before);
      return;
    }
    const bool acts = acts_at_decode(method);
    EXPECT_TRUE(!acts || refusal.find("has not seen") != std::string::npos ||
                refusal.find("holds other tokens") != std::string::npos ||
                refusal.find("one row at a time") != std::string::npos)
        << refusal;
  }

  /// Every head holds its budget, and what may not be evicted stays.
  void verify_evicted(SequenceId id, Index l, const AnyCompressor& method, const oracle::CachedLayer& before) {
    const Tags& tags = c_.cache.tags(id);
    const auto member = [&](Index p) { return method.selector.among.has(tags.class_of(static_cast<Position>(p))); };
    Index layers = 0, place = 0;  // that share the total
    for (Index other = 0; other < c_.cache.layers(); ++other)
      if (c_.shape(other).compress) place += other < l, ++layers;
    const Index given = std::count_if(before.given.begin(), before.given.end(), member);
    const Index total =
        method.keep.unit == Keep::Unit::tokens
            ? static_cast<Index>(method.keep.amount)
            : static_cast<Index>(std::floor(method.keep.amount * static_cast<double>(given * layers) + 0.5));
    const Index budget = total / layers + (place < total % layers);
    for (Index h = 0; h < c_.shape(l).kv_heads; ++h) {
      const std::vector<Index> after = c_.model(id, l).positions(h);
      Index members = 0, reserved = 0, left = 0;
      for (const Index p : before.positions(h)) {
        const TagSpan* span = tags.find(static_cast<Position>(p));
        const bool stays = std::binary_search(after.begin(), after.end(), p);
        ASSERT_TRUE(stays || (member(p) && !(span != nullptr && span->is_protected) && c_.shape(l).compress))
            << "layer " << l << " head " << h << " lost position " << p;
        members += member(p), reserved += member(p) && span != nullptr && span->is_protected,
            left += member(p) && stays;
      }
      if (c_.shape(l).compress && budget_is_even(method)) {
        ASSERT_TRUE(is_wanted(left, members, std::max(budget, reserved), reserved, method.selector))
            << "layer " << l << " head " << h << " budget " << budget << ", " << left << " of " << members << " left";
      }
    }
  }
  /// Did as many tokens stay as the budget says? More where the ends of the list, or samples of what goes, stay anyway;
  /// fewer where tokens go though there is room.
  static bool is_wanted(Index stayed, Index candidates, Index budget, Index reserved, const TopK& selector,
                        Index heads = 1) {
    const Index ends = heads * (selector.first + selector.last);
    const Index samples = selector.recover > 0 ? candidates / selector.recover + heads : 0;
    const Index most = heads > 1 ? budget + ends + samples : std::max({budget, reserved + ends, samples});
    return stayed <= std::min(candidates, most) && (selector.only_positive || stayed >= std::min(candidates, budget));
  }
  static bool budget_is_even(const AnyCompressor& method) {
    return std::holds_alternative<Uniform>(method.budget.held);
  }

  void compress(SequenceId id) {
    const AnyCompressor method = any_method();

    std::vector<Index> scored_to;  // last position that has a score, per layer
    const bool unobserved = method.scorer.reads().cache_only();
    if (!unobserved) c_.observe_all(id, method, [&] { return dice_.within(1, 80); });
    for (Index l = 0; l < c_.cache.layers(); ++l) scored_to.push_back(c_.model(id, l).last());
    if (dice_.chance(0.3)) append(id);  // tokens without a score
    if (unobserved) scored_to.assign(scored_to.size(), std::numeric_limits<Position>::max());
    if (!observed(id, method)) {
      c_.commit(c_.empty_plan(id), options_.alone);  // so that another policy may observe
      return;
    }

    const Counted before = c_.counted(id);
    const Plan plan = c_.cache.plan(id, method);
    EXPECT_EQ(c_.counted(id), before);
    verify_plan(id, method, plan, scored_to);
    c_.commit(plan, options_.alone);
    full_ = false;
  }

  /// False when tokens came to a layer after all of its own had been evicted, so that nothing could be observed.
  bool observed(SequenceId id, const AnyCompressor& method) {
    if (method.scorer.reads().cache_only()) return true;
    try {
      (void)c_.cache.plan(id, method);
      return true;
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find("was not observed"), std::string::npos) << e.what();
      return false;
    }
  }

  /// Budgets are exact, and what may not be evicted stays.
  void verify_plan(SequenceId id, const AnyCompressor& method, const Plan& plan, const std::vector<Index>& scored_to) {
    if (method.keep == Keep::ratio(1)) return;
    const Tags& tags = c_.cache.tags(id);
    const auto member = [&](Index p) { return method.selector.among.has(tags.class_of(static_cast<Position>(p))); };
    Index granted = 0, given = 0, available = 0;
    for (Index l = 0; l < c_.cache.layers(); ++l) {
      const LayerPlan& of_layer = plan.layers[static_cast<std::size_t>(l)];
      const oracle::CachedLayer& model = c_.model(id, l);
      ASSERT_EQ(of_layer.touched, c_.shape(l).compress && model.tokens() > 0) << "layer " << l;
      if (!of_layer.touched) continue;
      const auto lists = c_.cache.pages(id, l);
      Index most = 0, chosen_in_layer = 0, left_in_layer = 0, candidates_in_layer = 0;
      for (Index h = 0; h < c_.shape(l).kv_heads; ++h) {
        const Positions kept =
            positions_of(lists[static_cast<std::size_t>(h)], of_layer.keep[static_cast<std::size_t>(h)]);
        Index members = 0, candidates = 0, chosen = 0;
        for (const Index p : model.positions(h)) {
          const TagSpan* span = tags.find(static_cast<Position>(p));
          const bool up_for_choice =
              member(p) && !(span != nullptr && span->is_protected) && p <= scored_to[static_cast<std::size_t>(l)];
          const bool stays = std::binary_search(kept.begin(), kept.end(), static_cast<Position>(p));
          ASSERT_TRUE(stays || up_for_choice) << "layer " << l << " head " << h << " lost position " << p;
          members += member(p), candidates += up_for_choice, chosen += up_for_choice && stays;
        }
        const Index left = std::max<Index>(0, of_layer.budget - (members - candidates));
        if (method.selector.heads != SelectHeads::shared) {
          ASSERT_TRUE(is_wanted(chosen, candidates, left, 0, method.selector))
              << method.scorer.held_name() << ", layer " << l << " head " << h << " budget " << of_layer.budget << ", " << chosen << " of " << candidates;
        }
        chosen_in_layer += chosen, left_in_layer += left, candidates_in_layer += candidates;
        most = std::max(most, members);
      }
      if (method.selector.heads == SelectHeads::shared) {
        ASSERT_TRUE(is_wanted(chosen_in_layer, candidates_in_layer, left_in_layer, 0, method.selector, c_.shape(l).kv_heads))
            << method.scorer.held_name() << ", layer " << l << ": " << chosen_in_layer << " of " << candidates_in_layer;
      }
      granted += of_layer.budget, available += most;
      given += std::count_if(model.given.begin(), model.given.end(), member);
    }
    const Index amount = static_cast<Index>(method.keep.amount);
    switch (method.keep.unit) {
      case Keep::Unit::ratio:
        ASSERT_EQ(
            granted,
            std::min(available, static_cast<Index>(std::floor(method.keep.amount * static_cast<double>(given) + 0.5))));
        break;
      case Keep::Unit::tokens:
        ASSERT_EQ(granted, std::min(available, amount));
        break;
      case Keep::Unit::pages:
        ASSERT_LE(granted, amount * c_.cache.page_tokens());
        break;
      case Keep::Unit::bytes:
        ASSERT_LE(granted * 64, amount) << "the smallest token takes 64 bytes over all heads";
    }
  }

  Checked& c_;
  Choices& dice_;
  WalkOptions options_;
  bool full_ = false;
};

}  // namespace kvpare::test
