// A KvCache beside its naive model: every operation is done on both, and everything one can ask must agree.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <kvpare/kvpare.hpp>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <sstream>
#include <vector>

#include "oracle/cached_sequence.hpp"
#include "oracle/rope.hpp"
#include "support/features.hpp"
#include "support/inputs.hpp"
#include "support/tolerance.hpp"

namespace kvpare::test {

using Positions = std::vector<Position>;

/// Stats of a sequence but for the spare capacity of its host arrays, which is not part of any promise.
struct Counted {
  std::uint64_t epoch = 0;
  Index live_tokens = 0, pages = 0, page_bytes = 0, live_bytes = 0, observation_bytes = 0;
  Tags tags;
  friend bool operator==(const Counted&, const Counted&) = default;
  friend std::ostream& operator<<(std::ostream& out, const Counted& c) {
    return out << "epoch " << c.epoch << ", live tokens " << c.live_tokens << ", pages " << c.pages << " of "
               << c.page_bytes << " bytes, live bytes " << c.live_bytes << ", observations " << c.observation_bytes
               << " bytes, tag spans " << c.tags.spans().size();
  }
};

/// Which form a token was last seen in: Entry::format and Entry::state.
struct TokenForm {
  std::uint16_t format = 0;
  std::uint32_t state = 0;
  friend bool operator==(const TokenForm&, const TokenForm&) = default;
};
using HeadForms = std::map<Position, TokenForm>;  // positions not listed: as appended

/// Does a list of formats hold any that are coded?
template <class FormatList>
constexpr bool holds_codes() {
  bool coded = false;
  FormatList::for_each(
      [&]<class P>(int, P) { coded = coded || !is_raw<typename P::Key> || !is_raw<typename P::Value>; });
  return coded;
}

/// What some rows read as once they are coded together in these slots of a tile. Slots between them repeat a row, so that
/// groups over tokens see nothing new.
template <Codec C>
std::vector<std::vector<float>> read_coded(TileShape shape, const std::vector<Index>& slots,
                                           const std::vector<std::vector<double>>& rows, const float* state) {
  std::vector<float> dense(static_cast<std::size_t>(shape.tokens * shape.width));
  std::size_t next = 0;
  for (Index slot = 0; slot < shape.tokens; ++slot) {
    while (next + 1 < slots.size() && slots[next] < slot) ++next;
    for (Index c = 0; c < shape.width; ++c)
      dense[static_cast<std::size_t>(slot * shape.width + c)] =
          static_cast<float>(rows[next][static_cast<std::size_t>(c)]);
  }
  std::vector<std::byte> tile(static_cast<std::size_t>(C::tile_bytes(shape)));
  C::encode(shape, dense.data(), 0, shape.tokens, state, tile.data());
  std::vector<std::vector<float>> read;
  for (const Index slot : slots) {
    read.emplace_back(static_cast<std::size_t>(shape.width));
    C::decode(shape, tile.data(), slot, state, read.back().data());
  }
  return read;
}

template <class FormatList, Backend B = cpu::Backend>
class CheckedCache {
 public:
  using Cache = KvCache<B, FormatList>;
  static constexpr bool mixed = holds_codes<FormatList>();
  /// Attention on codes takes queries as integers and probabilities as well.
  static inline const Tolerance attended_tolerance = mixed ? Tolerance{8e-3, 0} : tolerance(Operation::attended),
                                lse_tolerance = mixed ? Tolerance{2e-2, 0} : tolerance(Operation::logit);

  CheckedCache(B& backend, Model model, CacheOptions options, std::uint64_t seed = 1)
      : CheckedCache(backend, std::make_shared<Cache>(backend, std::move(model), options), seed) {}

  /// The same cache with some of the sequences, for another thread.
  CheckedCache part(const std::vector<SequenceId>& ids, std::uint64_t seed) const {
    CheckedCache some(be, owned_, seed);
    for (const SequenceId id : ids) {
      some.held[id] = held.at(id);
      if (const auto at = forms.find(id); at != forms.end()) some.forms[id] = at->second;
    }
    return some;
  }

 private:
  std::shared_ptr<Cache> owned_;

  CheckedCache(B& backend, std::shared_ptr<Cache> shared, std::uint64_t seed)
      : owned_(std::move(shared)), be(backend), cache(*owned_), dice{seed} {}

 public:
  B& be;
  Cache& cache;
  Dice dice;
  std::map<SequenceId, oracle::CachedSequence> held;
  std::map<SequenceId, std::map<std::pair<Index, Index>, HeadForms>> forms;  // [sequence][(layer, head)]
  std::map<SequenceId, std::map<Index, Aging>> ages;                         // [sequence][layer], as set

  const LayerShape& shape(Index layer) const { return cache.model().layers[static_cast<std::size_t>(layer)]; }
  oracle::CachedLayer& model(SequenceId id, Index layer) { return oracle::item(held.at(id), layer); }

  // ---- the operations

  SequenceId create() {
    const SequenceId id = cache.create();
    auto& sequence = held[id];
    for (Index l = 0; l < cache.layers(); ++l)
      sequence.push_back({std::vector<oracle::CachedHead>(static_cast<std::size_t>(shape(l).kv_heads)), {}});
    return id;
  }

  SequenceId fork(SequenceId id) {
    const SequenceId copy = cache.fork(id);
    copy_model(id, copy);
    return copy;
  }

