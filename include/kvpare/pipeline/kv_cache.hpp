// The cache an engine talks to: append, observe, compress, attend; fork, truncate, release.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <shared_mutex>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../cache/compaction.hpp"
#include "../cache/page_pool.hpp"
#include "../cache/sequence_image.hpp"
#include "byte_budget.hpp"
#include "feature_scores.hpp"
#include "page_format.hpp"
#include "planning.hpp"
#include "sequence.hpp"

namespace kvpare {

/// An ordinary result: with `pool_full` nothing has changed.
enum class [[nodiscard]] Outcome : std::uint8_t{done, pool_full};

struct CacheOptions {
  Index page_tokens = 64;  // 16, 32 or 64
  Index pool_bytes = 0;    // budget for the pages of all sequences
  void* pool_memory =
      nullptr;  // backend memory of the engine, 64-byte aligned, pool_bytes long; null: the cache takes its own
};

/// One sequence of an `attend` call.
struct AttendRequest {
  SequenceId sequence = 0;
  ConstTensor queries;                  // [backend] [rows 1..64, q_heads, key_dim] after RoPE, not scaled
  std::span<const Position> positions;  // per row: it sees keys up to this position
  Tensor out;                           // [backend] [rows, q_heads, value_dim]
  float* lse = nullptr;                 // [backend] [rows, q_heads], natural log; or null
  std::span<float* const> mass = {};    // [backend] per kv head [slots], added to (see MassKind); or empty
};

/// What one sequence takes. Everything is counted: pages whole, bookkeeping, scores waiting for `compress`.
struct SequenceStats {
  struct Head {
    Index live_tokens = 0, pages = 0;
  };
  std::vector<std::vector<Head>> heads;  // [layer][kv head]
  Index live_tokens = 0;                 // over all layers and kv heads
  Index pages = 0;                       // entries: a page shared with other sequences counts here too
  Index shared_pages = 0;                // of these, how many others hold as well
  Index page_bytes = 0;                  // of all pages, whole
  Index live_bytes = 0;                  // of the live tokens' keys and values
  Index bookkeeping_bytes = 0;           // host memory: entries, positions, tags
  Index observation_bytes = 0;           // scores and query rows kept for `compress`
  Index running_bytes = 0;               // scores that go on from step to step, such as accumulated attention
  Index state_bytes = 0;                 // of codecs: balancers, channel factors, …; forks that share it count it too
  Index parked_bytes = 0;                // host memory: originals of coded rows (Aging::recode); forks that share them count them
  Index slack_bytes() const { return page_bytes - live_bytes; }
  Index total_bytes() const {
    return page_bytes + bookkeeping_bytes + observation_bytes + running_bytes + state_bytes + parked_bytes;
  }
};

/// What `commit` and `compress` did.
struct CompressReport {
  std::vector<Index> layer_budgets;  // tokens per kv head granted, of all groups that share one; -1 = layer left alone
  Index tokens_before = 0, tokens_after = 0;  // live, over all layers and kv heads
  Index pages_before = 0, pages_after = 0;
  Index page_bytes_before = 0, page_bytes_after = 0;
  Index pages_freed = 0, bytes_freed = 0;  // really back in the pool
  Index pages_shared = 0, bytes_shared = 0;  // given up but not free: other sequences hold them
  Index pages_unpacked = 0;  // left with less than 3/4 of their slots live, since other sequences hold them
  Index rows_moved = 0;
  Index tokens_merged = 0;    // that became part of others, over all layers and kv heads
  Index tokens_not_merged = 0;  // that should have, but, all or in part, found coded rows, or no page to copy a shared one to
  std::vector<std::string> notes = {};  // what a guard found, for people
  Index tokens_changed = 0;   // that took another form, over all layers and kv heads
  Index tokens_recoded = 0;   // that were coded anew in the form they have (Aging::recode)
  Index tokens_waiting = 0;   // that should have, but fill no page of their own yet or found no room in the pool
  Index nan_scores = 0;
};

/// Scores of one layer by token. NaN where a head no longer holds the token, and for tokens that came after the last
/// observation.
struct LayerScores {
  std::vector<Position> positions;         // of the tokens that any head holds, ascending
  std::vector<std::vector<float>> values;  // [kv head][token]
};

/// All of KvCache that does not depend on which formats it lists; see there.
template <Backend B>
class BasicKvCache {
 public:
  static constexpr int append_format = 0;
  using PageFormat = kvpare::PageFormat<B>;

  /// `formats` live as long as the cache. Throws as KvCache does.
  BasicKvCache(B& be, Model model, CacheOptions options, std::span<const PageFormat> formats)
      : be_(&be), formats_(formats), model_(checked(std::move(model))), page_tokens_(options.page_tokens) {
    require(page_tokens_ == 16 || page_tokens_ == 32 || page_tokens_ == 64, "cache: page_tokens = ", page_tokens_,
            ", must be 16, 32 or 64");
    require(options.pool_bytes > 0, "cache: pool_bytes = ", options.pool_bytes, ", must be positive");
    std::vector<Index> sizes;
    for (Index l = 0; l < layers(); ++l) {
      auto& sizes_of_layer = size_class_.emplace_back();
      for (const PageFormat& format : formats_) {
        const bool fits = takes(format, shape(l));
        require(fits || &format != &formats_[append_format], "cache: format ", append_format, " (", format.keys.name,
                " keys, ", format.values.name, " values), which append writes, has no tiles of ", page_tokens_,
                " tokens with ", shape(l).key_dim, " and ", shape(l).value_dim, " channels (layer ", l, ")");
        if (!fits) {  // of no use in this layer, see `support`
          sizes_of_layer.push_back(-1);
          continue;
        }
        const Index bytes = format.page_bytes(page_tokens_, shape(l).key_dim, shape(l).value_dim);
        auto at = std::find(sizes.begin(), sizes.end(), bytes);
        sizes_of_layer.push_back(static_cast<int>(at - sizes.begin()));
        if (at == sizes.end()) sizes.push_back(bytes);
      }
    }
    const PageFormat& appended = formats_[append_format];
    require(appended.keys.rows_move && appended.values.rows_move && appended.keys.state_floats(1) == 0 &&
                appended.values.state_floats(1) == 0,
            "cache: the first format is what append writes, ", appended.keys.name, " keys and ", appended.values.name,
            " values; both must code each token by itself and take no state");
    std::byte* memory = static_cast<std::byte*>(options.pool_memory);
    if (memory == nullptr) {
      owned_memory_ = Buffer<B, std::byte>(be, options.pool_bytes);
      memory = owned_memory_.data();
    }
    pool_ = std::make_unique<PagePool>(memory, options.pool_bytes, sizes);
    for (int size = 0; size < static_cast<int>(sizes.size()); ++size) {
      const bool of_append = std::any_of(size_class_.begin(), size_class_.end(),
                                         [&](const auto& of_layer) { return of_layer[append_format] == size; });
      if (!of_append && pool_->stats().chunks >= 4 * std::ssize(sizes))
        (void)pool_->reserve(size, 1);  // so that forms can change in a full pool; few chunks are too dear for that
    }
    for (const LayerShape& shape : model_.layers) {
      auto& geometry = geometry_.emplace_back();
      for (const PageFormat& format : formats_) geometry.push_back(geometry_of(format, shape, memory));
    }
  }
  BasicKvCache(const BasicKvCache&) = delete;
  BasicKvCache& operator=(const BasicKvCache&) = delete;

