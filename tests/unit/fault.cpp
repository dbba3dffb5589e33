// When memory runs out: of the pool, at every page in turn, and of the host, at every allocation in turn. Whatever
// fails, the sequence is as before or the operation is complete, and nothing leaks.
#include <gtest/gtest.h>

#include <cstdlib>
#include <new>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "support/checked_cache.hpp"

namespace {

/// Which allocation of this program fails: the n-th from now on, alone or with all that follow.
struct FailingAllocations {
  bool armed = false, all_that_follow = false;
  long left = 0;

  bool fails() {
    if (!armed) return false;
    if (left > 0) --left;
    if (left > 0) return false;
    armed = all_that_follow;
    return true;
  }
} failing;

void* memory_or_throw(std::size_t bytes, std::size_t alignment) {
  if (!failing.fails())
    if (void* p = std::aligned_alloc(alignment, (bytes + alignment) / alignment * alignment)) return p;
  throw std::bad_alloc();
}

}  // namespace

// (noinline: g++ would see free() meet operator new and warn.)
[[gnu::noinline]] void* operator new(std::size_t bytes) { return memory_or_throw(bytes, 16); }
[[gnu::noinline]] void* operator new(std::size_t bytes, std::align_val_t a) { return memory_or_throw(bytes, static_cast<std::size_t>(a)); }
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

