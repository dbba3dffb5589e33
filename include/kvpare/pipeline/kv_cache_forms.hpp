// KvCache: tokens that change their form, at commit or with age. A change is a transaction per layer: pages of the new form
// are taken and the state that codecs need is made, then rows are coded, then lists change and old pages go back.
#pragma once

#include "../backend/derived/rope.hpp"
#include "../codec/rounding.hpp"
#include "kv_cache.hpp"
#include "kv_cache_recode.hpp"

namespace kvpare {

namespace detail {

/// One query head group's channel per call: the largest |q| and the sum of q^2, so far and in these rows; and that sum row by
/// row, of the newest query_window rows by turns.
struct WatchQueries {
  ConstTensor queries;
  Index group;
  float *peaks, *squares;  // [kv_heads, width]
  float* newest;           // [query_window, kv_heads, width]: row r of all that were seen is at r % query_window
  Index seen;              // rows before these
  KVPARE_HD void operator()(Index i) const {
    const Index head = i / queries.width, channel = i % queries.width, channels = queries.width * (queries.heads / group);
    float peak = peaks[i], sum = 0;
    for (Index r = 0; r < queries.rows; ++r) {
      float of_row = 0;
      for (Index g = 0; g < group; ++g) {
        const float x = element(queries.at(r, head * group + g), channel);
        const float size = x < 0 ? -x : x;
        if (size > peak) peak = size;
        of_row += product(x, x);
      }
      sum += of_row;
      if (newest != nullptr && r + query_window >= queries.rows)
        newest[(seen + r) % query_window * channels + i] = of_row;
    }
    peaks[i] = peak;
    squares[i] += sum;
  }
  KVPARE_HD float element(const void* row, Index channel) const {
    switch (queries.dtype) {
      case DType::f16:
        return static_cast<float>(static_cast<const half*>(row)[channel]);
      case DType::bf16:
        return static_cast<float>(static_cast<const bfloat16*>(row)[channel]);
      default:
        return static_cast<const float*>(row)[channel];
    }
  }
};

/// Sums of the newest query rows, and ranges over all heads of a layer: one channel of one head per call, one channel.
struct SumNewest {
  const float* newest;  // [query_window, channels]
  Index rows, channels;
  float* sums;  // [channels]
  KVPARE_HD void operator()(Index i) const {
    float sum = 0;
    for (Index r = 0; r < rows; ++r) sum += newest[r * channels + i];
    sums[i] = sum;
  }
};
struct LayerRanges {
  const float *min, *max;  // [heads, width]
  Index heads, width;
  float *least, *most;  // [width]
  KVPARE_HD void operator()(Index c) const {
    float low = min[c], high = max[c];
    for (Index h = 1; h < heads; ++h) {
      if (min[h * width + c] < low) low = min[h * width + c];
      if (max[h * width + c] > high) high = max[h * width + c];
    }
    least[c] = low, most[c] = high;
  }
};

}  // namespace detail

template <Backend B>
void BasicKvCache<B>::check_format(int format, Index layer, const char* what) const {
  require(format >= 0 && format < format_count(), what, ": layer ", layer, ": format ", format,
          ", must be within [0, ", format_count(), "), this cache's formats being ",
          format_names());
  require(size_class(layer, format) >= 0, what, ": layer ", layer, ": format ", format,
          " has no tiles for its shape, or no kernels on ", B::name, ": ", page_tokens_, " tokens of ", shape(layer).key_dim, " and ",
          shape(layer).value_dim, " channels; the formats are ", format_names());
}

template <Backend B>
void BasicKvCache<B>::check_aging(const Aging& aging, Index layer, const char* verb) const {
  if (aging.format < 0) {
    require(aging.format == -1 && aging.keys_first == -1, verb, ": layer ", layer, ": aging: format = ", aging.format,
            ", keys_first = ", aging.keys_first, ", must be -1 (none) together");
    return;
  }
  check_format(aging.format, layer, verb);
  if (aging.keys_first != -1) check_format(aging.keys_first, layer, verb);
  require(aging.format != append_format && aging.keys_first != append_format, verb, ": layer ", layer,
          ": tokens have the form of format ", append_format, " already");
  if (aging.keys_first != -1) {
    const auto& formats = geometry_[static_cast<std::size_t>(layer)];
    const PageGeometry &first = formats[static_cast<std::size_t>(aging.keys_first)],
                       &last = formats[static_cast<std::size_t>(aging.format)], &appended = formats[append_format];
    require(first.key_codec == last.key_codec && first.value_codec == appended.value_codec &&
                first.value_type == appended.value_type,
            verb, ": layer ", layer, ": keys_first = ", aging.keys_first, " must have the keys of format ",
            aging.format, " and the values of format ", append_format, "; the formats are ",
            format_names());
  }
  require(aging.keep_raw_keys >= 0 && aging.keep_raw_values >= 0 && aging.flush_keys >= 1 && aging.flush_values >= 1 &&
              aging.sinks >= 0,
          verb, ": layer ", layer, ": keep_raw_keys = ", aging.keep_raw_keys, ", keep_raw_values = ",
          aging.keep_raw_values, ", flush_keys = ", aging.flush_keys, ", flush_values = ", aging.flush_values,
          ", sinks = ", aging.sinks, "; counts must not be negative, flushes at least 1");
}

template <Backend B>
void BasicKvCache<B>::check_forms(const LayerPlan& lp, const Layer& at, Index layer) const {
  if (lp.aging) check_aging(*lp.aging, layer, "commit");
  for (const Tier& tier : lp.tiers) {
    check_format(tier.format, layer, "commit");
    require(tier.tokens.size() == at.heads.size(), "commit: layer ", layer, ": a tier has ", tier.tokens.size(),
            " heads, must be ", at.heads.size());
    for (std::size_t h = 0; h < at.heads.size(); ++h)
      require(tier.tokens[h].entries() == static_cast<Index>(at.heads[h].entries.size()), "commit: layer ", layer,
              " head ", h, ": a tier has ", tier.tokens[h].entries(), " entries, the list ",
              at.heads[h].entries.size());
  }
  for (std::size_t h = 0; h < at.heads.size(); ++h)
    for (std::size_t e = 0; e < at.heads[h].entries.size() && lp.tiers.size() > 1; ++e) {
      std::uint64_t taken = 0;
      for (const Tier& tier : lp.tiers) {
        const std::uint64_t word = tier.tokens[h].word(static_cast<Index>(e));
        require((taken & word) == 0, "commit: layer ", layer, " head ", h, ": tiers share tokens of entry ", e,
                ", must be disjoint");
        taken |= word;
      }
    }
  // State is made of what was observed: find out now whether it can be.
  for (int format = 0; format < format_count(); ++format) {
    const auto& keys = format_at(format).keys;
    const bool wanted = (lp.aging && (lp.aging->format == format || lp.aging->keys_first == format)) ||
                        std::any_of(lp.tiers.begin(), lp.tiers.end(), [&](const Tier& t) { return t.format == format; });
    if (wanted || at.aging.format == format || at.aging.keys_first == format) check_state(at, layer, format);
    if (!wanted) continue;
    if (keys.needs_query_peak || keys.needs_query_window)
      require(at.query_peaks.size() > 0 || at.state_of(format) != 0, "commit: layer ", layer, ": ", keys.name,
              " keys depend on the queries, but no queries were observed; observe the prompt first");
    if (keys.needs_rope) plain_rope_of(shape(layer), layer, message("commit: ", keys.name));
  }
}

/// Tiers name slots; eviction moves rows. So they are kept by position until the lists have their new slots.
template <Backend B>
auto BasicKvCache<B>::tiers_after_eviction(const Plan& plan, const Sequence& s) const -> TierTokens {
  TierTokens tokens;
  for (Index l = 0; l < layers(); ++l) {
    const LayerPlan& lp = plan.layers[static_cast<std::size_t>(l)];
    if (lp.tiers.empty()) continue;
    const LayerLists lists(*this, s, l);
    for (std::size_t t = 0; t < lp.tiers.size(); ++t)
      for (std::size_t h = 0; h < lists.heads.size(); ++h) {
        Selection stay = Selection::live(lists.heads[h].entries);
        if (lp.touched) stay &= lp.keep[h];
        stay &= lp.tiers[t].tokens[h];
        tokens[{l, t}].push_back(positions_of(lists.heads[h], stay));
      }
  }
  return tokens;
}

/// The tiers of one layer, on its lists as they are after eviction.
template <Backend B>
auto BasicKvCache<B>::tier_changes(Sequence& s, Index layer, const LayerPlan& lp, const TierTokens& tiers)
    -> FormChanges {
  Layer& at = s.layers[static_cast<std::size_t>(layer)];
  FormChanges changes(at.heads.size());
  for (std::size_t t = 0; t < lp.tiers.size(); ++t) {
    const std::vector<std::vector<Position>>& chosen = tiers.at({layer, t});
    std::vector<std::vector<std::uint64_t>> words;
    bool any = false;
    for (std::size_t h = 0; h < at.heads.size(); ++h) {
      const Selection tokens = selection_at(list_of(at.heads[h], layer), chosen[h]);
      any = any || tokens.count() > 0;
      words.emplace_back(tokens.words().begin(), tokens.words().end());
    }
    if (!any) continue;
    const int format = lp.tiers[t].format;
    const std::uint32_t state = state_for(at, layer, format, words, lp.tiers[t].fresh_state);
    for (std::size_t h = 0; h < at.heads.size(); ++h)
      changes[h].push_back({static_cast<std::uint16_t>(format), state, std::move(words[h])});
  }
  return changes;
}

/// The states of the forms of age are made while all tokens are as they were: tiers are about to round some of them.
template <Backend B>
void BasicKvCache<B>::make_states_of_age(Sequence& s, Index layer, const FormChanges& tiers) {
  Layer& at = s.layers[static_cast<std::size_t>(layer)];
  std::vector<std::vector<std::uint64_t>> left;
  bool any = false;
  for (std::size_t h = 0; h < at.heads.size(); ++h) {
    auto& words = left.emplace_back();
    for (std::size_t e = 0; e < at.heads[h].entries.size(); ++e) {
      words.push_back(at.heads[h].entries[e].format == append_format ? at.heads[h].entries[e].live : 0);
      for (const FormChange& change : tiers[h]) words.back() &= ~change.words[e];
      any = any || words.back() != 0;
    }
  }
  const int formats[] = {at.aging.format, at.aging.keys_first};  // nvcc 13 loses a range over a braced list here
  for (const int format : formats)
    if (any && format >= 0) state_for(at, layer, format, left, false);
}

/// Layer by layer where the pool has the pages. Where not, the tokens of a few pages at a time, in all layers and heads by
/// turns, with the rest of the lists packed behind them: pages taken at the same time share chunks, and a chunk serves
/// another form once all of its pages are back. What finds no room, or fills no page, keeps its form.
template <Backend B>
void BasicKvCache<B>::reform(Sequence& s, const std::map<Index, FormChanges>& work, CompressReport& report) {
  struct Pending {
    Index layer;
    std::size_t head;
    std::uint16_t format;
    std::uint32_t state;
    std::vector<Position> positions;  // ascending
  };
  std::vector<Pending> pending;
  const auto form_pending = [&](Index layer, Index most_pages, FormChanges& words) {
    const Layer& at = s.layers[static_cast<std::size_t>(layer)];
    words.assign(at.heads.size(), {});
    Index left = 0;
    for (const Pending& p : pending) {
      if (p.layer != layer) continue;
      const HeadPages list = list_of(at.heads[p.head], layer);
      const Selection chosen = selection_at(list, p.positions);
      FormChange& change = words[p.head].emplace_back(p.format, p.state, std::vector<std::uint64_t>(list.entries.size(), 0));
      Index pages = 0;
      for (std::size_t e = 0; e < list.entries.size() && pages < most_pages; ++e) {
        if (list.entries[e].format == p.format && list.entries[e].state == p.state) continue;
        change.words[e] = chosen.word(static_cast<Index>(e));
        left += std::popcount(change.words[e]);
        pages += change.words[e] != 0;
      }
    }
    return left;
  };

  std::vector<Index> tight;  // layers that the pool has no room for at once
  for (const auto& [layer, changes] : work) {
    const Layer& at = s.layers[static_cast<std::size_t>(layer)];
    for (std::size_t h = 0; h < changes.size(); ++h)
      for (const FormChange& c : changes[h])
        pending.push_back({layer, h, c.format, c.state, positions_of(list_of(at.heads[h], layer), Selection(c.words))});
    if (!reform_some(s, layer, changes, report)) tight.push_back(layer);
  }
  constexpr Index few = 4;
  FormChanges words;
  for (bool progress = !tight.empty(); progress;) {
    progress = false;
    for (const Index layer : tight) {
      if (form_pending(layer, few, words) == 0 || !reform_some(s, layer, words, report)) continue;
      pack(s, layer, report);
      progress = true;
    }
  }
  for (const auto& [layer, changes] : work)
    report.tokens_waiting += form_pending(layer, std::numeric_limits<Index>::max(), words);
}

/// One transaction. False, and nothing changed: no room, or nothing to do.
template <Backend B>
bool BasicKvCache<B>::reform_some(Sequence& s, Index layer, const FormChanges& changes, CompressReport& report) {
  Layer& at = s.layers[static_cast<std::size_t>(layer)];
  const auto& formats = geometry_[static_cast<std::size_t>(layer)];
  std::vector<ReformedList> lists;
  std::vector<std::vector<std::pair<std::size_t, std::size_t>>> wanted(  // [size class] (head, which fresh page)
      static_cast<std::size_t>(pool_->formats()));
  Index changed = 0;
  for (std::size_t h = 0; h < at.heads.size(); ++h) {
    lists.push_back(reform_list(list_of(at.heads[h], layer), changes[h], append_format, is_private()));
    changed += lists.back().changed;
    for (std::size_t n = 0; n < lists[h].fresh.size(); ++n)
      wanted[static_cast<std::size_t>(size_class(layer, lists[h].entries[lists[h].fresh[n]].format))].emplace_back(h, n);
  }
  if (changed == 0) return false;

  bool slides = false;
  for (const ReformedList& list : lists)
    for (std::size_t slot = 0; slot < list.source.size(); ++slot)
      slides = slides || (list.source[slot] >= 0 && list.source[slot] != static_cast<std::int32_t>(slot));

  std::deque<FreshPages> taken;
  for (std::size_t size = 0; size < wanted.size(); ++size) {
    if (!taken.emplace_back(*pool_, static_cast<Index>(wanted[size].size()))
             .take(static_cast<int>(size), PagePool::Reserve::use))
      return false;
    for (std::size_t i = 0; i < wanted[size].size(); ++i)
      lists[wanted[size][i].first].place(wanted[size][i].second, taken.back().pages()[i]);
  }
  RunningScores<B> running;
  if (!at.running.empty()) {
    std::vector<std::vector<std::int32_t>> source;
    for (std::size_t h = 0; h < lists.size(); ++h) {
      source.push_back(lists[h].source);
      const Index filled = at.running.filled(static_cast<Index>(h));
      for (std::int32_t& slot : source.back())
        if (slot >= filled) slot = -1;
      while (!source.back().empty() && source.back().back() < 0) source.back().pop_back();
    }
    running.start(*be_, at.running.scorer(), at.running.data(), at.running.slots(), source, page_tokens_);
    running.count_rows_up_to(at.running.last_row());
  }
  const bool by_attention = any_reads_attention();
  if (by_attention && at.aging.recode) park(at, layer, lists);
  std::vector<EncodeList> encodes;
  std::vector<Buffer<B, float>> attention;
  for (std::size_t h = 0; h < lists.size(); ++h) {
    if (lists[h].pages.empty()) continue;
    attention.emplace_back();
    if (by_attention) attention.back() = attention_of(at, h, written_from(lists[h]));
    encodes.push_back({formats, at.heads[h].states, lists[h].pages, lists[h].pieces, shape(layer).key_dim,
                       shape(layer).value_dim, page_tokens_, lists[h].positions, attention.back().data()});
  }

  be_->encode(encodes);  // from here on nothing can fail
  for (FreshPages& pages : taken) pages.keep();
  for (std::size_t h = 0; h < lists.size(); ++h) {
    Head& head = at.heads[h];
    head.entries = std::move(lists[h].entries);
    head.offsets = std::move(lists[h].offsets);
    give_back(layer, lists[h].released, report);
  }
  if (!running.empty()) at.running = std::move(running);
  if (slides) at.observed.forget();  // its columns are slots; where all of them stay, it counts on
  ++s.epoch;
  report.tokens_changed += changed;
  return true;
}

/// Which tokens of a layer are old enough for another form.
template <Backend B>
auto BasicKvCache<B>::aged_changes(Sequence& s, Index layer) -> FormChanges {
  Layer& at = s.layers[static_cast<std::size_t>(layer)];
  const Aging rule = at.aging;
  if (rule.format < 0) return {};
  const auto eligible = [&](const HeadPages& list, const Entry& e) {
    std::uint64_t word = e.live;
    if (e.first < rule.sinks)
      for_each_bit(e.live, [&](Index slot) {
        if (list.position(e, slot) < rule.sinks) word &= ~(std::uint64_t{1} << slot);
      });
    if (!(rule.classes == all_tokens)) word &= detail::tagged_bits(list, e, s.tags, rule.classes).members;
    return word;
  };
  const auto due = [](Index raw, Index keep, Index flush) {
    return raw >= keep + flush ? (raw - keep) / flush * flush : 0;
  };

  // What fills no page would only wait: lists are not looked through for it at every append.
  const auto whole = [&](int format, Index tokens) {
    const bool rows_move = geometry_[static_cast<std::size_t>(layer)][static_cast<std::size_t>(format)].rows_move;
    return rows_move ? tokens : tokens / page_tokens_ * page_tokens_;
  };

  std::vector<std::vector<std::uint64_t>> to_first, to_last;
  bool first_any = false, last_any = false;
  for (const Head& head : at.heads) {
    const HeadPages list = list_of(head, layer);
    const std::size_t n = list.entries.size();
    to_first.emplace_back(n, 0), to_last.emplace_back(n, 0);
    // Tokens with keys, or values, as appended: in order, pages of other forms between them.
    const auto ages = [&](const Entry& e) {
      return e.format == append_format || (rule.keys_first >= 0 && e.format == rule.keys_first);
    };
    Index raw_keys = 0, raw_values = 0;
    for (const Entry& e : list.entries) {
      if (!ages(e)) continue;
      const Index here = std::popcount(eligible(list, e));
      raw_values += here;
      if (e.format == append_format) raw_keys += here;
    }
    const Index values_due = whole(rule.format, due(raw_values, rule.keep_raw_values, rule.flush_values));
    const Index keys_due =
        rule.keys_first < 0 ? values_due : whole(rule.keys_first, due(raw_keys, rule.keep_raw_keys, rule.flush_keys));
    if (values_due == 0 && keys_due == 0) continue;

    // The oldest of them, wherever they stand.
    std::vector<Position> values_at, keys_at;
    for (const Entry& e : list.entries) {
      if (!ages(e)) continue;
      for_each_bit(eligible(list, e), [&](Index slot) {
        values_at.push_back(list.position(e, slot));
        if (e.format == append_format) keys_at.push_back(values_at.back());
      });
    }
    const auto end_of = [](std::vector<Position>& positions, Index oldest) {
      if (oldest == 0) return Position{0};
      std::nth_element(positions.begin(), positions.begin() + (oldest - 1), positions.end());
      return positions[static_cast<std::size_t>(oldest - 1)] + 1;
    };
    const Position values_end = end_of(values_at, values_due),
                   keys_end = rule.keys_first < 0 ? values_end : end_of(keys_at, keys_due);
    for (std::size_t e = 0; e < n; ++e) {
      const Entry& entry = list.entries[e];
      if (!ages(entry)) continue;
      for_each_bit(eligible(list, entry), [&](Index slot) {
        const Position p = list.position(entry, slot);
        const bool raw = entry.format == append_format;
        if (raw && p >= keys_end) return;  // its keys stay, so its values do
        if (p < values_end)
          to_last.back()[e] |= std::uint64_t{1} << slot, last_any = true;
        else if (raw)
          to_first.back()[e] |= std::uint64_t{1} << slot, first_any = true;
      });
    }
  }
  if (!first_any && !last_any) return {};
  FormChanges changes(at.heads.size());
  const auto add = [&](int format, std::vector<std::vector<std::uint64_t>>& words) {
    const std::uint32_t state = state_for(at, layer, format, words, false);
    for (std::size_t h = 0; h < at.heads.size(); ++h)
      changes[h].push_back({static_cast<std::uint16_t>(format), state, std::move(words[h])});
  };
  if (last_any) add(rule.format, to_last);
  if (first_any) add(rule.keys_first, to_first);
  return changes;
}

template <Backend B>
detail::StateBlock<B> BasicKvCache<B>::state_shape(Index layer, int wanted, bool begun) const {
  detail::StateBlock<B> block;
  block.format = wanted, block.begun = begun;
  if (wanted >= 0 && wanted < format_count() && size_class(layer, wanted) >= 0) {
    const auto &keys = format_at(wanted).keys, &values = format_at(wanted).values;
    block.key_floats = (begun ? keys.given_floats : keys.state_floats)(shape(layer).key_dim);
    block.value_floats = (begun ? values.given_floats : values.state_floats)(shape(layer).value_dim);
    block.keys_of_layer = keys.state_of_layer, block.values_of_layer = values.state_of_layer;
  }
  block.heads = shape(layer).kv_heads;
  return block;
}

template <Backend B>
auto BasicKvCache<B>::empty_state(Index layer, int format, bool begun) const -> std::shared_ptr<detail::StateBlock<B>> {
  auto block = std::make_shared<detail::StateBlock<B>>(state_shape(layer, format, begun));
  if (block->floats() > 0) block->memory = Buffer<B, float>(*be_, block->floats());
  return block;
}

/// What codecs make their state of: measured of some tokens of a layer, `words` per head and entry, or of all of them.
template <Backend B>
class BasicKvCache<B>::StateSources {
 public:
  StateSources(const BasicKvCache& cache, const Layer& at, Index layer, const std::vector<std::vector<std::uint64_t>>& words)
      : cache_(cache), at_(at), layer_(layer), words_(words) {
    for (const auto& of_head : words) masks_.emplace_back(*cache.be_, std::span<const std::uint64_t>(of_head));
  }