  /// A second sequence by way of a snapshot; none when the pool has no room for it, and then nothing has changed.
  std::optional<SequenceId> reload(SequenceId id, bool alone = true) {
    std::stringstream stream;
    save(stream, cache, id);
    const PoolStats before = cache.pool().stats();
    const std::optional<SequenceId> copy = load(stream, cache);
    if (copy) {
      copy_model(id, *copy);
      EXPECT_EQ(cache.image(*copy), cache.image(id));
    }
    if (!copy && alone) {
      EXPECT_EQ(cache.pool().stats().pages_in_use, before.pages_in_use);
    }
    return copy;
  }

  void release(SequenceId id) {
    cache.release(id);
    held.erase(id), forms.erase(id), ages.erase(id);
  }

  void tag(SequenceId id, const TagSpan& span) { cache.tag(id, span); }

  void truncate(SequenceId id, Position n) {
    cache.truncate(id, n);
    for (oracle::CachedLayer& layer : held.at(id)) layer.truncate(n);
    for (auto& [head, of_head] : forms[id]) of_head.erase(of_head.lower_bound(n), of_head.end());
  }

  /// Random rows, exact in every element type. A refusal must change nothing.
  Outcome append(SequenceId id, Index layer, const Positions& positions, DType type = DType::f32) {
    const Index n = static_cast<Index>(positions.size());
    const LayerShape& s = shape(layer);
    const oracle::Array3 keys = rows(n, s.kv_heads, s.key_dim), values = rows(n, s.kv_heads, s.value_dim);
    const TensorBuffer<B> k(be, keys, type), v(be, values, type);
    const Counted before = counted(id);
    const Index bookkeeping = cache.stats(id).bookkeeping_bytes;
    const Outcome outcome = cache.append(id, layer, k.tensor(), v.tensor(), positions);
    if (outcome == Outcome::done) {
      model(id, layer).append({positions.begin(), positions.end()}, keys, values);
    } else if (!ages[id].contains(layer)) {  // else old tokens may have changed their form all the same
      EXPECT_EQ(counted(id), before);
      EXPECT_EQ(cache.stats(id).bookkeeping_bytes, bookkeeping);
    }
    if constexpr (mixed) settle(id, layer, outcome == Outcome::done ? n : 0);
    return outcome;
  }

  /// `count` tokens after the last, the next ones unless `gap` says otherwise.
  Outcome append(SequenceId id, Index layer, Index count, Position gap = 0) {
    const Position first = static_cast<Position>(model(id, layer).last()) + 1 + gap;
    Positions positions(static_cast<std::size_t>(count));
    std::iota(positions.begin(), positions.end(), first);
    return append(id, layer, positions);
  }

  /// Carries out a plan on both; the report must tell the truth about the pool when nobody else uses it.
  CompressReport commit(const Plan& plan, bool alone = true) {
    const SequenceId id = plan.sequence;
    std::vector<std::vector<std::vector<Index>>> stay(plan.layers.size());  // read before the lists change
    for (Index l = 0; l < cache.layers(); ++l) {
      const LayerPlan& of_layer = plan.layers[static_cast<std::size_t>(l)];
      const auto lists = cache.pages(id, l);
      for (std::size_t h = 0; h < of_layer.keep.size(); ++h) {
        Selection live = of_layer.keep[h];
        live &= Selection::live(lists[h].entries);
        const Positions at = positions_of(lists[h], live);
        stay[static_cast<std::size_t>(l)].emplace_back(at.begin(), at.end());
      }
    }
    const std::vector<TierToken> tiers = tier_tokens(plan);
    const SequenceStats before = cache.stats(id);
    const PoolStats pool_before = cache.pool().stats();
    const CompressReport report = cache.commit(plan);
    merge_rows(plan, report.tokens_not_merged == 0);
    for (Index l = 0; l < cache.layers(); ++l)
      for (std::size_t h = 0; h < stay[static_cast<std::size_t>(l)].size(); ++h)
        model(id, l).keep(static_cast<Index>(h), stay[static_cast<std::size_t>(l)][h]);

    const SequenceStats after = cache.stats(id);
    EXPECT_EQ(report.tokens_before, before.live_tokens);
    EXPECT_EQ(report.tokens_after, after.live_tokens);
    EXPECT_EQ(report.pages_before, before.pages);
    EXPECT_EQ(report.pages_after, after.pages);
    EXPECT_EQ(report.page_bytes_before, before.page_bytes);
    EXPECT_EQ(report.page_bytes_after, after.page_bytes);
    if (!mixed) {  // else the ranges of queries stay
      EXPECT_EQ(after.observation_bytes, 0);
    }
    if constexpr (mixed) settle_commit(plan, report, tiers);
    // Another form, new codes, a shared page that others merge into (a token merged in part counts as not merged).
    const bool took_pages = report.tokens_changed + report.tokens_recoded + report.tokens_merged + report.tokens_not_merged > 0;
    if (!took_pages) {
      EXPECT_EQ(report.pages_freed + report.pages_shared, report.pages_before - report.pages_after);
      EXPECT_EQ(report.bytes_freed + report.bytes_shared, report.page_bytes_before - report.page_bytes_after);
    }
    if (alone && !took_pages) {
      const PoolStats pool_after = cache.pool().stats();
      EXPECT_EQ(report.pages_freed, pool_before.pages_in_use - pool_after.pages_in_use);
      EXPECT_EQ(report.bytes_freed, pool_before.bytes_in_use - pool_after.bytes_in_use);
      if (report.tokens_waiting == 0) {  // else it may have found pages of one size and none of another
        EXPECT_EQ(pool_after.peak_bytes_in_use, pool_before.peak_bytes_in_use) << "a commit takes no pages";
      }
    }
    return report;
  }