namespace kvpare::test {
namespace {

/// Its memory runs out together with the host's.
struct FailingBackend : cpu::Backend {
  using cpu::Backend::Backend;
  void* allocate(Index bytes) { return failing.fails() ? nullptr : cpu::Backend::allocate(bytes); }
};

using Checked = CheckedCache<Formats<Pair<Raw<float>, Raw<float>>>, FailingBackend>;

// Pages of 1024 bytes in layer 0, of 768 in layer 1.
Model two_layers() {
  return {{{.q_heads = 4, .kv_heads = 2, .key_dim = 8, .value_dim = 8, .scale = 0.35f},
           {.q_heads = 2, .kv_heads = 1, .key_dim = 4, .value_dim = 8, .scale = 0.5f}}};
}

FailingBackend& backend() {
  static FailingBackend one({.threads = 1});
  return one;
}

/// All that can be seen of a sequence, attention included.
struct Sight {
  Counted counted;
  std::vector<Entry> entries;
  std::vector<float> attended;
  friend bool operator==(const Sight&, const Sight&) = default;
  friend std::ostream& operator<<(std::ostream& out, const Sight& s) {
    return out << s.counted << ", entries and attention " << ::testing::PrintToString(s.attended);
  }
};

Sight sight_of(Checked& c, SequenceId id) {
  Sight sight{c.counted(id), {}, {}};
  for (Index l = 0; l < c.cache.layers(); ++l) {
    for (const HeadPages& list : c.cache.pages(id, l)) sight.entries.insert(sight.entries.end(), list.entries.begin(), list.entries.end());
    const LayerShape& s = c.shape(l);
    std::vector<float> q(static_cast<std::size_t>(s.q_heads * s.key_dim), 0.25f), out(static_cast<std::size_t>(s.q_heads * s.value_dim));
    const Position all = std::numeric_limits<Position>::max();
    c.cache.attend(l, {{.sequence = id, .queries = ConstTensor(q.data(), 1, s.q_heads, s.key_dim), .positions = std::span(&all, 1),
                        .out = Tensor(out.data(), 1, s.q_heads, s.value_dim)}});
    sight.attended.insert(sight.attended.end(), out.begin(), out.end());
  }
  return sight;
}

// ---- the pool

/// Until nothing fits in any layer.
void fill_pool(Checked& c, SequenceId id) {
  for (Index l = 0; l < c.cache.layers(); ++l)
    while (c.append(id, l, 16) == Outcome::done) {
    }
}

TEST(PoolFault, EveryAppendIsRefusedInTurnAndChangesNothing) {
  Index refused = 0;
  for (Index pool_bytes = 12 << 10; pool_bytes <= 120 << 10; pool_bytes += 1 << 10) {
    if (pool_bytes < PagePool::chunk_bytes_for(std::vector<Index>{1024, 768})) continue;
    Checked c(backend(), two_layers(), {.page_tokens = 16, .pool_bytes = pool_bytes}, static_cast<std::uint64_t>(pool_bytes));
    const auto append = [&](SequenceId id, Index layer, Index count, Position gap) {
      const Sight before = sight_of(c, id);
      const PoolStats pool_before = c.cache.pool().stats();
      if (c.append(id, layer, count, gap) == Outcome::done) return;
      ++refused;
      EXPECT_EQ(sight_of(c, id), before);
      PoolStats pool_after = c.cache.pool().stats();
      EXPECT_EQ(pool_after.refusals, pool_before.refusals + 1);
      pool_after.refusals = pool_before.refusals;
      EXPECT_EQ(pool_after, pool_before);
    };
    const SequenceId one = c.create(), two = c.create();
    append(one, 0, 20, 0), append(one, 1, 40, 0), append(two, 0, 70, 5), append(two, 1, 1, 0);
    const SequenceId three = c.fork(one);
    append(one, 0, 100, 70000), append(three, 1, 3, 0), append(three, 0, 30, 1), append(two, 1, 200, 0);
    c.commit(c.random_plan(one, 0.5)), c.commit(c.random_plan(three, 0.2));
    append(three, 0, 40, 0), append(one, 1, 40, 0);
    c.verify_all();
    for (const SequenceId id : {two, one, three}) c.release(id);
    EXPECT_EQ(c.cache.pool().stats().pages_in_use, 0) << "pool of " << pool_bytes;
    if (HasFailure()) FAIL() << "pool of " << pool_bytes;
  }
  EXPECT_GT(refused, 100);
}

TEST(PoolFault, AShrinkingCommitSucceedsInAFullPoolAndTakesNothing) {
  for (const double keep : {0.0, 0.1, 0.5, 0.7, 0.9, 1.0}) {
    Checked c(backend(), two_layers(), {.page_tokens = 16, .pool_bytes = 96 << 10});
    const SequenceId id = c.create();
    fill_pool(c, id);
    for (int size = 0; size < c.cache.pool().formats(); ++size) ASSERT_EQ(c.cache.pool().available(size), 0);
    const PoolStats before = c.cache.pool().stats();
    const CompressReport report = c.commit(c.random_plan(id, keep));
    const PoolStats after = c.cache.pool().stats();
    EXPECT_LE(after.peak_bytes_in_use, before.bytes_in_use);
    EXPECT_LE(after.peak_chunk_bytes_in_use, before.chunk_bytes_in_use);
    EXPECT_EQ(after.refusals, before.refusals);
    EXPECT_EQ(report.pages_freed > 0, keep < 0.9) << "at keep " << keep;
    c.verify_all();
    if (report.pages_freed > 0) {
      EXPECT_EQ(c.append(id, 0, 16), Outcome::done) << "the room is really there";
    }
  }
}

TEST(PoolFault, CompressSucceedsInAFullPool) {
  for (const Recipe& recipe : known_recipes()) {
    Checked c(backend(), two_layers(), {.page_tokens = 16, .pool_bytes = 96 << 10});
    const SequenceId id = c.create();
    c.tag(id, {.begin = 4, .end = 300, .token_class = TokenClass::image});
    fill_pool(c, id);
    AnyCompressor method = recipe.compressor;
    method.keep = Keep::ratio(recipe.name == "full" ? 1 : 0.3);
    for (Index l = 0; l < 2; ++l) c.observe(id, l, method, 400);
    const CompressReport report = c.commit(c.cache.plan(id, method));
    EXPECT_EQ(report.pages_freed > 0, recipe.name != "full") << recipe.name;
    c.verify_all();
  }
}

TEST(PoolFault, SharedPagesInAFullPoolOnlyLoseBits) {
  Checked c(backend(), two_layers(), {.page_tokens = 16, .pool_bytes = 96 << 10});
  const SequenceId one = c.create();
  fill_pool(c, one);
  const SequenceId two = c.fork(one);
  const Sight before = sight_of(c, two);
  const CompressReport report = c.commit(c.random_plan(one, 0.3));
  EXPECT_EQ(report.pages_freed, 0);
  EXPECT_EQ(report.rows_moved, 0);
  EXPECT_EQ(sight_of(c, two), before);
  c.verify_all();
  c.release(two);
  EXPECT_GT(c.commit(c.random_plan(one, 1)).pages_freed, 0) << "now that they are private, what is left is packed";
  c.verify_all();
}

// ---- the host

/// A sequence with history: gaps, evictions, shared pages, tags.
SequenceId with_history(Checked& c) {
  const SequenceId id = c.create();
  c.tag(id, {.begin = 3, .end = 60, .token_class = TokenClass::image});
  for (Index l = 0; l < 2; ++l) {
    EXPECT_EQ(c.append(id, l, 40), Outcome::done);
    EXPECT_EQ(c.append(id, l, 30, 3), Outcome::done);
  }
  c.commit(c.random_plan(id, 0.6));
  c.fork(id);
  for (Index l = 0; l < 2; ++l) EXPECT_EQ(c.append(id, l, 21, 1), Outcome::done);
  return id;
}

/// Runs `prepare(c, id)`, then `act(c, id)` with the first allocation failing, then the second, … until it succeeds.
/// After each failure all is as before, and the same call succeeds.
template <class Prepare, class Act>
void each_allocation_fails(const Prepare& prepare, const Act& act) {
  for (const bool all_that_follow : {false, true})
    for (long n = 1;; ++n) {
      Checked c(backend(), two_layers(), {.page_tokens = 16, .pool_bytes = 256 << 10});
      const SequenceId id = with_history(c);
      prepare(c, id);
      const std::size_t sequences = c.held.size();
      const Sight before = sight_of(c, id);
      const Index pages = c.cache.pool().stats().pages_in_use;
      bool failed = false;
      failing = {true, all_that_follow, n};
      try {
        act(c, id);
      } catch (const std::bad_alloc&) {
        failed = true;
      } catch (const InvalidArgument&) {  // the backend says that it has no memory
        failed = true;
      }
      failing = {};
      if (!failed) {
        EXPECT_GT(n, 1) << "nothing was allocated, so nothing was tested";
        return;
      }
      ASSERT_EQ(c.held.size(), sequences);
      EXPECT_EQ(sight_of(c, id), before) << "allocation " << n;
      EXPECT_EQ(c.cache.pool().stats().pages_in_use, pages) << "allocation " << n;
      act(c, id);
      c.verify_all();
      if (::testing::Test::HasFailure()) FAIL() << "allocation " << n << (all_that_follow ? " and all that follow" : "");
      ASSERT_LT(n, 5000) << "never succeeds";
    }
}

constexpr auto nothing = [](Checked&, SequenceId) {};

/// Rows made beforehand, so that only the cache allocates while allocations fail.
struct Rows {
  std::vector<float> keys, values;
  Positions positions;

