// KvCache: one byte budget over eviction and precision.
//
// What a head's output is off by is estimated from its tokens' shares of attention, a_i, which the method's scores stand for.
// Coded in form f, a value is off by dv_i and a logit by ds_i, which moves the output by a_i (dv_i + ds_i (v_i - o)): errors of
// different tokens are independent, so squares add up. Evicted, a token takes a_i (v_i - o) away, and what evicted tokens have in
// common does not cancel: the values' mean is about as far from o as single values are from their mean. In units of that
// spread, for E evicted,
//
//   cost   sum_kept A_i c_f + sum_E A_i + (sum_E a_i)^2,      A_i = a_i^2
//   c_f    E|dv|^2 / E|v - mean v|^2 + E ds^2 / max(1, Var s), at most 1
//          E ds^2 = scale^2 sum_c E q_c^2 E dk_c^2,   Var s = scale^2 sum_c E q_c^2 Var k_c over tokens
//
// (Logits that lie further apart than 1 make attention sharp, and then only an error of their own size changes what it reads.)
//
// The scores tell of queries that came; those to come may ask for other tokens. With the share `trust` they attend as the past
// did, else as sharply, but to tokens of which nothing is known (the mean over all orders of the a_i):
//
//   A_i = trust a_i^2 + (1 - trust) sum_j a_j^2 / n,   and   trust (sum_E a_i)^2 + (1 - trust) (|E| / n)^2   for the last term
//
// Tokens that an earlier plan coded keep their form or go, each run of neighbouring pages for itself, as only neighbours are
// packed together. The bytes promised are those the pool reports where nothing was coded before, and at most these elsewhere;
// pages that a fork shares stay with it and are not counted on.
//
// dv and dk are measured on this sequence: up to four pages of each head are coded on the host, with states made of them;
// E q_c^2 comes from the queries observed. Where none were, every E q_c^2 is alike and Var s = 1. The budget is then split by
// split_bytes, over all layers and heads at once. (Ours; no paper's.)
#pragma once

#include "../codec/round_trip.hpp"
#include "byte_budget.hpp"
#include "kv_cache.hpp"

