// The verbs over rows of K and V (append, compact, gather, statistics), the dense product, `each`, and the copies.
#include <gtest/gtest.h>

#include <numeric>

#include "oracle/statistics.hpp"
#include "support/paged_tokens.hpp"
#include "support/tolerance.hpp"

namespace kvpare::test {
namespace {

constexpr DType types[] = {DType::f32, DType::f16, DType::bf16};

template <class Rig>
class Rows : public OnRig<Rig> {};
TYPED_TEST_SUITE(Rows, AllRigs, RigNames);

/// Pages of two heads that a test writes itself: every byte starts as NaN and is compared afterwards.
struct PageBlock {
  DType type = DType::f32;
  Index pages = 4, page_tokens = 8, key_dim = 5, value_dim = 3;

  Index key_bytes() const { return page_tokens * key_dim * size_of(type); }
  Index page_bytes() const { return round_up(key_bytes() + page_tokens * value_dim * size_of(type), 64); }
  std::vector<std::byte> fresh() const {
    return std::vector<std::byte>(static_cast<std::size_t>(pages * page_bytes()), std::byte{0xff});
  }
  PageGeometry geometry(std::byte* base) const {
    PageGeometry g;
    g.keys = base, g.values = base + key_bytes();
    g.key_page_bytes = g.value_page_bytes = page_bytes();
    g.key_row_bytes = key_dim * size_of(type), g.value_row_bytes = value_dim * size_of(type);
    g.key_type = g.value_type = type;
    return g;
  }
};

TYPED_TEST(Rows, AppendConvertsAndTouchesNothingElse) {
  Dice dice{1};
  for (const DType stored : types)
    for (const DType given : types)
      for (const Index width : {1, 5, 64, 80}) {
        const PageBlock block{.type = stored, .key_dim = width, .value_dim = width + 2};
        const auto keys = random_array(dice, 11, 2, block.key_dim, given, 70000),
                   values = random_array(dice, 11, 2, block.value_dim, given, 1e-6);
        const TensorBuffer<typename TestFixture::B> key_rows(this->be(), keys, given),
            value_rows(this->be(), values, given);
        const auto memory = upload(this->be(), block.fresh());
        const PageGeometry g = block.geometry(memory.data());
        const WriteRun runs[] = {{0, 0, 2, 0, 3, 5}, {0, 5, 0, 0, 0, 6}, {1, 3, 1, 0, 7, 1}};
        this->be().append(
            {.keys = key_rows.tensor(), .values = value_rows.tensor(), .formats = std::span(&g, 1), .runs = runs});

        auto wanted = block.fresh();
        const PageGeometry w = block.geometry(wanted.data());
        for (const WriteRun& run : runs)
          for (Index t = 0; t < run.count; ++t) {
            for (Index c = 0; c < block.key_dim; ++c)
              write_element(keys.at(run.row + t, run.head, c), stored,
                            w.key_row(run.page, run.slot + t) + c * size_of(stored));
            for (Index c = 0; c < block.value_dim; ++c)
              write_element(values.at(run.row + t, run.head, c), stored,
                            w.value_row(run.page, run.slot + t) + c * size_of(stored));
          }
        EXPECT_TRUE(download(this->be(), memory) == wanted)
            << name_of(given) << " to " << name_of(stored) << ", width " << width;
      }
}

TYPED_TEST(Rows, AppendReadsStridedTensors) {
  // Keys and values interleaved in one array, as a fused projection leaves them.
  Dice dice{2};
  const Index rows = 300, heads = 2, width = 32;
  const auto both = random_array(dice, rows, 2 * heads, width, DType::f16);
  const TensorBuffer<typename TestFixture::B> fused(this->be(), both, DType::f16);
  ConstTensor keys = fused.tensor(), values = fused.tensor();
  keys.heads = values.heads = heads;
  keys.head_stride = values.head_stride = 2 * width;
  values.data = fused.tensor().at(0, 1);
  const PageBlock block{.type = DType::f16, .pages = 10, .page_tokens = 64, .key_dim = width, .value_dim = width};
  const auto memory = upload(this->be(), block.fresh());
  const PageGeometry g = block.geometry(memory.data());
  std::vector<WriteRun> runs;
  for (Index h = 0; h < heads; ++h)
    for (Index row = 0; row < rows; row += 64)
      runs.push_back({h, row, static_cast<PageId>(h * 5 + row / 64), 0, 0,
                      static_cast<std::uint16_t>(std::min<Index>(64, rows - row))});
  this->be().append({.keys = keys, .values = values, .formats = std::span(&g, 1), .runs = runs});
  auto got = download(this->be(), memory);
  const PageGeometry w = block.geometry(got.data());
  for (Index h = 0; h < heads; ++h)
    for (Index row = 0; row < rows; ++row)
      for (Index c = 0; c < width; ++c) {
        const PageId page = static_cast<PageId>(h * 5 + row / 64);
        ASSERT_EQ(read_element(w.key_row(page, row % 64) + c * 2, DType::f16), both.at(row, 2 * h, c));
        ASSERT_EQ(read_element(w.value_row(page, row % 64) + c * 2, DType::f16), both.at(row, 2 * h + 1, c));
      }
}

TYPED_TEST(Rows, CompactMovesRowsInOrder) {
  for (const DType type : types) {
    const PageBlock block{.type = type};
    auto bytes = block.fresh();
    Dice dice{3};
    for (std::byte& b : bytes) b = static_cast<std::byte>(dice.below(256));
    const auto memory = upload(this->be(), bytes);
    const PageGeometry g = block.geometry(memory.data());
    // The second list moves within one page, over itself; the third reads what its first move does not write.
    const Move first[] = {{0, 0, 0, 2, 0, 3}}, second[] = {{1, 1, 0, 1, 0, 7}},
               third[] = {{2, 3, 0, 4, 0, 2}, {3, 3, 0, 5, 2, 3}, {2, 2, 0, 7, 0, 1}};
    const CompactList lists[] = {{std::span(&g, 1), first, block.key_dim, block.value_dim},
                                 {std::span(&g, 1), second, block.key_dim, block.value_dim},
                                 {std::span(&g, 1), third, block.key_dim, block.value_dim}};
    this->be().compact(lists);

    const PageGeometry w = block.geometry(bytes.data());
    for (const auto& list : lists)
      for (const Move& m : list.moves)
        for (Index t = 0; t < m.count; ++t) {
          std::memcpy(w.key_row(m.to, m.to_slot + t),
                      std::vector<std::byte>(w.key_row(m.from, m.from_slot + t),
                                             w.key_row(m.from, m.from_slot + t) + g.key_row_bytes)
                          .data(),
                      static_cast<std::size_t>(g.key_row_bytes));
          std::memcpy(w.value_row(m.to, m.to_slot + t),
                      std::vector<std::byte>(w.value_row(m.from, m.from_slot + t),
                                             w.value_row(m.from, m.from_slot + t) + g.value_row_bytes)
                          .data(),
                      static_cast<std::size_t>(g.value_row_bytes));
        }
    EXPECT_TRUE(download(this->be(), memory) == bytes) << name_of(type);
  }
}

/// Random heads with holes, and a mask over their slots.
struct Masked {
  std::vector<PlacedHead> heads;
  std::vector<std::vector<std::uint64_t>> mask;  // [head][entry]
  std::vector<std::vector<bool>> in;             // [head][slot] live and in the mask

