// Compression of pages that the engine owns: its layout, its block table, its memory. Nothing is copied out.
#pragma once

#include <span>
#include <vector>

#include "../cache/engine_pages.hpp"
#include "../cache/tags.hpp"
#include "../core/random.hpp"
#include "feature_scores.hpp"
#include "observed_layer.hpp"
#include "planning.hpp"

namespace kvpare {

/// One attention layer of a sequence in the engine's pages.
template <class T>
struct EngineLayer {
  LayerShape shape;
  EnginePages<T> kv;
};

/// What a commit left of one layer.
struct EngineLayerReport {
  Index tokens = 0;                              // now, per head: the engine's new live count
  std::vector<std::vector<Position>> positions;  // per kv head (one for all with Scope::same_tokens), ascending
  std::vector<std::int32_t> pages;        // that hold them, in order: the new block table
  std::vector<std::int32_t> freed_pages;  // the engine may reuse them
  Index rows_moved = 0;
};

/// Compresses one sequence that lives in an engine's pages. Holds observations between `observe` and `plan`, no payload.
///
/// The engine's pages have no holes, so kept tokens are packed to the front of the block table, whose end is free then. What
/// heads (Scope) or layers (`one_table`: one block table for all layers) must have in common, plans respect: with
/// Scope::same_tokens the heads choose together, with one table all layers keep the same number. Tokens in pages that hold
/// `frozen` ones stay. Where pages stay or go whole (granularity = page) nothing is written at all: the block table gets
/// shorter by those that go, wherever they stood. Heads must choose together then, and layers have tables of their own.
template <Backend B>
class EngineSequence {
 public:
  explicit EngineSequence(B& be, Tags tags = {}, bool one_table = false)
      : be_(&be), tags_(std::move(tags)), one_table_(one_table) {}

  /// As KvCache::observe, on the engine's pages of one layer.
  template <class T, class C>
  void observe(Index layer, const EngineLayer<T>& at, const C& compressor, ConstTensor queries,
               std::span<const Position> positions, bool final = true, const float* lse = nullptr) {
    check(at, layer);
    kvpare::check(compressor);
    kvpare::detail::require_reads_no_features(compressor);
    with_policy(compressor.scorer, [&](const auto& scorer) { check_layer_of(scorer, at.shape, layer); });
    require(queries.rows == static_cast<Index>(positions.size()) && queries.heads == at.shape.q_heads &&
                queries.width == at.shape.key_dim,
            "observe: queries are [", queries.rows, ", ", queries.heads, ", ", queries.width, "], must be [",
            positions.size(), ", ", at.shape.q_heads, ", ", at.shape.key_dim, "]");
    if (at.kv.tokens == 0) return;
    const Lists lists(at, layer);
    const Columns columns = columns_of(lists.heads, tags_);
    if (static_cast<Index>(observed_.size()) <= layer) observed_.resize(static_cast<std::size_t>(layer) + 1);
    observed_[static_cast<std::size_t>(layer)].observe(
        *be_, compressor.scorer, observation(layer, at, lists, columns, compressor), queries, positions, final, lse);
  }

  /// As KvCache::observe_features, on the engine's pages of all layers.
  template <class T, class C>
  void observe_features(const C& compressor, std::span<const EngineLayer<T>> layers, const Features& features) {
    kvpare::check(compressor);
    const kvpare::detail::FeatureScores<B> importance(*be_, compressor, features);
    std::vector<std::pair<std::size_t, ObservedLayer<B>>> observed;
    for (std::size_t l = 0; l < layers.size(); ++l) {
      const EngineLayer<T>& at = layers[l];
      const Index layer = static_cast<Index>(l);
      check(at, layer);
      if (!at.shape.compress || layer < compressor.selector.skip_layers || (at.kv.tokens == 0 && features.tokens() == 0))
        continue;
      if (l < observed_.size()) observed_[l].require_none_of_another(compressor.scorer, layer, "observe_features");
      const Lists lists(at, layer);
      observed.emplace_back(l, importance.of_layer(*be_, compressor.scorer, layer, at.shape.kv_heads,
                                                   columns_of(lists.heads, tags_)));
    }
    observed_.resize(std::max(observed_.size(), layers.size()));
    for (auto& [l, scores] : observed) observed_[l] = std::move(scores);
  }