  const Model& model() const { return model_; }
  Index layers() const { return static_cast<Index>(model_.layers.size()); }
  Index page_tokens() const { return page_tokens_; }
  std::span<const PageFormat> formats() const { return formats_; }  // by Entry::format
  const PagePool& pool() const { return *pool_; }
  B& backend() const { return *be_; }

  // ---- sequences

  SequenceId create() {
    auto fresh = std::make_unique<Sequence>();
    fresh->layers.resize(model_.layers.size());
    for (Index l = 0; l < layers(); ++l)
      fresh->layers[static_cast<std::size_t>(l)].heads.resize(static_cast<std::size_t>(shape(l).kv_heads));
    const std::unique_lock lock(table_);
    for (const auto& [layer, block] : shared_states_) fresh->layers[static_cast<std::size_t>(layer)].add_state(block);
    sequences_.emplace(next_id_, std::move(fresh));
    return next_id_++;
  }

  /// A second sequence with the same tokens and the same running scores. Pages are shared, entries are copied; what waits
  /// for `compress` is not.
  SequenceId fork(SequenceId id) {
    auto copy = std::make_unique<Sequence>(get(id).branch(*be_));
    const Sequence& fresh = *copy;
    const std::unique_lock lock(table_);
    sequences_.emplace(next_id_, std::move(copy));
    for (const Layer& layer : fresh.layers)
      for (const Head& head : layer.heads)
        for (const Entry& e : head.entries) pool_->retain(e.page);
    return next_id_++;
  }

  /// Gives back all pages of a sequence.
  void release(SequenceId id) {
    for (Layer& layer : get(id).layers)
      for (Head& head : layer.heads)
        for (const Entry& e : head.entries) pool_->release(e.page);
    const std::unique_lock lock(table_);
    sequences_.erase(id);
  }

  ~BasicKvCache() {
    while (!sequences_.empty()) release(sequences_.begin()->first);
  }

  /// Says what kind of tokens stand at some positions, before or after they are appended.
  void tag(SequenceId id, const TagSpan& span) {
    Sequence& s = get(id);
    s.tags.add(span);
    ++s.epoch;
  }
  const Tags& tags(SequenceId id) const { return get(id).tags; }

  // ---- append

  /// Adds tokens to one layer: keys after RoPE [tokens, kv_heads, key_dim], values [tokens, kv_heads, value_dim] of any
  /// element type, and their positions, ascending and beyond all earlier ones of this layer.
  /// All or nothing: `pool_full` when the pages cannot be had. Cost: the copy. Tokens that were there before may take the
  /// form of their age first (see Aging), so that what is appended now is attended to as it is.
  Outcome append(SequenceId id, Index layer, ConstTensor keys, ConstTensor values,
                 std::span<const Position> positions) {
    Sequence& s = get(id);
    check_layer(layer, "append");
    const LayerShape& sh = shape(layer);
    check_tensor("append", "keys", keys, static_cast<Index>(positions.size()), sh.kv_heads, sh.key_dim);
    check_tensor("append", "values", values, static_cast<Index>(positions.size()), sh.kv_heads, sh.value_dim);
    Layer& at = s.layers[static_cast<std::size_t>(layer)];
    for (std::size_t i = 0; i < positions.size(); ++i) {
      const Position before = i == 0 ? at.last_position() : positions[i - 1];
      require(positions[i] > before, "append: position ", positions[i], " of token ", i, " follows ", before,
              " in layer ", layer, ", positions must ascend and not be negative");
    }
    if (positions.empty()) return Outcome::done;
    require(positions.back() < std::numeric_limits<Position>::max(), "append: position ", positions.back(),
            ", must be below ", std::numeric_limits<Position>::max());

    if (FormChanges aged = aged_changes(s, layer); !aged.empty()) {  // what is here has been attended to as it was
      CompressReport unread;
      reform(s, {{layer, std::move(aged)}}, unread);
    }

    // Lay out, take pages, write rows where nobody looks yet; what changes the lists comes last and cannot fail.
    constexpr int format = append_format;
    std::vector<WriteRun> runs;
    const bool into_open_pages = has_open_pages(at, format);
    for (std::size_t h = 0; h < at.heads.size(); ++h)
      lay_out(at.heads[h], static_cast<Index>(h), positions, into_open_pages, runs);
    FreshPages fresh(*pool_,
                     std::count_if(runs.begin(), runs.end(), [](const WriteRun& run) { return run.slot == 0; }));
    if (!fresh.take(size_class(layer, format))) return Outcome::pool_full;
    std::size_t next = 0;
    for (WriteRun& run : runs) {
      run.format = format;
      run.page =
          run.slot == 0 ? fresh.pages()[next++] : at.heads[static_cast<std::size_t>(run.head)].entries.back().page;
    }
    at.make_room(runs, positions, page_tokens_);
    be_->append({.keys = keys,
                 .values = values,
                 .formats = geometry_[static_cast<std::size_t>(layer)],
                 .runs = runs,
                 .page_tokens = page_tokens_});

    fresh.keep();
    for (const WriteRun& run : runs)
      at.heads[static_cast<std::size_t>(run.head)].add(
          run, positions.subspan(static_cast<std::size_t>(run.row), run.count), page_tokens_);
    for (const Position p : positions) at.add_given(p);
    ++s.epoch;
    return Outcome::done;
  }

  // ---- observe and compress

  /// Shows a policy the queries of rows just appended to a layer: [rows, q_heads, key_dim] after RoPE, not scaled, with
  /// their positions, ascending. The scorer takes the rows it reads (Reads); pass all you have. Under chunked prefill
  /// pass `final = false` for all chunks but the last. A scorer that adds up attention counts every row once and goes on
  /// from turn to turn, whatever is evicted between.
  /// An engine whose attention has given it the rows' lse (natural log, sinks included, over exactly the tokens that the
  /// layer holds up to each row; [backend] [rows, q_heads]) may hand it over: scorers that look at whole rows then need one
  /// pass over the keys instead of two. Those that look at a part of the tokens (air_cache, csp) compute theirs anyway.
  template <class C>
  void observe(SequenceId id, Index layer, const C& compressor, ConstTensor queries,
               std::span<const Position> positions, bool final = true, const float* lse = nullptr) {
    Sequence& s = get(id);
    check_layer(layer, "observe");
    check_tensor("observe", "queries", queries, static_cast<Index>(positions.size()), shape(layer).q_heads,
                 shape(layer).key_dim);
    kvpare::check(compressor);
    detail::require_reads_no_features(compressor);
    if (takes_part(layer, compressor.selector))
      with_policy(compressor.scorer, [&](const auto& scorer) { check_layer_of(scorer, shape(layer), layer); });
    Layer& at = s.layers[static_cast<std::size_t>(layer)];
    require(!at.empty() || positions.empty(), "observe: layer ", layer, " holds no tokens yet, got ", positions.size(),
            " rows; append first");
    if (at.empty()) return;
    const LayerLists lists(*this, s, layer);
    const Columns columns = columns_of(lists.heads, s.tags);
    const Observation<B> seen = observation(layer, lists, columns, compressor);
    watch_queries(at, layer, queries);
    if (!compressor.scorer.reads().streams) {
      at.observed.observe(*be_, compressor.scorer, seen, queries, positions, final, lse);
      return;
    }
    // Sums over all rows so far go on where the last chunk, turn or decode step left them; a row counts once.
    at.observed.require_none_of_another(compressor.scorer, layer);
    ObservedLayer<B> sums;
    std::span<const Position> fresh = positions;
    if (at.running.is_of(policy_name(compressor.scorer))) {
      take_running(sums, compressor.scorer, at, lists.heads, columns);
      require(std::is_sorted(positions.begin(), positions.end()), "observe: layer ", layer,
              ": positions of the rows must ascend");
      const auto first = std::upper_bound(positions.begin(), positions.end(), at.running.last_row());
      fresh = positions.subspan(static_cast<std::size_t>(first - positions.begin()));
    }
    const Index skipped = static_cast<Index>(positions.size() - fresh.size());
    sums.observe(*be_, compressor.scorer, seen, queries.part(skipped, static_cast<Index>(fresh.size())), fresh, final,
                 lse != nullptr ? lse + skipped * queries.heads : nullptr);
    at.running.start(*be_, policy_name(compressor.scorer), sums.scores(), sums.columns(),
                     columns_of_slots(lists.heads, columns), 0);
    if (!fresh.empty()) at.running.count_rows_up_to(fresh.back());
  }

