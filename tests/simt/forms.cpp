// The verbs over coded pages against the CPU's, bit for bit: pages that change their form with gaps, in pieces and as
// they are, lists of several forms that are packed and read through masks, and work that takes several lots of scratch
// memory.
#include <gtest/gtest.h>

#include <kvpare/backend/cpu/backend.hpp>
#include <kvpare/backend/cuda/rows.cuh>
#include <kvpare/codec/folded.hpp>
#include <kvpare/codec/rotation.hpp>
#include <kvpare/codec/ternary.hpp>

#include "simt/runtime.hpp"
#include "support/inputs.hpp"

namespace kvpare::test {
namespace {

using Work = cuda::Workspace<simt::Runtime>;
using Half = Raw<half>;
using Listed = Formats<Pair<Half, Half>, Pair<Raw<float>, Half>, Pair<Int8, Affine<4, 16>>,
                       Pair<KiviKeys<4, 16>, KiviValues<2, 16>>, Pair<KiviKeys<4, 16>, Half>,
                       Pair<Symmetric<3, 8>, Ternary<>>, Pair<Rotated<Int4>, Balanced<Int8>>,
                       Pair<Int8, KiviKeys<2, 16>>, Pair<ChannelScaled<KiviKeys<4, 16>>, Int1>>;
constexpr Index pages = 6, key_dim = 48, value_dim = 32;

/// What both backends have: the same pages of every format, and states.
struct Pool {
  Index tokens;
  std::vector<Index> at;  // of a format's pages, in bytes
  std::vector<Index> page_bytes, key_bytes;
  Index bytes = 0;
  std::vector<float> states;  // two blocks

  explicit Pool(Index page_tokens) : tokens(page_tokens), states(2 * 1024) {
    for (std::size_t i = 0; i < states.size(); ++i) states[i] = 0.5f + random_unit(9, static_cast<Index>(i));
    Listed::for_each([&]<class P>(int, P) {
      at.push_back(bytes), key_bytes.push_back(P::key_bytes(tokens, key_dim));
      page_bytes.push_back(P::page_bytes(tokens, key_dim, value_dim));
      bytes += pages * page_bytes.back();
    });
  }

  template <class CodecOf>
  std::vector<PageGeometry> geometry(std::byte* base, const CodecOf& codec_of) const {
    std::vector<PageGeometry> all;
    Listed::for_each([&]<class P>(int format, P) {
      const auto f = static_cast<std::size_t>(format);
      PageGeometry g;
      g.keys = base + at[f], g.values = g.keys + key_bytes[f];
      g.key_page_bytes = g.value_page_bytes = page_bytes[f];
      const auto side = [&]<Codec C>(C*, Side which, Index width, Index& row_bytes, DType& type, const void*& codec,
                                     bool& moves, Index& tile_bytes) {
        moves = C::rows_move, tile_bytes = C::tile_bytes({tokens, width});
        if constexpr (is_raw<C>)
          row_bytes = C::row_bytes(width), type = C::dtype;
        else
          codec = codec_of.template operator()<C>(which, TileShape{tokens, width});
      };
      side(static_cast<typename P::Key*>(nullptr), Side::keys, key_dim, g.key_row_bytes, g.key_type, g.key_codec,
           g.keys_move, g.key_tile_bytes);
      side(static_cast<typename P::Value*>(nullptr), Side::values, value_dim, g.value_row_bytes, g.value_type,
           g.value_codec, g.values_move, g.value_tile_bytes);
      g.rows_move = g.keys_move && g.values_move;
      all.push_back(g);
    });
    return all;
  }
};

/// The same work on fibers and on the CPU.
class BothBackends {
 public:
  explicit BothBackends(Index tokens) : pool(tokens), here(static_cast<std::size_t>(pool.bytes) + 64) {
    memory = static_cast<std::byte*>(runtime.allocate(pool.bytes));
    states = static_cast<float*>(runtime.allocate(std::ssize(pool.states) * 4));
    runtime.to_backend(states, pool.states.data(), std::ssize(pool.states) * 4);
    base = here.data() + (64 - reinterpret_cast<std::uintptr_t>(here.data()) % 64) % 64;
    there_formats = pool.geometry(
        memory, []<Codec C>(Side side, TileShape s) -> const void* { return cuda::tile_ops<Work, C>(side, s); });
    here_formats =
        pool.geometry(base, [this]<Codec C>(Side side, TileShape s) -> const void* { 
          return side == Side::keys ? cpu.codec<C, Side::keys>(s) : cpu.codec<C, Side::values>(s);
        });
    // Pages of rows first, then every other format from them.
    Dice dice{tokens == 16 ? 5u : 6u};
    std::vector<std::uint16_t> rows(static_cast<std::size_t>(pages * tokens * (key_dim + value_dim)));
    for (auto& x : rows) x = half(static_cast<float>(dice.symmetric() * 3)).bits;
    const Index row_bytes = std::ssize(rows) * 2;
    EXPECT_LE(row_bytes, pages * pool.page_bytes[0]);
    std::memset(base, 0, static_cast<std::size_t>(pool.bytes));
    std::memcpy(base, rows.data(), static_cast<std::size_t>(row_bytes));
    runtime.to_backend(memory, base, pool.bytes);
    for (std::uint16_t f = 1; f < Listed::count; ++f) {
      std::vector<EncodePage> whole;
      std::vector<EncodePiece> pieces;
      for (PageId p = 0; p < pages; ++p) {
        whole.push_back({p, f, p % 3, std::ssize(pieces), 1});
        pieces.push_back({p, 0, 0, 0, 0, static_cast<std::uint8_t>(tokens)});
      }
      encode(whole, pieces);
    }
  }
  ~BothBackends() { runtime.release(memory), runtime.release(states); }