  /// What a policy would keep. Reads only. Waits once. A ratio is of the tokens the pages hold now.
  template <class T, class C>
  Plan plan(const C& compressor, std::span<const EngineLayer<T>> layers) {
    Plan plan;
    kvpare::check(compressor);
    require(compressor.selector.merge == MergeInto::none,
            "plan: merge writes keys and values, which pages of the engine do not take; it must be none");
    const bool whole_pages = compressor.selector.granularity == Granularity::page;
    require(!whole_pages || !one_table_ || layers.size() == 1, "plan: granularity = page, but ", layers.size(),
            " layers share one block table, and each would drop other pages; must be token");
    plan.layers.resize(layers.size());
    plan.epoch = epoch_of(layers);
    observed_.resize(std::max(observed_.size(), layers.size()));
    std::vector<Lists> lists;
    std::vector<Columns> columns;
    std::vector<ScoredLayer> scored;
    lists.reserve(layers.size()), columns.reserve(layers.size());
    const std::vector<TokenGroup> groups = groups_of(compressor.selector, compressor.keep, tags_);
    bool together = false;
    for (std::size_t l = 0; l < layers.size(); ++l) {
      const EngineLayer<T>& at = layers[l];
      check(at, static_cast<Index>(l));
      if (!at.shape.compress || at.kv.tokens == 0 || static_cast<Index>(l) < compressor.selector.skip_layers) {
        require(!one_table_, "plan: layer ", l, " is not to be compressed, but shares its block table with the others");
        continue;
      }
      require(!whole_pages || at.kv.scope == Scope::same_tokens || compressor.selector.heads == SelectHeads::layer,
              "plan: granularity = page, but the pages of layer ", l,
              " hold all heads, and each would drop other pages; heads must be layer");
      lists.emplace_back(at, static_cast<Index>(l));
      columns.push_back(columns_of(lists.back().heads, tags_));
      ObservedLayer<B>& seen = observed_[l];
      if (compressor.scorer.reads().cache_only())
        seen.score_unobserved(*be_, compressor.scorer,
                              observation(static_cast<Index>(l), at, lists.back(), columns.back(), compressor));
      seen.require_scores_of(compressor.scorer, "plan", static_cast<Index>(l));
      ScoredLayer out;
      out.layer = static_cast<Index>(l), out.heads = lists.back().heads, out.columns = &columns.back();
      out.scores = seen.scores(), out.scored_columns = std::min(seen.columns(), columns.back().count);
      out.density = seen.density();
      for (const TokenGroup& group : groups) {
        const auto members = columns.back().at(group.at);
        Index held = 0;
        for (std::size_t w = 0; w < members.size(); ++w) held += std::popcount(members[w] & columns.back().live[0][w]);
        out.given.push_back(held);
      }
      out.frozen = round_up(at.kv.frozen, at.kv.keys.shape[1]);
      out.page_bytes = at.kv.keys.shape[1] * (at.shape.key_dim + at.shape.value_dim) * static_cast<Index>(sizeof(T));
      together = together || at.kv.scope == Scope::same_tokens;
      scored.push_back(std::move(out));
    }
    plan_layers(*be_, compressor, groups, scored, PlanScope{together, one_table_}, plan);
    return plan;
  }

