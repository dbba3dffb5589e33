// KvCache::decode, stage by stage: what can be wrong, what is up for choice, memory, attention, the choice, carrying it out.
#pragma once

#include "kv_cache.hpp"

namespace kvpare {

/// One sequence of a decode step.
template <Backend B>
struct BasicKvCache<B>::DecodeStep {
  Sequence* sequence;
  Layer* at;
  LayerLists lists;
  int rest = -1;    // the form of tokens that would be evicted
  Index block = 1;  // how many at a time take it
  bool fresh_state = false;  // with a codec state of their own
  typename RunningScores<B>::Admission admission = {};
  std::vector<float*> mass = {};
  ObservedLayer<B> made = {};           // scores of a scorer that reads no rows, over columns
  RunningScores<B> by_slot = {};        // these over slots, where the two differ
  Buffer<B, float> attention = {};      // of a scorer that takes steps: [heads, slots]
  Buffer<B, Index> keys = {}, position = {};
  Buffer<B, float> mean = {};           // over heads that choose together
  Buffer<B, std::int32_t> slides = {};  // memory for running scores to follow their tokens
  bool evicts = false;

  /// Rows for the step's attention, all 0.
  std::vector<float*> rows_of_attention(B& be) const {
    fill(be, attention.data(), attention.size(), 0.0f);
    const Index heads = keys.size(), slots = attention.size() / heads;
    std::vector<float*> rows;
    for (Index h = 0; h < heads; ++h) rows.push_back(attention.data() + h * slots);
    return rows;
  }
};

/// One list over its budget, or all lists of a layer whose heads choose together.
template <Backend B>
struct BasicKvCache<B>::DecodeChoice {
  DecodeStep* step;
  Index head = 0, heads = 1;  // from `head` on, all that choose together
  detail::EvictionRow row;
  std::size_t at;  // of its words among those of all choices
};

/// Everything that can be wrong is found here.
template <Backend B>
template <class C>
auto BasicKvCache<B>::decode_steps(Index layer, std::span<const AttendRequest> batch, const C& method)
    -> std::vector<DecodeStep> {
  check_layer(layer, "decode");
  kvpare::check(method);
  detail::require_acts_at_decode(method);
  const LayerShape& sh = shape(layer);
  const Reads reads = method.scorer.reads();
  const std::string_view scorer = policy_name(method.scorer);
  const bool together = method.selector.heads == SelectHeads::layer;
  const Precision precision = precision_of(method, layers());
  const int rest = forms_of(precision, layer).rest;
  std::vector<DecodeStep> steps;
  for (const AttendRequest& r : batch) {
    check_request(r, sh, "decode", 0);
    Sequence& s = get(r.sequence);
    DecodeStep step{&s, &s.layers[static_cast<std::size_t>(layer)], LayerLists(*this, s, layer), rest, precision.block,
                    precision.fresh_state};
    for (const DecodeStep& other : steps)
      require(other.sequence != &s, "decode: sequence ", r.sequence, " is in the batch twice");
    const Index rows = static_cast<Index>(r.positions.size());
    require(!reads.attention || (reads.streams && !detail::takes_steps<B>(method)) || rows == 1, "decode: rows = ", rows, ", ",
            scorer, " looks at one row at a time");
    require(!detail::follows_compress(method) || step.at->compressed_from > 0 || !takes_part(layer, method.selector),
            "decode: budget ", policy_name(method.budget), " goes on from compress, which layer ", layer, " of sequence ",
            r.sequence, " has not seen");
    const RunningScores<B>& running = step.at->running;
    for (std::size_t h = 0; h < step.lists.heads.size() && reads.streams && sh.compress; ++h) {
      const Index unseen = step.lists.live_from(h, running.is_of(scorer) ? running.filled(static_cast<Index>(h)) : 0);
      require(unseen <= rows, "decode: layer ", layer, " holds ", unseen, " tokens that ", scorer,
              " has not seen, got ", rows,
              " rows; observe the prompt first, and pass a row for every token appended since");
    }
    for (std::size_t h = 1; h < step.lists.heads.size() && together && sh.compress; ++h)
      require(detail::same_tokens(step.lists.heads[0], step.lists.heads[h]), "decode: heads = layer, but head ", h,
              " of layer ", layer, " holds other tokens than head 0; use heads = kv");
    steps.push_back(std::move(step));
  }
  return steps;
}

/// Which lists are over their budget, and what of them is up for choice.
template <Backend B>
template <class C>
auto BasicKvCache<B>::decode_choices(Index layer, std::vector<DecodeStep>& steps, const C& method)
    -> std::vector<DecodeChoice> {
  std::vector<DecodeChoice> choices;
  if (!takes_part(layer, method.selector)) return choices;
  const TopK& selector = method.selector;
  const bool together = selector.heads == SelectHeads::layer;
  Index place = 0, sharing = 0;  // only layers that are compressed share a total, as in `compress`
  for (Index l = 0; l < layers(); ++l)
    if (takes_part(l, method.selector)) place += l < layer, ++sharing;
  detail::EvictionRow row;
  std::size_t words = 0;
  for (DecodeStep& step : steps) {
    const Index heads = static_cast<Index>(step.lists.heads.size());
    const Index budget = detail::follows_compress(method)
                             ? step.at->as_compressed(method.keep.amount)
                             : step.sequence->decode_budget.of(method, place, sharing,
                                                               step.at->given(step.sequence->tags.of_class(selector.among)));
    for (Index h = 0; h < (together ? 1 : heads); ++h) {
      if (!detail::eviction_row(step.lists.heads[static_cast<std::size_t>(h)], step.sequence->tags, selector, budget,
                                step.rest, step.rest < 0 ? 1 : step.block, row))
        continue;
      step.evicts = true;
      choices.push_back({&step, h, together ? heads : 1, row, words});
      words += row.candidates.size();
    }
  }
  return choices;
}

/// The backend memory that a sequence's part of the step takes, so that the step cannot run out half-way; and the scores
/// of a scorer that reads no rows.
template <Backend B>
template <class C>
void BasicKvCache<B>::prepare_decode(Index layer, DecodeStep& step, Position position, const C& method) {
  const Reads reads = method.scorer.reads();
  const std::string_view scorer = policy_name(method.scorer);
  const std::span<const HeadPages> heads = step.lists.heads;
  if (reads.attention && shape(layer).compress)
    step.admission = step.at->running.to_admit(*be_, scorer, heads, !reads.streams);
  if (detail::takes_steps<B>(method) && shape(layer).compress) {
    const RunningScores<B>& to = step.admission.other.empty() ? step.at->running : step.admission.other;
    step.attention = Buffer<B, float>(*be_, static_cast<Index>(heads.size()) * to.slots());
    std::vector<Index> keys;
    for (const HeadPages& list : heads) keys.push_back(detail::tokens_in_sight(list, position, shape(layer).window));
    step.keys = Buffer<B, Index>(*be_, keys);
    step.position = Buffer<B, Index>(*be_, std::vector<Index>(heads.size(), Index{position} + 1));
  }
  if (!step.evicts) return;
  if (reads.rows == Reads::Rows::none) {
    const Columns columns = columns_of(heads, step.sequence->tags);
    step.made.score_unobserved(*be_, method.scorer, observation(layer, step.lists, columns, method));
    if (!columns.aligned)
      step.by_slot.start(*be_, scorer, step.made.scores(), step.made.columns(), columns_of_slots(heads, columns), 0);
  }
  const RunningScores<B>& running = step.admission.other.empty() ? step.at->running : step.admission.other;
  step.slides = Buffer<B, std::int32_t>(*be_, running.most_slides(heads));
  if (method.selector.heads == SelectHeads::layer) {
    const bool over_columns = step.made.scored() && step.by_slot.empty();
    step.mean = Buffer<B, float>(
        *be_, over_columns ? step.made.columns() : (step.by_slot.empty() ? running : step.by_slot).slots());
  }
}

/// What does not stay takes the form of the rest.
template <Backend B>
void BasicKvCache<B>::demote(Index layer, std::vector<DecodeStep>& steps, std::span<const DecodeChoice> choices,
                                std::span<const std::uint64_t> stay, std::span<const Index> nans,
                                EvictReport& report) {
  for (DecodeStep& step : steps) {
    std::vector<std::vector<std::uint64_t>> words;
    for (const HeadPages& list : step.lists.heads) words.emplace_back(list.entries.size(), 0);
    bool any = false;
    for (std::size_t c = 0; c < choices.size(); ++c) {
      const DecodeChoice& choice = choices[c];
      if (choice.step != &step) continue;
      report.nan_scores += nans[c] * choice.heads;
      for (Index h = choice.head; h < choice.head + choice.heads; ++h)
        for (std::size_t e = 0; e < choice.row.candidates.size(); ++e) {
          words[static_cast<std::size_t>(h)][e] = choice.row.candidates[e] & ~stay[choice.at + e];
          any = any || words[static_cast<std::size_t>(h)][e] != 0;
        }
    }
    if (!any) continue;
    const std::uint32_t state = state_for(*step.at, layer, step.rest, words, step.fresh_state);
    FormChanges changes(words.size());
    for (std::size_t h = 0; h < words.size(); ++h)
      changes[h].emplace_back(static_cast<std::uint16_t>(step.rest), state, std::move(words[h]));
    CompressReport formed;
    reform(*step.sequence, {{layer, std::move(changes)}}, formed);
    pack(*step.sequence, layer, formed);
    report.demoted += formed.tokens_changed;
    report.pages_freed += formed.pages_freed, report.bytes_freed += formed.bytes_freed;
    report.pages_shared += formed.pages_shared, report.bytes_shared += formed.bytes_shared;
    report.rows_moved += formed.rows_moved;
  }
}

/// Clears the bits of what does not stay, packs lists that have holes enough, gives pages back. `stay` has a word for every
/// word of candidates.
template <Backend B>
EvictReport BasicKvCache<B>::evict(Index layer, std::vector<DecodeStep>& steps,
                                      std::span<const DecodeChoice> choices, std::span<const std::uint64_t> stay,
                                      std::span<const Index> nans) {
  EvictReport report;
  if (!steps.empty() && steps[0].rest >= 0) {
    demote(layer, steps, choices, stay, nans, report);
    return report;
  }
  struct Change {
    DecodeStep* step;
    Index head;
    std::vector<Entry> left;  // the list with fewer live bits
    bool packs = false;
    CompactedList packed = {};
  };
  std::vector<Change> changes;
  std::vector<CompactList> moves;
  for (std::size_t c = 0; c < choices.size(); ++c) {
    const DecodeChoice& choice = choices[c];
    report.nan_scores += nans[c] * choice.heads;
    for (Index h = choice.head; h < choice.head + choice.heads; ++h) {
      const HeadPages& list = choice.step->lists.heads[static_cast<std::size_t>(h)];
      Change change{choice.step, h, {list.entries.begin(), list.entries.end()}};
      std::vector<std::uint64_t> live;
      Index tokens = 0;
      for (std::size_t e = 0; e < change.left.size(); ++e) {
        std::uint64_t& word = change.left[e].live;
        const Index before = std::popcount(word);
        word &= ~choice.row.candidates[e] | stay[choice.at + e];
        report.evicted += before - std::popcount(word);
        tokens += std::popcount(word);
        change.packs = change.packs || word == 0;
        live.push_back(word);
      }
      const bool sparse = static_cast<Index>(live.size()) > detail::most_pages_at_decode(tokens, page_tokens_);
      change.packs = change.packs || sparse;
      if (change.packs)
        change.packed = compact_list(list, live, is_private(), sparse ? Joining::dense : Joining::sparse);
      changes.push_back(std::move(change));
    }
  }
  for (const Change& change : changes) {
    if (change.packed.moves.empty()) continue;
    moves.push_back({geometry_[static_cast<std::size_t>(layer)], change.packed.moves, shape(layer).key_dim,
                     shape(layer).value_dim, page_tokens_});
    for (const Move& m : change.packed.moves) report.rows_moved += m.count;
  }
  std::vector<detail::ScoreSlide> slides;
  for (const DecodeStep& step : steps) {
    std::vector<Index> heads;
    std::vector<std::vector<std::int32_t>> sources;
    for (const Change& change : changes) {
      if (change.step != &step || !change.packs) continue;
      heads.push_back(change.head);
      sources.push_back(detail::slots_before(change.left, change.packed.entries, page_tokens_));
    }
    slides.push_back(step.at->running.to_slide(std::move(heads), std::move(sources)));
  }

  be_->compact(moves);  // from here on nothing can fail
  for (std::size_t i = 0; i < steps.size(); ++i) steps[i].at->running.slide(*be_, slides[i], steps[i].slides);
  for (Change& change : changes) {
    Head& head = change.step->at->heads[static_cast<std::size_t>(change.head)];
    if (!change.packs) {
      std::copy(change.left.begin(), change.left.end(), head.entries.change().begin());
      continue;
    }
    head.entries = std::move(change.packed.entries);
    head.offsets = std::move(change.packed.offsets);
    give_back(layer, change.packed.released, report);
  }
  for (DecodeStep& step : steps) {
    if (!step.evicts) continue;
    step.at->observed.forget();
    ++step.sequence->epoch;
  }
  return report;
}

template <Backend B>
template <class C>
EvictReport BasicKvCache<B>::decode(Index layer, std::span<const AttendRequest> batch, const C& method) {
  std::vector<DecodeStep> steps = decode_steps(layer, batch, method);
  const std::vector<DecodeChoice> choices = decode_choices(layer, steps, method);
  std::vector<std::uint64_t> candidates;
  std::vector<Index> keep;
  for (const DecodeChoice& choice : choices) {
    candidates.insert(candidates.end(), choice.row.candidates.begin(), choice.row.candidates.end());
    keep.push_back(choice.row.keep);
  }
  const Buffer<B, std::uint64_t> candidate_bits(*be_, candidates), chosen(*be_, static_cast<Index>(candidates.size()));
  const Buffer<B, Index> k(*be_, keep), nan_counts(*be_, static_cast<Index>(keep.size()));
  for (std::size_t i = 0; i < steps.size(); ++i) prepare_decode(layer, steps[i], batch[i].positions.back(), method);

  // Attend; what the rows look at goes straight into the running scores.
  const bool watches = method.scorer.reads().attention && shape(layer).compress;
  std::vector<AttendRequest> requests(batch.begin(), batch.end());
  const bool by_steps = detail::takes_steps<B>(method) && watches;
  for (std::size_t i = 0; i < steps.size() && watches; ++i) {
    steps[i].mass = steps[i].at->running.rows_to_fill(*be_, steps[i].admission);
    if (by_steps) steps[i].mass = steps[i].rows_of_attention(*be_);
    requests[i].mass = steps[i].mass;
  }
  attend(layer, requests, !watches ? MassKind::none : by_steps ? MassKind::max : MassKind::mean);
  for (std::size_t i = 0; i < steps.size() && watches; ++i) {
    steps[i].at->running.admit(std::move(steps[i].admission), std::ranges::max(requests[i].positions));
    if (!by_steps) continue;
    DecodeStep& step = steps[i];
    RunningScores<B>& running = step.at->running;
    with_policy(method.scorer, [&](const auto& scorer) {
      if constexpr (TakesSteps<std::remove_cvref_t<decltype(scorer)>, B>)
        take_step(*be_, scorer, DecodeRow{step.attention.data(), running.data(), static_cast<Index>(step.lists.heads.size()),
                                          running.slots(), step.keys.data(), step.position.data()});
    });
  }
  if (choices.empty()) return {};

  std::vector<TopRow> tops;
  for (std::size_t c = 0; c < choices.size(); ++c) {
    DecodeStep& step = *choices[c].step;
    const std::span<const HeadPages> heads = step.lists.heads;
    const bool together = choices[c].heads > 1;
    const bool over_columns = step.made.scored() && step.by_slot.empty();
    const RunningScores<B>& by_slot = step.by_slot.empty() ? step.at->running : step.by_slot;
    const float* scores = over_columns ? step.made.scores() : by_slot.data();
    const Index stride = over_columns ? step.made.columns() : by_slot.slots();
    if (together) reduce_heads(*be_, scores, static_cast<Index>(heads.size()), stride, step.mean.data());
    tops.push_back(
        {together ? step.mean.data() : scores + choices[c].head * stride, candidate_bits.data() + choices[c].at,
         k.data() + c, chosen.data() + choices[c].at, nan_counts.data() + c,
         detail::used_slots(heads[static_cast<std::size_t>(choices[c].head)].entries, page_tokens_), page_tokens_});
    if (method.selector.only_positive) detail::bound_by_positive(*be_, tops.back(), k.data() + c);
  }
  std::vector<std::uint64_t> stay(candidates.size());
  std::vector<Index> nans(keep.size());
  be_->select_top(tops);
  nan_counts.to_host(nans);
  be_->wait(chosen.to_host(stay));
  return evict(layer, steps, choices, stay, nans);
}

}  // namespace kvpare