  /// Shows a policy whose scorer reads features (TopV) those of a prompt's visual tokens, once per prompt, instead of
  /// `observe`: when the prompt has been appended to all layers that the selector chooses in (from `skip_layers` on), and
  /// before `compress`. Every one of them gets the same scores, its heads alike; tokens that the features leave out score
  /// 0, so that visual ones among them go first. A later call takes the place of an earlier one. Does not wait.
  /// Throws where rows, widths or counts disagree, positions do not ascend, a layer holds no such token, or one that is
  /// not visual; nothing has changed then.
  template <class C>
  void observe_features(SequenceId id, const C& compressor, const Features& features) {
    Sequence& s = get(id);
    kvpare::check(compressor);
    const detail::FeatureScores<B> importance(*be_, compressor, features);
    std::vector<std::pair<Layer*, ObservedLayer<B>>> observed;
    for (Index l = 0; l < layers(); ++l) {
      Layer& at = s.layers[static_cast<std::size_t>(l)];
      if (!takes_part(l, compressor.selector) || (at.empty() && features.tokens() == 0)) continue;
      at.observed.require_none_of_another(compressor.scorer, l, "observe_features");
      const LayerLists lists(*this, s, l);
      observed.emplace_back(&at, importance.of_layer(*be_, compressor.scorer, l, shape(l).kv_heads,
                                                     columns_of(lists.heads, s.tags)));
    }
    for (auto& [at, scores] : observed) at->observed = std::move(scores);
  }

  /// What a policy would keep. Changes nothing. Throws when a layer was not observed by this policy although its scorer
  /// reads queries or features. Waits once for the backend.
  template <class C>
  Plan plan(SequenceId id, const C& compressor) const {
    const Sequence& s = get(id);
    kvpare::check(compressor);
    Plan plan;
    plan.sequence = id;
    plan.layers.resize(model_.layers.size());
    const Precision precision = precision_of(compressor, layers());
    if (!precision.choice.empty()) {
      const ScoresOfLayer scores = [&](Index l, const LayerLists& lists, const Columns& columns,
                                       ObservedLayer<B>& made) -> const ObservedLayer<B>& {
        return scores_of(s.layers[static_cast<std::size_t>(l)], l, lists, columns, compressor, made, "compress");
      };
      plan_joint(s, compressor.keep, compressor.selector, scores, precision, plan);
      plan.epoch = s.epoch;
      return plan;
    }
    std::vector<LayerForms> forms;
    for (Index l = 0; l < layers(); ++l) forms.push_back(forms_of(precision, l));
    const KeyRanges key_ranges(*this, s, precision);
    if (evicts(compressor)) {
      const std::vector<TokenGroup> groups = groups_of(compressor.selector, compressor.keep, s.tags);
      std::vector<LayerLists> lists;
      std::vector<Columns> columns;
      std::vector<ScoredLayer> scored;
      std::vector<ObservedLayer<B>> made(model_.layers.size());
      lists.reserve(model_.layers.size()), columns.reserve(model_.layers.size());
      for (Index l = 0; l < layers(); ++l) {
        const Layer& layer = s.layers[static_cast<std::size_t>(l)];
        if (!takes_part(l, compressor.selector) || layer.empty()) continue;
        if (compressor.selector.merge_keys == MergeKeys::unrotated)
          plain_rope_of(shape(l), l, "compress: merge_keys = unrotated");
        lists.emplace_back(*this, s, l);
        columns.push_back(columns_of(lists.back().heads, s.tags));
        const ObservedLayer<B>& observed = scores_of(layer, l, lists.back(), columns.back(), compressor,
                                                     made[static_cast<std::size_t>(l)], "compress");
        ScoredLayer out;
        out.layer = l, out.heads = lists.back().heads, out.columns = &columns.back();
        out.scores = observed.scores(), out.scored_columns = observed.columns(), out.density = observed.density();
        for (const TokenGroup& group : groups) out.given.push_back(layer.given(group.at));
        out.page_bytes = pool_->page_bytes(size_class(l, append_format));
        out.settled = forms[static_cast<std::size_t>(l)].rest;
        scored.push_back(std::move(out));
      }
      plan_layers(*be_, compressor, groups, scored, PlanScope{}, plan);
    }
    plan_forms(s, precision, forms, key_ranges, plan);
    plan.epoch = s.epoch;
    return plan;
  }

  /// Carries out a plan: evicted tokens lose their bit, private pages are packed in place, empty ones go back to the
  /// pool. That needs no memory from the pool, so it succeeds in a full one. Then tiers take their forms, and what is old
  /// enough that of its age: new pages are taken before old ones go back, a few at a time where the pool has no room for
  /// all; what finds none keeps its form and is counted in `tokens_waiting`. Payload of shared pages is never written.
  /// Throws on a plan that is stale, of another sequence, or does not fit the lists; nothing has changed then. When host
  /// memory runs out after eviction, some tokens keep their form, and where rows are coded as they are appended some that
  /// absorb others may stay as they were. Cost: the survivors moved, and tokens coded.
  CompressReport commit(const Plan& plan) {
    Sequence& s = get(plan.sequence);
    require(plan.epoch == s.epoch, "commit: the plan is stale: made at epoch ", plan.epoch, ", the sequence is at ",
            s.epoch);
    require(plan.layers.size() == model_.layers.size(), "commit: plan has ", plan.layers.size(), " layers, the model ",
            model_.layers.size());
    for (Index l = 0; l < layers(); ++l) check_fits(plan.layers[static_cast<std::size_t>(l)], s, l);
    TierTokens tiers = tiers_after_eviction(plan, s);

    CompressReport report;
    count(s, report.tokens_before, report.pages_before, report.page_bytes_before);
    report.nan_scores = plan.nan_scores;
    report.notes = plan.notes;
    for (const LayerPlan& lp : plan.layers) report.layer_budgets.push_back(lp.touched ? lp.budget : -1);
    evict_and_pack(s, plan, report);
    for (Layer& layer : s.layers) layer.observed.forget();
    for (std::size_t l = 0; l < s.layers.size(); ++l) {
      if (!plan.layers[l].touched) continue;
      Layer& layer = s.layers[l];
      layer.compressed_to = 0, layer.compressed_from = layer.given();
      for (const Head& head : layer.heads)
        layer.compressed_to = std::max(layer.compressed_to, list_of(head, static_cast<Index>(l)).live_tokens());
    }

    std::map<Index, FormChanges> moved;
    for (Index l = 0; l < layers(); ++l) {
      const LayerPlan& lp = plan.layers[static_cast<std::size_t>(l)];
      if (lp.aging) s.layers[static_cast<std::size_t>(l)].aging = *lp.aging;
      if (lp.tiers.empty()) continue;
      moved[l] = tier_changes(s, l, lp, tiers);
      make_states_of_age(s, l, moved[l]);
    }
    reform(s, moved, report);
    for (const auto& [layer, changes] : moved) pack(s, layer, report, plan.dense);  // tokens that moved have left holes
    recode(s, report);
    age(s, report);
    count(s, report.tokens_after, report.pages_after, report.page_bytes_after);
    for (Index l = 0; l < layers() && !plan.in_place; ++l)
      if (plan.layers[static_cast<std::size_t>(l)].touched) report.pages_unpacked += unpacked(s, l);
    return report;
  }

