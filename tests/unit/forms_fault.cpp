// Memory runs out while tokens change their form: the pool's at every size in turn, the host's and the backend's at every
// allocation in turn. No token is lost or read otherwise than its form says, no page leaks, and what comes next succeeds.
#include <gtest/gtest.h>

#include <kvpare/codec/group.hpp>
#include <kvpare/policy/budget/uniform.hpp>
#include <kvpare/policy/score/accumulated_attention.hpp>
#include <kvpare/policy/select/top_k.hpp>

#include "support/checked_cache.hpp"
#include "support/failing_memory.hpp"
#include "support/ranged_codec.hpp"

namespace kvpare::test {
namespace {

enum : int { raw, int8, kivi_keys, kivi, ranged };
using Float = Raw<float>;
using Checked = CheckedCache<Formats<Pair<Float, Float>, Pair<Int8, Int8>, Pair<KiviKeys<2, 16>, Float>,
                                     Pair<KiviKeys<2, 16>, KiviValues<2, 16>>, Pair<Ranged, Ranged>>,
                             FailingBackend>;

FailingBackend& backend() {
  static FailingBackend one({.threads = 1});
  return one;
}

Model two_layers() {
  return {{{.q_heads = 4, .kv_heads = 2, .key_dim = 16, .value_dim = 16, .scale = 0.35f},
           {.q_heads = 2, .kv_heads = 1, .key_dim = 16, .value_dim = 32, .scale = 0.5f}}};
}

/// Tokens by thirds into forms, some evicted, layer 1 with a rule for its age.
Plan mixed_plan(Checked& c, SequenceId id, bool evicts) {
  Plan plan = evicts ? c.random_plan(id, 0.8) : c.empty_plan(id);
  for (Index l = 0; l < 2; ++l) {
    LayerPlan& lp = plan.layers[static_cast<std::size_t>(l)];
    for (const int format : {int8, ranged, kivi}) {
      Tier tier{.format = format};
      for (const HeadPages& list : c.cache.pages(id, l)) {
        Selection& s = tier.tokens.emplace_back(static_cast<Index>(list.entries.size()));
        for (std::size_t e = 0; e < list.entries.size(); ++e)
          for_each_bit(list.entries[e].live, [&](Index slot) {
            const Position p = list.position(list.entries[e], slot);
            if (list.entries[e].format == raw && (p < 32       ? kivi
                                                  : p % 3 == 0 ? int8
                                                  : p % 3 == 1 ? ranged
                                                               : raw) == format)
              s.insert(static_cast<Index>(e), slot);
          });
      }
      lp.tiers.push_back(std::move(tier));
    }
  }
  plan.layers[1].aging = Aging{.format = kivi, .keys_first = kivi_keys, .flush_keys = 16, .keep_raw_values = 20};
  return plan;
}

/// What is left of a sequence after a failure: the tokens that `stay` in some head, or all; each reads as its form says.
void settle_after_failure(Checked& c, SequenceId id, const Plan* plan) {
  for (Index l = 0; l < 2; ++l) {
    if (plan != nullptr && plan->layers[static_cast<std::size_t>(l)].aging)
      c.ages[id][l] = *plan->layers[static_cast<std::size_t>(l)].aging;
    for (Index h = 0; h < c.shape(l).kv_heads; ++h) {
      const Positions kept = c.cache.kept(id, l, h);
      const std::vector<Index> had = c.model(id, l).positions(h);
      if (kept.size() == had.size()) continue;
      ASSERT_TRUE(plan != nullptr && plan->layers[static_cast<std::size_t>(l)].touched) << "a token is lost";
      c.model(id, l).keep(h, {kept.begin(), kept.end()});
    }
    (void)c.settle(id, l, 0, true);
  }
  c.verify_all();
}

/// Of these formats and shapes.
Index chunk_bytes() {
  Index chunk = 1 << 10;
  for (;; chunk += 64) {
    try {
      const Checked::Cache cache(backend(), two_layers(), {.page_tokens = 16, .pool_bytes = chunk});
      return chunk;
    } catch (const InvalidArgument&) {  // less than a chunk
    }
  }
}

TEST(FormsFault, EveryPoolSizeInTurn) {
  Index refused = 0, waited = 0, changed = 0;
  const Index chunk = chunk_bytes();
  for (Index chunks = 2; chunks <= 30; chunks += chunks < 12 ? 1 : 3) {
    const Index pool_bytes = chunks * chunk;
    Checked c(backend(), two_layers(), {.page_tokens = 16, .pool_bytes = pool_bytes},
              static_cast<std::uint64_t>(chunks));
    const SequenceId id = c.create();
    for (Index l = 0; l < 2; ++l)
      while (c.model(id, l).most_tokens() < (l == 0 ? 160 : 120) && c.append(id, l, 16) == Outcome::done) {
      }
    const SequenceId fork = c.fork(id);
    const CompressReport report = c.commit(mixed_plan(c, id, chunks % 2 == 0), false);
    waited += report.tokens_waiting > 0, changed += report.tokens_changed;
    c.verify_all();
    for (Index step = 0; step < 24; ++step)
      for (Index l = 0; l < 2; ++l) refused += c.append(id, l, 1) == Outcome::pool_full;
    c.verify_all();
    c.release(fork);
    c.age(id);
    (void)c.commit(mixed_plan(c, id, true));
    c.verify_all();
    for (Index l = 0; l < 2; ++l) c.verify_attend(id, l);
    c.release(id);
    ASSERT_EQ(c.cache.pool().stats().pages_in_use, 0) << pool_bytes;
    ASSERT_FALSE(::testing::Test::HasFailure()) << pool_bytes;
  }
  EXPECT_GT(refused, 0);
  EXPECT_GT(waited, 0);
  EXPECT_GT(changed, 1000);
}

/// Runs `act` on a fresh scene with its n-th allocation failing, for n = 1, 2, … until it succeeds.
template <class Prepare, class Act>
void each_allocation_fails(const Prepare& prepare, const Act& act) {
  for (const bool of_host : {true, false})
    for (const bool all_that_follow : {false, true})
      for (long n = 1;; ++n) {
        Checked c(backend(), two_layers(), {.page_tokens = 16, .pool_bytes = 512 << 10}, 5);
        const SequenceId id = c.create();
        for (Index l = 0; l < 2; ++l) ASSERT_EQ(c.append(id, l, 90), Outcome::done);
        const Plan plan = prepare(c, id);
        bool failed = false;
        failing = {true, all_that_follow, n, of_host};
        try {
          act(c, id, plan);
        } catch (const std::bad_alloc&) {
          failed = true;
        } catch (const InvalidArgument&) {  // the backend says that it has no memory
          failed = true;
        }
        failing = {};
        settle_after_failure(c, id, &plan);
        for (Index l = 0; l < 2; ++l) c.verify_attend(id, l);
        // What comes next succeeds.
        for (Index l = 0; l < 2; ++l) ASSERT_EQ(c.append(id, l, 1), Outcome::done);
        c.age(id);
        c.verify_all();
        c.release(id);
        ASSERT_EQ(c.cache.pool().stats().pages_in_use, 0) << "allocation " << n;
        ASSERT_FALSE(::testing::Test::HasFailure()) << "allocation " << n << (of_host ? "" : " of the backend");
        ASSERT_TRUE(failed || n > 1) << "nothing was allocated, so nothing was tested";
        if (!failed) break;
      }
}

TEST(FormsFault, CommitWithTiersEvictionAndAge) {
  each_allocation_fails([](Checked& c, SequenceId id) { return mixed_plan(c, id, true); },
                        [](Checked& c, SequenceId, const Plan& plan) { (void)c.cache.commit(plan); });
}

TEST(FormsFault, AppendThatAges) {
  std::vector<float> rows(2 * 32, 0.25f);
  each_allocation_fails(
      [](Checked& c, SequenceId id) {
        c.set_aging(id, 0, {.format = ranged, .keep_raw_values = 30, .flush_values = 5});
        return c.empty_plan(id);
      },
      [&](Checked& c, SequenceId id, const Plan&) {
        const Position p = static_cast<Position>(c.cache.kept(id, 0, 0).back() + 1);
        const Outcome outcome = c.cache.append(id, 0, ConstTensor(rows.data(), 1, 2, 16),
                                               ConstTensor(rows.data(), 1, 2, 16), std::span(&p, 1));
        failing = {};
        if (outcome == Outcome::done)
          c.model(id, 0).append({p}, oracle::Array3(1, 2, 16, 0.25), oracle::Array3(1, 2, 16, 0.25));
      });
}

}  // namespace
}  // namespace kvpare::test