  /// Packs the kept rows to the front of each block table, in place, or drops whole pages and writes nothing; the only call
  /// that writes. Throws on a plan made for other pages, or one whose heads (or layers) do not have in common what their
  /// pages demand.
  template <class T>
  std::vector<EngineLayerReport> commit(const Plan& plan, std::span<const EngineLayer<T>> layers) {
    static_assert(!std::is_const_v<T>, "commit writes: it needs EnginePages<half>, not EnginePages<const half>");
    require(plan.layers.size() == layers.size(), "commit: plan has ", plan.layers.size(), " layers, got ",
            layers.size());
    require(plan.epoch == epoch_of(layers),
            "commit: the plan is stale: block tables, positions or token counts have changed since");
    std::vector<Lists> lists;
    for (std::size_t l = 0; l < layers.size(); ++l) {
      check(layers[l], static_cast<Index>(l));
      lists.emplace_back(layers[l], static_cast<Index>(l));
      if (plan.layers[l].touched) check_scope(plan.layers[l], layers[l], lists.back(), l);
      if (plan.layers[l].touched && plan.in_place) check_in_place(plan.layers[l], lists.back(), l);
    }
    require(!plan.in_place || !one_table_ || layers.size() == 1, "commit: the plan drops pages where they stand, but ",
            layers.size(), " layers share one block table");
    std::vector<EngineLayerReport> reports(layers.size());
    for (std::size_t l = 0; l < layers.size(); ++l)
      reports[l].tokens = plan.layers[l].touched ? plan.layers[l].keep[0].count() : layers[l].kv.tokens;
    for (std::size_t l = 1; l < layers.size() && one_table_; ++l)
      require(reports[l].tokens == reports[0].tokens, "commit: layer ", l, " keeps ", reports[l].tokens,
              " tokens and layer 0 ", reports[0].tokens, "; with one block table for all layers they must be equal");

    std::vector<std::vector<Move>> moves;
    std::vector<CompactList> compact;
    for (std::size_t l = 0; l < layers.size(); ++l) {
      const EnginePages<T>& kv = layers[l].kv;
      EngineLayerReport& report = reports[l];
      const Index heads = kv.keys.shape[2], distinct = kv.scope == Scope::same_tokens ? 1 : heads;
      for (Index h = 0; h < distinct; ++h) {
        const HeadPages& list = lists[l].heads[static_cast<std::size_t>(h)];
        const Selection keep =
            plan.layers[l].touched ? plan.layers[l].keep[static_cast<std::size_t>(h)] : Selection::live(list.entries);
        report.positions.push_back(positions_of(list, keep));
        moves.push_back(plan.in_place ? std::vector<Move>{} : pack(list, keep));
      }
      for (Index h = 0; h < heads; ++h) {
        const auto& of_head =
            moves[moves.size() - static_cast<std::size_t>(distinct) + static_cast<std::size_t>(distinct == 1 ? 0 : h)];
        for (const Move& m : of_head) report.rows_moved += m.count;
      }
      const Index page = kv.keys.shape[1];
      for (Index i = 0; i < ceil_div(kv.tokens, page); ++i) {
        const bool stays = plan.in_place && plan.layers[l].touched ? plan.layers[l].keep[0].word(i) != 0
                                                                   : i < ceil_div(report.tokens, page);
        (stays ? report.pages : report.freed_pages).push_back(kv.pages[static_cast<std::size_t>(i)]);
      }
    }
    for (std::size_t l = 0, m = 0; l < layers.size(); ++l) {
      const Index heads = layers[l].kv.keys.shape[2], distinct = layers[l].kv.scope == Scope::same_tokens ? 1 : heads;
      for (Index h = 0; h < heads; ++h) {
        const auto& of_head = moves[m + static_cast<std::size_t>(distinct == 1 ? 0 : h)];
        if (!of_head.empty())
          compact.push_back({lists[l].heads[static_cast<std::size_t>(h)].formats, of_head, layers[l].shape.key_dim,
                             layers[l].shape.value_dim});
      }
      m += static_cast<std::size_t>(distinct);
    }
    be_->compact(compact);
    for (ObservedLayer<B>& seen : observed_) seen.forget();
    return reports;
  }

  /// Decode attention straight on the engine's pages; see KvCache::attend.
  template <class T>
  void attend(Index layer, const EngineLayer<T>& at, ConstTensor queries, std::span<const Position> positions,
              Tensor out, float* lse = nullptr) {
    check(at, layer);
    const Index rows = static_cast<Index>(positions.size());
    require(rows >= 1 && rows <= 64, "attend: rows = ", rows, ", must be within [1, 64]");
    require(queries.rows == rows && queries.heads == at.shape.q_heads && queries.width == at.shape.key_dim,
            "attend: queries are [", queries.rows, ", ", queries.heads, ", ", queries.width, "], must be [", rows, ", ",
            at.shape.q_heads, ", ", at.shape.key_dim, "]");
    require(out.rows == rows && out.heads == at.shape.q_heads && out.width == at.shape.value_dim, "attend: out is [",
            out.rows, ", ", out.heads, ", ", out.width, "], must be [", rows, ", ", at.shape.q_heads, ", ",
            at.shape.value_dim, "]");
    const Lists lists(at, layer);
    const AttendSequence one{lists.heads, queries, positions, out, lse, {}};
    be_->attend(at.shape, std::span(&one, 1), MassKind::none);
  }

 private:
  struct Lists {
    EngineLists lists;
    std::vector<HeadPages> heads;
    template <class T>
    Lists(const EngineLayer<T>& at, Index layer) : lists(lists_of(at.kv, layer)) {
      for (Index h = 0; h < at.shape.kv_heads; ++h) heads.push_back(lists.head(h));
    }
    Lists(Lists&&) = default;  // vectors keep their memory: the spans in `heads` stay valid
  };

  template <class T>
  static void check(const EngineLayer<T>& at, Index layer) {
    kvpare::check(at.shape, layer);
    require(at.kv.keys.shape[2] == at.shape.kv_heads && at.kv.keys.shape[3] == at.shape.key_dim &&
                at.kv.values.shape[3] == at.shape.value_dim,
            "engine layer ", layer, ": pages hold ", at.kv.keys.shape[2], " heads of widths ", at.kv.keys.shape[3],
            " and ", at.kv.values.shape[3], ", the shape says ", at.shape.kv_heads, " heads of ", at.shape.key_dim,
            " and ", at.shape.value_dim);
  }