  /// plan and commit.
  template <class C>
  CompressReport compress(SequenceId id, const C& compressor) {
    return commit(plan(id, compressor));
  }

  // ---- forms

  /// The form that tokens of a layer take as they grow old, from now on; see Aging. Changes nothing yet: the next append or
  /// commit does. Throws for formats this cache does not list.
  void set_aging(SequenceId id, Index layer, const Aging& aging) {
    Sequence& s = get(id);
    check_layer(layer, "set_aging");
    check_aging(aging, layer, "set_aging");
    s.layers[static_cast<std::size_t>(layer)].aging = aging;
    ++s.epoch;
  }

  /// State for a format in one layer, for tokens that take that form from now on: a calibrated scale, say. `keys` and
  /// `values`: host floats [kv_heads, state_floats of the codec]. Pages coded before keep theirs.
  /// Where all heads share one state (a dictionary), [state_floats].
  void set_state(SequenceId id, Index layer, int format, std::span<const float> keys, std::span<const float> values);

  /// The same for layers [first_layer, last_layer] of every sequence created from now on, in memory once: see
  /// shared_state_bytes. Layers that share have the same kv heads and widths. A snapshot holds it; a sequence restored from
  /// one has it for itself. Of a state whose rest is made of the prompt (given_floats of the codec) it takes that part; a
  /// sequence then has all of it for itself as soon as tokens take the form.
  void share_state(Index first_layer, Index last_layer, int format, std::span<const float> keys,
                   std::span<const float> values);
  /// Bytes of all that share_state was given; no sequence counts them.
  Index shared_state_bytes() const {
    const std::shared_lock lock(table_);
    Index bytes = 0;
    for (std::size_t i = 0; i < shared_states_.size(); ++i)
      if (i == 0 || shared_states_[i].second != shared_states_[i - 1].second) bytes += shared_states_[i].second->memory.bytes();
    return bytes;
  }

  /// Changes the form of all old tokens as set_aging says, now.
  CompressReport age(SequenceId id) {
    Sequence& s = get(id);
    CompressReport report;
    count(s, report.tokens_before, report.pages_before, report.page_bytes_before);
    age(s, report);
    count(s, report.tokens_after, report.pages_after, report.page_bytes_after);
    return report;
  }

  /// How well this cache's backend attends to a format in one layer. A format that has no tiles of the
  /// layer's shape, or whose codecs no kernel of the backend can call, is unsupported there; whoever asks for it gets an
  /// error.
  Support support(Index layer, int format) const {
    check_layer(layer, "support");
    require(format >= 0 && format < format_count(), "support: format = ", format, ", must be within [0, ",
            format_count(), ")");
    if (size_class(layer, format) < 0) return Support::unsupported;
    return be_->support(geometry_[static_cast<std::size_t>(layer)][static_cast<std::size_t>(format)]);
  }

  // ---- attend

  /// out = softmax(scale * q·K) V over the live tokens of each sequence, for 1 to 64 rows each, causal by position; see
  /// LayerShape for softcap, window and sinks. A row that sees nothing gives zeros and lse = -inf. NaN in what a row sees
  /// makes that row NaN, no other. Does not wait.
  void attend(Index layer, std::span<const AttendRequest> batch, MassKind kind = MassKind::none) {
    check_layer(layer, "attend");
    const LayerShape& sh = shape(layer);
    std::vector<LayerLists> lists;
    std::vector<AttendSequence> sequences;
    lists.reserve(batch.size());
    for (const AttendRequest& r : batch) {
      check_request(r, sh, "attend", kind == MassKind::none ? 0 : sh.kv_heads);
      lists.emplace_back(*this, get(r.sequence), layer);
      sequences.push_back({lists.back().heads, r.queries, r.positions, r.out, r.lse, r.mass});
    }
    if (!sequences.empty()) be_->attend(sh, sequences, kind);
  }
  void attend(Index layer, std::initializer_list<AttendRequest> batch, MassKind kind = MassKind::none) {
    attend(layer, std::span(batch.begin(), batch.size()), kind);
  }

  /// One decode step of a layer: attends as above, then the method evicts until every kv head holds no more than its
  /// budget, the step's own tokens up for choice as well. Append them first. The budget is the method's `keep`: tokens,
  /// in total over all layers as everywhere, or a ratio of those ever given.
  ///
  /// A scorer that adds up attention (H2O) goes on from what it has observed of the prompt; one that wants the last row
  /// (TOVA) takes one row at a time; one that reads none scores the tokens anew. Newest and protected tokens, classes and
  /// ties as in TopK. Evicting clears a bit; a list that has an empty page, or more than 17/16 of the pages it needs and
  /// one, is packed, so that pages in use stay within ceil(budget * 4/3 / page) + 2 (pages that others share are not
  /// packed). Cost: that of `attend` with mass, a scan of the scores, and at most 16 rows moved per evicted token on average.
  /// A method whose Precision has a form for the rest moves tokens there instead, once a head has `block` of them.
  /// Waits once. Throws, with nothing changed, where the method cannot act here (see acts_at_decode). When host memory runs
  /// out in the middle nothing is evicted, but the step may have been counted by a scorer that adds up.
  template <class C>
  EvictReport decode(Index layer, std::span<const AttendRequest> batch, const C& method);
  template <class C>
  EvictReport decode(Index layer, std::initializer_list<AttendRequest> batch, const C& method) {
    return decode(layer, std::span(batch.begin(), batch.size()), method);
  }

  // ---- the rest

  /// The scores that `compress` would go by. Waits once. Throws as `plan` does.
  template <class C>
  LayerScores scores(SequenceId id, Index layer, const C& compressor) const {
    const Sequence& s = get(id);
    check_layer(layer, "scores");
    kvpare::check(compressor);
    const Layer& at = s.layers[static_cast<std::size_t>(layer)];
    LayerScores out;
    out.values.resize(at.heads.size());
    if (at.empty()) return out;
    const LayerLists lists(*this, s, layer);
    const Columns columns = columns_of(lists.heads, s.tags);
    ObservedLayer<B> made;
    const ObservedLayer<B>& observed = scores_of(at, layer, lists, columns, compressor, made, "scores");
    std::vector<float> all(at.heads.size() * static_cast<std::size_t>(observed.columns()));
    be_->wait(be_->to_host(all.data(), observed.scores(), static_cast<Index>(all.size() * sizeof(float))));
    const auto any = columns.live_in_any();
    for (Index c = 0; c < columns.count; ++c) {
      if (!columns.has(any, c)) continue;
      out.positions.push_back(columns.positions[static_cast<std::size_t>(c)]);
      for (Index h = 0; h < static_cast<Index>(at.heads.size()); ++h)
        out.values[static_cast<std::size_t>(h)].push_back(
            c < observed.columns() && columns.has(columns.live_in(h), c)
                ? all[static_cast<std::size_t>(h * observed.columns() + c)]
                : std::numeric_limits<float>::quiet_NaN());
    }
    return out;
  }