  Masked(Dice& dice, Index page, Index width, DType type) {
    for (const Index tokens : {Index{0}, Index{1}, 2 * page + 3}) {
      heads.push_back(random_head(dice, tokens, width, width + 1, type, 2, 0.3));
      auto& words = mask.emplace_back(static_cast<std::size_t>(ceil_div(tokens, page)), 0);
      auto& chosen = in.emplace_back();
      for (Index s = 0; s < tokens; ++s) {
        const bool wanted = dice.chance(0.6);
        if (wanted) words[static_cast<std::size_t>(s / page)] |= std::uint64_t{1} << (s % page);
        chosen.push_back(wanted && heads.back()[static_cast<std::size_t>(s)].live);
      }
    }
  }
};

TYPED_TEST(Rows, GatherDecodesLiveTokensInOrder) {
  Dice dice{4};
  for (const DType type : types)
    for (const Layout layout : {Layout::pool, Layout::nhd, Layout::hnd})
      for (const bool with_mask : {false, true}) {
        const Masked m(dice, 16, 20, type);
        const PagedTokens<typename TestFixture::B> pages(this->be(), m.heads, 20, 21, {16, layout, type, 5});
        std::vector<Buffer<typename TestFixture::B, std::uint64_t>> masks;
        std::vector<Buffer<typename TestFixture::B, float>> outs;
        std::vector<GatherRow> rows;
        std::vector<std::vector<float>> wanted;
        for (std::size_t h = 0; h < m.heads.size(); ++h)
          for (const Side side : {Side::keys, Side::values}) {
            auto& want = wanted.emplace_back();
            for (std::size_t s = 0; s < m.heads[h].size(); ++s)
              if (with_mask ? m.in[h][s] : m.heads[h][s].live)
                for (const double x : side == Side::keys ? m.heads[h][s].token.key : m.heads[h][s].token.value)
                  want.push_back(static_cast<float>(x));
            masks.push_back(upload(this->be(), m.mask[h]));
            outs.emplace_back(this->be(), static_cast<Index>(want.size()));
            rows.push_back({pages.heads()[h], side, with_mask ? masks.back().data() : nullptr,
                            side == Side::keys ? 20 : 21, outs.back().data()});
          }
        this->be().gather(rows);
        for (std::size_t i = 0; i < rows.size(); ++i) EXPECT_EQ(download(this->be(), outs[i]), wanted[i]) << i;
      }
}

TYPED_TEST(Rows, StatisticsPerChannelAndPerSlot) {
  Dice dice{5};
  for (const DType type : types)
    for (const bool per_slot : {false, true})
      for (const bool with_mask : {false, true}) {
        const Masked m(dice, 16, 20, type);
        const PagedTokens<typename TestFixture::B> pages(this->be(), m.heads, 20, 21, {16, Layout::pool, type, 5});
        for (std::size_t h = 0; h < m.heads.size(); ++h)
          for (const Side side : {Side::keys, Side::values}) {
            const Index width = side == Side::keys ? 20 : 21, n = per_slot ? pages.slots(static_cast<Index>(h)) : width;
            oracle::Array3 x(static_cast<Index>(m.heads[h].size()), 1, width);
            for (Index t = 0; t < x.a; ++t)
              for (Index c = 0; c < width; ++c) {
                const auto& token = m.heads[h][static_cast<std::size_t>(t)].token;
                x.at(t, 0, c) = (side == Side::keys ? token.key : token.value)[static_cast<std::size_t>(c)];
              }
            std::vector<bool> used(static_cast<std::size_t>(x.a));
            for (std::size_t t = 0; t < used.size(); ++t) used[t] = with_mask ? m.in[h][t] : m.heads[h][t].live;
            auto wanted = per_slot ? oracle::spread_over_channels(x) : oracle::spread_over_tokens(x, used);
            const auto mask = upload(this->be(), m.mask[h]);
            const Buffer<typename TestFixture::B, float> min(this->be(), n), max(this->be(), n), sum(this->be(), n),
                squares(this->be(), n);
            const StatisticsRow row{pages.heads()[h],
                                    side,
                                    with_mask ? mask.data() : nullptr,
                                    width,
                                    per_slot,
                                    min.data(),
                                    max.data(),
                                    sum.data(),
                                    squares.data()};
            this->be().statistics(std::span(&row, 1));
            const auto got_min = download(this->be(), min), got_max = download(this->be(), max),
                       got_sum = download(this->be(), sum), got_squares = download(this->be(), squares);
            for (Index i = 0; i < n; ++i) {
              const bool counted = !per_slot || (i < x.a && used[static_cast<std::size_t>(i)]);
              const double huge = std::numeric_limits<double>::infinity();
              const std::size_t at = static_cast<std::size_t>(i);
              EXPECT_EQ(static_cast<double>(got_min[at]), counted ? wanted.min.at(0, i) : huge);
              EXPECT_EQ(static_cast<double>(got_max[at]), counted ? wanted.max.at(0, i) : -huge);
              EXPECT_TRUE(close(static_cast<double>(got_sum[at]), counted ? wanted.sum.at(0, i) : 0,
                                tolerance(Operation::product)));
              EXPECT_TRUE(close(static_cast<double>(got_squares[at]), counted ? wanted.sum_of_squares.at(0, i) : 0,
                                tolerance(Operation::product)));
            }
          }
      }
}

TYPED_TEST(Rows, StatisticsThatAreNotWantedAreNotWritten) {
  Dice dice{6};
  const std::vector<PlacedHead> heads{random_head(dice, 20, 4, 4, DType::f32)};
  const PagedTokens<typename TestFixture::B> pages(this->be(), heads, 4, 4, {});
  const Buffer<typename TestFixture::B, float> max(this->be(), 4);
  const StatisticsRow row{pages.heads()[0], Side::keys, nullptr, 4, false, nullptr, max.data(), nullptr, nullptr};
  this->be().statistics(std::span(&row, 1));
  double wanted = -1;
  for (const PlacedToken& t : heads[0]) wanted = std::max(wanted, t.token.key[0]);
  EXPECT_EQ(static_cast<double>(download(this->be(), max)[0]), wanted);
}

TYPED_TEST(Rows, ProductOfBatches) {
  Dice dice{7};
  for (const bool transposed : {false, true})
    for (const auto& [m, n, k] : {std::tuple<Index, Index, Index>{1, 1, 1},
                                  {3, 5, 7},
                                  {16, 8, 200},
                                  {4, 4, 0},
                                  {65, 130, 19},  // several tiles of 64 x 64
                                  {2, 70, 530}}) {  // long sums
      const Index batch = 3;
      const auto a = random_array(dice, batch, m, k, DType::f32),
                 b = random_array(dice, batch, transposed ? n : k, transposed ? k : n, DType::f32);
      const auto left = upload(this->be(), to_floats(a.values)), right = upload(this->be(), to_floats(b.values));
      const Buffer<typename TestFixture::B, float> c(this->be(), batch * m * n);
      this->be().product({left.data(), right.data(), c.data(), batch, m, n, k, transposed});
      const auto got = download(this->be(), c);
      for (Index i = 0; i < batch; ++i)
        for (Index row = 0; row < m; ++row)
          for (Index column = 0; column < n; ++column) {
            double wanted = 0;
            for (Index d = 0; d < k; ++d)
              wanted += a.at(i, row, d) * (transposed ? b.at(i, column, d) : b.at(i, d, column));
            EXPECT_TRUE(close(static_cast<double>(got[static_cast<std::size_t>((i * m + row) * n + column)]), wanted,
                              tolerance(Operation::product)));
          }
    }
}

struct AddPlace {
  Index* counts;
  KVPARE_HD void operator()(Index i) const { counts[i] += i + 1; }
};

TYPED_TEST(Rows, EachRunsEveryIndexOnce) {
  for (const Index n : {0, 1, 4095, 4096, 4097, 20000}) {
    const auto counts = upload(this->be(), std::vector<Index>(static_cast<std::size_t>(n) + 1, 0));
    this->be().each(n, AddPlace{counts.data()});
    std::vector<Index> wanted(static_cast<std::size_t>(n) + 1);
    std::iota(wanted.begin(), wanted.end(), Index{1});
    wanted.back() = 0;
    EXPECT_EQ(download(this->be(), counts), wanted) << n;
  }
}

TYPED_TEST(Rows, CopiesKeepEveryByteAndItsNeighbours) {
  auto& be = this->be();
  for (const Index bytes : {0, 1, 63, 64, 1000}) {
    const Index padded = bytes + 2;
    const auto memory = upload(be, std::vector<unsigned char>(static_cast<std::size_t>(padded), 0xaa));
    std::vector<unsigned char> from(static_cast<std::size_t>(bytes)), to(static_cast<std::size_t>(padded), 0);
    for (std::size_t i = 0; i < from.size(); ++i) from[i] = static_cast<unsigned char>(i * 7);
    be.to_backend(memory.data() + 1, from.data(), bytes);
    be.wait(be.to_host(to.data(), memory.data(), padded));
    EXPECT_EQ(to.front(), 0xaa);
    EXPECT_EQ(to.back(), 0xaa);
    EXPECT_TRUE(std::equal(from.begin(), from.end(), to.begin() + 1));
  }
}

TYPED_TEST(Rows, MemoryIsAlignedAndReleasingNothingIsAllowed) {
  for (const Index bytes : {1, 3, 64, 1000}) {
    void* memory = this->be().allocate(bytes);
    ASSERT_NE(memory, nullptr);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(memory) % 64, 0u);
    this->be().release(memory);
  }
  this->be().release(nullptr);
}

}  // namespace
}  // namespace kvpare::test