  std::vector<CodecState> states_at(const float* at) const { return {{at, at + 1024}, {at + 300, at + 100}}; }
  void encode(std::span<const EncodePage> written, std::span<const EncodePiece> pieces) {
    const auto on = [&](const std::vector<PageGeometry>& formats, const std::vector<CodecState>& s) {
      return EncodeList{formats, s, written, pieces, key_dim, value_dim, pool.tokens};
    };
    const auto there = states_at(states), mine = states_at(pool.states.data());
    const EncodeList on_fibers = on(there_formats, there), on_cpu = on(here_formats, mine);
    work.begin();
    cuda::encode(work, std::span(&on_fibers, 1));
    cpu.encode(std::span(&on_cpu, 1));
  }
  /// Bytes of all tiles, as canonical ones.
  void expect_same(const std::string& after) {
    for (std::uint16_t f = 0; f < Listed::count; ++f)
      for (PageId p = 0; p < pages; ++p)
        for (const Side side : {Side::keys, Side::values}) {
          const PageGeometry &g = there_formats[f], &h = here_formats[f];
          const Index bytes = side == Side::keys ? g.key_tile_bytes : g.value_tile_bytes,
                      width = side == Side::keys ? key_dim : value_dim;
          auto* canonical = static_cast<std::byte*>(runtime.allocate(bytes));
          std::vector<std::byte> got(static_cast<std::size_t>(bytes)), wanted(static_cast<std::size_t>(bytes));
          const RepackTile on_fibers{&g, side, p, width, pool.tokens, canonical},
              on_cpu{&h, side, p, width, pool.tokens, wanted.data()};
          work.begin();
          cuda::repack(work, std::span(&on_fibers, 1), RepackTo::canonical);
          cpu.repack(std::span(&on_cpu, 1), RepackTo::canonical);
          runtime.wait(runtime.to_host(got.data(), canonical, bytes));
          runtime.release(canonical);
          ASSERT_TRUE(got == wanted) << after << ": format " << f << (side == Side::keys ? " keys" : " values")
                                     << " of page " << p;
        }
  }