  /// State of one side, head h's at state + h * stride; where heads share it, at `state`. `given`: the caller's part, or null.
  void make(const SideFormat<B>& codec, Side side, const float* given, float* state, Index stride) const {
    B& be = *cache_.be_;
    const LayerShape& shape = cache_.shape(layer_);
    const Index width = side == Side::keys ? shape.key_dim : shape.value_dim, heads = shape.kv_heads;
    const Buffer<B, float> least(be, heads * width), most(be, heads * width), squares(be, heads * width),
        layer_least(be, width), layer_most(be, width), newest(be, heads * width);
    std::vector<StatisticsRow> rows;
    std::vector<Index> starts = {0}, tokens_of;
    std::vector<Position> positions;
    for (Index h = 0; h < heads; ++h) {
      StatisticsRow row;
      row.pages = cache_.list_of(at_.heads[static_cast<std::size_t>(h)], layer_);
      row.side = side, row.width = width;
      row.mask = codec.ranges_of_all ? nullptr : masks_[static_cast<std::size_t>(h)].data();
      row.min = least.data() + h * width, row.max = most.data() + h * width, row.sum_squares = squares.data() + h * width;
      Index tokens = 0;
      for (std::size_t e = 0; e < row.pages.entries.size(); ++e) {
        const Entry& entry = row.pages.entries[e];
        const std::uint64_t word = codec.ranges_of_all ? entry.live : entry.live & words_[static_cast<std::size_t>(h)][e];
        tokens += std::popcount(word);
        if (codec.state_reads_rows)
          for_each_bit(word, [&](Index slot) { positions.push_back(row.pages.position(entry, slot)); });
      }
      starts.push_back(starts.back() + tokens);
      tokens_of.push_back(tokens);
      rows.push_back(row);
    }
    be.statistics(rows);
    be.each(width, detail::LayerRanges{least.data(), most.data(), heads, width, layer_least.data(), layer_most.data()});

    Measured m{.min = least.data(), .max = most.data(), .sum_squares = squares.data(), .layer_min = layer_least.data(),
               .layer_max = layer_most.data(), .given = given};
    BackendRope<B> rope;
    if (side == Side::keys) {
      if (at_.query_peaks.size() > 0) m.query_peak = at_.query_peaks.data();
      if (at_.query_newest.size() > 0) {
        const Index seen = std::min(query_window, at_.query_vectors / shape.group());
        be.each(heads * width, detail::SumNewest{at_.query_newest.data(), seen, heads * width, newest.data()});
        m.query_squares = newest.data(), m.query_vectors = seen * shape.group();
      }
      if (codec.needs_rope) {
        rope = BackendRope<B>(be, plain_rope_of(shape, layer_, std::string(codec.name)));
        m.rope = rope.view();
      }
    }
    const Buffer<B, float> numbers(be, std::span<const float>(at_.aging.numbers)),
        gathered(be, codec.state_reads_rows ? starts.back() * width : 0);
    Buffer<B, Position> places;
    if (codec.state_reads_rows) places = Buffer<B, Position>(be, std::span<const Position>(positions));
    Index states = heads;
    if (codec.state_of_layer) {
      states = 1, starts = {0, starts.back()};
      m.min = m.layer_min, m.max = m.layer_max;
      m.sum_squares = m.query_peak = m.query_squares = nullptr, m.query_vectors = 0;
    }
    const Buffer<B, Index> row_starts(be, std::span<const Index>(starts));
    if (!at_.aging.numbers.empty()) m.numbers = numbers.data(), m.number_count = numbers.size();
    if (gathered.size() > 0) {
      std::vector<GatherRow> from;
      Index start = 0;
      for (Index h = 0; h < heads; ++h) {
        const StatisticsRow& row = rows[static_cast<std::size_t>(h)];
        from.push_back({row.pages, side, row.mask, width, gathered.data() + start * width});
        start += tokens_of[static_cast<std::size_t>(h)];
      }
      be.gather(from);
      m.rows = gathered.data(), m.positions = places.data();
    }
    codec.make_state(be, states, m, row_starts.data(), width, stride, state);
  }

