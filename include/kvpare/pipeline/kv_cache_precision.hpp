// KvCache: what a Precision means for the formats this cache lists, and its part of a plan.
#pragma once

#include "kv_cache.hpp"

namespace kvpare {

/// Indices of formats, -1 = none. A layer that stays as appended has none at all.
template <Backend B>
struct BasicKvCache<B>::LayerForms {
  Aging aging;
  int rest = -1;
  Aging guarded;  // in place of `aging`, where the guard says so
};

/// Largest |k| per channel and head of every layer, on their way to the host.
template <Backend B>
class BasicKvCache<B>::KeyRanges {
 public:
  KeyRanges(const BasicKvCache& cache, const Sequence& s, const Precision& precision) : be_(cache.be_) {
    if (precision.guard == 0) return;
    for (Index l = 0; l < cache.layers(); ++l) {
      const Layer& layer = s.layers[static_cast<std::size_t>(l)];
      OfLayer& of = layers_.emplace_back();
      if (layer.empty()) continue;
      const LayerLists lists(cache, s, l);
      const Index width = cache.shape(l).key_dim, heads = cache.shape(l).kv_heads;
      of.width = width;
      of.min = Buffer<B, float>(*be_, heads * width), of.max = Buffer<B, float>(*be_, heads * width);
      std::vector<StatisticsRow> rows;
      for (Index h = 0; h < heads; ++h) {
        StatisticsRow row;
        row.pages = lists.heads[static_cast<std::size_t>(h)];
        row.width = width;
        row.min = of.min.data() + h * width, row.max = of.max.data() + h * width;
        rows.push_back(row);
      }
      be_->statistics(rows);
    }
    for (OfLayer& of : layers_) {
      if (of.width == 0) continue;
      of.min.to_host(of.least);
      last_ = of.max.to_host(of.most);
    }
  }

  /// The largest channel of a layer over the median one, and which it is. Waits at the first call.
  struct Peak {
    double over_median = 0;
    Index head = 0, channel = 0;
  };
  Peak peak(Index layer) const {
    if (last_) be_->wait(*last_);
    last_.reset();
    const OfLayer& of = layers_[static_cast<std::size_t>(layer)];
    Peak peak;
    if (of.width == 0) return peak;
    std::vector<float> sizes;
    for (std::size_t i = 0; i < of.most.size(); ++i) sizes.push_back(std::max(-of.least[i], of.most[i]));
    const auto largest = std::max_element(sizes.begin(), sizes.end());
    const Index at = largest - sizes.begin();
    const float size = *largest;
    std::nth_element(sizes.begin(), sizes.begin() + static_cast<std::ptrdiff_t>(sizes.size() / 2), sizes.end());
    const float median = sizes[sizes.size() / 2];
    const double over = median > 0 ? static_cast<double>(size / median)
                        : size > 0 ? std::numeric_limits<double>::infinity() : 0;  // most channels are nothing at all
    peak = {over, at / of.width, at % of.width};
    return peak;
  }