  /// One decode step on both, with a random row for each position. The model attends as well, then takes the choice of the
  /// cache; a refusal must change nothing and says why.
  template <class C>
  std::string decode(SequenceId id, Index layer, const C& method, const Positions& positions, bool alone = true) {
    const LayerShape& s = shape(layer);
    const Index n = std::ssize(positions);
    oracle::AttendInput in = attend_input(id, layer, rows(n, s.q_heads, s.key_dim), positions);
    const TensorBuffer<B> q(be, in.queries, DType::f32);
    const TensorBuffer<B> out(be, oracle::Array3(n, s.q_heads, s.value_dim, -1), DType::f32);
    const Counted before = counted(id);
    const SequenceStats stats_before = cache.stats(id);
    const PoolStats pool_before = cache.pool().stats();
    EvictReport report;
    const std::string refusal = error_of([&] {
      report = cache.decode(
          layer, {{.sequence = id, .queries = q.tensor(), .positions = positions, .out = out.writable()}}, method);
    });
    if (refusal != "no error") {
      EXPECT_EQ(counted(id), before) << refusal;
      return refusal;
    }
    const oracle::Array3 got = out.download();
    const oracle::AttendResult wanted = oracle::attend(in);
    for (std::size_t i = 0; i < got.values.size(); ++i)
      EXPECT_TRUE(close(got.values[i], wanted.out.values[i], attended_tolerance))
          << "decode, sequence " << id << " layer " << layer;
    Index gone = 0;
    for (Index h = 0; h < s.kv_heads; ++h) {
      const Positions kept = cache.kept(id, layer, h);
      const std::vector<Index> holding = model(id, layer).positions(h);
      EXPECT_TRUE(std::includes(holding.begin(), holding.end(), kept.begin(), kept.end())) << "tokens from nowhere";
      gone += std::ssize(holding) - std::ssize(kept);
      model(id, layer).keep(h, {kept.begin(), kept.end()});
    }
    EXPECT_EQ(report.evicted, gone);
    if constexpr (mixed) {
      const Index changed = settle(id, layer, 0, true);
      EXPECT_EQ(report.demoted, changed);
    }
    if (report.demoted == 0) {
      const SequenceStats after = cache.stats(id);
      EXPECT_EQ(report.pages_freed + report.pages_shared, stats_before.pages - after.pages);
      EXPECT_EQ(report.bytes_freed + report.bytes_shared, stats_before.page_bytes - after.page_bytes);
    }
    if (alone && report.demoted == 0) {
      const PoolStats pool_after = cache.pool().stats();
      EXPECT_EQ(report.pages_freed, pool_before.pages_in_use - pool_after.pages_in_use);
      EXPECT_EQ(report.bytes_freed, pool_before.bytes_in_use - pool_after.bytes_in_use);
      EXPECT_EQ(pool_after.peak_bytes_in_use, pool_before.peak_bytes_in_use) << "decode takes no pages";
    }
    return {};
  }

  /// How tokens of a layer change as they grow old, from now on.
  void set_aging(SequenceId id, Index layer, const Aging& aging) {
    cache.set_aging(id, layer, aging);
    ages[id][layer] = aging;
  }

  void age(SequenceId id, bool alone = true) {
    const PoolStats pool_before = cache.pool().stats();
    const CompressReport report = cache.age(id);
    EXPECT_EQ(report.tokens_before, report.tokens_after);
    Index changed = 0;
    for (Index l = 0; l < cache.layers(); ++l) changed += settle(id, l, 0);
    EXPECT_EQ(report.tokens_changed, changed);
    if (alone) {
      if (changed == 0) {
        EXPECT_EQ(cache.pool().stats().bytes_in_use, pool_before.bytes_in_use);
      }
    }
  }

  /// A plan that keeps each live token with probability `keep`, in every head for itself.
  Plan random_plan(SequenceId id, double keep) {
    Plan plan = empty_plan(id);
    for (Index l = 0; l < cache.layers(); ++l) {
      LayerPlan& of_layer = plan.layers[static_cast<std::size_t>(l)];
      of_layer.touched = true;
      for (const HeadPages& list : cache.pages(id, l)) {
        Selection& stay = of_layer.keep.emplace_back(static_cast<Index>(list.entries.size()));
        for (Index e = 0; e < stay.entries(); ++e)
          for (Index s = 0; s < 64; ++s)  // bits that stand for no live token must not matter
            if (dice.chance(keep)) stay.insert(e, s);
      }
    }
    return plan;
  }

