// The verbs that walk over rows of K and V on a CPU: append, compact, gather, statistics; and the dense product.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "../arguments.hpp"
#include "product.hpp"
#include "team.hpp"
#include "tiles.hpp"

namespace kvpare::cpu {

namespace detail {

/// Writes `count` rows of one head, converting the element type when it differs.
inline void write_rows(const Kernels& k, const ConstTensor& from, Index head, Index row, Index count, std::byte* to,
                       Index row_bytes, DType type) {
  const Index dense_bytes = from.width * size_of(type);
  for (Index r = 0; r < count; ++r) {
    const auto* source = static_cast<const std::byte*>(from.at(row + r, head));
    if (from.dtype == type) {
      std::memcpy(to + r * row_bytes, source, static_cast<std::size_t>(dense_bytes));
    } else {
      float* values = Scratch::fresh().floats(from.width);
      k.to_float(source, from.dtype, from.width, values);
      k.from_float(values, from.width, type, to + r * row_bytes);
    }
  }
}

/// One side of a page, coded or not.
struct SideOf {
  std::byte* base;
  Index row_bytes;
  DType type;
  const TileOps* ops;  // null: raw rows
  Index tile_bytes;

  SideOf(const PageGeometry& g, PageId page, Side side)
      : base(side == Side::keys ? g.key_row(page, 0) : g.value_row(page, 0)),
        row_bytes(side == Side::keys ? g.key_row_bytes : g.value_row_bytes),
        type(side == Side::keys ? g.key_type : g.value_type),
        ops(static_cast<const TileOps*>(side == Side::keys ? g.key_codec : g.value_codec)),
        tile_bytes(side == Side::keys ? g.key_tile_bytes : g.value_tile_bytes) {}