 private:
  struct OfLayer {
    Index width = 0;
    Buffer<B, float> min, max;
    std::vector<float> least, most;
  };
  B* be_;
  std::vector<OfLayer> layers_;
  mutable std::optional<typename B::Ticket> last_;
};

/// The format of this name. Throws where the cache does not list it, or it has no tiles in the layer.
template <Backend B>
int BasicKvCache<B>::find_form(const Precision& p, const Form& form, Index layer) const {
  const auto whole = [](std::string name, std::string_view appended) {
    constexpr std::string_view as_appended = "as_appended";
    if (name.ends_with(as_appended)) name.replace(name.size() - as_appended.size(), as_appended.size(), appended);
    return name;
  };
  const PageFormat& appended = format_at(append_format);
  const std::string keys = whole(form.keys, appended.keys.name), values = whole(form.values, appended.values.name);
  int found = -1;
  for (int format = 0; format < format_count() && found < 0; ++format)
    if (format_at(format).keys.name == keys && format_at(format).values.name == values) found = format;
  require(found >= 0, "precision ", p.said, ": form ", keys, "/", values, " is none of this cache's: ", format_names());
  require(size_class(layer, found) >= 0, "precision ", p.said, ": form ", keys, "/", values,
          " has no tiles in layer ", layer, ": ", page_tokens_, " tokens of ", shape(layer).key_dim, " and ",
          shape(layer).value_dim, " channels");
  return found;
}

/// Names become formats of this cache.
template <Backend B>
auto BasicKvCache<B>::forms_of(const Precision& p, Index layer) const -> LayerForms {
  LayerForms of;
  if (!p.changes_forms()) return of;
  require(p.layers.empty() || p.layers.size() == model_.layers.size(), "precision ", p.said, ": forms for ",
          p.layers.size(), " layers, the model has ", model_.layers.size());
  if (!shape(layer).compress || layer < p.first_layers || layer >= layers() - p.last_layers) return of;
  const std::string_view appended_values = format_at(append_format).values.name;
  const auto aging = [&](const Form& form) {
    Aging a;
    if (form.as_appended()) return a;
    a.format = find_form(p, form, layer);
    if (a.format == append_format) return Aging{};
    if (p.keep_raw_keys != p.keep_raw_values || p.flush_keys != p.flush_values)
      a.keys_first = find_form(p, Form(form.keys, appended_values), layer);
    a.keep_raw_keys = p.keep_raw_keys, a.flush_keys = p.flush_keys;
    a.keep_raw_values = p.keep_raw_values, a.flush_values = p.flush_values;
    a.classes = p.only, a.sinks = p.sinks;
    return a;
  };
  of.aging = aging(p.layers.empty() ? p.kept : p.layers[static_cast<std::size_t>(layer)]);
  if (p.guard > 0) of.guarded = aging(p.guarded);
  if (!p.rest.as_appended()) {
    of.rest = find_form(p, p.rest, layer);
    require(of.rest != append_format && of.rest != of.aging.format, "precision ", p.said,
            ": tokens that matter and the rest have the same form, ", print_setting(p.rest));
  }
  return of;
}

/// Tokens that were to go take the form `rest` instead; layers get their rule for tokens that grow old.
template <Backend B>
void BasicKvCache<B>::plan_forms(const Sequence& s, const Precision& p, const std::vector<LayerForms>& forms,
                                    const KeyRanges& key_ranges, Plan& plan) const {
  if (!p.changes_forms()) return;
  for (Index l = 0; l < layers(); ++l) {
    const LayerForms& of = forms[static_cast<std::size_t>(l)];
    LayerPlan& lp = plan.layers[static_cast<std::size_t>(l)];
    lp.aging = of.aging;
    if (p.guard > 0 && of.aging.format >= 0) {
      const auto peak = key_ranges.peak(l);
      if (peak.over_median > p.guard) {
        lp.aging = of.guarded;
        plan.notes.push_back(message("layer ", l, ": key channel ", peak.channel, " of head ", peak.head, " reaches ",
                                     peak.over_median, " times the median channel, above ", p.guard, ": takes ",
                                     p.guarded.as_appended() ? std::string("no other form") : print_setting(p.guarded)));
      }
    }
    lp.aging->numbers = p.numbers, lp.aging->recode = p.recode;
    if (of.rest < 0 || !lp.touched) continue;
    Tier tier{.format = of.rest, .fresh_state = p.fresh_state};
    const LayerLists lists(*this, s, l);
    for (std::size_t h = 0; h < lists.heads.size(); ++h) {
      const HeadPages& list = lists.heads[h];
      Selection out = Selection::live(list.entries);
      out -= lp.keep[h];
      for (Index e = 0; e < out.entries(); ++e) {
        const Entry& entry = list.entries[static_cast<std::size_t>(e)];
        std::uint64_t& word = out.word(e);
        if (!(p.only == all_tokens)) word &= detail::tagged_bits(list, entry, s.tags, p.only).members;
        for_each_bit(word, [&](Index slot) {
          if (list.position(entry, slot) < p.sinks) word &= ~(std::uint64_t{1} << slot);
        });
      }
      tier.tokens.push_back(std::move(out));
    }
    lp.tiers.push_back(std::move(tier));
    lp.touched = false;  // nothing is evicted
    lp.keep.clear();
  }
}

}  // namespace kvpare
