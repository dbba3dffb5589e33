// Tokens laid out in pages by hand, in every layout the library may meet, with NaN in every slot that nobody may read.
#pragma once

#include <kvpare/cache/pages.hpp>
#include <limits>
#include <vector>

#include "inputs.hpp"
#include "oracle/attend.hpp"

namespace kvpare::test {

/// How pages lie in memory.
///
///   pool    a page holds one head's keys, then its values; any page for any head
///   nhd     [pages, page_tokens, heads, width]
///   hnd     [pages, heads, page_tokens, width]
///   dense   nhd with pages in order: a plain [tokens, heads, width] array
enum class Layout { pool, nhd, hnd, dense };

struct Paging {
  Index page_tokens = 16;
  Layout layout = Layout::pool;
  DType type = DType::f32;
  std::uint64_t shuffle = 1;  // seed of the order of pages in memory
};

/// A token of one head; a dead one was evicted, its slot holds NaN.
struct PlacedToken {
  oracle::CachedToken token;
  bool live = true;
};
using PlacedHead = std::vector<PlacedToken>;  // positions ascend

/// What the oracle sees of a head: the live tokens.
inline oracle::CachedHead live_tokens(const PlacedHead& head) {
  oracle::CachedHead live;
  for (const PlacedToken& t : head)
    if (t.live) live.push_back(t.token);
  return live;
}

template <Backend B>
class PagedTokens {
 public:
  PagedTokens(B& be, const std::vector<PlacedHead>& heads, Index key_dim, Index value_dim, Paging how)
      : page_tokens_(how.page_tokens) {
    const Index head_count = static_cast<Index>(heads.size()), size = size_of(how.type);
    Index most = 1, all = 0;
    for (const PlacedHead& head : heads) {
      const Index pages = ceil_div(static_cast<Index>(head.size()), page_tokens_);
      most = std::max(most, pages), all += pages;
    }
    // Spare pages, so that a shuffled table has gaps.
    const bool in_order = how.layout == Layout::dense;
    const Index pages = in_order ? most : (how.layout == Layout::pool ? all : most) + 3;
    Dice dice{how.shuffle};
    const Sizes sizes(how, pages, head_count, key_dim, value_dim);
    std::vector<std::byte> memory(static_cast<std::size_t>(sizes.total));
    for (Index h = 0; h < head_count; ++h)
      geometry_.push_back(place(how, sizes, head_count, h, key_dim, value_dim, memory.data()));
    for (std::size_t i = 0; i < memory.size(); i += static_cast<std::size_t>(size))
      write_element(nan, how.type, memory.data() + i);

    const std::vector<Index> shared = dice.permutation(pages);
    Index next = 0;
    for (Index h = 0; h < head_count; ++h) {
      const PlacedHead& head = heads[static_cast<std::size_t>(h)];
      auto& entries = entries_.emplace_back();
      auto& offsets = offsets_.emplace_back();
      const std::vector<Index> own = dice.permutation(pages);
      for (Index begin = 0, i = 0; begin < static_cast<Index>(head.size()); begin += page_tokens_, ++i) {
        const Index page = in_order                     ? i
                           : how.layout == Layout::pool ? shared[static_cast<std::size_t>(next++)]
                                                        : own[static_cast<std::size_t>(i)];
        entries.push_back(fill_page(geometry_[static_cast<std::size_t>(h)], how.type, static_cast<PageId>(page),
                                    std::span(head).subspan(static_cast<std::size_t>(begin),
                                                            std::min(head.size() - static_cast<std::size_t>(begin),
                                                                     static_cast<std::size_t>(page_tokens_))),
                                    offsets));
      }
    }
    memory_ = upload(be, memory);
    for (PageGeometry& g : geometry_) {  // from the host copy to the backend's
      g.keys = memory_.data() + (g.keys - memory.data());
      g.values = memory_.data() + (g.values - memory.data());
    }
    for (std::size_t h = 0; h < heads.size(); ++h)
      lists_.push_back({entries_[h], offsets_[h].data(), std::span(geometry_).subspan(h, 1), page_tokens_});
  }

  std::span<const HeadPages> heads() const { return lists_; }
  Index slots(Index head) const { return lists_[static_cast<std::size_t>(head)].slots(); }
  const Buffer<B, std::byte>& memory() const { return memory_; }

 private:
  static constexpr double nan = std::numeric_limits<double>::quiet_NaN();