  void read(const Kernels& k, TileShape shape, Index slot, Position position, const float* state, float* to) const {
    if (ops != nullptr)
      ops->decode(k, shape, base, slot, position, state, to);
    else
      k.to_float(base + slot * row_bytes, type, shape.width, to);
  }
};

inline const float* state_of(const CodecState& state, Side side) {
  return side == Side::keys ? state.keys : state.values;
}

/// Writes the rows of a run, in the form of its page.
inline void write_run(const Kernels& k, const ConstTensor& from, const WriteRun& run, const PageGeometry& g, Side side,
                      Index page_tokens) {
  const SideOf to(g, run.page, side);
  if (to.ops == nullptr) {
    write_rows(k, from, run.head, run.row, run.count, to.base + run.slot * to.row_bytes, to.row_bytes, to.type);
    return;
  }
  float* rows = Scratch::fresh().floats(run.count * from.width);
  for (Index r = 0; r < run.count; ++r)
    k.to_float(static_cast<const std::byte*>(from.at(run.row + r, run.head)), from.dtype, from.width,
               rows + r * from.width);
  to.ops->encode(k, {page_tokens, from.width}, rows, run.slot, run.count, {}, nullptr, to.base);
}

inline constexpr int move_lookahead = 8;  // rows to fetch ahead of a copy whose sources are scattered

inline void prefetch_row(const std::byte* row, Index bytes) {
  for (Index b = 0; b < bytes; b += 64) __builtin_prefetch(row + b, 0);
}

inline void move_rows(const Kernels& k, const SideOf& from, Index slot, const SideOf& to, Index to_slot, Index count,
                      TileShape shape) {
  if (from.ops != nullptr) {
    from.ops->move_rows(k, shape, from.base, slot, to.base, to_slot, count);
    return;
  }
  const Index stride = from.row_bytes, bytes = shape.width * size_of(from.type);
  if (stride == bytes)
    std::memmove(to.base + to_slot * stride, from.base + slot * stride, static_cast<std::size_t>(bytes * count));
  else
    for (Index r = 0; r < count; ++r)
      std::memmove(to.base + (to_slot + r) * stride, from.base + (slot + r) * stride, static_cast<std::size_t>(bytes));
}

inline void carry_out(const Kernels& k, const CompactList& list) {
  const Index width_of[2] = {list.key_dim, list.value_dim};
  for (std::size_t i = 0; i < list.moves.size(); ++i) {
    const Move& m = list.moves[i];
    const PageGeometry& g = list.formats[m.format];
    for (const Side side : {Side::keys, Side::values}) {
      const Index width = width_of[static_cast<int>(side)];
      if (i + move_lookahead < list.moves.size()) {
        const Move& ahead = list.moves[i + move_lookahead];
        const SideOf from(list.formats[ahead.format], ahead.from, side);
        prefetch_row(from.base + ahead.from_slot * from.row_bytes,
                     from.ops == nullptr ? width * size_of(from.type) * ahead.count : 0);
      }
      move_rows(k, SideOf(g, m.from, side), m.from_slot, SideOf(g, m.to, side), m.to_slot, m.count,
                {list.page_tokens, width});
    }
  }
}

/// One side of one page that changes its form.
inline void encode_side(const Kernels& k, const EncodeList& list, const EncodePage& page, Side side) {
  const TileShape shape{list.page_tokens, side == Side::keys ? list.key_dim : list.value_dim};
  const auto state = [&](std::uint32_t index) {
    return index == 0 ? nullptr : state_of(list.states[index - 1], side);
  };
  const SideOf to(list.formats[page.format], page.page, side);
  const Index at_page = (&page - list.pages.data()) * list.page_tokens;
  const TokenFacts facts{list.positions.empty() ? nullptr : list.positions.data() + at_page,
                         list.attention == nullptr ? nullptr : list.attention + at_page};
  const auto pieces =
      list.pieces.subspan(static_cast<std::size_t>(page.first_piece), static_cast<std::size_t>(page.pieces));
  if (pieces.empty()) return;

  const auto same_form = [&](const EncodePiece& piece) {
    const SideOf from(list.formats[piece.format], piece.page, side);
    return from.ops == to.ops && (to.ops != nullptr ? state(piece.state) == state(page.state)
                                                    : from.type == to.type && from.row_bytes == to.row_bytes);
  };
  /// Decodes and codes slots [first, first + count), which these pieces fill but for gaps that a neighbour's row goes in:
  /// groups over tokens see nothing new.
  const auto code = [&](std::span<const EncodePiece> some, Index first) {
    const Index count = some.back().to_slot + some.back().count - first;
    float* rows = Scratch::fresh().floats(count * shape.width);
    Index filled = 0;
    for (const EncodePiece& p : some) {
      const SideOf from(list.formats[p.format], p.page, side);
      float* to_row = rows + (p.to_slot - first) * shape.width;
      for (Index r = 0; r < p.count; ++r)
        from.read(k, shape, p.slot + r, facts.positions == nullptr ? 0 : facts.positions[p.to_slot + r],
                  state(p.state), to_row + r * shape.width);
      for (; filled < p.to_slot - first; ++filled) std::copy_n(to_row, shape.width, rows + filled * shape.width);
      filled += p.count;
    }
    if (to.ops != nullptr)
      to.ops->encode(k, shape, rows, first, count, facts.from(first), state(page.state), to.base);
    else
      for (Index r = 0; r < count; ++r)
        k.from_float(rows + r * shape.width, shape.width, to.type, to.base + (first + r) * to.row_bytes);
  };
  if (to.ops != nullptr && !to.ops->rows_move) {
    const bool copied = std::all_of(pieces.begin(), pieces.end(), [&](const EncodePiece& p) {
      return same_form(p) && p.page == pieces[0].page && p.slot == p.to_slot;
    });
    if (copied)
      std::memcpy(to.base, SideOf(list.formats[pieces[0].format], pieces[0].page, side).base,
                  static_cast<std::size_t>(to.tile_bytes));
    else
      code(pieces, 0);
    return;
  }
  for (std::size_t at = 0; at < pieces.size();) {
    const EncodePiece& p = pieces[at];
    if (same_form(p)) {
      move_rows(k, SideOf(list.formats[p.format], p.page, side), p.slot, to, p.to_slot, p.count, shape);
      ++at;
      continue;
    }
    std::size_t end = at + 1;
    while (end < pieces.size() && !same_form(pieces[end]) &&
           pieces[end].to_slot == pieces[end - 1].to_slot + pieces[end - 1].count)
      ++end;
    code(pieces.subspan(at, end - at), p.to_slot);
    at = end;
  }
}

/// Calls `f(slot, row)` for every token of a list that is live and in the mask, `row` as floats in `memory` [width].
template <class F>
void for_each_row(const Kernels& k, const HeadPages& list, Side side, const std::uint64_t* mask, Index width,
                  float* memory, F&& f) {
  for (Index e = 0; e < static_cast<Index>(list.entries.size()); ++e) {
    const Entry& entry = list.entries[static_cast<std::size_t>(e)];
    const SideOf tile(list.formats[entry.format], entry.page, side);
    for_each_bit(mask != nullptr ? entry.live & mask[e] : entry.live, [&](Index s) {
      tile.read(k, {list.page_tokens, width}, s, list.position(entry, s), state_of(list.state_of(entry), side), memory);
      f(e * list.page_tokens + s, memory);
    });
  }
}

}  // namespace detail

inline void append(const Team& team, const AppendArguments& a) {
  constexpr Index worth_sharing = 64 * 1024;  // bytes; below, waking a thread costs more than it saves
  const auto write = [&](Index i) {
    const WriteRun& run = a.runs[static_cast<std::size_t>(i)];
    const PageGeometry& g = a.formats[run.format];
    detail::write_run(*team.kernels, a.keys, run, g, Side::keys, a.page_tokens);
    detail::write_run(*team.kernels, a.values, run, g, Side::values, a.page_tokens);
  };
  const Index runs = static_cast<Index>(a.runs.size());
  if (a.keys.rows * a.keys.heads * (a.keys.width + a.values.width) * 4 < worth_sharing)
    for (Index i = 0; i < runs; ++i) write(i);
  else
    team.run(runs, write);
}

inline void compact(const Team& team, std::span<const CompactList> lists) {
  team.run(static_cast<Index>(lists.size()),
           [&](Index i) { detail::carry_out(*team.kernels, lists[static_cast<std::size_t>(i)]); });
}

inline void encode(const Team& team, std::span<const EncodeList> lists) {
  std::vector<std::pair<const EncodeList*, const EncodePage*>> pages;
  for (const EncodeList& list : lists)
    for (const EncodePage& page : list.pages) pages.emplace_back(&list, &page);
  team.run(static_cast<Index>(pages.size()), [&](Index i) {
    const auto [list, page] = pages[static_cast<std::size_t>(i)];
    detail::encode_side(*team.kernels, *list, *page, Side::keys);
    detail::encode_side(*team.kernels, *list, *page, Side::values);
  });
}

inline void repack(const Team& team, std::span<const RepackTile> tiles, RepackTo to) {
  const Kernels& k = *team.kernels;
  team.run(static_cast<Index>(tiles.size()), [&](Index i) {
    const RepackTile& t = tiles[static_cast<std::size_t>(i)];
    const detail::SideOf tile(*t.geometry, t.page, t.side);
    const TileShape shape{t.page_tokens, t.width};
    const auto copy = [&](std::byte* into, const std::byte* from) {
      std::memcpy(into, from, static_cast<std::size_t>(tile.tile_bytes));
    };
    if (to == RepackTo::canonical)
      tile.ops != nullptr ? tile.ops->to_canonical(k, shape, tile.base, t.canonical) : copy(t.canonical, tile.base);
    else
      tile.ops != nullptr ? tile.ops->from_canonical(k, shape, t.canonical, tile.base) : copy(tile.base, t.canonical);
  });
}

inline void gather(const Team& team, std::span<const GatherRow> rows) {
  team.run(static_cast<Index>(rows.size()), [&](Index i) {
    const GatherRow& g = rows[static_cast<std::size_t>(i)];
    float* x = Scratch::fresh().floats(g.width);
    Index n = 0;
    detail::for_each_row(*team.kernels, g.pages, g.side, g.mask, g.width, x, [&](Index, const float* row) {
      std::copy_n(row, g.width, g.out + n++ * g.width);
    });
  });
}

inline void statistics(const Team& team, std::span<const StatisticsRow> rows) {
  team.run(static_cast<Index>(rows.size()), [&](Index i) {
    const StatisticsRow& s = rows[static_cast<std::size_t>(i)];
    float* x = Scratch::fresh().floats(s.width);
    const Index n = s.per_slot ? s.pages.slots() : s.width;
    const auto start = [&](float* to, float value) {
      if (to != nullptr) std::fill_n(to, n, value);
    };
    start(s.min, std::numeric_limits<float>::infinity()), start(s.max, -std::numeric_limits<float>::infinity());
    start(s.sum, 0), start(s.sum_squares, 0);
    detail::for_each_row(*team.kernels, s.pages, s.side, s.mask, s.width, x, [&](Index slot, const float*) {
      if (s.per_slot) {
        float least = std::numeric_limits<float>::infinity(), most = -least, sum = 0, squares = 0;
        for (Index c = 0; c < s.width; ++c)
          least = std::min(least, x[c]), most = std::max(most, x[c]), sum += x[c], squares += x[c] * x[c];
        if (s.min != nullptr) s.min[slot] = least;
        if (s.max != nullptr) s.max[slot] = most;
        if (s.sum != nullptr) s.sum[slot] = sum;
        if (s.sum_squares != nullptr) s.sum_squares[slot] = squares;
        return;
      }
      if (s.min != nullptr)
        for (Index c = 0; c < s.width; ++c) s.min[c] = std::min(s.min[c], x[c]);
      if (s.max != nullptr)
        for (Index c = 0; c < s.width; ++c) s.max[c] = std::max(s.max[c], x[c]);
      if (s.sum != nullptr)
        for (Index c = 0; c < s.width; ++c) s.sum[c] += x[c];
      if (s.sum_squares != nullptr)
        for (Index c = 0; c < s.width; ++c) s.sum_squares[c] += x[c] * x[c];
    });
  });
}

inline void product(const Team& team, const ProductArguments& p) {
  team.run(p.batch, [&](Index b) { multiply(p, b); });
}

}  // namespace kvpare::cpu