  /// Forgets all tokens at positions >= n, in every layer. Nothing is decoded or moved; shared pages stay as they are.
  void truncate(SequenceId id, Position n) {
    require(n >= 0, "truncate: n = ", n, ", must not be negative");
    Sequence& s = get(id);
    for (Index l = 0; l < layers(); ++l) {
      Layer& layer = s.layers[static_cast<std::size_t>(l)];
      layer.observed.forget();
      layer.cut_given(n);
      for (std::size_t h = 0; h < layer.heads.size(); ++h) {
        Head& head = layer.heads[h];
        const HeadPages list = list_of(head, l);
        for (Entry& e : head.entries.change()) {
          if (e.last < n) continue;
          while (e.used > 0 && list.position(e, e.used - 1) >= n) --e.used;
          e.live &= low_bits(e.used);
          if (e.used > 0) e.last = list.position(e, e.used - 1);
        }
        // An emptied page between others keeps its place until the next `commit`: slots must not move here.
        while (!head.entries.empty() && head.entries.back().live == 0) {
          pool_->release(head.entries.back().page);
          head.drop_last(page_tokens_);
        }
        std::erase_if(head.parked, [&](const auto& lot) { return lot->positions.front() >= n; });
        layer.running.truncate(static_cast<Index>(h), list_of(head, l), n);
      }
    }
    ++s.epoch;
  }

  /// Positions of the live tokens of one head, ascending.
  std::vector<Position> kept(SequenceId id, Index layer, Index kv_head) const {
    check_layer(layer, "kept");
    require(kv_head >= 0 && kv_head < shape(layer).kv_heads, "kept: kv_head = ", kv_head, ", must be within [0, ",
            shape(layer).kv_heads, ")");
    const LayerLists lists(*this, get(id), layer);
    const HeadPages& list = lists.heads[static_cast<std::size_t>(kv_head)];
    return positions_of(list, Selection::live(list.entries));
  }

  /// One layer's lists as verbs take them; valid until the sequence changes.
  std::vector<HeadPages> pages(SequenceId id, Index layer) const {
    check_layer(layer, "pages");
    return LayerLists(*this, get(id), layer).heads;
  }

  std::uint64_t epoch(SequenceId id) const { return get(id).epoch; }

  // ---- off and back

  /// A copy of a sequence in host memory. Waits once per layer. Queries and scores that wait for `compress` are not in it;
  /// running scores are.
  SequenceImage image(SequenceId id) const;

  /// Bytes of keys and of values that an image holds of a page with so many live tokens.
  std::pair<Index, Index> image_bytes(Index layer, int format, Index live) const {
    check_layer(layer, "image_bytes");
    check_format(format, layer, "image_bytes");
    const PageGeometry& g = geometry_[static_cast<std::size_t>(layer)][static_cast<std::size_t>(format)];
    return {g.key_codec != nullptr ? g.key_tile_bytes : live * g.key_row_bytes,
            g.value_codec != nullptr ? g.value_tile_bytes : live * g.value_row_bytes};
  }

  /// A new sequence like the one the image was made of, attention identical to the last bit; none when the pool has no
  /// room for it. Throws when the image does not go with this cache's model, formats or page size, or makes no sense.
  std::optional<SequenceId> restore(const SequenceImage& image);

  SequenceStats stats(SequenceId id) const {
    const Sequence& s = get(id);
    SequenceStats out;
    out.bookkeeping_bytes = static_cast<Index>(sizeof(Sequence)) + s.tags.bytes() + s.decode_budget.bytes();
    for (Index l = 0; l < layers(); ++l) {
      const Layer& layer = s.layers[static_cast<std::size_t>(l)];
      auto& row = out.heads.emplace_back();
      out.observation_bytes += layer.observed.bytes();
      out.running_bytes += layer.running.bytes();
      out.observation_bytes +=
          layer.query_peaks.bytes() + layer.query_squares.bytes() + layer.query_newest.bytes();
      for (const auto& block : layer.states)
        if (!is_shared(block)) out.state_bytes += block->memory.bytes();
      out.bookkeeping_bytes +=
          static_cast<Index>(sizeof(Layer) + layer.given_spans.capacity() * sizeof(layer.given_spans[0]));
      for (const Head& head : layer.heads) {
        SequenceStats::Head h;
        h.pages = static_cast<Index>(head.entries.size());
        for (const auto& lot : head.parked)
          out.parked_bytes += static_cast<Index>((lot->keys.size() + lot->values.size() + lot->positions.size()) * 4);
        for (const Entry& e : head.entries) {
          h.live_tokens += std::popcount(e.live);
          out.page_bytes += pool_->page_bytes(size_class(l, e.format));
          out.shared_pages += pool_->references(e.page) > 1;
          const PageGeometry& g = geometry_[static_cast<std::size_t>(l)][e.format];
          out.live_bytes += std::popcount(e.live) * (g.key_tile_bytes + g.value_tile_bytes) / page_tokens_;
        }
        out.live_tokens += h.live_tokens;
        out.pages += h.pages;
        out.bookkeeping_bytes +=
            static_cast<Index>(sizeof(Head) + head.entries.capacity() * sizeof(Entry) + head.offsets.capacity() * 2 +
                               head.states.capacity() * sizeof(CodecState));
        row.push_back(h);
      }
    }
    return out;
  }

 private:
  using Sequence = detail::Sequence<B>;
  using Layer = detail::SequenceLayer<B>;
  using Head = detail::SequenceHead;

  /// One layer of a sequence as lists of pages.
  struct LayerLists {
    std::vector<HeadPages> heads;
    Index compressed_to = 0;
    LayerLists(const BasicKvCache& cache, const Sequence& s, Index layer) {
      const Layer& at = s.layers[static_cast<std::size_t>(layer)];
      compressed_to = at.compressed_to;
      heads.reserve(at.heads.size());
      for (const Head& h : at.heads) heads.push_back(cache.list_of(h, layer));
    }

    /// Live tokens of a head in slots from `slot` on.
    Index live_from(std::size_t head, Index slot) const {
      const HeadPages& list = heads[head];
      Index n = 0;
      for (Index e = slot / list.page_tokens; e < static_cast<Index>(list.entries.size()); ++e)
        n += std::popcount(list.entries[static_cast<std::size_t>(e)].live &
                           ~low_bits(std::clamp<Index>(slot - e * list.page_tokens, 0, 64)));
      return n;
    }
  };

  /// The columns of each head's slots.
  static std::vector<std::vector<std::int32_t>> columns_of_slots(std::span<const HeadPages> lists,
                                                                 const Columns& columns) {
    if (!columns.aligned) {
      std::vector<std::vector<std::int32_t>> slots = columns.of_slot;
      for (std::size_t h = 0; h < lists.size(); ++h)
        slots[h].resize(static_cast<std::size_t>(detail::used_slots(lists[h].entries, lists[h].page_tokens)));
      return slots;
    }
    std::vector<std::int32_t> same(static_cast<std::size_t>(columns.count));
    std::iota(same.begin(), same.end(), 0);
    return std::vector(lists.size(), same);
  }