  /// Merges what goes of a plan into tokens that stay, at random: ranges that follow each other, or overlap where values are
  /// added.
  void merge_at_random(Plan& plan, MergeRule rule) {
    for (Index l = 0; l < cache.layers(); ++l) {
      LayerPlan& of_layer = plan.layers[static_cast<std::size_t>(l)];
      const auto lists = cache.pages(plan.sequence, l);
      for (std::size_t h = 0; h < of_layer.keep.size(); ++h) {
        Merge& merge = of_layer.merges.emplace_back();
        merge.rule = rule;
        Selection kept = of_layer.keep[h];
        kept &= Selection::live(lists[h].entries);
        const Positions stays = positions_of(lists[h], kept);
        for (const Position p : stays)
          if (dice.chance(0.5)) merge.into.push_back(p);
        if (merge.into.empty()) continue;
        std::ranges::set_difference(positions_of(lists[h], Selection::live(lists[h].entries)), stays,
                                    std::back_inserter(merge.from));
        const Index joining = std::ssize(merge.from);
        for (std::size_t i = 0, covered = 0; i < merge.into.size(); ++i) {
          const Index at = static_cast<Index>(covered);
          const bool overlaps = rule == MergeRule::added_values && i > 0;
          merge.begin.push_back(overlaps ? dice.within(merge.begin.back(), at) : at);
          covered = static_cast<std::size_t>(i + 1 == merge.into.size() ? joining : dice.within(at, joining));
          merge.end.push_back(static_cast<Index>(covered));
        }
        for (Index i = 0; i < joining && rule == MergeRule::added_values; ++i) merge.weights.push_back(dice.symmetric());
      }
    }
  }

  Plan empty_plan(SequenceId id) const {
    Plan plan;
    plan.sequence = id, plan.epoch = cache.epoch(id);
    plan.layers.resize(static_cast<std::size_t>(cache.layers()));
    return plan;
  }

  /// Shows random queries of the layer's `count` newest live tokens to a policy, in two chunks when there are enough.
  template <class C>
  void observe(SequenceId id, Index layer, const C& compressor, Index count) {
    std::set<Position> live;
    for (const oracle::CachedHead& head : model(id, layer).heads)
      for (const oracle::CachedToken& token : head) live.insert(static_cast<Position>(token.position));
    Positions positions(live.begin(), live.end());
    positions.erase(positions.begin(), positions.end() - std::min<Index>(count, std::ssize(positions)));
    if (positions.empty()) return;
    const LayerShape& s = shape(layer);
    const TensorBuffer<B> q(be, rows(std::ssize(positions), s.q_heads, s.key_dim), DType::f32);
    const std::span<const Position> all = positions;
    const std::size_t half = all.size() / 2;
    if (half > 0)
      cache.observe(id, layer, compressor, q.tensor().part(0, static_cast<Index>(half)), all.first(half), false);
    cache.observe(id, layer, compressor,
                  q.tensor().part(static_cast<Index>(half), std::ssize(all) - static_cast<Index>(half)),
                  all.subspan(half), true);
  }

  /// Shows a method what it reads of every layer: the newest rows, or features of the visual tokens that all layers hold in
  /// which it chooses.
  template <class C>
  void observe_all(SequenceId id, const C& compressor, const std::function<Index()>& count) {
    if (!compressor.scorer.reads().features) {
      for (Index l = 0; l < cache.layers(); ++l) observe(id, l, compressor, count());
      return;
    }
    std::map<Position, Index> held_by;
    Index chosen_in = 0;
    for (Index l = compressor.selector.skip_layers; l < cache.layers(); ++l) {
      if (!shape(l).compress) continue;
      ++chosen_in;
      std::set<Position> live;
      for (const oracle::CachedHead& head : model(id, l).heads)
        for (const oracle::CachedToken& token : head) live.insert(static_cast<Position>(token.position));
      for (const Position p : live) held_by[p] += visual.has(cache.tags(id).class_of(p));
    }
    Positions positions;
    for (const auto& [p, layers] : held_by)
      if (layers == chosen_in) positions.push_back(p);
    const FeatureSet features = random_features(dice, positions, 4);
    cache.observe_features(id, compressor, HeldFeatures<B>(be, features).get());
  }
  template <class C>
  void observe_all(SequenceId id, const C& compressor, Index count) {
    observe_all(id, compressor, [&] { return count; });
  }

  /// The model of a sequence that came from elsewhere: its tokens as the cache holds them, without their rows.
  void adopt(SequenceId id) {
    auto& sequence = held[id];
    for (Index l = 0; l < cache.layers(); ++l) {
      oracle::CachedLayer& layer = sequence.emplace_back();
      for (Index h = 0; h < shape(l).kv_heads; ++h) {
        layer.heads.emplace_back();
        for (const Position p : cache.kept(id, l, h)) layer.heads.back().push_back({p, {}, {}});
      }
    }
  }

  // ---- what must hold

  Counted counted(SequenceId id) const {
    const SequenceStats s = cache.stats(id);
    return {cache.epoch(id), s.live_tokens, s.pages, s.page_bytes, s.live_bytes, s.observation_bytes, cache.tags(id)};
  }