  template <class T, class C>
  static Observation<B> observation(Index layer, const EngineLayer<T>& at, const Lists& lists, const Columns& columns,
                                    const C& compressor) {
    Observation<B> seen;
    seen.layer = layer, seen.shape = &at.shape, seen.heads = lists.heads, seen.columns = &columns,
    seen.among = compressor.selector.classes();
    return seen;
  }

  template <class T>
  static void check_scope(const LayerPlan& plan, const EngineLayer<T>& at, const Lists& lists, std::size_t layer) {
    require(static_cast<Index>(plan.keep.size()) == at.shape.kv_heads, "commit: layer ", layer, " of the plan has ",
            plan.keep.size(), " heads, must be ", at.shape.kv_heads);
    const Index page = at.kv.keys.shape[1], frozen_pages = ceil_div(at.kv.frozen, page);
    for (std::size_t h = 0; h < plan.keep.size(); ++h) {
      const Selection& keep = plan.keep[h];
      require(keep.entries() == static_cast<Index>(lists.lists.entries.size()), "commit: layer ", layer,
              " of the plan has ", keep.entries(), " pages, the block table ", lists.lists.entries.size());
      require(keep.count() == plan.keep[0].count(), "commit: layer ", layer, " is ragged: head ", h, " keeps ",
              keep.count(), " tokens, head 0 ", plan.keep[0].count(),
              "; these pages hold all heads, so every head must keep the same number");
      if (at.kv.scope == Scope::same_tokens)
        require(keep == plan.keep[0], "commit: layer ", layer, ": heads 0 and ", h,
                " keep different tokens, but the pages' scope is same_tokens");
      for (Index e = 0; e < keep.entries(); ++e)
        require((keep.word(e) & ~lists.lists.entries[static_cast<std::size_t>(e)].live) == 0, "commit: layer ", layer,
                " of the plan keeps slots of page ", e, " that hold no token");
      for (Index e = 0; e < frozen_pages; ++e)
        require(keep.word(e) == lists.lists.entries[static_cast<std::size_t>(e)].live, "commit: layer ", layer,
                ": page ", e, " holds frozen tokens, and the plan evicts from it");
    }
  }

  static void check_in_place(const LayerPlan& plan, const Lists& lists, std::size_t layer) {
    for (std::size_t h = 0; h < plan.keep.size(); ++h) {
      require(plan.keep[h] == plan.keep[0], "commit: layer ", layer, ": heads 0 and ", h,
              " keep different pages, but the plan moves no rows");
      for (Index e = 0; e < plan.keep[h].entries(); ++e) {
        const std::uint64_t kept = plan.keep[h].word(e), live = lists.lists.entries[static_cast<std::size_t>(e)].live;
        require(kept == 0 || kept == live, "commit: layer ", layer, " of the plan keeps ", std::popcount(kept), " of ",
                std::popcount(live), " tokens of page ", e, ", but moves no rows");
      }
    }
  }

  /// Rows of one head to the front of the table, ascending; whole runs at a time.
  static std::vector<Move> pack(const HeadPages& list, const Selection& keep) {
    std::vector<Move> moves;
    Index to = 0;
    for (Index e = 0; e < keep.entries(); ++e)
      for (std::uint64_t left = keep.word(e); left != 0;) {
        const Index slot = std::countr_zero(left);
        const Index count = std::min<Index>(std::countr_one(left >> slot), list.page_tokens - to % list.page_tokens);
        if (e * list.page_tokens + slot != to)
          moves.push_back({list.entries[static_cast<std::size_t>(e)].page,
                           list.entries[static_cast<std::size_t>(to / list.page_tokens)].page, 0,
                           static_cast<std::uint8_t>(slot), static_cast<std::uint8_t>(to % list.page_tokens),
                           static_cast<std::uint8_t>(count)});
        to += count;
        left &= ~(low_bits(count) << slot);
      }
    return moves;
  }

  template <class T>
  std::uint64_t epoch_of(std::span<const EngineLayer<T>> layers) const {
    std::uint64_t hash = 0;
    const auto add = [&](std::uint64_t x) { hash = mix_bits(hash ^ x) + 0x9e3779b97f4a7c15u; };
    for (const EngineLayer<T>& at : layers) {
      add(static_cast<std::uint64_t>(at.kv.tokens));
      for (const std::int32_t p : at.kv.pages) add(static_cast<std::uint64_t>(p));
      for (const Position p : at.kv.positions) add(static_cast<std::uint64_t>(p));
    }
    return hash;
  }

  B* be_;
  Tags tags_;
  bool one_table_;
  std::vector<ObservedLayer<B>> observed_;
};

}  // namespace kvpare