  /// Running scores as scores over columns; tokens that came since have none.
  template <class S>
  void take_running(ObservedLayer<B>& to, const S& scorer, const Layer& at, std::span<const HeadPages> lists,
                    const Columns& columns) const {
    const auto slots = columns_of_slots(lists, columns);
    const auto each_scored = [&](const auto& f) {
      for (std::size_t h = 0; h < lists.size(); ++h)
        for (std::size_t e = 0; e < lists[h].entries.size(); ++e)
          for_each_bit(lists[h].entries[e].live, [&](Index bit) {
            const Index slot = static_cast<Index>(e) * page_tokens_ + bit;
            if (slot < at.running.filled(static_cast<Index>(h)))
              f(static_cast<Index>(h), slot, static_cast<Index>(slots[h][static_cast<std::size_t>(slot)]));
          });
    };
    const Index heads = static_cast<Index>(lists.size());
    Index scored = 0;
    each_scored([&](Index, Index, Index column) { scored = std::max(scored, column + 1); });
    std::vector<std::int32_t> source(static_cast<std::size_t>(heads * scored), -1);
    each_scored([&](Index h, Index slot, Index column) {
      source[static_cast<std::size_t>(h * scored + column)] = static_cast<std::int32_t>(slot);
    });
    const Buffer<B, std::int32_t> map(*be_, source);
    Buffer<B, float> scores(*be_, heads * scored);
    be_->each(heads * scored, detail::TakeScores{at.running.data(), at.running.slots(), map.data(), scores.data(),
                                                 std::max<Index>(scored, 1)});
    to.adopt(scorer, std::move(scores), scored);
  }

  /// The scores a method goes by: its observation, its running scores, or, when it reads the cache alone, ones made in `made`.
  template <class C>
  const ObservedLayer<B>& scores_of(const Layer& at, Index layer, const LayerLists& lists, const Columns& columns,
                                    const C& compressor, ObservedLayer<B>& made, const char* verb) const {
    const Reads reads = compressor.scorer.reads();
    if (reads.cache_only()) {
      made.score_unobserved(*be_, compressor.scorer, observation(layer, lists, columns, compressor));
      return made;
    }
    if (reads.streams && at.running.is_of(policy_name(compressor.scorer))) {
      take_running(made, compressor.scorer, at, lists.heads, columns);
      return made;
    }
    at.observed.require_scores_of(compressor.scorer, verb, layer);
    return at.observed;
  }

  bool takes_part(Index layer, const TopK& selector) const {
    return shape(layer).compress && layer >= selector.skip_layers;
  }

  HeadPages list_of(const Head& head, Index layer) const {
    return {head.entries, head.offsets.data(), geometry_[static_cast<std::size_t>(layer)], page_tokens_, head.states,
            &head.entries.version()};
  }

  /// Does a slot of an image hold a token?
  bool is_live(const SequenceImage::Head& head, std::size_t slot) const {
    const auto page_tokens = static_cast<std::size_t>(page_tokens_);
    return head.pages[slot / page_tokens].live >> slot % page_tokens & 1u;
  }

  /// Clears the bits of what does not stay, packs lists, gives pages back. Whatever throws, nothing has changed.
  void evict_and_pack(Sequence& s, const Plan& plan, CompressReport& report) {
    struct Change {
      Index layer;
      Head* head;
      CompactedList list;
    };
    std::vector<Change> changes;
    std::vector<RunningScores<B>> running(model_.layers.size());
    std::vector<CompactList> moves;
    const Joining joining = plan.in_place ? Joining::none : plan.dense ? Joining::dense : Joining::sparse;
    for (Index l = 0; l < layers(); ++l) {
      const LayerPlan& lp = plan.layers[static_cast<std::size_t>(l)];
      if (!lp.touched) continue;
      const LayerLists lists(*this, s, l);
      for (std::size_t h = 0; h < lists.heads.size(); ++h)
        changes.push_back({l, &s.layers[static_cast<std::size_t>(l)].heads[h],
                           compact_list(lists.heads[h], lp.keep[h].words(), is_private(), joining)});
      const RunningScores<B>& before = s.layers[static_cast<std::size_t>(l)].running;
      if (before.empty()) continue;
      std::vector<std::vector<std::int32_t>> source;
      for (std::size_t h = 0; h < lists.heads.size(); ++h) {
        std::vector<Entry> left(lists.heads[h].entries.begin(), lists.heads[h].entries.end());
        for (std::size_t e = 0; e < left.size(); ++e) left[e].live &= lp.keep[h].words()[e];
        const auto& after = changes[changes.size() - lists.heads.size() + h].list.entries;
        source.push_back(detail::slots_before(left, after, page_tokens_));
        detail::cut_unscored(source.back(), before.filled(static_cast<Index>(h)));
      }
      RunningScores<B>& after = running[static_cast<std::size_t>(l)];
      after.start(*be_, before.scorer(), before.data(), before.slots(), source, page_tokens_);
      after.count_rows_up_to(before.last_row());
    }
    std::deque<Merging> merging;
    for (std::size_t c = 0; c < changes.size(); c += static_cast<std::size_t>(shape(changes[c].layer).kv_heads)) {
      const Index l = changes[c].layer;
      const LayerPlan& lp = plan.layers[static_cast<std::size_t>(l)];
      if (lp.merges.empty()) continue;
      std::vector<CompactedList*> lists;
      for (Index h = 0; h < shape(l).kv_heads; ++h) lists.push_back(&changes[c + static_cast<std::size_t>(h)].list);
      merging.emplace_back(*this, s, l, lp.merges, lists, report);
    }
    for (const Change& c : changes) {
      if (c.list.moves.empty()) continue;
      moves.push_back({geometry_[static_cast<std::size_t>(c.layer)], c.list.moves, shape(c.layer).key_dim,
                       shape(c.layer).value_dim, page_tokens_});
      for (const Move& m : c.list.moves) report.rows_moved += m.count;
    }
    be_->compact(moves);  // from here on nothing can fail
    for (Merging& m : merging) m.keep_pages();
    for (Change& c : changes) {
      c.head->entries = std::move(c.list.entries);
      c.head->offsets = std::move(c.list.offsets);
      give_back(c.layer, c.list.released, report);
    }
    for (std::size_t l = 0; l < s.layers.size(); ++l) {
      if (plan.layers[l].touched) s.layers[l].observed.forget();
      if (!running[l].empty()) s.layers[l].running = std::move(running[l]);
    }
    ++s.epoch;
    for (Merging& m : merging) m.write();
  }

  /// Pages that a list no longer needs; what really comes back to the pool is counted, and what others still hold.
  template <class Report>
  void give_back(Index layer, std::span<const Entry> pages, Report& report) {
    for (const Entry& e : pages) {
      const Index bytes = pool_->page_bytes(size_class(layer, e.format));
      if (pool_->release(e.page))
        ++report.pages_freed, report.bytes_freed += bytes;
      else
        ++report.pages_shared, report.bytes_shared += bytes;
    }
  }

  /// Tokens of all layers that are old enough change their form.
  void age(Sequence& s, CompressReport& report) {
    std::map<Index, FormChanges> work;
    for (Index l = 0; l < layers(); ++l)
      if (FormChanges changes = aged_changes(s, l); !changes.empty()) work[l] = std::move(changes);
    reform(s, work, report);
  }

  /// Joins pages that tokens of a layer have left.
  void pack(Sequence& s, Index layer, CompressReport& report, bool dense = false) {
    Plan all;
    all.dense = dense;
    all.layers.resize(model_.layers.size());
    LayerPlan& lp = all.layers[static_cast<std::size_t>(layer)];
    lp.touched = true;
    for (const Head& head : s.layers[static_cast<std::size_t>(layer)].heads)
      lp.keep.push_back(Selection::live(head.entries));
    evict_and_pack(s, all, report);
  }

  static void add_coded_tiles(const HeadPages& list, const Entry& e, const LayerShape& shape, std::byte* canonical,
                              Index& at, std::vector<RepackTile>& tiles);