  /// Lists, kept positions and stats of a sequence.
  void verify(SequenceId id) {
    const SequenceStats stats = cache.stats(id);
    Index tokens = 0, pages = 0, page_bytes = 0, live_bytes = 0;
    for (Index l = 0; l < cache.layers(); ++l) {
      const auto lists = cache.pages(id, l);
      for (Index h = 0; h < shape(l).kv_heads; ++h) {
        const HeadPages& list = lists[static_cast<std::size_t>(h)];
        verify_list(list);
        const std::vector<Index> wanted = model(id, l).positions(h);
        const Positions got = cache.kept(id, l, h);
        ASSERT_TRUE(std::equal(got.begin(), got.end(), wanted.begin(), wanted.end()))
            << "sequence " << id << " layer " << l << " head " << h << ": holds " << ::testing::PrintToString(got)
            << "\nmodel " << ::testing::PrintToString(wanted);
        const auto& of_head = stats.heads[static_cast<std::size_t>(l)][static_cast<std::size_t>(h)];
        ASSERT_EQ(of_head.live_tokens, std::ssize(wanted));
        ASSERT_EQ(of_head.pages, std::ssize(list.entries));
        tokens += of_head.live_tokens, pages += of_head.pages;
        for (const Entry& e : list.entries) {
          const PageGeometry& g = list.formats[e.format];
          if constexpr (mixed) {
            live_bytes += std::popcount(e.live) * (g.key_tile_bytes + g.value_tile_bytes) / list.page_tokens;
            page_bytes += round_up(g.key_tile_bytes, 64) + round_up(g.value_tile_bytes, 64);
            continue;
          }
          const Index row = shape(l).key_dim * size_of(g.key_type) + shape(l).value_dim * size_of(g.value_type);
          live_bytes += std::popcount(e.live) * row;
          page_bytes += round_up(list.page_tokens * shape(l).key_dim * size_of(g.key_type), 64) +
                        round_up(list.page_tokens * shape(l).value_dim * size_of(g.value_type), 64);
        }
      }
    }
    ASSERT_EQ(stats.live_tokens, tokens);
    ASSERT_EQ(stats.pages, pages);
    ASSERT_EQ(stats.page_bytes, page_bytes);
    ASSERT_EQ(stats.live_bytes, live_bytes);
    ASSERT_EQ(stats.slack_bytes(), page_bytes - live_bytes);
  }

  /// What the merges of a plan make of rows that stay. Where some could not be carried out, rows are as the cache has them.
  void merge_rows(const Plan& plan, bool all) {
    for (Index l = 0; l < cache.layers(); ++l) {
      const auto lists = cache.pages(plan.sequence, l);
      const auto& merges = plan.layers[static_cast<std::size_t>(l)].merges;
      for (std::size_t h = 0; h < merges.size(); ++h) {
        oracle::CachedHead& head = oracle::item(model(plan.sequence, l).heads, static_cast<Index>(h));
        const PageGeometry& raw = lists[h].formats[0];
        for (const Side side : {Side::keys, Side::values}) {
          const Index width = side == Side::keys ? shape(l).key_dim : shape(l).value_dim;
          const auto row = [&](Position p) -> std::vector<double>& {
            oracle::CachedToken& t = token_at(head, p);
            return side == Side::keys ? t.key : t.value;
          };
          const bool turned = side == Side::keys && merges[h].rule == MergeRule::unrotated_mean;
          const bool adds = merges[h].rule == MergeRule::added_values;
          const auto joining = [&](Position p, Position into) {
            if (!turned) return row(p);
            const Rope& rope = *shape(l).rope;
            return oracle::times(
                oracle::rotation_matrix({rope.inverse_frequencies, rope.pairing == RopePairing::interleaved}, width,
                                        static_cast<double>(into - p)),
                row(p));
          };
          std::vector<float> now(static_cast<std::size_t>(lists[h].live_tokens() * width));
          const GatherRow gather{lists[h], side, nullptr, width, now.data()};
          be.gather(std::span(&gather, 1));
          const Positions order = positions_in_order(lists[h]);
          for (std::size_t i = 0; i < merges[h].into.size(); ++i) {
            const Position into = merges[h].into[i];
            std::vector<double>& mean = row(into);
            const auto begin = static_cast<std::size_t>(merges[h].begin[i]), end = static_cast<std::size_t>(merges[h].end[i]);
            for (std::size_t j = begin; j < end && !(adds && side == Side::keys); ++j) {
              const std::vector<double> joins = joining(merges[h].from[j], into);
              for (std::size_t c = 0; c < mean.size(); ++c) mean[c] += joins[c] * (adds ? merges[h].weights[j] : 1);
            }
            for (std::size_t c = 0; c < mean.size() && !(adds && side == Side::keys); ++c) {
              const float x = static_cast<float>(adds ? mean[c] : mean[c] / static_cast<double>(1 + end - begin));
              mean[c] = rounded(static_cast<double>(x), side == Side::keys ? raw.key_type : raw.value_type);
            }
            if (all) continue;
            const auto at = static_cast<std::size_t>(std::ranges::find(order, into) - order.begin());
            for (std::size_t c = 0; c < mean.size(); ++c)
              mean[c] = static_cast<double>(now[at * static_cast<std::size_t>(width) + c]);
          }
        }
      }
    }
  }

  /// Every live row of a sequence, bit for bit.
  void verify_rows(SequenceId id) {
    for (Index l = 0; l < cache.layers(); ++l) {
      const auto lists = cache.pages(id, l);
      for (Index h = 0; h < shape(l).kv_heads; ++h) {
        const oracle::CachedHead& wanted = oracle::item(model(id, l).heads, h);
        for (const Side side : {Side::keys, Side::values}) {
          const Index width = side == Side::keys ? shape(l).key_dim : shape(l).value_dim;
          std::vector<float> got(wanted.size() * static_cast<std::size_t>(width)), rows;
          const GatherRow gather{lists[static_cast<std::size_t>(h)], side, nullptr, width, got.data()};
          ASSERT_EQ(gather.pages.live_tokens(), std::ssize(wanted));
          be.gather(std::span(&gather, 1));
          for (const Position p : positions_in_order(lists[static_cast<std::size_t>(h)])) {
            const oracle::CachedToken& token = token_at(wanted, p);
            for (const double x : side == Side::keys ? token.key : token.value) rows.push_back(static_cast<float>(x));
          }
          ASSERT_EQ(got, rows) << "sequence " << id << " layer " << l << " head " << h
                               << (side == Side::keys ? " keys" : " values");
        }
      }
    }
  }