 private:
  const BasicKvCache& cache_;
  const Layer& at_;
  Index layer_;
  const std::vector<std::vector<std::uint64_t>>& words_;
  std::vector<Buffer<B, std::uint64_t>> masks_;
};

/// Throws where a layer has no state for a form, and none can be made.
template <Backend B>
void BasicKvCache<B>::check_state(const Layer& at, Index layer, int wanted) const {
  if (at.state_of(wanted) != 0) return;
  const PageFormat& format = format_at(wanted);
  const bool begun = at.begun_state(wanted) != nullptr, made = format.keys.makes_state || format.values.makes_state;
  for (const Side side : {Side::keys, Side::values}) {
    const SideFormat<B>& codec = format.of(side);
    const Index width = side == Side::keys ? shape(layer).key_dim : shape(layer).value_dim;
    require(!codec.needs_state || (codec.makes_state && (codec.given_floats(width) == 0 || begun)), "layer ", layer, ": ",
            format.keys.name, " keys and ", format.values.name,
            " values are nothing without a state (a dictionary, say); give one by set_state or share_state");
    // Neutral would be as null, which a block cannot say for one side only.
    require(!made || codec.make_state != nullptr || codec.state_floats(width) == 0, "layer ", layer, ": ", codec.name,
            " takes a state that it cannot make; give one by set_state");
  }
}

/// The state that tokens about to take a form are coded with: the layer's own, or one made of these tokens.
template <Backend B>
std::uint32_t BasicKvCache<B>::state_for(Layer& at, Index layer, int wanted,
                                            const std::vector<std::vector<std::uint64_t>>& words, bool fresh) {
  const PageFormat& format = format_at(wanted);
  const bool made = format.keys.makes_state || format.values.makes_state;
  if (const std::uint32_t known = at.state_of(wanted); known != 0 && !(fresh && made)) return known;
  check_state(at, layer, wanted);
  if (!made) return 0;
  const detail::StateBlock<B>* begun = at.begun_state(wanted);
  const auto block = empty_state(layer, wanted);
  const StateSources sources(*this, at, layer, words);
  for (const Side side : {Side::keys, Side::values}) {
    const auto& codec = format.of(side);
    if (codec.make_state != nullptr)
      sources.make(codec, side, begun != nullptr ? begun->of(side, 0) : nullptr,
                   block->memory.data() + block->offset(side, 0), block->stride());
  }
  at.add_state(block);
  return static_cast<std::uint32_t>(at.states.size());
}

template <Backend B>
auto BasicKvCache<B>::given_state(const char* verb, bool shared, Index layer, int format, std::span<const float> keys,
                                  std::span<const float> values) const
    -> std::shared_ptr<detail::StateBlock<B>> {
  check_layer(layer, verb);
  check_format(format, layer, verb);
  const bool begun = shared && state_shape(layer, format, true).floats() > 0;
  const auto block = empty_state(layer, format, begun);
  std::vector<float> all(static_cast<std::size_t>(block->floats()));
  const auto take = [&](Side side, const char* name, std::span<const float> given, Index floats) {
    const Index states = block->states(side);
    require(static_cast<Index>(given.size()) == states * floats, verb, ": ", given.size(), " floats for ", name,
            ", must be ", states * floats, " (", states, states == 1 ? " state" : " kv heads", ", ", floats, " each)");
    for (Index h = 0; h < states; ++h)
      std::copy_n(given.begin() + h * floats, floats, all.begin() + block->offset(side, h));
  };
  take(Side::keys, "keys", keys, block->key_floats), take(Side::values, "values", values, block->value_floats);
  be_->to_backend(block->memory.data(), all.data(), block->memory.bytes());
  return block;
}

template <Backend B>
void BasicKvCache<B>::set_state(SequenceId id, Index layer, int format, std::span<const float> keys,
                                   std::span<const float> values) {
  Sequence& s = get(id);
  const auto block = given_state("set_state", false, layer, format, keys, values);
  if (block->floats() == 0) return;
  s.layers[static_cast<std::size_t>(layer)].add_state(block);
  ++s.epoch;
}

template <Backend B>
void BasicKvCache<B>::share_state(Index first_layer, Index last_layer, int format, std::span<const float> keys,
                                     std::span<const float> values) {
  check_layer(first_layer, "share_state"), check_layer(last_layer, "share_state");
  require(first_layer <= last_layer, "share_state: layers ", first_layer, " to ", last_layer, ", must ascend");
  for (Index l = first_layer; l <= last_layer; ++l)
    require(shape(l).kv_heads == shape(first_layer).kv_heads && shape(l).key_dim == shape(first_layer).key_dim &&
                shape(l).value_dim == shape(first_layer).value_dim,
            "share_state: layer ", l, " has ", shape(l).kv_heads, " kv heads, ", shape(l).key_dim, " and ",
            shape(l).value_dim, " channels, layer ", first_layer, " has not; layers that share must be alike");
  const std::shared_ptr<const detail::StateBlock<B>> block =
      given_state("share_state", true, first_layer, format, keys, values);
  if (block->floats() == 0) return;
  const std::unique_lock lock(table_);
  for (Index l = first_layer; l <= last_layer; ++l) shared_states_.emplace_back(l, block);
}

template <Backend B>
void BasicKvCache<B>::watch_queries(Layer& at, Index layer, const ConstTensor& queries) {
  bool coded = false, window = false;
  for (const PageFormat& format : formats_) {
    coded = coded || !format.keys.raw || !format.values.raw;
    window = window || format.keys.needs_query_window;
  }
  if (!coded || queries.rows == 0) return;
  const Index heads = shape(layer).kv_heads, width = shape(layer).key_dim;
  if (at.query_peaks.size() == 0) {
    Buffer<B, float> peaks(*be_, heads * width), squares(*be_, heads * width);
    fill(*be_, peaks.data(), heads * width, 0.0f);
    fill(*be_, squares.data(), heads * width, 0.0f);
    Buffer<B, float> newest(*be_, window ? query_window * heads * width : 0);
    at.query_peaks = std::move(peaks), at.query_squares = std::move(squares), at.query_newest = std::move(newest);
  }
  const Index group = shape(layer).group();
  be_->each(heads * width, detail::WatchQueries{queries, group, at.query_peaks.data(), at.query_squares.data(),
                                                window ? at.query_newest.data() : nullptr, at.query_vectors / group});
  at.query_vectors += queries.rows * shape(layer).group();
}

}  // namespace kvpare
