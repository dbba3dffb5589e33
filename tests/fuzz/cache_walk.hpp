// A walk over the operations of KvCache, each beside a naive model that keeps every token of every sequence for itself.
// Who chooses the next step is a parameter: random numbers in a test, the bytes of an input in a fuzz target.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "support/checked_cache.hpp"

namespace kvpare::test {

using WalkedCache = CheckedCache<Formats<Pair<Raw<float>, Raw<half>>, Pair<Raw<half>, Raw<half>>>>;

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

struct WalkOptions {
  std::size_t most_sequences = 6;
  Index most_tokens = 150;  // per head; then a sequence is more often made shorter
  bool alone = true;        // the pool is nobody else's, so its totals are ours
};

/// One thread's walk over its sequences. `Choices` draws like Dice: unit, below, within, chance.
template <class Choices>
class Walk {
 public:
  Walk(WalkedCache& checked, Choices& choices, WalkOptions options) : c_(checked), dice_(choices), options_(options) {}

  Index steps_that_evicted = 0;  // of decode

  void step(Index number) {
    if (c_.held.empty() || (c_.held.size() < options_.most_sequences && dice_.chance(0.02))) c_.create();
    const SequenceId id = any_sequence();
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

    if (!c_.held.contains(id)) return;
    c_.verify(id);
    if (number % 8 == 0) c_.verify_attend(id, dice_.below(c_.cache.layers()));
    if (number % 16 == 0) c_.verify_rows(id);
    if (number % 16 == 0 && options_.alone) c_.verify_pool();
  }

 private:
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
    return method;
  }

  /// Some tokens and their rows, mostly with a method that acts here.
  void decode(SequenceId id) {
    const Index l = dice_.below(c_.cache.layers());
    AnyCompressor method = any_method();
    for (int tries = 0; tries < 5 && !acts_at_decode(method); ++tries) method = any_method();
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
        ASSERT_EQ(left, std::min(members, std::max(budget, reserved)))
            << "layer " << l << " head " << h << " budget " << budget;
      }
    }
  }
  static bool budget_is_even(const AnyCompressor& method) {
    return std::holds_alternative<Uniform>(method.budget.held);
  }

  void compress(SequenceId id) {
    const AnyCompressor method = any_method();

    std::vector<Index> scored_to;  // last position that has a score, per layer
    const bool unobserved = method.scorer.reads().rows == Reads::Rows::none;
    for (Index l = 0; l < c_.cache.layers(); ++l) {
      if (!unobserved) c_.observe(id, l, method, dice_.within(1, 80));
      scored_to.push_back(c_.model(id, l).last());
    }
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
    if (method.scorer.reads().rows == Reads::Rows::none) return true;
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
          ASSERT_EQ(chosen, std::min(candidates, left))
              << "layer " << l << " head " << h << " budget " << of_layer.budget;
        }
        chosen_in_layer += chosen, left_in_layer += left, candidates_in_layer += candidates;
        most = std::max(most, members);
      }
      if (method.selector.heads == SelectHeads::shared) {
        ASSERT_EQ(chosen_in_layer, std::min(candidates_in_layer, left_in_layer)) << "layer " << l;
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

  WalkedCache& c_;
  Choices& dice_;
  WalkOptions options_;
  bool full_ = false;
};

}  // namespace kvpare::test