  /// Attention of random rows, some of which see only part of the tokens, or none.
  void verify_attend(SequenceId id, Index layer) {
    const LayerShape& s = shape(layer);
    const Index n = dice.within(1, 3), last = model(id, layer).last();
    Positions positions;
    for (Index r = 0; r < n; ++r)
      positions.push_back(static_cast<Position>(dice.chance(0.5) ? last : dice.within(-1, last + 3)));
    const oracle::AttendInput in = attend_input(id, layer, rows(n, s.q_heads, s.key_dim), positions);
    const TensorBuffer<B> q(be, in.queries, DType::f32);
    std::vector<float> out(static_cast<std::size_t>(n * s.q_heads * s.value_dim), -1),
        lse(static_cast<std::size_t>(n * s.q_heads), -1);
    cache.attend(layer, {{.sequence = id,
                          .queries = q.tensor(),
                          .positions = positions,
                          .out = Tensor(out.data(), n, s.q_heads, s.value_dim),
                          .lse = lse.data()}});
    const oracle::AttendResult wanted = oracle::attend(in);
    for (std::size_t i = 0; i < out.size(); ++i)
      ASSERT_TRUE(close(out[i], wanted.out.values[i], attended_tolerance))
          << "sequence " << id << " layer " << layer << " out " << i;
    for (std::size_t i = 0; i < lse.size(); ++i)
      ASSERT_TRUE(close(lse[i], wanted.lse.values[i], lse_tolerance))
          << "sequence " << id << " layer " << layer << " lse " << i;
  }

  /// Every page in use is in some list, as often as it has references.
  void verify_pool() {
    std::map<PageId, Index> entries;
    std::map<PageId, Index> bytes;
    for (const auto& [id, sequence] : held) {
      Index shared = 0;
      for (Index l = 0; l < cache.layers(); ++l)
        for (const HeadPages& list : cache.pages(id, l))
          for (const Entry& e : list.entries) {
            ++entries[e.page];
            bytes[e.page] = round_up(list.formats[e.format].key_tile_bytes, 64) +
                            round_up(list.formats[e.format].value_tile_bytes, 64);
            shared += cache.pool().references(e.page) > 1;
          }
      ASSERT_EQ(cache.stats(id).shared_pages, shared);
    }
    Index in_use = 0;
    for (const auto& [page, count] : entries) {
      ASSERT_EQ(cache.pool().references(page), count) << "page " << page;
      in_use += bytes[page];
    }
    ASSERT_EQ(cache.pool().stats().pages_in_use, std::ssize(entries));
    ASSERT_EQ(cache.pool().stats().bytes_in_use, in_use);
  }

  void verify_all() {
    for (const auto& [id, sequence] : held) verify(id), verify_rows(id);
    verify_pool();
  }

  oracle::Array3 rows(Index n, Index heads, Index width) {
    oracle::Array3 x(n, heads, width);
    for (double& v : x.values) v = static_cast<double>(dice.within(-64, 64)) / 64;
    return x;
  }

 private:
  void copy_model(SequenceId from, SequenceId to) {
    held[to] = held.at(from);
    if (forms.contains(from)) forms[to] = forms.at(from);
    if (ages.contains(from)) ages[to] = ages.at(from);
  }

  static Positions positions_in_order(const HeadPages& list) {
    Positions positions;
    for (const Entry& e : list.entries)
      for_each_bit(e.live, [&](Index slot) { positions.push_back(list.position(e, slot)); });
    return positions;
  }
  template <class Head>
  static auto& token_at(Head& head, Position p) {
    const auto at = std::lower_bound(head.begin(), head.end(), p,
                                     [](const oracle::CachedToken& t, Position q) { return t.position < q; });
    if (at == head.end() || at->position != p) throw std::logic_error("model: no token at a position of the cache");
    return *at;
  }

  // ---- forms of tokens

  struct TierToken {
    Index layer, head;
    Position position;
    int format;
  };
  std::vector<TierToken> tier_tokens(const Plan& plan) const {
    std::vector<TierToken> tokens;
    for (Index l = 0; l < cache.layers(); ++l) {
      const LayerPlan& lp = plan.layers[static_cast<std::size_t>(l)];
      const auto lists = cache.pages(plan.sequence, l);
      for (const Tier& tier : lp.tiers)
        for (std::size_t h = 0; h < lists.size(); ++h) {
          Selection stay = Selection::live(lists[h].entries);
          if (lp.touched) stay &= lp.keep[h];
          stay &= tier.tokens[h];
          for (const Position p : positions_of(lists[h], stay))
            tokens.push_back({l, static_cast<Index>(h), p, tier.format});
        }
    }
    return tokens;
  }

