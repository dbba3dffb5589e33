// When memory runs out: of the pool, at every page in turn, and of the host, at every allocation in turn. Whatever
// fails, the sequence is as before or the operation is complete, and nothing leaks.
#include <gtest/gtest.h>

#include <cstdlib>
#include <new>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "support/checked_cache.hpp"
#include "support/failing_memory.hpp"

namespace kvpare::test {
namespace {

using Checked = CheckedCache<Formats<Pair<Raw<float>, Raw<float>>>, FailingBackend>;

// Pages of 1024 bytes in layer 0, of 768 in layer 1.
Model two_layers() {
  return {{{.q_heads = 4, .kv_heads = 2, .key_dim = 8, .value_dim = 8, .scale = 0.35f, .rope = rope_of_base(8)},
           {.q_heads = 2, .kv_heads = 1, .key_dim = 4, .value_dim = 8, .scale = 0.5f, .rope = rope_of_base(2)}}};
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
    for (const HeadPages& list : c.cache.pages(id, l))
      sight.entries.insert(sight.entries.end(), list.entries.begin(), list.entries.end());
    const LayerShape& s = c.shape(l);
    std::vector<float> q(static_cast<std::size_t>(s.q_heads * s.key_dim), 0.25f),
        out(static_cast<std::size_t>(s.q_heads * s.value_dim));
    const Position all = std::numeric_limits<Position>::max();
    c.cache.attend(l, {{.sequence = id,
                        .queries = ConstTensor(q.data(), 1, s.q_heads, s.key_dim),
                        .positions = std::span(&all, 1),
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
    Checked c(backend(), two_layers(), {.page_tokens = 16, .pool_bytes = pool_bytes},
              static_cast<std::uint64_t>(pool_bytes));
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
    method.selector.skip_layers = 0;  // there are but two
    c.observe_all(id, method, 400);
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
      if (::testing::Test::HasFailure())
        FAIL() << "allocation " << n << (all_that_follow ? " and all that follow" : "");
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
    for (Index t = 0; t < count; ++t)
      positions.push_back(static_cast<Position>(c.model(id, layer).last() + 1 + gap + t + (t > 4 ? gap : 0)));
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
    ASSERT_EQ(c.cache.append(id, 0, ConstTensor(k.data(), 2, 2, 8), ConstTensor(v.data(), 2, 2, 8), positions),
              Outcome::done);
    if (!failing.armed)
      c.model(id, 0).append({positions[0], positions[1]}, oracle::Array3(2, 2, 8), oracle::Array3(2, 2, 8));
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
                            if (failing.armed)
                              (void)c.cache.commit(plan);
                            else
                              c.commit(plan);
                          });
  }
}

/// Merged rows are made before anything moves and written when the lists are whole; pages that others share are copied
/// first.
TEST(HostFault, CommitOfMerges) {
  for (const MergeRule rule : {MergeRule::mean, MergeRule::unrotated_mean, MergeRule::added_values})
    for (const double keep : {0.1, 0.6}) {
      Plan plan;
      each_allocation_fails(
          [&](Checked& c, SequenceId id) {
            plan = c.random_plan(id, keep);
            c.merge_at_random(plan, rule);
          },
          [&](Checked& c, SequenceId) {
            if (failing.armed) {
              (void)c.cache.commit(plan);
              return;
            }
            const CompressReport report = c.commit(plan);
            EXPECT_GT(report.tokens_merged, 10);
            EXPECT_EQ(report.tokens_not_merged, 0);
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
    c.cache.attend(0, {{.sequence = id,
                        .queries = ConstTensor(q, 1, 4, 8),
                        .positions = std::span(&at, 1),
                        .out = Tensor(out, 1, 4, 8)}});
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
                    std::span(live).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count)),
                    chunk == chunks - 1);
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

// ---- snapshots

/// A history with running scores that follow their tokens.
SequenceId with_scores(Checked& c, SelectHeads heads = SelectHeads::kv) {
  AnyCompressor method = make_compressor("h2o(keep=100t)");
  method.selector.heads = heads;
  const SequenceId id = c.create();
  for (Index l = 0; l < 2; ++l) {
    EXPECT_EQ(c.append(id, l, 60), Outcome::done);
    c.observe(id, l, method, 60);
    for (Index t = 0; t < 20; ++t) {
      EXPECT_EQ(c.append(id, l, 1, t == 7 ? 9 : 0), Outcome::done);
      EXPECT_EQ(c.decode(id, l, method, {static_cast<Position>(c.model(id, l).last())}), "");
    }
  }
  EXPECT_GT(c.cache.stats(id).running_bytes, 0);
  return id;
}

TEST(PoolFault, ARestoreTakesAllPagesOrNone) {
  Checked from(backend(), two_layers(), {.page_tokens = 16, .pool_bytes = 256 << 10});
  const SequenceImage image = from.cache.image(with_scores(from));
  Index full = 0, taken = 0;
  for (Index pool_bytes = 12 << 10; pool_bytes <= 48 << 10; pool_bytes += 256) {
    if (pool_bytes < PagePool::chunk_bytes_for(std::vector<Index>{1024, 768})) continue;
    Checked c(backend(), two_layers(), {.page_tokens = 16, .pool_bytes = pool_bytes});
    const SequenceId held = c.create();
    ASSERT_EQ(c.append(held, 0, 20), Outcome::done);
    const Sight before = sight_of(c, held);
    const PoolStats pool_before = c.cache.pool().stats();
    if (const std::optional<SequenceId> copy = c.cache.restore(image)) {
      EXPECT_TRUE(c.cache.image(*copy) == image);
      c.cache.release(*copy);
      ++taken;
    } else {
      ++full;
      EXPECT_EQ(c.cache.pool().stats().refusals, pool_before.refusals + 1);
    }
    EXPECT_EQ(c.cache.pool().stats().pages_in_use, pool_before.pages_in_use);
    EXPECT_EQ(c.cache.pool().stats().bytes_in_use, pool_before.bytes_in_use);
    EXPECT_EQ(c.cache.pool().stats().chunk_bytes_in_use, pool_before.chunk_bytes_in_use);
    EXPECT_EQ(sight_of(c, held), before);
    c.verify_all();
  }
  EXPECT_GT(full, 10);
  EXPECT_GT(taken, 10);
}

TEST(HostFault, Restore) {
  Checked from(backend(), two_layers(), {.page_tokens = 16, .pool_bytes = 256 << 10});
  const SequenceImage image = from.cache.image(with_scores(from));
  each_allocation_fails(nothing, [&](Checked& c, SequenceId) {
    const std::optional<SequenceId> copy = c.cache.restore(image);
    if (!failing.armed) {
      EXPECT_TRUE(c.cache.image(*copy) == image);
    }
    c.cache.release(*copy);
  });
}

TEST(HostFault, SaveAndLoad) {
  Checked from(backend(), two_layers(), {.page_tokens = 16, .pool_bytes = 256 << 10});
  const SequenceId id = with_scores(from);
  std::ostringstream out;
  save(out, from.cache, id);
  const std::string bytes = out.str();
  each_allocation_fails(nothing, [&](Checked& c, SequenceId) {
    struct Bytes : std::streambuf {  // allocates nothing
      explicit Bytes(const std::string& s) {
        char* begin = const_cast<char*>(s.data());
        setg(begin, begin, begin + s.size());
      }
    } buffer(bytes);
    std::istream in(&buffer);
    const std::optional<SequenceId> copy = load(in, c.cache);
    if (!failing.armed) {
      EXPECT_TRUE(c.cache.image(*copy) == from.cache.image(id));
    }
    c.cache.release(*copy);
  });
  each_allocation_fails(nothing, [&](Checked&, SequenceId) {
    struct Nowhere : std::streambuf {
      std::size_t taken = 0;
      std::streamsize xsputn(const char*, std::streamsize n) override {
        taken += static_cast<std::size_t>(n);
        return n;
      }
    } buffer;
    std::ostream to(&buffer);
    save(to, from.cache, id);
    if (!failing.armed) {
      EXPECT_EQ(buffer.taken, bytes.size());
    }
  });
}

// ---- decode

/// Two sequences in one batch, the second with scores that another left there or that lack room.
struct DecodeScene {
  Checked c{backend(), two_layers(), {.page_tokens = 16, .pool_bytes = 256 << 10}};
  SequenceId one, two;
  std::vector<float> q = std::vector<float>(2 * 4 * 8), out = std::vector<float>(2 * 4 * 8);
  Positions at;

  explicit DecodeScene(const AnyCompressor& method)
      : one(with_scores(c, method.selector.heads)), two(with_scores(c, method.selector.heads)) {
    for (std::size_t i = 0; i < q.size(); ++i) q[i] = random_unit(5, i) - 0.5f;
    // Lists that are about to be packed, and shared pages that are not.
    c.fork(two);
    for (Index t = 0; t < 7; ++t) {
      EXPECT_EQ(c.append(one, 0, 1), Outcome::done);
      c.decode(one, 0, method, {static_cast<Position>(c.model(one, 0).last())});
    }
    for (const SequenceId id : {one, two}) {
      EXPECT_EQ(c.append(id, 0, 1), Outcome::done);
      at.push_back(static_cast<Position>(c.model(id, 0).last()));
    }
  }
  EvictReport decode(const AnyCompressor& method) {
    std::vector<AttendRequest> batch;
    for (Index i = 0; i < 2; ++i)
      batch.push_back({.sequence = i == 0 ? one : two,
                       .queries = ConstTensor(q.data() + i * 32, 1, 4, 8),
                       .positions = std::span(at).subspan(static_cast<std::size_t>(i), 1),
                       .out = Tensor(out.data() + i * 32, 1, 4, 8)});
    return c.cache.decode(0, std::span<const AttendRequest>(batch), method);
  }
  /// The model takes what the cache chose.
  void follow() {
    for (const SequenceId id : {one, two})
      for (Index h = 0; h < 2; ++h) {
        const Positions kept = c.cache.kept(id, 0, h);
        c.model(id, 0).keep(h, {kept.begin(), kept.end()});
      }
  }
};

constexpr const char* decode_methods[] = {
    "h2o(keep=70t)",           "tova(keep=70t)",     "tova(keep=70t, heads=kv)",
    "streaming_llm(keep=70t)", "key_norm(keep=70t)", "key_diff(keep=70t, heads=layer)",
    "lag_kv(keep=70t, lag=8)", "random(keep=0t)",    "h2o(keep=4000t)"};

/// The backend's memory fails at every place in turn: an InvalidArgument, and nothing has changed, scores neither.
TEST(BackendFault, Decode) {
  for (const char* words : decode_methods) {
    const AnyCompressor method = make_compressor(words);
    DecodeScene undisturbed(method);
    const EvictReport wanted = undisturbed.decode(method);
    const SequenceImage one = undisturbed.c.cache.image(undisturbed.one),
                        two = undisturbed.c.cache.image(undisturbed.two);
    long n = 1;
    for (;; ++n) {
      DecodeScene s(method);
      const SequenceImage one_before = s.c.cache.image(s.one), two_before = s.c.cache.image(s.two);
      const Sight before = sight_of(s.c, s.one), other_before = sight_of(s.c, s.two);
      const Index running = s.c.cache.stats(s.one).running_bytes;
      failing = {.armed = true, .all_that_follow = n % 2 == 0, .left = n, .of_host = false};
      const std::string said = error_of([&] { s.decode(method); });
      failing = {};
      if (said == "no error") break;
      ASSERT_NE(said.find("no memory for"), std::string::npos) << said;
      EXPECT_EQ(sight_of(s.c, s.one), before) << words << ", allocation " << n;
      EXPECT_EQ(sight_of(s.c, s.two), other_before) << words << ", allocation " << n;
      EXPECT_TRUE(s.c.cache.image(s.one) == one_before) << words << ", allocation " << n;
      EXPECT_TRUE(s.c.cache.image(s.two) == two_before) << words << ", allocation " << n;
      EXPECT_EQ(s.c.cache.stats(s.one).running_bytes, running);

      const EvictReport again = s.decode(method);  // the same step, as if nothing had been
      EXPECT_EQ(again.evicted, wanted.evicted);
      EXPECT_EQ(again.pages_freed, wanted.pages_freed);
      EXPECT_EQ(s.out, undisturbed.out) << words << ", allocation " << n;
      EXPECT_TRUE(s.c.cache.image(s.one) == one && s.c.cache.image(s.two) == two) << words << ", allocation " << n;
      s.follow();
      s.c.verify_all();
      ASSERT_FALSE(HasFailure()) << words << ", allocation " << n;
      ASSERT_LT(n, 1000) << "never succeeds";
    }
    EXPECT_GE(n, 3) << words << ": hardly anything was allocated";
  }
}

/// Scores move to a larger place from time to time: at every step every allocation fails once, and none is lost.
TEST(BackendFault, ScoresThatOutgrowTheirRoom) {
  for (const char* words : {"h2o(keep=4000t)", "h2o(keep=200t)", "tova(keep=4000t)"}) {
    const AnyCompressor method = make_compressor(words);
    Checked c(backend(), two_layers(), {.page_tokens = 16, .pool_bytes = 256 << 10});
    const SequenceId id = c.create(), undisturbed = c.create();
    std::vector<float> q(4 * 8), out(4 * 8), wanted(4 * 8);
    Index grown = 0;
    for (Position p = 0; p < 150; ++p) {
      for (std::size_t i = 0; i < q.size(); ++i) q[i] = random_unit(6, i, p) - 0.5f;
      const oracle::Array3 rows = c.rows(1, 2, 8);
      const TensorBuffer<FailingBackend> k(c.be, rows, DType::f32);
      for (const SequenceId s : {id, undisturbed})
        ASSERT_EQ(c.cache.append(s, 0, k.tensor(), k.tensor(), std::span(&p, 1)), Outcome::done);
      const auto step = [&](SequenceId s, std::vector<float>& to) {
        c.cache.decode(0,
                       {{.sequence = s,
                         .queries = ConstTensor(q.data(), 1, 4, 8),
                         .positions = std::span(&p, 1),
                         .out = Tensor(to.data(), 1, 4, 8)}},
                       method);
      };
      step(undisturbed, wanted);
      const SequenceImage before = c.cache.image(id);
      const Index running = c.cache.stats(id).running_bytes;
      for (long n = 1;; ++n) {
        failing = {.armed = true, .left = n, .of_host = false};
        const std::string said = error_of([&] { step(id, out); });
        failing = {};
        if (said == "no error") break;
        ASSERT_TRUE(c.cache.image(id) == before) << words << ", position " << p << ", allocation " << n;
        ASSERT_EQ(c.cache.stats(id).running_bytes, running);
      }
      grown += c.cache.stats(id).running_bytes > running;
      ASSERT_EQ(out, wanted) << words << ", position " << p;
      ASSERT_TRUE(c.cache.image(id) == c.cache.image(undisturbed)) << words << ", position " << p;
    }
    EXPECT_GE(grown, 3) << words;
  }
}

/// The host's memory fails: nothing is evicted, lists are whole, and steps go on.
TEST(HostFault, Decode) {
  for (const char* words : decode_methods) {
    const AnyCompressor method = make_compressor(words);
    for (long n = 1;; ++n) {
      DecodeScene s(method);
      const Sight before = sight_of(s.c, s.one), other_before = sight_of(s.c, s.two);
      bool failed = false;
      failing = {.armed = true, .all_that_follow = n % 2 == 0, .left = n};
      try {
        s.decode(method);
      } catch (const std::bad_alloc&) {
        failed = true;
      } catch (const InvalidArgument&) {
        failed = true;
      }
      failing = {};
      if (!failed) break;
      EXPECT_EQ(sight_of(s.c, s.one), before) << words << ", allocation " << n;
      EXPECT_EQ(sight_of(s.c, s.two), other_before) << words << ", allocation " << n;
      s.c.verify_all();
      s.decode(method);
      s.follow();
      s.c.verify_all();
      ASSERT_FALSE(HasFailure()) << words << ", allocation " << n;
      ASSERT_LT(n, 5000) << "never succeeds";
    }
  }
}

/// Whatever fails in a fork of a sequence with scores, or in cutting its end, its scores are as before.
TEST(HostFault, RunningScoresOfForksAndTruncations) {
  const auto scores_of = [](Checked& c, SequenceId id) { return c.cache.image(id); };
  for (long n = 1;; ++n) {
    Checked c(backend(), two_layers(), {.page_tokens = 16, .pool_bytes = 256 << 10});
    const SequenceId id = with_scores(c);
    const SequenceImage before = scores_of(c, id);
    std::optional<SequenceId> copy;
    failing = {.armed = true, .left = n};
    try {
      copy = c.cache.fork(id);
    } catch (const std::bad_alloc&) {
    } catch (const InvalidArgument&) {
    }
    failing = {};
    EXPECT_TRUE(scores_of(c, id) == before);
    EXPECT_EQ(c.cache.pool().stats().pages_in_use, c.cache.stats(id).pages);
    if (!copy) continue;
    EXPECT_TRUE(scores_of(c, *copy) == before) << "a fork has the scores";
    failing = {.armed = true, .all_that_follow = true, .left = 1};
    c.cache.truncate(*copy, 50);  // takes no memory
    failing = {};
    EXPECT_TRUE(scores_of(c, id) == before);
    const SequenceImage cut = scores_of(c, *copy);
    for (std::size_t l = 0; l < cut.layers.size(); ++l) {
      EXPECT_EQ(cut.layers[l].last_row, 49);
      for (std::size_t h = 0; h < cut.layers[l].heads.size(); ++h) {
        const std::vector<float>&now = cut.layers[l].heads[h].running, &then = before.layers[l].heads[h].running;
        ASSERT_LT(now.size(), then.size());
        EXPECT_TRUE(std::equal(now.begin(), now.end(), then.begin()));
      }
    }
    return;
  }
}

TEST(HostFault, CompressWithoutObservation) {
  const AnyCompressor method = make_compressor("random(keep=0.5)");
  each_allocation_fails(nothing, [&](Checked& c, SequenceId id) {
    if (failing.armed)
      (void)c.cache.compress(id, method);
    else
      c.commit(c.cache.plan(id, method));
  });
}

}  // namespace
}  // namespace kvpare::test
