// KvCache::image and KvCache::restore: a sequence as host data, and back.
#pragma once

#include "kv_cache.hpp"

namespace kvpare {

/// The coded tiles of one page, keys first, with room for their canonical bytes from `at` on.
template <Backend B>
void BasicKvCache<B>::add_coded_tiles(const HeadPages& list, const Entry& e, const LayerShape& shape,
                                         std::byte* canonical, Index& at, std::vector<RepackTile>& tiles) {
  const PageGeometry& g = list.formats[e.format];
  if (g.key_codec != nullptr) {
    tiles.push_back({&g, Side::keys, e.page, shape.key_dim, list.page_tokens, canonical + at});
    at += round_up(g.key_tile_bytes, 64);
  }
  if (g.value_codec != nullptr) {
    tiles.push_back({&g, Side::values, e.page, shape.value_dim, list.page_tokens, canonical + at});
    at += round_up(g.value_tile_bytes, 64);
  }
}

template <Backend B>
SequenceImage BasicKvCache<B>::image(SequenceId id) const {
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
    to.compressed_to = layer.compressed_to, to.compressed_from = layer.compressed_from;
    to.aging = layer.aging;
    for (const auto& block : layer.states)
      to.states.push_back({static_cast<std::uint16_t>(block->format),
                           std::vector<float>(static_cast<std::size_t>(block->memory.size()))});
    const LayerLists lists(*this, s, l);
    Index coded_bytes = 0;
    for (std::size_t h = 0; h < lists.heads.size(); ++h) {
      const HeadPages& list = lists.heads[h];
      SequenceImage::Head& head = to.heads.emplace_back();
      head.pages.resize(list.entries.size());
      for (std::size_t e = 0; e < list.entries.size(); ++e) {
        const Entry& entry = list.entries[e];
        const PageGeometry& g = list.formats[entry.format];
        SequenceImage::Page& page = head.pages[e];
        page.format = entry.format, page.state = entry.state, page.first = entry.first, page.live = entry.live;
        page.offsets.resize(entry.used);
        for (Index slot = 0; slot < entry.used; ++slot)
          page.offsets[static_cast<std::size_t>(slot)] =
              static_cast<std::uint16_t>(list.position(entry, slot) - entry.first);
        page.keys.resize(
            static_cast<std::size_t>(g.key_codec != nullptr ? g.key_tile_bytes : entry.used * g.key_row_bytes));
        page.values.resize(
            static_cast<std::size_t>(g.value_codec != nullptr ? g.value_tile_bytes : entry.used * g.value_row_bytes));
        if (g.key_codec != nullptr) coded_bytes += round_up(g.key_tile_bytes, 64);
        if (g.value_codec != nullptr) coded_bytes += round_up(g.value_tile_bytes, 64);
      }
      if (!layer.running.empty())
        head.running.resize(static_cast<std::size_t>(layer.running.filled(static_cast<Index>(h))));
    }

    const Buffer<B, std::byte> canonical(*be_, coded_bytes);
    std::vector<RepackTile> tiles;
    Index coded_at = 0;
    for (const HeadPages& list : lists.heads)
      for (const Entry& e : list.entries) add_coded_tiles(list, e, shape(l), canonical.data(), coded_at, tiles);
    be_->repack(tiles, RepackTo::canonical);

    // All host memory is there: nothing can fail between these copies and the wait for them.
    std::optional<typename B::Ticket> last;
    const auto fetch = [&](auto& host, const void* from) {
      if (!host.empty()) last = be_->to_host(host.data(), from, static_cast<Index>(host.size() * sizeof(host[0])));
    };
    auto tile = tiles.begin();
    for (std::size_t h = 0; h < lists.heads.size(); ++h) {
      const HeadPages& list = lists.heads[h];
      for (std::size_t e = 0; e < list.entries.size(); ++e) {
        const PageGeometry& g = list.formats[list.entries[e].format];
        const PageId page = list.entries[e].page;
        fetch(to.heads[h].pages[e].keys, g.key_codec != nullptr ? (tile++)->canonical : g.key_row(page, 0));
        fetch(to.heads[h].pages[e].values, g.value_codec != nullptr ? (tile++)->canonical : g.value_row(page, 0));
      }
      fetch(to.heads[h].running, layer.running.row(static_cast<Index>(h)));
    }
    for (std::size_t b = 0; b < layer.states.size(); ++b) fetch(to.states[b].values, layer.states[b]->memory.data());
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
        if (g.key_codec == nullptr) drop_dead(page.keys, g.key_row_bytes, page.live);
        if (g.value_codec == nullptr) drop_dead(page.values, g.value_row_bytes, page.live);
      }
      for (std::size_t slot = 0; slot < head.running.size(); ++slot)
        if (!is_live(head, slot)) head.running[slot] = 0;
      for (std::size_t p = head.pages.size(); p-- > 0;) {  // emptied by `truncate`, where formats interleave
        if (head.pages[p].live != 0) continue;
        head.pages.erase(head.pages.begin() + static_cast<std::ptrdiff_t>(p));
        const auto begin = std::min(head.running.size(), p * static_cast<std::size_t>(page_tokens_));
        const auto end = std::min(head.running.size(), begin + static_cast<std::size_t>(page_tokens_));
        head.running.erase(head.running.begin() + static_cast<std::ptrdiff_t>(begin),
                           head.running.begin() + static_cast<std::ptrdiff_t>(end));
      }
    }
  }
  return image;
}