  /// Tokens of tiers have their form, or that of their age, or wait; no other token has changed but by its age.
  void settle_commit(const Plan& plan, const CompressReport& report, const std::vector<TierToken>& tiers) {
    const SequenceId id = plan.sequence;
    for (Index l = 0; l < cache.layers(); ++l)
      if (const auto& aging = plan.layers[static_cast<std::size_t>(l)].aging) ages[id][l] = *aging;
    std::map<std::pair<Index, Index>, std::map<Position, int>> wanted;
    for (const TierToken& t : tiers) wanted[{t.layer, t.head}][t.position] = t.format;
    for (Index l = 0; l < cache.layers(); ++l) settle(id, l, 0, false, &wanted);
    Index waiting = 0;
    for (const TierToken& t : tiers) {
      const int now = forms[id][{t.layer, t.head}][t.position].format;
      const Aging& age = ages[id][t.layer];
      EXPECT_TRUE(now == t.format || now == 0 || now == age.format || now == age.keys_first ||
                  report.tokens_waiting > 0);
      waiting += now != t.format && now != age.format && now != age.keys_first;
    }
    EXPECT_LE(waiting, report.tokens_waiting);
  }

  template <class Of>
  static const void* codec_of(const PageGeometry& g, Of side) {
    return side == Side::keys ? g.key_codec : g.value_codec;
  }
  static const float* state_of(const HeadPages& list, std::uint32_t state, Side side) {
    if (state == 0) return nullptr;
    const CodecState& s = list.states[state - 1];
    return side == Side::keys ? s.keys : s.values;
  }

 public:
  /// Reads every token of a layer: one whose form is as it was reads as it did, to the last bit; one that has changed reads
  /// as its codec makes of what was read before. The model then holds what is read now. Gives the tokens that changed.
  Index settle(SequenceId id, Index layer, Index newest_appended, bool demotes = false,
               const std::map<std::pair<Index, Index>, std::map<Position, int>>* tiers = nullptr) {
    Index changed = 0;
    const auto lists = cache.pages(id, layer);
    const Aging rule = ages[id].contains(layer) ? ages[id].at(layer) : Aging{};
    for (Index h = 0; h < shape(layer).kv_heads; ++h) {
      const HeadPages& list = lists[static_cast<std::size_t>(h)];
      oracle::CachedHead& head = oracle::item(model(id, layer).heads, h);
      HeadForms& known = forms[id][{layer, h}];
      const Positions order = positions_in_order(list);
      if (order.size() != head.size()) {
        ADD_FAILURE() << "layer " << layer << " head " << h << " holds " << order.size() << " tokens, model "
                      << head.size();
        return changed;
      }
      std::vector<std::size_t> entry_of(order.size());
      std::vector<Index> slot_of(order.size());
      for (std::size_t e = 0, i = 0; e < list.entries.size(); ++e)
        for_each_bit(list.entries[e].live, [&](Index slot) { entry_of[i] = e, slot_of[i++] = slot; });
      for (const Side side : {Side::keys, Side::values}) {
        const Index width = side == Side::keys ? shape(layer).key_dim : shape(layer).value_dim;
        std::vector<float> rows(order.size() * static_cast<std::size_t>(width));
        const GatherRow gather{list, side, nullptr, width, rows.data()};
        be.gather(std::span(&gather, 1));
        const auto row_of = [&](std::size_t i) {
          return std::span(rows).subspan(i * static_cast<std::size_t>(width), static_cast<std::size_t>(width));
        };
        const auto model_row = [&](std::size_t i) -> std::vector<double>& {
          oracle::CachedToken& t = token_at(head, order[i]);
          return side == Side::keys ? t.key : t.value;
        };
        for (std::size_t i = 0; i < order.size();) {
          const Entry& e = list.entries[entry_of[i]];
          std::size_t end = i;
          while (end < order.size() && entry_of[end] == entry_of[i]) ++end;
          std::vector<Index> slots;
          std::vector<std::vector<double>> before;
          std::vector<std::size_t> coded;
          bool twice = false;  // a tier's form, and that of age on top
          for (std::size_t t = i; t < end && tiers != nullptr && tiers->contains({layer, h}); ++t) {
            const auto& of_head = tiers->at({layer, h});
            const auto tier = of_head.find(order[t]);
            twice = twice || (tier != of_head.end() && tier->second != e.format && e.format != 0);
          }
          for (std::size_t t = i; t < end && !twice; ++t) {
            const TokenForm was = known.contains(order[t]) ? known.at(order[t]) : TokenForm{};
            const PageGeometry &from = list.formats[was.format], &to = list.formats[e.format];
            const bool same =
                codec_of(from, side) == codec_of(to, side) &&
                (codec_of(to, side) == nullptr || state_of(list, was.state, side) == state_of(list, e.state, side));
            if (same) {
              const std::vector<double>& wanted = model_row(t);
              if (!std::equal(wanted.begin(), wanted.end(), row_of(t).begin()))
                ADD_FAILURE() << "layer " << layer << " head " << h << " position " << order[t] << ": "
                              << (side == Side::keys ? "keys" : "values") << " of format " << e.format << " (was "
                              << was.format << ") read otherwise than before";
            } else {
              slots.push_back(slot_of[t]), before.push_back(model_row(t)), coded.push_back(t);
            }
          }
          if (!coded.empty())
            verify_coded(list, e, side, width, static_cast<Index>(end - i), slots, before, coded, row_of);
          for (std::size_t t = i; t < end; ++t) model_row(t).assign(row_of(t).begin(), row_of(t).end());
          i = end;
        }
      }
      // Which changed, and whether they should have.
      Position newest_changed = -1;
      std::vector<Position> left;  // eligible tokens whose values are as appended
      for (std::size_t i = 0; i < order.size(); ++i) {
        const Entry& e = list.entries[entry_of[i]];
        const TokenForm now{e.format, e.state}, was = known.contains(order[i]) ? known.at(order[i]) : TokenForm{};
        const bool eligible = order[i] >= rule.sinks && rule.classes.has(cache.tags(id).class_of(order[i]));
        const bool to_tier =
            tiers != nullptr && tiers->contains({layer, h}) && tiers->at({layer, h}).contains(order[i]);
        if (eligible && (now.format == 0 || now.format == rule.keys_first)) left.push_back(order[i]);
        if (now == was) continue;
        ++changed;
        known[order[i]] = now;
        if (to_tier || demotes) continue;
        EXPECT_TRUE(eligible && (now.format == rule.format || now.format == rule.keys_first))
            << "layer " << layer << " head " << h << " position " << order[i] << " took format " << now.format;
        if (now.format == rule.format) newest_changed = std::max(newest_changed, order[i]);
      }
      std::sort(left.begin(), left.end());
      const Index newest = newest_appended == 0
                               ? std::numeric_limits<Index>::max()
                               : head[head.size() - static_cast<std::size_t>(newest_appended)].position;
      const Index old = std::lower_bound(left.begin(), left.end(), newest) - left.begin();
      if (newest_changed >= 0) {
        EXPECT_GE(old, rule.keep_raw_values) << "layer " << layer << " head " << h << ": too many have aged";
        const auto& to = list.formats[static_cast<std::size_t>(rule.format)];
        if (to.rows_move && rule.keys_first < 0 && !left.empty() && tiers == nullptr &&
            cache.pool().stats().refusals == 0) {
          EXPECT_GT(left.front(), newest_changed) << "layer " << layer << " head " << h << ": older ones have not aged";
        }
      }
    }
    return changed;
  }