  Pool pool;
  simt::Runtime runtime;
  Work work{runtime};
  cpu::Backend cpu{{.threads = 1}};
  std::vector<std::byte> here;
  std::byte* base;
  std::byte* memory;
  float* states;
  std::vector<PageGeometry> there_formats, here_formats;
};

TEST(DeviceForms, EveryFormIsCodedFromRows) {
  for (const Index tokens : {16, 64}) BothBackends(tokens).expect_same("coding rows");
}

TEST(DeviceForms, PagesWithGapsAndPiecesChangeTheirForm) {
  for (const Index lot : {Index{8} << 20, Index{3000}})  // a page and a bit
    for (std::uint16_t from = 0; from < Listed::count; ++from) {
      BothBackends both(16);
      both.work.lot_floats = lot;
      for (std::uint16_t to = 0; to < Listed::count; ++to) {
        if (to == from) continue;
        std::vector<EncodePage> written;
        std::vector<EncodePiece> pieces;
        const auto piece = [&](PageId page, std::uint32_t state, int slot, int to_slot, int count) {
          pieces.push_back({page, from, state, static_cast<std::uint8_t>(slot), static_cast<std::uint8_t>(to_slot),
                            static_cast<std::uint8_t>(count)});
          ++written.back().pieces;
        };
        // Converted whole, with gaps at the start, between and at the end; with the state of its tiles and with
        // another.
        for (const std::uint32_t state : {0u, 1u}) {
          written.push_back({state, to, state, std::ssize(pieces), 0});
          piece(state, state, 2, 2, 3), piece(state, state, 7, 7, 1), piece(state, state, 9, 9, 5);
        }
        written.push_back({2, to, 1, std::ssize(pieces), 0});
        piece(2, 2, 0, 0, 16);
        // Gathered from several pages, into the rest of an open one where rows move.
        written.push_back({3, to, 0, std::ssize(pieces), 0});
        const int begin = both.there_formats[to].rows_move ? 5 : 0;
        piece(0, 0, 15, begin, 1), piece(3, 0, 1, begin + 1, 2), piece(4, 1, 3, begin + 3, 4),
            piece(1, 1, 0, begin + 7, 1);
        both.encode(written, pieces);
      }
      ASSERT_NO_FATAL_FAILURE(both.expect_same("from format " + std::to_string(from)));
    }
}

TEST(DeviceForms, RowsOfAnyTypeAreAppendedInAnyForm) {
  Dice dice{8};
  for (const DType type : {DType::f32, DType::f16, DType::bf16})
    for (const Index lot : {Index{8} << 20, Index{300}}) {
      BothBackends both(16);
      both.work.lot_floats = lot;
      const Index heads = 2, rows = 19, stride = heads * (key_dim + value_dim);
      std::vector<std::byte> bytes(static_cast<std::size_t>(rows * stride * size_of(type)));
      for (Index i = 0; i < rows * stride; ++i)
        write_element(dice.symmetric() * 2, type, bytes.data() + i * size_of(type));
      auto* there = static_cast<std::byte*>(both.runtime.allocate(std::ssize(bytes)));
      both.runtime.to_backend(there, bytes.data(), std::ssize(bytes));
      std::vector<WriteRun> runs;
      for (std::uint16_t f = 0; f < Listed::count; ++f)
        if (both.there_formats[f].rows_move) {
          runs.push_back({0, 0, 1, f, 3, 13}), runs.push_back({0, 13, 2, f, 0, 6});
          runs.push_back({1, 18, 4, f, 15, 1}), runs.push_back({1, 2, 5, f, 0, 16});
        }
      const auto append = [&](std::byte* at, const std::vector<PageGeometry>& formats) {
        AppendArguments a;
        a.keys.data = at, a.keys.dtype = type, a.keys.rows = rows, a.keys.heads = heads, a.keys.width = key_dim;
        a.keys.row_stride = stride, a.keys.head_stride = key_dim;
        a.values = a.keys;
        a.values.data = at + heads * key_dim * size_of(type), a.values.width = value_dim,
        a.values.head_stride = value_dim;
        a.formats = formats, a.runs = runs, a.page_tokens = 16;
        return a;
      };
      both.work.begin();
      cuda::append(both.work, append(there, both.there_formats));
      both.cpu.append(append(bytes.data(), both.here_formats));
      ASSERT_NO_FATAL_FAILURE(both.expect_same(std::string("appending ") + std::string(name_of(type))));
      both.runtime.release(there);
    }
}

TEST(DeviceForms, ListsOfSeveralFormsArePacked) {
  for (const Index tokens : {16, 64}) {
    BothBackends both(tokens);
    Dice dice{12};
    // As compaction does it: survivors of pages 0, 1, 2 … go to the first of them, list by list; lists take turns of
    // formats.
    std::vector<std::vector<Move>> lists(2);
    for (std::uint16_t f = 0; f < Listed::count; ++f) {
      if (!both.there_formats[f].rows_move) continue;
      for (PageId first : {0u, 3u}) {
        Index to = 0;
        std::vector<Move> moves;
        for (PageId from = first; from < first + 3; ++from)
          for (Index slot = 0; slot < tokens;) {
            const Index count = std::min(dice.within(1, 5), tokens - slot), room = tokens - to % tokens;
            if (dice.chance(0.5)) {
              const Index fits = std::min(count, room);
              moves.push_back({from, first + static_cast<PageId>(to / tokens), f, static_cast<std::uint8_t>(slot),
                               static_cast<std::uint8_t>(to % tokens), static_cast<std::uint8_t>(fits)});
              to += fits;
            }
            slot += count;
          }
        auto& list = lists[first == 0 ? 0 : 1];
        list.insert(list.end(), moves.begin(), moves.end());
      }
    }
    for (auto& list : lists)  // formats interleaved, each in its own order
      std::stable_sort(list.begin(), list.end(), [](const Move& a, const Move& b) { return a.from < b.from; });
    const auto compacts = [&](const std::vector<PageGeometry>& formats) {
      std::vector<CompactList> all;
      for (const auto& list : lists) all.push_back({formats, list, key_dim, value_dim, tokens});
      return all;
    };
    both.work.begin();
    cuda::compact(both.work, compacts(both.there_formats));
    both.cpu.compact(compacts(both.here_formats));
    ASSERT_NO_FATAL_FAILURE(both.expect_same("packing"));
  }
}

TEST(DeviceForms, MixedListsAreReadThroughMasks) {
  for (const Index lot : {Index{8} << 20, Index{3000}})
    for (const bool with_mask : {false, true}) {
      BothBackends both(16);
      both.work.lot_floats = lot;
      Dice dice{15};
      std::vector<Entry> entries;
      std::vector<std::uint64_t> mask;
      for (Index i = 0; i < 300; ++i) {  // more than a block places at once
        Entry e;
        e.format = static_cast<std::uint16_t>(dice.below(Listed::count)),
        e.page = static_cast<PageId>(dice.below(pages));
        e.used = 16, e.live = random_bits(3, i) & low_bits(16), e.state = e.page % 3;
        entries.push_back(e), mask.push_back(random_bits(4, i));
      }
      auto* there_mask = static_cast<std::uint64_t*>(both.runtime.allocate(std::ssize(mask) * 8));
      both.runtime.to_backend(there_mask, mask.data(), std::ssize(mask) * 8);
      Index rows = 0;
      for (std::size_t e = 0; e < entries.size(); ++e)
        rows += std::popcount(with_mask ? entries[e].live & mask[e] : entries[e].live);
      const auto there_states = both.states_at(both.states), here_states = both.states_at(both.pool.states.data());
      const auto list = [&](const std::vector<PageGeometry>& formats, const std::vector<CodecState>& states) {
        return HeadPages{entries, nullptr, formats, 16, states};
      };
      for (const Side side : {Side::keys, Side::values}) {
        const Index width = side == Side::keys ? key_dim : value_dim;
        std::vector<float> got(static_cast<std::size_t>(rows * width)), wanted(got.size());
        auto* out = static_cast<float*>(both.runtime.allocate(rows * width * 4));
        const GatherRow there[] = {{list(both.there_formats, there_states), side, with_mask ? there_mask : nullptr,
                                    width, out}},
                        here[] = {{list(both.here_formats, here_states), side, with_mask ? mask.data() : nullptr, width,
                                   wanted.data()}};
        both.work.begin();
        cuda::gather(both.work, std::span<const GatherRow>(there));
        both.cpu.gather(here);
        both.runtime.wait(both.runtime.to_host(got.data(), out, rows * width * 4));
        both.runtime.release(out);
        for (std::size_t i = 0; i < got.size(); ++i)
          ASSERT_EQ(got[i], wanted[i]) << "row " << static_cast<Index>(i) / width << " channel "
                                       << static_cast<Index>(i) % width;

        for (const bool per_slot : {false, true}) {
          const Index n = per_slot ? std::ssize(entries) * 16 : width;
          std::vector<float> is(static_cast<std::size_t>(4 * n)), must(is.size());
          auto* measured = static_cast<float*>(both.runtime.allocate(4 * n * 4));
          const auto row = [&](const HeadPages& p, const std::uint64_t* m, float* to) {
            return StatisticsRow{p, side, m, width, per_slot, to, to + n, to + 2 * n, to + 3 * n};
          };
          const StatisticsRow on_fibers = row(list(both.there_formats, there_states), with_mask ? there_mask : nullptr,
                                              measured),
                              on_cpu = row(list(both.here_formats, here_states), with_mask ? mask.data() : nullptr,
                                           must.data());
          both.work.begin();
          cuda::statistics(both.work, std::span(&on_fibers, 1));
          both.cpu.statistics(std::span(&on_cpu, 1));
          both.runtime.wait(both.runtime.to_host(is.data(), measured, 4 * n * 4));
          both.runtime.release(measured);
          for (std::size_t i = 0; i < is.size(); ++i) {
            if (static_cast<Index>(i) < 2 * n)
              ASSERT_EQ(is[i], must[i]) << i;
            else
              ASSERT_NEAR(is[i], must[i], 1e-5 * (1 + std::abs(must[i])) * 100) << i;
          }
        }
      }
      both.runtime.release(there_mask);
    }
}

}  // namespace
}  // namespace kvpare::test