  struct Sizes {
    Index key_tile, value_tile;  // of a pool page
    Index values_at, total;
    Sizes(const Paging& how, Index pages, Index heads, Index key_dim, Index value_dim)
        : key_tile(round_up(how.page_tokens * key_dim * size_of(how.type), 64)),
          value_tile(round_up(how.page_tokens * value_dim * size_of(how.type), 64)) {
      const Index tiles = how.layout == Layout::pool ? 1 : pages * heads;
      values_at = tiles * key_tile;
      total = how.layout == Layout::pool ? pages * (key_tile + value_tile) : values_at + tiles * value_tile;
    }
  };

  static PageGeometry place(const Paging& how, const Sizes& sizes, Index heads, Index head, Index key_dim,
                            Index value_dim, std::byte* memory) {
    const Index size = size_of(how.type), page = how.page_tokens;
    PageGeometry g;
    g.key_type = g.value_type = how.type;
    const auto set = [&](std::byte*& base, Index& page_bytes, Index& row_bytes, Index width, Index start) {
      switch (how.layout) {
        case Layout::pool:
          row_bytes = width * size, page_bytes = sizes.key_tile + sizes.value_tile;
          break;
        case Layout::hnd:
          row_bytes = width * size, page_bytes = heads * page * width * size, start += head * page * width * size;
          break;
        default:
          row_bytes = heads * width * size, page_bytes = page * row_bytes, start += head * width * size;
      }
      base = memory + start;
    };
    set(g.keys, g.key_page_bytes, g.key_row_bytes, key_dim, 0);
    set(g.values, g.value_page_bytes, g.value_row_bytes, value_dim, sizes.values_at);
    return g;
  }

  Entry fill_page(const PageGeometry& g, DType type, PageId page, std::span<const PlacedToken> tokens,
                  std::vector<std::uint16_t>& offsets) const {
    Entry e;
    e.page = page, e.used = static_cast<std::uint16_t>(tokens.size());
    e.first = static_cast<Position>(tokens.front().token.position),
    e.last = static_cast<Position>(tokens.back().token.position);
    if (e.last - e.first != e.used - 1) {
      e.offsets = static_cast<std::uint32_t>(static_cast<Index>(offsets.size()) / page_tokens_) + 1;
      offsets.resize(offsets.size() + static_cast<std::size_t>(page_tokens_), 0);
    }
    for (std::size_t s = 0; s < tokens.size(); ++s) {
      const PlacedToken& t = tokens[s];
      if (e.offsets != 0)
        offsets[static_cast<std::size_t>((e.offsets - 1) * page_tokens_) + s] =
            static_cast<std::uint16_t>(t.token.position - e.first);
      if (!t.live) continue;
      e.live |= std::uint64_t{1} << s;
      const auto write = [&](const std::vector<double>& row, std::byte* to) {
        for (std::size_t c = 0; c < row.size(); ++c)
          write_element(row[c], type, to + c * static_cast<std::size_t>(size_of(type)));
      };
      write(t.token.key, g.key_row(page, static_cast<Index>(s)));
      write(t.token.value, g.value_row(page, static_cast<Index>(s)));
    }
    return e;
  }

  Index page_tokens_;
  std::vector<PageGeometry> geometry_;
  std::vector<std::vector<Entry>> entries_;
  std::vector<std::vector<std::uint16_t>> offsets_;
  Buffer<B, std::byte> memory_;
  std::vector<HeadPages> lists_;
};

/// `tokens` random tokens at ascending positions; every step skips up to `gap` positions, every token is dead with
/// probability `dead`.
inline PlacedHead random_head(Dice& dice, Index tokens, Index key_dim, Index value_dim, DType type, Index gap = 0,
                              double dead = 0, double key_size = 1) {
  PlacedHead head;
  Index position = 0;
  for (Index t = 0; t < tokens; ++t) {
    PlacedToken placed;
    placed.token.position = position += gap > 0 ? dice.below(gap + 1) : 0;
    ++position;
    placed.live = !dice.chance(dead);
    for (Index c = 0; c < key_dim; ++c) placed.token.key.push_back(rounded(key_size * dice.symmetric(), type));
    for (Index c = 0; c < value_dim; ++c) placed.token.value.push_back(rounded(dice.symmetric(), type));
    head.push_back(std::move(placed));
  }
  return head;
}

}  // namespace kvpare::test