  /// Throws unless an image of a layer is one this cache could have made.
  void check_image(const SequenceImage::Layer& from, Index layer) const;

  class Merging;  // of one layer, see kv_cache_merge.hpp

  // Changes of form, see kv_cache_forms.hpp.
  using FormChanges = std::vector<std::vector<FormChange>>;  // [kv head]
  struct LayerForms;  // what a Precision means in one layer of this cache
  class KeyRanges;    // of all layers, for a guard
  class StateSources;  // what codecs make their state of
  LayerForms forms_of(const Precision& precision, Index layer) const;
  void plan_forms(const Sequence& s, const Precision& precision, const std::vector<LayerForms>& forms,
                  const KeyRanges& key_ranges, Plan& plan) const;
  struct FormSample;  // rows to measure forms on
  int find_form(const Precision& precision, const Form& form, Index layer) const;
  /// The scores that a method goes by in one layer, perhaps made in `made`.
  using ScoresOfLayer = std::function<const ObservedLayer<B>&(Index layer, const LayerLists& lists,
                                                              const Columns& columns, ObservedLayer<B>& made)>;
  void plan_joint(const Sequence& s, const Keep& keep, const TopK& selector, const ScoresOfLayer& scores,
                  const Precision& precision, Plan& plan) const;
  double form_error(int format, Index layer, const FormSample& sample) const;
  using TierTokens = std::map<std::pair<Index, std::size_t>, std::vector<std::vector<Position>>>;
  void watch_queries(Layer& at, Index layer, const ConstTensor& queries);

  // What is coded by attention, see kv_cache_recode.hpp.
  struct RowsOut;
  Buffer<B, float> attention_of(const Layer& at, std::size_t head, std::vector<std::int32_t> source) const;
  std::vector<std::int32_t> written_from(const ReformedList& list) const;
  void park(Layer& at, Index layer, const std::vector<ReformedList>& lists);
  bool has_originals(const Head& head, Index layer, std::size_t entry) const;
  void recode(Sequence& s, CompressReport& report);
  void recode_some(Layer& at, Index layer, std::size_t h, std::span<const std::size_t> due, CompressReport& report);
  void check_forms(const LayerPlan& lp, const Layer& at, Index layer) const;
  void check_format(int format, Index layer, const char* what) const;
  void check_state(const Layer& at, Index layer, int format) const;
  void check_aging(const Aging& aging, Index layer, const char* verb) const;
  TierTokens tiers_after_eviction(const Plan& plan, const Sequence& s) const;
  FormChanges tier_changes(Sequence& s, Index layer, const LayerPlan& lp, const TierTokens& tiers);
  FormChanges aged_changes(Sequence& s, Index layer);
  void make_states_of_age(Sequence& s, Index layer, const FormChanges& tiers);
  void reform(Sequence& s, const std::map<Index, FormChanges>& work, CompressReport& report);
  bool reform_some(Sequence& s, Index layer, const FormChanges& changes, CompressReport& report);
  std::uint32_t state_for(Layer& at, Index layer, int format, const std::vector<std::vector<std::uint64_t>>& words,
                          bool fresh);
  /// Without memory; `begun`: of the caller's part.
  detail::StateBlock<B> state_shape(Index layer, int format, bool begun = false) const;
  std::shared_ptr<detail::StateBlock<B>> empty_state(Index layer, int format, bool begun = false) const;
  std::shared_ptr<detail::StateBlock<B>> given_state(const char* verb, bool shared, Index layer, int format,
                                                     std::span<const float> keys, std::span<const float> values) const;
  bool is_shared(const std::shared_ptr<const detail::StateBlock<B>>& block) const {
    const std::shared_lock lock(table_);
    return std::any_of(shared_states_.begin(), shared_states_.end(), [&](const auto& s) { return s.second == block; });
  }

  // The stages of decode, see kv_cache_decode.hpp.
  struct DecodeStep;
  struct DecodeChoice;
  template <class C>
  std::vector<DecodeStep> decode_steps(Index layer, std::span<const AttendRequest> batch, const C& method);
  template <class C>
  std::vector<DecodeChoice> decode_choices(Index layer, std::vector<DecodeStep>& steps, const C& method);
  template <class C>
  void prepare_decode(Index layer, DecodeStep& step, Position position, const C& method);
  void demote(Index layer, std::vector<DecodeStep>& steps, std::span<const DecodeChoice> choices,
              std::span<const std::uint64_t> stay, std::span<const Index> nans, EvictReport& report);
  EvictReport evict(Index layer, std::vector<DecodeStep>& steps, std::span<const DecodeChoice> choices,
                    std::span<const std::uint64_t> stay, std::span<const Index> nans);

  /// Pages just taken from the pool; they go back unless they are kept.
  class FreshPages {
   public:
    FreshPages(PagePool& pool, Index count) : pool_(pool), pages_(static_cast<std::size_t>(count)) {}
    FreshPages(const FreshPages&) = delete;
    FreshPages& operator=(const FreshPages&) = delete;
    ~FreshPages() {
      if (held_) pool_.release(pages_);
    }
    bool take(int size_class, PagePool::Reserve reserve = PagePool::Reserve::leave) {
      return held_ = pool_.allocate(size_class, pages_, reserve);
    }
    std::span<const PageId> pages() const { return pages_; }
    void keep() { held_ = false; }

   private:
    PagePool& pool_;
    std::vector<PageId> pages_;
    bool held_ = false;
  };

  /// May new tokens go into the last pages? All heads or none, so that heads that hold the same tokens stay aligned even
  /// where only some of their pages are shared.
  bool has_open_pages(const Layer& at, int format) const {
    return std::all_of(at.heads.begin(), at.heads.end(), [&](const Head& head) {
             return head.entries.empty() ||
                    (head.entries.back().format == format && pool_->references(head.entries.back().page) == 1);
           });
  }

  /// How one head takes new tokens: a run into the open page, then one for each new page, at slot 0.
  void lay_out(const Head& head, Index index, std::span<const Position> positions, bool into_open_page,
               std::vector<WriteRun>& runs) const {
    Index used = page_tokens_;
    Position first = 0;
    if (into_open_page && !head.entries.empty()) used = head.entries.back().used, first = head.entries.back().first;
    for (Index row = 0; row < static_cast<Index>(positions.size());) {
      if (used == page_tokens_ || positions[static_cast<std::size_t>(row)] - first > 65535)
        used = 0, first = positions[static_cast<std::size_t>(row)];
      Index count = std::min(page_tokens_ - used, static_cast<Index>(positions.size()) - row);
      while (positions[static_cast<std::size_t>(row + count - 1)] - first > 65535) --count;
      WriteRun run;
      run.head = index, run.row = row, run.slot = static_cast<std::uint16_t>(used),
      run.count = static_cast<std::uint16_t>(count);
      runs.push_back(run);
      row += count, used += count;
    }
  }

  template <class C>
  Observation<B> observation(Index layer, const LayerLists& lists, const Columns& columns, const C& compressor) const {
    Observation<B> seen;
    seen.layer = layer, seen.shape = &shape(layer), seen.heads = lists.heads, seen.columns = &columns;
    seen.among = compressor.selector.classes(), seen.compressed_to = lists.compressed_to;
    return seen;
  }