  Rows(Checked& c, SequenceId id, Index layer, Index count, Position gap) {
    const LayerShape& s = c.shape(layer);
    keys.assign(static_cast<std::size_t>(count * s.kv_heads * s.key_dim), 0.5f);
    values.assign(static_cast<std::size_t>(count * s.kv_heads * s.value_dim), -0.25f);
    for (Index t = 0; t < count; ++t) positions.push_back(static_cast<Position>(c.model(id, layer).last() + 1 + gap + t + (t > 4 ? gap : 0)));
  }
};

TEST(HostFault, Append) {
  for (const Index count : {1, 5, 60})
    for (const Position gap : {0, 2, 70000}) {
      std::optional<Rows> rows;
      const auto make_rows = [&](Checked& c, SequenceId id) { rows.emplace(c, id, 0, count, gap); };
      each_allocation_fails(make_rows, [&](Checked& c, SequenceId id) {
        const LayerShape& s = c.shape(0);
        ASSERT_EQ(c.cache.append(id, 0, ConstTensor(rows->keys.data(), count, s.kv_heads, s.key_dim),
                                 ConstTensor(rows->values.data(), count, s.kv_heads, s.value_dim), rows->positions),
                  Outcome::done);
        if (failing.armed) return;  // the model is told by the call that is sure to succeed
        oracle::Array3 keys(count, s.kv_heads, s.key_dim, 0.5), values(count, s.kv_heads, s.value_dim, -0.25);
        c.model(id, 0).append({rows->positions.begin(), rows->positions.end()}, keys, values);
      });
    }
}

TEST(HostFault, AppendOfAnotherElementType) {
  std::vector<half> k(2 * 2 * 8), v(2 * 2 * 8);
  each_allocation_fails(nothing, [&](Checked& c, SequenceId id) {
    const Position last = static_cast<Position>(c.model(id, 0).last());
    const Position positions[] = {last + 1, last + 9};
    ASSERT_EQ(c.cache.append(id, 0, ConstTensor(k.data(), 2, 2, 8), ConstTensor(v.data(), 2, 2, 8), positions), Outcome::done);
    if (!failing.armed) c.model(id, 0).append({positions[0], positions[1]}, oracle::Array3(2, 2, 8), oracle::Array3(2, 2, 8));
  });
}

TEST(HostFault, Fork) {
  each_allocation_fails(nothing, [](Checked& c, SequenceId id) {
    const SequenceId copy = c.cache.fork(id);
    c.cache.release(copy);
  });
}

TEST(HostFault, Tag) {
  each_allocation_fails(nothing, [](Checked& c, SequenceId id) { c.cache.tag(id, {.begin = 20, .end = 30}); });
}

TEST(HostFault, Construction) {
  std::set<std::string> said;
  for (long n = 1;; ++n) {
    Model model = two_layers();
    failing = {true, false, n};
    try {
      Checked::Cache cache(backend(), std::move(model), {.page_tokens = 16, .pool_bytes = 64 << 10});
      failing = {};
      break;
    } catch (const std::bad_alloc&) {
      failing = {};
    } catch (const InvalidArgument& e) {
      failing = {};
      said.insert(e.what());
    }
  }
  EXPECT_EQ(said, std::set<std::string>{"cpu backend: no memory for 65536 bytes"});
}

TEST(HostFault, Create) {
  each_allocation_fails(nothing, [](Checked& c, SequenceId) { c.cache.release(c.cache.create()); });
}

TEST(HostFault, Commit) {
  for (const double keep : {0.0, 0.4, 0.95}) {
    Plan plan;
    each_allocation_fails([&](Checked& c, SequenceId id) { plan = c.random_plan(id, keep); },
                          [&](Checked& c, SequenceId) {
                            if (failing.armed) (void)c.cache.commit(plan);
                            else c.commit(plan);
                          });
  }
}

/// Nothing is allocated, so nothing can fail.
TEST(HostFault, TruncateAndReleaseNeedNoMemory) {
  Checked c(backend(), two_layers(), {.page_tokens = 16, .pool_bytes = 256 << 10});
  const SequenceId id = with_history(c);
  for (const Position n : {100, 95, 90, 75, 44, 43, 20, 1, 0}) {
    failing = {true, true, 1};
    c.cache.truncate(id, n);
    failing = {};
    for (oracle::CachedLayer& layer : c.held.at(id)) layer.truncate(n);
    c.verify_all();
  }
  const SequenceId other = c.create();
  ASSERT_EQ(c.append(other, 0, 50), Outcome::done);
  failing = {true, true, 1};
  c.cache.release(other);
  failing = {};
  c.held.erase(other);
  c.verify_pool();
}

TEST(HostFault, Attend) {
  float q[4 * 8] = {}, out[4 * 8];
  each_allocation_fails(nothing, [&](Checked& c, SequenceId id) {
    const Position at = 50;
    c.cache.attend(0, {{.sequence = id, .queries = ConstTensor(q, 1, 4, 8), .positions = std::span(&at, 1), .out = Tensor(out, 1, 4, 8)}});
  });
}

/// After a failed observation the same one succeeds, and the plan is the one that an undisturbed sequence makes.
void observation_fails(std::string_view recipe, Index chunks) {
  const AnyCompressor method = make_compressor(recipe);
  const auto observe = [&](Checked& c, SequenceId id, Index layer, Index chunk) {
    const Positions live = c.cache.kept(id, layer, 0);
    const LayerShape& s = c.shape(layer);
    const Index count = 20 / chunks, first = std::ssize(live) - 20 + chunk * count;
    std::vector<float> q(static_cast<std::size_t>(count * s.q_heads * s.key_dim));
    for (std::size_t i = 0; i < q.size(); ++i) q[i] = random_unit(7, i, chunk, layer);
    c.cache.observe(id, layer, method, ConstTensor(q.data(), count, s.q_heads, s.key_dim),
                    std::span(live).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count)), chunk == chunks - 1);
  };
  Checked undisturbed(backend(), two_layers(), {.page_tokens = 16, .pool_bytes = 256 << 10});
  const SequenceId reference = with_history(undisturbed);
  for (Index l = 0; l < 2; ++l)
    for (Index chunk = 0; chunk < chunks; ++chunk) observe(undisturbed, reference, l, chunk);
  const Plan wanted = undisturbed.cache.plan(reference, method);
  ASSERT_LT(wanted.chosen, wanted.candidates);

