// KvCache: pages whose codecs go by what is known of tokens are coded anew when more is known, from the originals, which were
// parked in host memory. A page of which one is not there (restored from a snapshot, say) stays as it is.
#pragma once

#include "../policy/score/recent_maximum.hpp"
#include "kv_cache.hpp"

namespace kvpare {

namespace detail {

/// One slot to be coded per call: the attention that its token has been given of late, NaN where nobody knows; 0 = no token.
struct TakeAttention {
  static constexpr std::int32_t no_token = -1, unknown = -2;
  const float* scores;         // of the head, by slot; 0 = no row has seen it
  const std::int32_t* source;  // slot of each, or one of these two
  float* attention;
  KVPARE_HD void operator()(Index i) const {
    const float score = source[i] < 0 ? 0.0f : scores[source[i]];
    attention[i] = score == 0 && source[i] != no_token ? std::numeric_limits<float>::quiet_NaN() : score;
  }
};

}  // namespace detail

/// What is known of the attention of slots about to be coded: `source` says from which slot each of them comes.
template <Backend B>
Buffer<B, float> BasicKvCache<B>::attention_of(const Layer& at, std::size_t head,
                                                  std::vector<std::int32_t> source) const {
  if (!at.running.is_of(RecentMaximum::name)) return {};
  const Index filled = at.running.filled(static_cast<Index>(head));
  for (std::int32_t& slot : source)
    if (slot >= filled) slot = detail::TakeAttention::unknown;
  const Buffer<B, std::int32_t> map(*be_, std::span<const std::int32_t>(source));
  Buffer<B, float> attention(*be_, std::ssize(source));
  be_->each(std::ssize(source),
            detail::TakeAttention{at.running.row(static_cast<Index>(head)), map.data(), attention.data()});
  return attention;
}

/// The slots that come to be written, page by page: where they are now.
template <Backend B>
std::vector<std::int32_t> BasicKvCache<B>::written_from(const ReformedList& list) const {
  std::vector<std::int32_t> source;
  for (const EncodePage& page : list.pages) {
    const auto first = list.source.begin() + static_cast<std::ptrdiff_t>(page.entry * page_tokens_);
    source.insert(source.end(), first, first + page_tokens_);
  }
  return source;
}

/// Rows of some live tokens of a list as floats, keys and values, ascending; and where they stand.
template <Backend B>
struct BasicKvCache<B>::RowsOut {
  std::vector<Position> positions;
  Buffer<B, float> keys, values;  // [tokens, width]

