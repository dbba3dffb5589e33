// KvCache::image and KvCache::restore: a sequence as host data, and back.
#pragma once

#include "kv_cache.hpp"

namespace kvpare {

template <Backend B, class Listed>
SequenceImage KvCache<B, Listed>::image(SequenceId id) const {
  const Sequence& s = get(id);
  SequenceImage image;
  image.page_tokens = page_tokens_;
  image.tags = s.tags.spans();
  for (Index l = 0; l < layers(); ++l) {
    const Layer& layer = s.layers[static_cast<std::size_t>(l)];
    SequenceImage::Layer& to = image.layers.emplace_back();
    to.given = layer.given_spans;
    to.scorer = layer.running.scorer();
    to.last_row = layer.running.last_row();
    const LayerLists lists(*this, s, l);
    for (std::size_t h = 0; h < lists.heads.size(); ++h) {
      const HeadPages& list = lists.heads[h];
      SequenceImage::Head& head = to.heads.emplace_back();
      head.pages.resize(list.entries.size());
      for (std::size_t e = 0; e < list.entries.size(); ++e) {
        const Entry& entry = list.entries[e];
        const PageGeometry& g = list.formats[entry.format];
        SequenceImage::Page& page = head.pages[e];
        page.format = entry.format, page.first = entry.first, page.live = entry.live;
        page.offsets.resize(entry.used);
        for (Index slot = 0; slot < entry.used; ++slot)
          page.offsets[static_cast<std::size_t>(slot)] =
              static_cast<std::uint16_t>(list.position(entry, slot) - entry.first);
        page.keys.resize(static_cast<std::size_t>(entry.used * g.key_row_bytes));
        page.values.resize(static_cast<std::size_t>(entry.used * g.value_row_bytes));
      }
      if (!layer.running.empty())
        head.running.resize(static_cast<std::size_t>(layer.running.filled(static_cast<Index>(h))));
    }

    // All host memory is there: nothing can fail between these copies and the wait for them.
    std::optional<typename B::Ticket> last;
    const auto fetch = [&](auto& host, const void* from) {
      if (!host.empty()) last = be_->to_host(host.data(), from, static_cast<Index>(host.size() * sizeof(host[0])));
    };
    for (std::size_t h = 0; h < lists.heads.size(); ++h) {
      const HeadPages& list = lists.heads[h];
      for (std::size_t e = 0; e < list.entries.size(); ++e) {
        const PageGeometry& g = list.formats[list.entries[e].format];
        fetch(to.heads[h].pages[e].keys, g.key_row(list.entries[e].page, 0));
        fetch(to.heads[h].pages[e].values, g.value_row(list.entries[e].page, 0));
      }
      fetch(to.heads[h].running, layer.running.row(static_cast<Index>(h)));
    }
    if (last) be_->wait(*last);

    // What was evicted is nobody's business any more.
    const auto drop_dead = [](std::vector<std::byte>& rows, Index row_bytes, std::uint64_t live) {
      std::byte* end = rows.data();
      for_each_bit(live, [&](Index slot) {
        std::memmove(end, rows.data() + slot * row_bytes, static_cast<std::size_t>(row_bytes));
        end += row_bytes;
      });
      rows.resize(static_cast<std::size_t>(end - rows.data()));
    };
    for (SequenceImage::Head& head : to.heads) {
      for (SequenceImage::Page& page : head.pages) {
        const PageGeometry& g = geometry_[static_cast<std::size_t>(l)][page.format];
        drop_dead(page.keys, g.key_row_bytes, page.live);
        drop_dead(page.values, g.value_row_bytes, page.live);
      }
      for (std::size_t slot = 0; slot < head.running.size(); ++slot)
        if (!is_live(head, slot)) head.running[slot] = 0;
    }
  }
  return image;
}

template <Backend B, class Listed>
void KvCache<B, Listed>::check_image(const SequenceImage::Layer& from, Index layer) const {
  const LayerShape& sh = shape(layer);
  require(static_cast<Index>(from.heads.size()) == sh.kv_heads, "restore: layer ", layer, " has ", from.heads.size(),
          " kv heads, must be ", sh.kv_heads);
  Index end = -1;  // of what was given so far
  for (const auto& [first, past] : from.given) {
    require(first > end && first >= 0 && past > first, "restore: layer ", layer, " was given positions [", first, ", ",
            past, ") after those below ", std::max<Index>(end, 0), ", spans must ascend and not touch");
    end = past;
  }
  require(from.last_row >= -1, "restore: layer ", layer, ": last row = ", from.last_row, ", must be a position or -1");
  require(!from.scorer.empty() || from.last_row == -1, "restore: layer ", layer, ": last row = ", from.last_row,
          ", but no scorer has counted any");
  for (std::size_t h = 0; h < from.heads.size(); ++h) {
    const SequenceImage::Head& head = from.heads[h];
    Index before = -1, slots = 0;
    auto given = from.given.begin();
    for (std::size_t p = 0; p < head.pages.size(); ++p) {
      const SequenceImage::Page& page = head.pages[p];
      const auto wrong = [&](const auto&... what) {
        fail(message("restore: layer ", layer, " head ", h, " page ", p, ": ", what...));
      };
      const Index used = static_cast<Index>(page.offsets.size());
      if (page.format >= FormatList::count) wrong("format ", page.format, ", must be below ", FormatList::count);
      if (used < 1 || used > page_tokens_) wrong(used, " slots, must be within [1, ", page_tokens_, "]");
      if (page.live == 0 || (page.live & ~low_bits(used)) != 0) wrong("live slots beyond the ", used, " used, or none");
      if (page.offsets[0] != 0 || page.first <= before) wrong("starts at position ", page.first, " after ", before);
      for (std::size_t i = 1; i < page.offsets.size(); ++i)
        if (page.offsets[i] <= page.offsets[i - 1]) wrong("positions do not ascend at slot ", i);
      for (const std::uint16_t offset : page.offsets) {
        before = Index{page.first} + offset;
        while (given != from.given.end() && given->second <= before) ++given;
        if (given == from.given.end() || before < given->first)
          wrong("holds position ", before, ", which the layer was not given");
      }
      const PageGeometry& g = geometry_[static_cast<std::size_t>(layer)][page.format];
      const Index rows = std::popcount(page.live);
      if (static_cast<Index>(page.keys.size()) != rows * g.key_row_bytes ||
          static_cast<Index>(page.values.size()) != rows * g.value_row_bytes)
        wrong(page.keys.size(), " bytes of keys and ", page.values.size(), " of values, must be ",
              rows * g.key_row_bytes, " and ", rows * g.value_row_bytes);
      slots = static_cast<Index>(p) * page_tokens_ + used;
    }
    require(static_cast<Index>(head.running.size()) <= (from.scorer.empty() ? 0 : slots), "restore: layer ", layer,
            " head ", h, " has ", head.running.size(), " running scores for ", slots, " slots of scorer '", from.scorer,
            "'");
    for (std::size_t slot = 0; slot < head.running.size(); ++slot)
      require(is_live(head, slot) || std::bit_cast<std::uint32_t>(head.running[slot]) == 0, "restore: layer ", layer,
              " head ", h, " has a running score in slot ", slot, ", which holds no token");
  }
}

template <Backend B, class Listed>
std::optional<SequenceId> KvCache<B, Listed>::restore(const SequenceImage& image) {
  require(image.page_tokens == page_tokens_, "restore: page_tokens = ", image.page_tokens, ", must be ", page_tokens_);
  require(static_cast<Index>(image.layers.size()) == layers(), "restore: ", image.layers.size(), " layers, must be ",
          layers());
  auto fresh = std::make_unique<Sequence>();
  fresh->tags = Tags(image.tags);
  for (Index l = 0; l < layers(); ++l) check_image(image.layers[static_cast<std::size_t>(l)], l);

  std::vector<Index> wanted(static_cast<std::size_t>(pool_->formats()), 0);  // [size class] pages
  for (Index l = 0; l < layers(); ++l)
    for (const SequenceImage::Head& head : image.layers[static_cast<std::size_t>(l)].heads)
      for (const SequenceImage::Page& page : head.pages) ++wanted[static_cast<std::size_t>(size_class(l, page.format))];
  std::deque<FreshPages> taken;  // [size class]
  for (std::size_t size = 0; size < wanted.size(); ++size)
    if (!taken.emplace_back(*pool_, wanted[size]).take(static_cast<int>(size))) return std::nullopt;

  fresh->layers.resize(image.layers.size());
  for (Index l = 0; l < layers(); ++l) {
    const SequenceImage::Layer& from = image.layers[static_cast<std::size_t>(l)];
    Layer& to = fresh->layers[static_cast<std::size_t>(l)];
    to.given_spans = from.given;
    std::vector<std::vector<float>> running;
    for (const SequenceImage::Head& head : from.heads) {
      Head& list = to.heads.emplace_back();
      running.push_back(head.running);
      for (const SequenceImage::Page& page : head.pages) {
        const auto size = static_cast<std::size_t>(size_class(l, page.format));
        Entry e;
        e.page = taken[size].pages()[static_cast<std::size_t>(--wanted[size])];
        e.format = page.format, e.first = page.first;
        list.entries.push_back(e);
        for (const std::uint16_t offset : page.offsets)
          list.put(list.entries.back(), page.first + offset, page_tokens_);
        list.entries.back().live = page.live;

        const PageGeometry& g = geometry_[static_cast<std::size_t>(l)][page.format];
        const auto write = [&](const std::vector<std::byte>& rows, std::byte* tile, Index row_bytes) {
          if (page.live == low_bits(static_cast<Index>(page.offsets.size()))) {
            be_->to_backend(tile, rows.data(), static_cast<Index>(rows.size()));
            return;
          }
          std::vector<std::byte> dense(page.offsets.size() * static_cast<std::size_t>(row_bytes));
          const std::byte* row = rows.data();
          for_each_bit(page.live, [&](Index slot) {
            std::memcpy(dense.data() + slot * row_bytes, row, static_cast<std::size_t>(row_bytes));
            row += row_bytes;
          });
          be_->to_backend(tile, dense.data(), static_cast<Index>(dense.size()));
        };
        write(page.keys, g.key_row(e.page, 0), g.key_row_bytes);
        write(page.values, g.value_row(e.page, 0), g.value_row_bytes);
      }
    }
    if (!from.scorer.empty()) to.running.start(*be_, from.scorer, running, page_tokens_, from.last_row);
  }

  const std::unique_lock lock(table_);
  sequences_.emplace(next_id_, std::move(fresh));
  for (FreshPages& pages : taken) pages.keep();
  return next_id_++;
}

}  // namespace kvpare