template <Backend B>
void BasicKvCache<B>::check_image(const SequenceImage::Layer& from, Index layer) const {
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
  require(0 <= from.compressed_to && from.compressed_to <= from.compressed_from, "restore: layer ", layer, " was compressed to ",
          from.compressed_to, " of ", from.compressed_from, " tokens, must be between 0 and these");
  for (std::size_t b = 0; b < from.states.size(); ++b) {
    const SequenceImage::State& state = from.states[b];
    require(state.format < format_count(), "restore: layer ", layer, " state ", b, ": format ", state.format,
            ", must be below ", format_count());
    const Index floats = std::ssize(state.values), all = state_shape(layer, state.format).floats(),
                given = state_shape(layer, state.format, true).floats();
    require(floats > 0 && (floats == all || floats == given), "restore: layer ", layer, " state ", b, " has ", floats,
            " floats, format ", state.format, " takes ", all, given > 0 ? message(", or the caller's ", given) : "");
  }
  check_aging(from.aging, layer, "restore");
  for (std::size_t h = 0; h < from.heads.size(); ++h) {
    const SequenceImage::Head& head = from.heads[h];
    Index before = -1, slots = 0;
    Index appended = -1;        // last position so far of pages of the form that is appended
    std::vector<Index> all;     // positions of live tokens
    auto given = from.given.begin();
    for (std::size_t p = 0; p < head.pages.size(); ++p) {
      const SequenceImage::Page& page = head.pages[p];
      const auto wrong = [&](const auto&... what) {
        fail(message("restore: layer ", layer, " head ", h, " page ", p, ": ", what...));
      };
      const Index used = static_cast<Index>(page.offsets.size());
      if (page.format >= format_count()) wrong("format ", page.format, ", must be below ", format_count());
      if (used < 1 || used > page_tokens_) wrong(used, " slots, must be within [1, ", page_tokens_, "]");
      if (page.live == 0 || (page.live & ~low_bits(used)) != 0) wrong("live slots beyond the ", used, " used, or none");
      if (page.state > from.states.size() ||
          (page.state != 0 && (from.states[page.state - 1].format != page.format ||
                               std::ssize(from.states[page.state - 1].values) != state_shape(layer, page.format).floats())))
        wrong("state ", page.state, " is none of its format");
      if (page.format == append_format && page.first <= appended) wrong("starts at position ", page.first, " after ", appended);
      if (page.offsets[0] != 0 || page.first < 0) wrong("starts at position ", page.first, " + ", page.offsets[0]);
      given = from.given.begin();
      for (std::size_t i = 1; i < page.offsets.size(); ++i)
        if (page.offsets[i] <= page.offsets[i - 1]) wrong("positions do not ascend at slot ", i);
      for (const std::uint16_t offset : page.offsets) {
        before = Index{page.first} + offset;
        while (given != from.given.end() && given->second <= before) ++given;
        if (given == from.given.end() || before < given->first)
          wrong("holds position ", before, ", which the layer was not given");
      }
      if (page.format == append_format) appended = before;
      for_each_bit(page.live, [&](Index slot) { all.push_back(page.first + page.offsets[static_cast<std::size_t>(slot)]); });
      const auto [key_bytes, value_bytes] = image_bytes(layer, page.format, std::popcount(page.live));
      if (static_cast<Index>(page.keys.size()) != key_bytes || static_cast<Index>(page.values.size()) != value_bytes)
        wrong(page.keys.size(), " bytes of keys and ", page.values.size(), " of values, must be ", key_bytes, " and ",
              value_bytes);
      slots = static_cast<Index>(p) * page_tokens_ + used;
    }
    std::sort(all.begin(), all.end());
    if (const auto twice = std::adjacent_find(all.begin(), all.end()); twice != all.end())
      fail(message("restore: layer ", layer, " head ", h, " holds position ", *twice, " twice"));
    require(static_cast<Index>(head.running.size()) <= (from.scorer.empty() ? 0 : slots), "restore: layer ", layer,
            " head ", h, " has ", head.running.size(), " running scores for ", slots, " slots of scorer '", from.scorer,
            "'");
    for (std::size_t slot = 0; slot < head.running.size(); ++slot)
      require(is_live(head, slot) || std::bit_cast<std::uint32_t>(head.running[slot]) == 0, "restore: layer ", layer,
              " head ", h, " has a running score in slot ", slot, ", which holds no token");
  }
}