namespace kvpare {

/// Rows of one head, on the host.
template <Backend B>
struct BasicKvCache<B>::FormSample {
  std::vector<float> keys, values;          // [tokens, width], consecutive tokens of whole pages as far as there are any
  std::vector<float> query_peak, query_square;  // [key_dim]; square: mean of q^2; empty: no queries observed
  Index tokens = 0;
};

/// c_f of the formula above, for one head.
template <Backend B>
double BasicKvCache<B>::form_error(int wanted, Index layer, const FormSample& sample) const {
  const PageFormat& format = format_at(wanted);
  const Index key_dim = shape(layer).key_dim, value_dim = shape(layer).value_dim;
  RoundTripFacts facts{.query_peak = sample.query_peak, .query_squares = sample.query_square, .query_vectors = 1};
  if (shape(layer).rope && shape(layer).rope->axes.empty()) facts.rope = shape(layer).rope->view();
  const auto keys = format.keys.round_trip(sample.keys, key_dim, page_tokens_, facts);
  const auto values = format.values.round_trip(sample.values, value_dim, page_tokens_, {});
  // Of a side: what its channels are off by, and how far they lie from their mean, both weighed by `weight` of the channel.
  const auto compare = [&](const std::vector<float>& exact, const std::vector<float>& coded, Index width, const auto& weight) {
    const double n = static_cast<double>(std::max<Index>(1, sample.tokens));
    std::pair<double, double> found{0, 0};
    for (Index c = 0; c < width; ++c) {
      double off = 0, sum = 0, square = 0;
      for (Index t = 0; t < sample.tokens; ++t) {
        const auto at = static_cast<std::size_t>(t * width + c);
        const double x = static_cast<double>(exact[at]), d = static_cast<double>(coded[at]) - x;
        off += d * d, sum += x, square += x * x;
      }
      found.first += off / n * weight(c), found.second += (square - sum * sum / n) / n * weight(c);
    }
    return found;
  };
  const double scale = static_cast<double>(shape(layer).scale);
  const bool watched = !sample.query_square.empty();
  const auto [logit_error, logit_spread] = compare(sample.keys, keys, key_dim, [&](Index c) {
    return watched ? scale * scale * static_cast<double>(sample.query_square[static_cast<std::size_t>(c)]) : 1.0;
  });
  const auto [value_error, value_spread] = compare(sample.values, values, value_dim, [](Index) { return 1.0; });
  const auto share = [](double part, double whole) { return whole > 0 ? part / whole : part > 0 ? 1.0 : 0.0; };
  const double of_logits = share(logit_error, watched ? std::max(1.0, logit_spread) : logit_spread);
  const double of_values = share(value_error, value_spread);
  return std::min(1.0, of_values + of_logits);
}

template <Backend B>
void BasicKvCache<B>::plan_joint(const Sequence& s, const Keep& keep, const TopK& selector, const ScoresOfLayer& scores,
                                 const Precision& precision, Plan& plan) const {
  require(keep.unit == Keep::Unit::bytes, "plan: ", precision.said,
          ": keep = ", print_setting(keep), ", must be in bytes, such as 8MiB");
  require(!selector.refines() && !selector.only_positive, "plan: ", precision.said,
          " chooses by bytes and scores; chunk, represent, recover, merge, granularity = page and only_positive do not go "
          "with it");
  require(selector.mode == Mode::paper, "plan: ", precision.said,
          " is of no published code; mode = reference does not go with it");
  require(!selector.splits(), "plan: ", precision.said,
          " meets one budget in bytes; each and also, which give groups of tokens budgets of their own, do not go with it");
  constexpr Index sampled_pages = 4;
  constexpr double least_weight = 1e-30;  // a token that nobody looks at is still worth bytes that nobody else wants
  constexpr double never = 1e30;
  struct OfLayer {
    Index layer;
    LayerLists lists;
    Columns columns;
    std::vector<float> scores, keys, values, peaks, squares;  // on their way to the host
    Index scored_columns = 0;
    std::vector<Index> samples;  // tokens of each head
    std::vector<Buffer<B, float>> gathered;
    std::vector<Buffer<B, std::uint64_t>> masks;
    ObservedLayer<B> made;
  };
  std::deque<OfLayer> work;
  std::optional<typename B::Ticket> last;
  for (Index l = 0; l < layers(); ++l) {
    const Layer& at = s.layers[static_cast<std::size_t>(l)];
    if (!takes_part(l, selector) || at.empty()) continue;
    OfLayer& w = work.emplace_back(OfLayer{l, LayerLists(*this, s, l), {}, {}, {}, {}, {}, {}, 0, {}, {}, {}, {}});
    w.columns = columns_of(w.lists.heads, s.tags);
    const ObservedLayer<B>& observed = scores(l, w.lists, w.columns, w.made);
    const Index heads = shape(l).kv_heads;
    w.scored_columns = observed.columns();
    w.scores.resize(static_cast<std::size_t>(heads * w.scored_columns));
    last = be_->to_host(w.scores.data(), observed.scores(), static_cast<Index>(w.scores.size() * sizeof(float)));

    std::vector<GatherRow> rows;
    Index total = 0;
    std::vector<std::vector<std::uint64_t>> words;
    for (const HeadPages& list : w.lists.heads) {
      auto& of_head = words.emplace_back(list.entries.size(), 0);
      std::vector<std::size_t> exact;  // what codes were made of is gone where tokens are coded already
      for (std::size_t e = 0; e < list.entries.size(); ++e)
        if (list.entries[e].format == append_format) exact.push_back(e);
      const Index n = std::ssize(exact), pages = std::min(n, sampled_pages);
      Index tokens = 0;
      for (Index i = 0; i < pages; ++i) {
        const std::size_t e = exact[static_cast<std::size_t>(i * n / pages)];
        of_head[e] = list.entries[e].live;
        tokens += std::popcount(of_head[e]);
      }
      w.samples.push_back(tokens);
      total += tokens;
    }
    w.gathered.emplace_back(*be_, total * shape(l).key_dim);
    w.gathered.emplace_back(*be_, total * shape(l).value_dim);
    Index before = 0;
    for (std::size_t h = 0; h < words.size(); ++h) {
      w.masks.emplace_back(*be_, std::span<const std::uint64_t>(words[h]));
      const std::uint64_t* mask = w.masks.back().data();
      rows.push_back({w.lists.heads[h], Side::keys, mask, shape(l).key_dim, w.gathered[0].data() + before * shape(l).key_dim});
      rows.push_back({w.lists.heads[h], Side::values, mask, shape(l).value_dim, w.gathered[1].data() + before * shape(l).value_dim});
      before += w.samples[h];
    }
    be_->gather(rows);
    w.gathered[0].to_host(w.keys);
    last = w.gathered[1].to_host(w.values);
    if (at.query_vectors > 0) {
      at.query_peaks.to_host(w.peaks);
      last = at.query_squares.to_host(w.squares);
    }
  }
  if (!last) return;
  be_->wait(*last);

  // Tokens of a head that are in one form and in neighbouring pages, by falling weight.
  struct OfForm {
    OfLayer* work;
    Index head;
    int format;
    std::vector<std::pair<Index, Index>> tokens;  // (entry, slot), heaviest first
    Index fixed = 0;                              // of these, the first so many are not up for choice
    std::vector<int> formats;                     // of the list's forms
  };
  std::vector<OfForm> held;
  std::vector<BudgetList> lists;
  Index settled_bytes = 0, fixed_bytes = 0;
  for (OfLayer& w : work) {
    ScoredLayer layer;
    layer.heads = w.lists.heads, layer.columns = &w.columns, layer.scored_columns = w.scored_columns;
    const detail::PlanPart everything{.tokens = w.columns.at(s.tags.of_class(selector.among))};
    const Layer& at = s.layers[static_cast<std::size_t>(w.layer)];
    const auto& geometry = geometry_[static_cast<std::size_t>(w.layer)];
    const auto page_bytes = [&](int format) { return pool_->page_bytes(size_class(w.layer, format)); };
    Index before = 0;
    for (Index h = 0; h < shape(w.layer).kv_heads; ++h) {
      const HeadPages& list = w.lists.heads[static_cast<std::size_t>(h)];
      const detail::PlanRow row =
          detail::plan_row(layer, everything, detail::open_columns(layer, h), selector);
      const std::vector<std::uint64_t> candidates = w.columns.to_slots(list, h, row.candidates);
      const std::size_t first = held.size();
      held.push_back({&w, h, append_format, {}, 0, {}});
      struct Candidate {
        double weight;
        std::size_t held;
        std::pair<Index, Index> token;
      };
      std::vector<Candidate> order;
      double sum = 0;
      for (Index e = 0; e < static_cast<Index>(list.entries.size()); ++e) {
        const Entry& entry = list.entries[static_cast<std::size_t>(e)];
        if (!geometry[entry.format].rows_move) {  // goes by whole pages only: it stays
          settled_bytes += page_bytes(entry.format);
          continue;
        }
        // Pages of one form are packed together where they are neighbours.
        const Entry* neighbour = e > 0 ? &list.entries[static_cast<std::size_t>(e - 1)] : nullptr;
        if (entry.format != append_format && (neighbour == nullptr || neighbour->format != entry.format ||
                                              neighbour->state != entry.state || neighbour->last >= entry.first))
          held.push_back({&w, h, entry.format, {}, 0, {}});
        const std::size_t into = entry.format == append_format ? first : held.size() - 1;
        for_each_bit(entry.live, [&](Index slot) {
          if ((candidates[static_cast<std::size_t>(e)] >> slot & 1u) == 0) {
            held[into].tokens.emplace_back(e, slot);
            return;
          }
          const Index at_slot = e * page_tokens_ + slot;
          const Index column =
              w.columns.aligned ? at_slot
                                : Index{w.columns.of_slot[static_cast<std::size_t>(h)][static_cast<std::size_t>(at_slot)]};
          float score = w.scores[static_cast<std::size_t>(h * w.scored_columns + column)];
          plan.nan_scores += score != score;
          if (ranks_first(score)) score /= first_rank;  // the rank is more than any attention to it could be
          const double weight = score > 0 ? static_cast<double>(score) : 0.0;
          sum += weight;
          order.push_back({weight, into, {e, slot}});
        });
      }
      lists.resize(held.size());
      for (std::size_t i = first; i < held.size(); ++i) {
        held[i].fixed = std::ssize(held[i].tokens);
        fixed_bytes += ceil_div(held[i].fixed, page_tokens_) * page_bytes(held[i].format);
        lists[i].weights.assign(held[i].tokens.size(), never), lists[i].losses = lists[i].weights;
      }
      std::stable_sort(order.begin(), order.end(), [](const Candidate& a, const Candidate& b) { return a.weight > b.weight; });
      const double n = static_cast<double>(order.size()), trust = precision.trust;
      double squares = 0;
      std::vector<double> behind(order.size() + 1, 0);  // [i]: attention of all tokens from i on
      for (std::size_t i = order.size(); i-- > 0;) {
        order[i].weight = sum > 0 ? order[i].weight / sum : 1 / n;
        squares += order[i].weight * order[i].weight;
        behind[i] = behind[i + 1] + order[i].weight;
      }
      for (std::size_t i = 0; i < order.size(); ++i) {
        const Candidate& c = order[i];
        const double a = c.weight, others = static_cast<double>(order.size() - 1 - i);
        const double weight = std::max(least_weight, trust * a * a + (1 - trust) * squares / n);
        held[c.held].tokens.push_back(c.token);
        lists[c.held].weights.push_back(weight);
        lists[c.held].losses.push_back(
            precision.may_evict ? weight + trust * a * (2 * behind[i + 1] + a) + (1 - trust) * (2 * others + 1) / (n * n) : never);
      }

      FormSample sample;
      const Index key_dim = shape(w.layer).key_dim, value_dim = shape(w.layer).value_dim;
      sample.tokens = w.samples[static_cast<std::size_t>(h)];
      const auto part = [](const std::vector<float>& all, Index from, Index count) {
        return std::vector<float>(all.begin() + from, all.begin() + from + count);
      };
      sample.keys = part(w.keys, before * key_dim, sample.tokens * key_dim);
      sample.values = part(w.values, before * value_dim, sample.tokens * value_dim);
      before += sample.tokens;
      if (at.query_vectors > 0) {
        sample.query_peak = part(w.peaks, h * key_dim, key_dim);
        sample.query_square = part(w.squares, h * key_dim, key_dim);
        for (float& x : sample.query_square) x /= static_cast<float>(at.query_vectors);
      }
      std::map<int, double> errors{{append_format, 0}};  // each form is measured once
      const auto error_of = [&](int format) {
        const auto [at_format, is_new] = errors.try_emplace(format, 0);
        if (is_new) at_format->second = form_error(format, w.layer, sample);
        return at_format->second;
      };
      for (std::size_t i = first; i < held.size(); ++i) {
        lists[i].forms.push_back({page_bytes(held[i].format), error_of(held[i].format)});
        held[i].formats.push_back(held[i].format);
      }
      for (const Form& form : precision.choice) {  // for those that are as appended; coded once, a token changes no more
        const int format = find_form(precision, form, w.layer);
        require(!format_at(format).keys.needs_state && !format_at(format).values.needs_state, "precision ", precision.said, ": ",
                print_setting(form), " cannot be chosen: what it costs depends on a dictionary that is not made yet");
        require(geometry[static_cast<std::size_t>(format)].rows_move, "precision ", precision.said, ": ", print_setting(form),
                " takes whole pages of neighbours, must code tokens one by one");
        lists[first].forms.push_back({page_bytes(format), error_of(format)});
        held[first].formats.push_back(format);
      }
    }
  }
  const Index budget = static_cast<Index>(keep.amount);
  require(fixed_bytes + settled_bytes <= budget, "plan: keep = ", budget, " bytes, but tokens that are not up for choice take ",
          fixed_bytes + settled_bytes);
  const BudgetSplit split = split_bytes(lists, page_tokens_, budget - settled_bytes);
  const auto kept_in = [&](std::size_t i) {
    return std::accumulate(split.counts[i].begin(), split.counts[i].end(), Index{0});
  };
  for (std::size_t i = 0; i < lists.size(); ++i)
    require(precision.may_evict || kept_in(i) == std::ssize(held[i].tokens), "plan: keep = ", budget,
            " bytes do not hold all tokens in the smallest of the forms; allow eviction or more bytes");

  plan.dense = true;
  plan.promised_bytes = settled_bytes + split.bytes;
  for (OfLayer& w : work) {
    LayerPlan& lp = plan.layers[static_cast<std::size_t>(w.layer)];
    lp.touched = true;
    for (const HeadPages& list : w.lists.heads) lp.keep.push_back(Selection::live(list.entries));
    for (const Form& form : precision.choice) {
      const int format = find_form(precision, form, w.layer);
      if (format == append_format || std::any_of(lp.tiers.begin(), lp.tiers.end(), [&](const Tier& t) { return t.format == format; }))
        continue;
      Tier& tier = lp.tiers.emplace_back(Tier{.format = format, .tokens = {}});
      for (const HeadPages& list : w.lists.heads) tier.tokens.emplace_back(static_cast<Index>(list.entries.size()));
    }
  }
  for (std::size_t i = 0; i < held.size(); ++i) {
    const OfForm& from = held[i];
    LayerPlan& lp = plan.layers[static_cast<std::size_t>(from.work->layer)];
    std::vector<std::size_t> best_first(from.formats.size());
    std::iota(best_first.begin(), best_first.end(), std::size_t{0});
    std::stable_sort(best_first.begin(), best_first.end(), [&](std::size_t a, std::size_t b) {
      return lists[i].forms[a].error < lists[i].forms[b].error;
    });
    auto token = from.tokens.begin();
    for (const std::size_t f : best_first)
      for (Index n = split.counts[i][f]; n > 0; --n, ++token)
        for (Tier& tier : lp.tiers)
          if (tier.format == from.formats[f] && tier.format != from.format)
            tier.tokens[static_cast<std::size_t>(from.head)].word(token->first) |= std::uint64_t{1} << token->second;
    for (; token != from.tokens.end(); ++token)
      lp.keep[static_cast<std::size_t>(from.head)].word(token->first) &= ~(std::uint64_t{1} << token->second);
    plan.candidates += std::ssize(from.tokens) - from.fixed;
    plan.chosen += kept_in(i) - from.fixed;
  }
}

}  // namespace kvpare