  RowsOut(const BasicKvCache& cache, const HeadPages& list, const std::vector<std::uint64_t>& words, const LayerShape& shape) {
    for (std::size_t e = 0; e < list.entries.size(); ++e)
      for_each_bit(list.entries[e].live & words[e],
                   [&](Index slot) { positions.push_back(list.position(list.entries[e], slot)); });
    const Index tokens = std::ssize(positions);
    keys = Buffer<B, float>(*cache.be_, tokens * shape.key_dim);
    values = Buffer<B, float>(*cache.be_, tokens * shape.value_dim);
    const Buffer<B, std::uint64_t> mask(*cache.be_, std::span<const std::uint64_t>(words));
    const GatherRow rows[] = {{list, Side::keys, mask.data(), shape.key_dim, keys.data()},
                              {list, Side::values, mask.data(), shape.value_dim, values.data()}};
    cache.be_->gather(rows);
  }
};

/// Keeps the rows, as appended, of tokens that are about to be coded by what is known of them. Waits.
template <Backend B>
void BasicKvCache<B>::park(Layer& at, Index layer, const std::vector<ReformedList>& lists) {
  for (std::size_t h = 0; h < lists.size(); ++h) {
    const HeadPages list = list_of(at.heads[h], layer);
    std::vector<std::uint64_t> words(list.entries.size(), 0);
    bool any = false;
    for (const EncodePage& page : lists[h].pages) {
      if (!reads_attention(page.format)) continue;
      for (Index slot = 0; slot < page_tokens_; ++slot) {
        const std::int32_t from = lists[h].source[static_cast<std::size_t>(page.entry * page_tokens_ + slot)];
        if (from < 0) continue;
        const auto entry = static_cast<std::size_t>(from / page_tokens_);
        if (list.entries[entry].format != append_format) continue;
        words[entry] |= std::uint64_t{1} << from % page_tokens_;
        any = true;
      }
    }
    if (!any) continue;
    const RowsOut rows(*this, list, words, shape(layer));
    auto lot = std::make_shared<detail::ParkedRows>();
    lot->positions = rows.positions;
    rows.keys.to_host(lot->keys);
    be_->wait(rows.values.to_host(lot->values));
    at.heads[h].parked.push_back(std::move(lot));
  }
}

/// Is a page of a form that goes by attention, and are all of its tokens parked?
template <Backend B>
bool BasicKvCache<B>::has_originals(const Head& head, Index layer, std::size_t entry) const {
  const Entry& e = head.entries[entry];
  if (e.live == 0 || !reads_attention(e.format)) return false;
  const HeadPages list = list_of(head, layer);
  bool all = true;
  for_each_bit(e.live, [&](Index slot) { all = all && head.parked_row(list.position(e, slot)).first != nullptr; });
  return all;
}

/// Codes anew, in lots of a few pages: rows as appended go to pages taken for the while, and from there into the form.
template <Backend B>
void BasicKvCache<B>::recode(Sequence& s, CompressReport& report) {
  if (any_reads_attention())
    for (Index l = 0; l < layers(); ++l) {
      Layer& at = s.layers[static_cast<std::size_t>(l)];
      if (!at.aging.recode || !at.running.is_of(RecentMaximum::name)) continue;
      for (std::size_t h = 0; h < at.heads.size(); ++h) {
        std::vector<std::size_t> due;
        for (std::size_t e = 0; e < at.heads[h].entries.size(); ++e)
          if (has_originals(at.heads[h], l, e)) due.push_back(e);
        constexpr std::size_t few = 16;
        for (std::size_t first = 0; first < due.size(); first += few)
          recode_some(at, l, h, std::span(due).subspan(first, std::min(few, due.size() - first)), report);
        std::erase_if(at.heads[h].parked, [&](const auto& lot) {
          const HeadPages list = list_of(at.heads[h], l);
          return selection_at(list, lot->positions).count() == 0;
        });
      }
    }
}

template <Backend B>
void BasicKvCache<B>::recode_some(Layer& at, Index layer, std::size_t h, std::span<const std::size_t> due,
                                     CompressReport& report) {
  Head& head = at.heads[h];
  const LayerShape& sh = shape(layer);
  const HeadPages list = list_of(head, layer);
  std::vector<std::uint64_t> words(list.entries.size(), 0);
  std::vector<std::vector<std::size_t>> copies(static_cast<std::size_t>(pool_->formats()));  // [size class] of `due`
  for (std::size_t i = 0; i < due.size(); ++i) {
    const Entry& e = list.entries[due[i]];
    words[due[i]] = e.live;
    if (pool_->references(e.page) > 1) copies[static_cast<std::size_t>(size_class(layer, e.format))].push_back(i);
  }
  FreshPages raw(*pool_, std::ssize(due));
  std::deque<FreshPages> own;
  bool room = raw.take(size_class(layer, append_format), PagePool::Reserve::use);
  for (std::size_t size = 0; room && size < copies.size(); ++size)
    room = own.emplace_back(*pool_, std::ssize(copies[size])).take(static_cast<int>(size), PagePool::Reserve::use);
  if (!room) {
    for (const std::uint64_t word : words) report.tokens_waiting += std::popcount(word);
    return;
  }

  std::vector<float> keys, values;
  for (const std::size_t e : due)
    for_each_bit(list.entries[e].live, [&](Index slot) {
      const auto found = head.parked_row(list.position(list.entries[e], slot));
      const auto take = [&](std::vector<float>& to, const std::vector<float>& from, Index width) {
        to.insert(to.end(), from.begin() + found.second * width, from.begin() + (found.second + 1) * width);
      };
      take(keys, found.first->keys, sh.key_dim), take(values, found.first->values, sh.value_dim);
    });
  const Buffer<B, float> key_rows(*be_, std::span<const float>(keys)), value_rows(*be_, std::span<const float>(values));

  std::vector<WriteRun> runs;
  std::vector<EncodePage> pages;
  std::vector<EncodePiece> pieces;
  std::vector<Position> positions;
  std::vector<std::int32_t> source;
  Index row = 0;
  for (std::size_t i = 0; i < due.size(); ++i) {
    const Entry& e = list.entries[due[i]];
    pages.push_back({e.page, e.format, e.state, std::ssize(pieces), 0, static_cast<Index>(due[i])});
    for (std::uint64_t left = e.live; left != 0;) {
      const Index slot = std::countr_zero(left), count = std::countr_one(left >> slot);
      runs.push_back({0, row, raw.pages()[i], append_format, static_cast<std::uint16_t>(slot),
                      static_cast<std::uint16_t>(count)});
      pieces.push_back({raw.pages()[i], append_format, 0, static_cast<std::uint8_t>(slot),
                        static_cast<std::uint8_t>(slot), static_cast<std::uint8_t>(count)});
      ++pages.back().pieces;
      row += count;
      left &= ~(low_bits(count) << slot);
    }
    for (Index slot = 0; slot < page_tokens_; ++slot) {
      positions.push_back(slot < e.used ? list.position(e, slot) : e.last);
      source.push_back(e.live >> slot & 1u ? static_cast<std::int32_t>(static_cast<Index>(due[i]) * page_tokens_ + slot)
                                          : detail::TakeAttention::no_token);
    }
  }
  for (std::size_t size = 0; size < copies.size(); ++size)
    for (std::size_t n = 0; n < copies[size].size(); ++n) pages[copies[size][n]].page = own[size].pages()[n];
  const auto& formats = geometry_[static_cast<std::size_t>(layer)];
  const Buffer<B, float> attention = attention_of(at, h, std::move(source));
  be_->append({ConstTensor(key_rows.data(), row, 1, sh.key_dim), ConstTensor(value_rows.data(), row, 1, sh.value_dim),
               formats, runs, page_tokens_});
  const EncodeList encode{formats,    head.states,  pages,        pieces,
                          sh.key_dim, sh.value_dim, page_tokens_, positions,
                          attention.data()};
  be_->encode(std::span(&encode, 1));  // from here on nothing can fail
  for (FreshPages& fresh : own) fresh.keep();
  std::vector<Entry> given_up;
  for (const auto& of_size : copies)
    for (const std::size_t i : of_size) {
      given_up.push_back(list.entries[due[i]]);
      head.entries.change()[due[i]].page = pages[i].page;
    }
  give_back(layer, given_up, report);
  report.tokens_recoded += row;
}

}  // namespace kvpare