  void check_fits(const LayerPlan& lp, const Sequence& s, Index layer) const {
    const Layer& at = s.layers[static_cast<std::size_t>(layer)];
    check_forms(lp, at, layer);
    if (!lp.touched) return;
    require(lp.keep.size() == at.heads.size(), "commit: layer ", layer, " of the plan has ", lp.keep.size(),
            " heads, must be ", at.heads.size());
    for (std::size_t h = 0; h < at.heads.size(); ++h)
      require(lp.keep[h].entries() == static_cast<Index>(at.heads[h].entries.size()), "commit: layer ", layer, " head ",
              h, ": the plan has ", lp.keep[h].entries(), " entries, the list ", at.heads[h].entries.size());
    check_merges(lp, at, layer);
  }
  void check_merges(const LayerPlan& lp, const Layer& at, Index layer) const;

  void count(const Sequence& s, Index& tokens, Index& pages, Index& bytes) const {
    for (Index l = 0; l < layers(); ++l)
      for (const Head& head : s.layers[static_cast<std::size_t>(l)].heads)
        for (const Entry& e : head.entries)
          tokens += std::popcount(e.live), ++pages, bytes += pool_->page_bytes(size_class(l, e.format));
  }

  /// Pages of a layer that would have been packed if nobody else held them.
  Index unpacked(const Sequence& s, Index layer) const {
    Index pages = 0;
    for (const Head& head : s.layers[static_cast<std::size_t>(layer)].heads)
      for (const Entry& e : head.entries)
        pages += geometry_[static_cast<std::size_t>(layer)][e.format].rows_move &&
                 detail::is_sparse(e.live, page_tokens_) && pool_->references(e.page) > 1;
    return pages;
  }

  static Model checked(Model model) {
    check(model);
    return model;
  }
  const LayerShape& shape(Index layer) const { return model_.layers[static_cast<std::size_t>(layer)]; }
  static Index width_of(const LayerShape& shape, Side side) { return side == Side::keys ? shape.key_dim : shape.value_dim; }
  /// Has a format tiles for this shape, and the backend kernels for them?
  bool takes(const PageFormat& format, const LayerShape& shape) const {
    const auto has_tiles = [&](Side side) {
      const TileShape tile{page_tokens_, width_of(shape, side)};
      const auto& of = format.of(side);
      return of.fits(tile) && (of.raw || of.codec(*be_, tile) != nullptr);
    };
    return has_tiles(Side::keys) && has_tiles(Side::values);
  }
  PageGeometry geometry_of(const PageFormat& format, const LayerShape& shape, std::byte* memory) const {
    PageGeometry g;
    if (!takes(format, shape)) return g;
    const TileShape keys{page_tokens_, shape.key_dim}, values{page_tokens_, shape.value_dim};
    g.key_tile_bytes = format.keys.tile_bytes(keys), g.value_tile_bytes = format.values.tile_bytes(values);
    g.keys = memory;
    g.values = memory + round_up(g.key_tile_bytes, 64);
    g.key_page_bytes = g.value_page_bytes = 64;  // a PageId counts 64-byte units
    if (format.keys.raw)
      g.key_row_bytes = format.keys.row_bytes(keys.width), g.key_type = format.keys.type;
    else
      g.key_codec = format.keys.codec(*be_, keys);
    if (format.values.raw)
      g.value_row_bytes = format.values.row_bytes(values.width), g.value_type = format.values.type;
    else
      g.value_codec = format.values.codec(*be_, values);
    g.pair = format.pair(*be_, keys, values);
    g.keys_move = format.keys.rows_move, g.values_move = format.values.rows_move;
    g.rows_move = g.keys_move && g.values_move;
    return g;
  }

  int format_count() const { return static_cast<int>(formats_.size()); }
  const PageFormat& format_at(int format) const { return formats_[static_cast<std::size_t>(format)]; }
  std::string format_names() const { return detail::names_of(formats_); }
  bool reads_attention(int format) const { return format_at(format).reads_attention(); }
  bool any_reads_attention() const {
    return std::ranges::any_of(formats_, [](const PageFormat& format) { return format.reads_attention(); });
  }

  int size_class(Index layer, int format) const {
    return size_class_[static_cast<std::size_t>(layer)][static_cast<std::size_t>(format)];
  }

  void check_layer(Index layer, const char* verb) const {
    require(layer >= 0 && layer < layers(), verb, ": layer = ", layer, ", must be within [0, ", layers(), ")");
  }
  template <class Void>
  static void check_tensor(const char* verb, const char* what, const BasicTensor<Void>& t, Index rows, Index heads,
                           Index width) {
    require(t.rows == rows && t.heads == heads && t.width == width, verb, ": ", what, " are [", t.rows, ", ", t.heads,
            ", ", t.width, "], must be [", rows, ", ", heads, ", ", width, "]");
    require(t.data != nullptr || rows == 0, verb, ": ", what, ": no memory");
  }

  /// Does nobody else hold a page?
  auto is_private() const {
    return [this](PageId p) { return pool_->references(p) == 1; };
  }

  void check_request(const AttendRequest& r, const LayerShape& sh, const char* verb, Index mass_rows) const {
    get(r.sequence);
    const Index rows = static_cast<Index>(r.positions.size());
    require(rows >= 1 && rows <= 64, verb, ": rows = ", rows, ", must be within [1, 64]");
    check_tensor(verb, "queries", r.queries, rows, sh.q_heads, sh.key_dim);
    check_tensor(verb, "out", r.out, rows, sh.q_heads, sh.value_dim);
    require(static_cast<Index>(r.mass.size()) == mass_rows, verb, ": ", r.mass.size(), " mass rows, must be ",
            mass_rows);
  }

  const Sequence& get(SequenceId id) const {
    const std::shared_lock lock(table_);
    const auto at = sequences_.find(id);
    require(at != sequences_.end(), "sequence ", id, " does not exist (never created, or released)");
    return *at->second;
  }
  Sequence& get(SequenceId id) { return const_cast<Sequence&>(std::as_const(*this).get(id)); }

  B* be_;
  std::span<const PageFormat> formats_;
  Model model_;
  Index page_tokens_;
  Buffer<B, std::byte> owned_memory_;
  std::unique_ptr<PagePool> pool_;
  std::vector<std::vector<int>> size_class_;         // [layer][format] -> the pool's page size
  std::vector<std::vector<PageGeometry>> geometry_;  // [layer][format]
  mutable std::shared_mutex table_;                  // guards the next three
  std::vector<std::pair<Index, std::shared_ptr<const detail::StateBlock<B>>>> shared_states_;  // by layer
  std::map<SequenceId, std::unique_ptr<Sequence>> sequences_;
  SequenceId next_id_ = 1;
};

/// The KV cache of many sequences of one model, in pages of the listed formats from one pool.
///
/// Memory of keys, values, queries and outputs is the backend's; positions, tags and plans are host memory. After an
/// InvalidArgument nothing has changed. Calls that concern different sequences may run in parallel, create, fork and
/// release among them; calls that concern one sequence take turns, which is the caller's to see to.
template <Backend B, class Listed>
class KvCache : public BasicKvCache<B> {
 public:
  using FormatList = Listed;

  /// Throws on a shape that makes no sense, a page size other than 16, 32 or 64, or a budget below one chunk.
  KvCache(B& be, Model model, CacheOptions options);
};
template <Backend B, class Listed>
KvCache<B, Listed>::KvCache(B& be, Model model, CacheOptions options)
    : BasicKvCache<B>(be, std::move(model), options, detail::page_formats<B, Listed>) {}

}  // namespace kvpare

#include "kv_cache_decode.hpp"
#include "kv_cache_forms.hpp"
#include "kv_cache_recode.hpp"
#include "kv_cache_precision.hpp"
#include "kv_cache_image.hpp"
#include "kv_cache_joint.hpp"
#include "kv_cache_merge.hpp"