 private:
  template <class RowOf>
  void verify_coded(const HeadPages& list, const Entry& e, Side side, Index width, Index live,
                    const std::vector<Index>& slots, const std::vector<std::vector<double>>& before,
                    const std::vector<std::size_t>& coded, RowOf&& row_of) {
    FormatList::for_each([&]<class P>(int format, P) {
      if (format != e.format) return;
      const auto verify_side = [&]<Codec C>(C*) {
        EXPECT_TRUE(C::rows_move || std::ssize(slots) == live) << C::name << ": a page was written twice";
        std::vector<float> state(static_cast<std::size_t>(state_floats<C>(width)));
        const float* there = state_of(list, e.state, side);
        if (there != nullptr && !state.empty()) be.wait(be.to_host(state.data(), there, std::ssize(state) * 4));
        const auto wanted =
            read_coded<C>({list.page_tokens, width}, slots, before, there != nullptr ? state.data() : nullptr);
        for (std::size_t i = 0; i < coded.size(); ++i)
          for (Index c = 0; c < width; ++c) {
            const float got = row_of(coded[i])[static_cast<std::size_t>(c)],
                        want = wanted[i][static_cast<std::size_t>(c)];
            if (std::abs(got - want) > 1e-5f)
              ADD_FAILURE() << got << ", wanted " << want << ": " << C::name << ": slot " << slots[i] << " channel "
                            << c << " was " << before[i][static_cast<std::size_t>(c)];
          }
      };
      if (side == Side::keys)
        verify_side(static_cast<typename P::Key*>(nullptr));
      else
        verify_side(static_cast<typename P::Value*>(nullptr));
    });
  }

  oracle::AttendInput attend_input(SequenceId id, Index layer, oracle::Array3 queries, const Positions& positions) {
    const LayerShape& s = shape(layer);
    oracle::AttendInput in;
    in.queries = std::move(queries);
    in.positions.assign(positions.begin(), positions.end());
    in.heads = model(id, layer).heads;
    in.value_width = s.value_dim;
    in.how = {.scale = static_cast<double>(s.scale), .softcap = static_cast<double>(s.softcap), .window = s.window};
    in.sink.assign(s.sink_logits.begin(), s.sink_logits.end());
    return in;
  }

  static void verify_list(const HeadPages& list) {
    std::map<PageId, Position> last;  // pages of coded forms may interleave
    std::set<std::uint32_t> blocks;
    for (const Entry& e : list.entries) {
      Position& before = last.try_emplace(mixed && e.format != 0 ? e.page + 1 : 0, -1).first->second;
      ASSERT_TRUE(mixed || e.live != 0) << "an entry without tokens holds a page";
      ASSERT_TRUE(e.live != 0 || &e != &list.entries.back()) << "the last entry holds no token";
      if (mixed && e.live == 0) continue;  // emptied by truncate, until the next commit
      ASSERT_TRUE(e.used >= 1 && e.used <= list.page_tokens);
      ASSERT_EQ(e.live & ~low_bits(e.used), 0u) << "live beyond the slots used";
      ASSERT_EQ(list.position(e, 0), e.first);
      ASSERT_EQ(list.position(e, e.used - 1), e.last);
      ASSERT_TRUE(e.offsets == 0 || blocks.insert(e.offsets).second) << "two entries share a block of offsets";
      for (Index s = 0; s < e.used; ++s) {
        ASSERT_GT(list.position(e, s), before);
        before = list.position(e, s);
      }
    }
  }
};

}  // namespace kvpare::test