template <Backend B>
std::optional<SequenceId> BasicKvCache<B>::restore(const SequenceImage& image) {
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
    to.aging = from.aging;
    std::vector<std::vector<float>> running;
    std::vector<Buffer<B, std::byte>> canonical;
    std::vector<RepackTile> tiles;
    for (const SequenceImage::Head& head : from.heads) {
      Head& list = to.heads.emplace_back();
      running.push_back(head.running);
      for (const SequenceImage::Page& page : head.pages) {
        const auto size = static_cast<std::size_t>(size_class(l, page.format));
        Entry e;
        e.page = taken[size].pages()[static_cast<std::size_t>(--wanted[size])];
        e.format = page.format, e.state = page.state, e.first = page.first;
        std::vector<Entry>& entries = list.entries.change();
        entries.push_back(e);
        for (const std::uint16_t offset : page.offsets)
          put_token(entries.back(), page.first + offset, page_tokens_, list.offsets);
        entries.back().live = page.live;

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
        const auto stage = [&](const std::vector<std::byte>& tile, Side side, Index width) {
          canonical.emplace_back(*be_, std::span<const std::byte>(tile));
          tiles.push_back({&g, side, e.page, width, page_tokens_, canonical.back().data()});
        };
        if (g.key_codec != nullptr)
          stage(page.keys, Side::keys, shape(l).key_dim);
        else
          write(page.keys, g.key_row(e.page, 0), g.key_row_bytes);
        if (g.value_codec != nullptr)
          stage(page.values, Side::values, shape(l).value_dim);
        else
          write(page.values, g.value_row(e.page, 0), g.value_row_bytes);
      }
    }
    be_->repack(tiles, RepackTo::page);
    for (const SequenceImage::State& state : from.states) {
      const bool begun = std::ssize(state.values) != state_shape(l, state.format).floats();
      const auto block = empty_state(l, state.format, begun);
      be_->to_backend(block->memory.data(), state.values.data(), block->memory.bytes());
      to.add_state(block);
    }
    const std::shared_lock lock(table_);
    for (auto shared = shared_states_.rbegin(); shared != shared_states_.rend(); ++shared)  // the newest, as new sequences have
      if (const auto& [layer, block] = *shared; layer == l && to.newest(block->format, block->begun) == 0) to.add_state(block);
    to.compressed_to = from.compressed_to, to.compressed_from = from.compressed_from;
    if (!from.scorer.empty()) to.running.start(*be_, from.scorer, running, page_tokens_, from.last_row);
  }

  const std::unique_lock lock(table_);
  sequences_.emplace(next_id_, std::move(fresh));
  for (FreshPages& pages : taken) pages.keep();
  return next_id_++;
}

}  // namespace kvpare