  for (Index failing_chunk = 0; failing_chunk < chunks; ++failing_chunk)
    each_allocation_fails(
        [&](Checked& c, SequenceId id) {
          for (Index chunk = 0; chunk < chunks; ++chunk) observe(c, id, 1, chunk);
          for (Index chunk = 0; chunk < failing_chunk; ++chunk) observe(c, id, 0, chunk);
        },
        [&](Checked& c, SequenceId id) {
          observe(c, id, 0, failing_chunk);
          if (failing.armed) return;
          for (Index chunk = failing_chunk + 1; chunk < chunks; ++chunk) observe(c, id, 0, chunk);
          EXPECT_EQ(c.cache.plan(id, method), wanted) << "chunk " << failing_chunk;
        });
  each_allocation_fails(
      [&](Checked& c, SequenceId id) {
        for (Index l = 0; l < 2; ++l)
          for (Index chunk = 0; chunk < chunks; ++chunk) observe(c, id, l, chunk);
      },
      [&](Checked& c, SequenceId id) {
        const Plan plan = c.cache.plan(id, method);
        EXPECT_EQ(plan, wanted);
      });
}

TEST(HostFault, ObserveAndPlanWithARowWindow) { observation_fails("snap_kv(keep=0.5)", 2); }
TEST(HostFault, ObserveAndPlanWithStreamingScores) { observation_fails("h2o(keep=0.5)", 2); }
TEST(HostFault, ObserveAndPlanWithEliteRows) { observation_fails("air_cache(keep=0.5)", 2); }
TEST(HostFault, ObserveAndPlanInOneChunk) { observation_fails("snap_kv(keep=0.4, heads=layer, recent_share=0.3)", 1); }

TEST(HostFault, CompressWithoutObservation) {
  const AnyCompressor method = make_compressor("random(keep=0.5)");
  each_allocation_fails(nothing, [&](Checked& c, SequenceId id) {
    if (failing.armed) (void)c.cache.compress(id, method);
    else c.commit(c.cache.plan(id, method));
  });
}

}  // namespace
}  // namespace kvpare::test
