// Attention on the device's own kernels for forms and shapes that the shared suites do not reach: every family whose
// codes become operands in registers, against the rows that its codec decodes, in double.
#define KVPARE_TEST_SIMT
#include <gtest/gtest.h>

#include <kvpare/codec/block_float.hpp>
#include <kvpare/codec/folded.hpp>
#include <kvpare/codec/fp8.hpp>
#include <kvpare/codec/ggml.hpp>
#include <kvpare/codec/group.hpp>
#include <kvpare/codec/rotation.hpp>
#include <kvpare/codec/ternary.hpp>
#include <kvpare/codec/turbo_quant.hpp>

#include "oracle/attend.hpp"
#include "support/inputs.hpp"
#include "support/tolerance.hpp"

namespace kvpare::test {
namespace {

using Be = SimtRig::Backend;

struct Recipe {
  Index kv_heads = 1, group = 4, width = 128, page_tokens = 64;
  std::vector<Index> pages = {3};  // of every form and head; head h has h fewer
  Index last_used = 64;            // slots of the last page
  double dead = 0;
  Index rows = 1;
  bool rows_inside = false;
  Index window = 0;
  float softcap = 0;
  bool sinks = false;
  MassKind mass = MassKind::none;
  DType query_type = DType::f32;
  bool bad_key = false, bad_value = false;  // a NaN in the last page that only some rows see; of raw rows
  double query_size = 1, key_size = 1, value_size = 1;
  Tolerance attended = {2e-3, 0}, logit = {4e-3, 0};
};

/// A codec on one side: what a scene does with it, whichever it is.
struct CodecSide {
  std::string_view name;
  bool raw = false, rows_move = true;
  DType type = DType::f32;  // of raw rows
  Index tile_bytes = 0, state_floats = 0;
  void (*encode)(TileShape, const float* rows, Index first, Index count, const float* state, std::byte* tile) = nullptr;
  void (*decode)(TileShape, const std::byte* tile, Index slot, const float* state, float* row) = nullptr;
  void (*lay)(TileShape, const std::byte* canonical, std::byte* to) = nullptr;  // null: as the codec has it
};

/// Canonical bytes in fragment order.
template <class Stored, Side side>
void lay_fragments(TileShape shape, const std::byte* canonical, std::byte* to) {
  using Layout = cuda::FragmentLayout<Stored, side>;
  constexpr int low_bits = Layout::low_bits;
  std::memset(to, 0, static_cast<std::size_t>(Layout::scales_at(shape)));
  const auto put_trits = [&](Index t, const std::uint8_t* codes) {
    for (Index y = 0; y < 26; ++y) {
      unsigned digits = 0;
      for (int k = 0; k < 5; ++k)
        digits = digits * 3 + (k < Layout::trits_of(y) ? unsigned{codes[Layout::trit_channel(y, k)]} : 0u);
      to[Layout::trit_byte_at(shape, t, y)] = static_cast<std::byte>((digits * 256 + 242) / 243);
    }
  };
  const auto put_code = [&](Index t, Index c, std::uint8_t code) {
    constexpr Index per_unit = Layout::per_unit;
    const Index first = c / per_unit * per_unit, at = Layout::unit_at(shape, t, first);
    const unsigned low = code & ((1u << low_bits) - 1u), high = unsigned{code} >> low_bits;
    std::uint16_t unit;
    std::memcpy(&unit, to + at, 2);
    unit = static_cast<std::uint16_t>(unit | low << c % per_unit * low_bits);
    std::memcpy(to + at, &unit, 2);
    if constexpr (Layout::has_high)
      to[Layout::high_unit_at(shape, t, first)] |=
          static_cast<std::byte>(high << Layout::high_bit(static_cast<int>(c - first)));
  };
  const auto put_scale = [&](Index group, GroupBits b) {
    std::memcpy(to + Layout::scales_at(shape) + group * Layout::scale_bytes, &b.scale, Layout::scale_bytes);
    std::memcpy(to + Layout::zeros_at(shape) + group * Layout::zero_bytes, &b.zero, Layout::zero_bytes);
  };
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(shape.width));
  if constexpr (Stored::form.along == Along::channels) {
    std::vector<GroupBits> scales(static_cast<std::size_t>(shape.width));
    const Index groups = shape.width / Layout::group(shape);
    for (Index t = 0; t < shape.tokens; ++t) {
      Stored::read_row(shape, canonical, t, codes.data(), scales.data());
      if constexpr (Stored::form.ternary)
        put_trits(t, codes.data());
      else
        for (Index c = 0; c < shape.width; ++c) put_code(t, c, codes[static_cast<std::size_t>(c)]);
      for (Index g = 0; g < groups; ++g) put_scale(t * groups + g, scales[static_cast<std::size_t>(g)]);
    }
  } else {
    const Index run = Layout::group(shape);
    for (Index place = 0; place < shape.tokens / run * shape.width; ++place) {
      put_scale(place, Stored::read_run(shape, canonical, place, codes.data()));
      for (Index i = 0; i < run; ++i)
        put_code(place / shape.width * run + i, place % shape.width, codes[static_cast<std::size_t>(i)]);
    }
  }
}

template <class C, Side side>
CodecSide codec_side(TileShape shape) {
  using Tiles = cuda::DeviceTiles<C, side>;
  CodecSide s{.name = C::name, .raw = is_raw<C>, .rows_move = C::rows_move};
  if constexpr (is_raw<C>) s.type = C::dtype;
  s.tile_bytes = C::tile_bytes(shape), s.state_floats = state_floats<C>(shape.width);
  s.encode = &C::encode, s.decode = &C::decode;
  if constexpr (cuda::has_fragment_order<typename Tiles::Stored>())
    if (Tiles::in_fragments(shape)) s.lay = &lay_fragments<typename Tiles::Stored, side>;
  return s;
}

/// A form of pages, and the handle of what attends to them.
struct Form {
  CodecSide keys, values;
  const void* pair = nullptr;
  Index page_bytes = 0, key_bytes = 0;
  bool raw() const { return keys.raw && values.raw; }
};

/// Pages of one width, and of no other: `pair` of a backend compiles kernels for all of them.
template <class K, class V, int width, Support wanted>
Form form(Index page_tokens) {
  using P = Pair<K, V>;
  const TileShape shape{page_tokens, width};
  Form f{codec_side<K, Side::keys>(shape), codec_side<V, Side::values>(shape)};
  f.page_bytes = P::page_bytes(page_tokens, width, width), f.key_bytes = P::key_bytes(page_tokens, width);
  if constexpr (!is_raw<K> || !is_raw<V>) {
    const auto* fused = cuda::detail::fused_ops<Be::Work, K, V, width>(page_tokens);
    f.pair = fused;
    if constexpr (wanted == Support::generic) {
      EXPECT_EQ(fused, nullptr) << K::name << " " << V::name;
      f.pair = &cuda::detail::generic_pair<Be::Work, P>;
    } else {
      EXPECT_NE(fused, nullptr) << K::name << " " << V::name;
    }
  }
  return f;
}

/// A list built by hand: pages of several forms, interleaved, with any bytes wherever nobody may look.
class Scene {
 public:
  Scene(const Recipe& r, std::uint64_t seed) : r_(r), dice_{seed}, heads_(static_cast<std::size_t>(r.kv_heads)) {}

  /// `count` more pages of a form for every head.
  void add(Index count, const Form& form, Support wanted) {
    PageGeometry g;
    g.pair = form.pair;
    set_codec(form.keys, g.key_codec, g.key_row_bytes, g.key_type, g.key_tile_bytes);
    set_codec(form.values, g.value_codec, g.value_row_bytes, g.value_type, g.value_tile_bytes);
    g.key_page_bytes = g.value_page_bytes = form.page_bytes;
    EXPECT_EQ(name_of(be().support(g)), name_of(wanted)) << form.keys.name << " " << form.values.name;
    const auto format = static_cast<std::uint16_t>(formats_.size());
    std::vector<std::byte> memory;
    const std::vector<float> key_state = state_of(form.keys, r_.key_size),
                             value_state = state_of(form.values, r_.value_size);
    for (std::size_t h = 0; h < heads_.size(); ++h) {
      Head& head = heads_[h];
      for (Index i = 0; i < std::max<Index>(1, count - static_cast<Index>(h)); ++i) {
        const auto page = static_cast<PageId>(memory.size() / static_cast<std::size_t>(g.key_page_bytes));
        memory.resize(memory.size() + static_cast<std::size_t>(g.key_page_bytes), std::byte{0xff});
        Entry e;
        e.page = page, e.format = format;
        e.used = static_cast<std::uint16_t>(i == 0 ? std::min(r_.last_used, r_.page_tokens) : r_.page_tokens);
        e.first = head.next, e.last = head.next + e.used - 1;
        head.next += e.used;
        if (!key_state.empty() || !value_state.empty()) e.state = static_cast<std::uint32_t>(states_.size()) + 1;
        for (Index t = 0; t < e.used; ++t)
          if (!dice_.chance(r_.dead)) e.live |= std::uint64_t{1} << t;
        std::byte* at = memory.data() + static_cast<Index>(page) * g.key_page_bytes;
        const auto keys = fill(form.keys, e, r_.key_size, key_state, at, r_.bad_key);
        const auto values = fill(form.values, e, r_.value_size, value_state, at + form.key_bytes, r_.bad_value);
        for_each_bit(e.live, [&](Index t) {
          head.tokens.push_back({e.first + t, keys[static_cast<std::size_t>(t)], values[static_cast<std::size_t>(t)]});
          head.slots.emplace_back(head.entries.size(), t);
        });
        head.entries.push_back(e);
      }
    }
    const auto& there = pages_.emplace_back(upload(be(), memory));
    g.keys = there.data(), g.values = there.data() + form.key_bytes;
    formats_.push_back(g);
    if (!key_state.empty() || !value_state.empty()) {
      const float* k = key_state.empty() ? nullptr : state_memory_.emplace_back(upload(be(), key_state)).data();
      const float* v = value_state.empty() ? nullptr : state_memory_.emplace_back(upload(be(), value_state)).data();
      states_.push_back({k, v});
    }
  }

  void expect_attends(const std::string& name) {
    LayerShape shape{.q_heads = r_.kv_heads * r_.group,
                     .kv_heads = r_.kv_heads,
                     .key_dim = r_.width,
                     .value_dim = r_.width,
                     .scale = static_cast<float>(1 / std::sqrt(static_cast<double>(r_.width))),
                     .softcap = r_.softcap,
                     .window = r_.window};
    for (Index h = 0; r_.sinks && h < shape.q_heads; ++h) shape.sink_logits.push_back(0.5f * static_cast<float>(h) - 1);
    oracle::AttendInput in;
    in.queries = random_array(dice_, r_.rows, shape.q_heads, r_.width, r_.query_type, r_.query_size);
    in.value_width = r_.width;
    in.how = {.scale = static_cast<double>(shape.scale), .softcap = shape.softcap, .window = shape.window};
    in.sink.assign(shape.sink_logits.begin(), shape.sink_logits.end());
    std::vector<Position> positions;
    for (Index r = 0; r < r_.rows; ++r)
      positions.push_back(heads_[0].next - 1 - (r_.rows_inside ? static_cast<Position>((r_.rows - 1 - r) * 5) : 0));
    in.positions.assign(positions.begin(), positions.end());
    std::vector<HeadPages> lists;
    for (const Head& head : heads_) {
      in.heads.push_back(head.tokens);
      lists.push_back({head.entries, nullptr, formats_, r_.page_tokens, states_});
    }
    const TensorBuffer<Be> q(be(), in.queries, r_.query_type),
        out(be(), oracle::Array3(r_.rows, shape.q_heads, r_.width), DType::f32);
    const Buffer<Be, float> lse(be(), r_.rows * shape.q_heads);
    std::vector<Buffer<Be, float>> mass;
    std::vector<float*> mass_rows;
    for (const HeadPages& list : lists) {
      mass.push_back(upload(be(), std::vector<float>(static_cast<std::size_t>(list.slots()), 0.5f)));
      mass_rows.push_back(mass.back().data());
    }
    const AttendSequence s{.heads = lists,
                           .queries = q.tensor(),
                           .positions = positions,
                           .out = out.writable(),
                           .lse = lse.data(),
                           .mass = r_.mass == MassKind::none ? std::span<float* const>{} : mass_rows};
    be().runtime().multiprocessors(1);  // so that tasks are of several pages
    be().attend(shape, std::span(&s, 1), r_.mass);

    const oracle::AttendResult wanted = oracle::attend(in);
    const oracle::Array3 got = out.download();
    int printed = 0;
    for (std::size_t i = 0; i < got.values.size() && printed < 4; ++i) {
      const auto near =
          close(got.values[i], wanted.out.values[i], {r_.attended.absolute * r_.value_size, r_.attended.relative});
      EXPECT_TRUE(near) << name << " row " << i / static_cast<std::size_t>(r_.width) << " channel "
                        << i % static_cast<std::size_t>(r_.width);
      printed += !near;
    }
    const std::vector<float> got_lse = download(be(), lse);
    for (std::size_t i = 0; i < got_lse.size() && printed < 8; ++i) {
      const auto near = close(static_cast<double>(got_lse[i]), wanted.lse.values[i], r_.logit);
      EXPECT_TRUE(near) << name << " lse " << i;
      printed += !near;
    }
    if (r_.mass == MassKind::none) return;
    using oracle::Fold;
    const Fold fold = r_.mass == MassKind::sum ? Fold::sum : r_.mass == MassKind::mean ? Fold::mean : Fold::max;
    const auto wanted_mass = oracle::attend_mass(in, fold, Fold::sum);
    for (std::size_t h = 0; h < heads_.size(); ++h) {
      const std::vector<float> of_head = download(be(), mass[h]);
      std::vector<double> all(of_head.size(), 0.5);
      for (std::size_t t = 0; t < heads_[h].slots.size(); ++t)
        all[heads_[h].slots[t].first * static_cast<std::size_t>(r_.page_tokens) +
            static_cast<std::size_t>(heads_[h].slots[t].second)] += wanted_mass[h][t];
      for (std::size_t slot = 0; slot < all.size(); ++slot)
        ASSERT_TRUE(close(static_cast<double>(of_head[slot]), all[slot], {1e-5, 2 * r_.logit.absolute}))
            << name << " mass of head " << h << " slot " << slot;
    }
  }

  static Be& be() { return SimtRig::backend(); }

 private:
  struct Head {
    std::vector<Entry> entries;
    oracle::CachedHead tokens;                         // live ones, as decoded
    std::vector<std::pair<std::size_t, Index>> slots;  // of these: entry, slot
    Position next = 0;
  };

  void set_codec(const CodecSide& c, const void*& codec, Index& row_bytes, DType& type, Index& tile_bytes) const {
    tile_bytes = c.tile_bytes;
    if (c.raw)
      row_bytes = r_.width * size_of(c.type), type = c.type;
    else
      codec = &coded;  // attend asks no more than whether there is one
  }
  /// Numbers that tell one channel from another.
  std::vector<float> state_of(const CodecSide& c, double size) {
    std::vector<float> state(static_cast<std::size_t>(c.state_floats));
    for (float& x : state)
      x = static_cast<float>(size) * (state.size() == 1 ? 0.01f : 0.02f + 0.02f * static_cast<float>(dice_.unit()));
    return state;
  }

  /// Tokens of one side of a page, coded: canonical bytes, then as the device has them. What lies in slots that are not
  /// live stays as it was where tokens are coded one by one.
  std::vector<std::vector<double>> fill(const CodecSide& c, const Entry& e, double size,
                                        const std::vector<float>& state, std::byte* to, bool bad) {
    const TileShape shape{r_.page_tokens, r_.width};
    const auto w = static_cast<std::size_t>(r_.width);
    std::vector<float> rows(static_cast<std::size_t>(r_.page_tokens) * w);
    for (float& x : rows) x = static_cast<float>(size * dice_.symmetric());
    const float* state_at = state.empty() ? nullptr : state.data();
    std::vector<std::byte> canonical(static_cast<std::size_t>(c.tile_bytes), std::byte{0xff});
    if (c.rows_move) {
      for_each_bit(e.live,
                   [&](Index t) { c.encode(shape, rows.data() + t * r_.width, t, 1, state_at, canonical.data()); });
    } else {
      c.encode(shape, rows.data(), 0, e.used, state_at, canonical.data());
    }
    std::vector<std::vector<double>> read(static_cast<std::size_t>(r_.page_tokens));
    std::vector<float> row(w);
    for_each_bit(e.live, [&](Index t) {
      c.decode(shape, canonical.data(), t, state_at, row.data());
      read[static_cast<std::size_t>(t)].assign(row.begin(), row.end());
    });
    if (c.lay != nullptr)
      c.lay(shape, canonical.data(), to);
    else
      std::memcpy(to, canonical.data(), canonical.size());
    if (c.raw && bad) {
      const Index slot = e.used - 4, channel = 3;
      write_element(std::numeric_limits<double>::quiet_NaN(), c.type,
                    to + (slot * r_.width + channel) * size_of(c.type));
      read[static_cast<std::size_t>(slot)][channel] = std::numeric_limits<double>::quiet_NaN();
    }
    return read;
  }
  static constexpr char coded = 0;
  Recipe r_;
  Dice dice_;
  std::vector<Head> heads_;
  std::vector<PageGeometry> formats_;
  std::vector<CodecState> states_;
  std::vector<Buffer<Be, std::byte>> pages_;
  std::vector<Buffer<Be, float>> state_memory_;
};

/// Queries and probabilities over codes are rounded to 11 bits; over raw rows they keep at least 16.
void expect_attends(Recipe r, const Form& form, Support wanted) {
  if (form.raw()) r.attended = tolerance(Operation::attended), r.logit = tolerance(Operation::logit);
  Scene s(r, 1);
  for (const Index pages : r.pages) s.add(pages, form, wanted);
  s.expect_attends(message(form.keys.name, "/", form.values.name, " width ", r.width, " page ", r.page_tokens,
                           " group ", r.group, " rows ", r.rows));
}

template <class K, class V = K, int width = 128, Support wanted = Support::fused>
void expect_fused(Recipe r) {
  r.width = width;
  expect_attends(r, form<K, V, width, wanted>(r.page_tokens), wanted);
}
template <class K, class V = K, int width = 128>
void expect_generic() {
  expect_fused<K, V, width, Support::generic>({});
}

template <int... widths, class F>
void for_widths(const F& f) {
  (f.template operator()<widths>(), ...);
}

using FormAt = Form (*)(Index page_tokens);
void expect_family_of(FormAt form, Index width) {
  const Recipe whole{.width = width, .pages = {14}};  // three pages to a task
  const Recipe some{.kv_heads = 2,
                    .group = 7,
                    .width = width,
                    .page_tokens = 32,
                    .pages = {3, 2},
                    .last_used = 21,
                    .dead = 0.4,
                    .rows = 3,
                    .rows_inside = true,
                    .window = 37,
                    .mass = MassKind::sum};
  for (const Recipe& r : {whole, some}) expect_attends(r, form(r.page_tokens), Support::fused);
}
/// What every family must do.
template <class K, class V = K, int width = 128>
void expect_family() {
  expect_family_of(&form<K, V, width, Support::fused>, width);
}

TEST(AttendTiles, RawRowsOfSixteenBits) {
  for_widths<64, 80, 96, 128, 256>([]<int width>() {
    for (const Index page_tokens : {16, 64}) {
      expect_fused<Raw<half>, Raw<half>, width>({.page_tokens = page_tokens, .last_used = 13});
      expect_fused<Raw<bfloat16>, Raw<bfloat16>, width>({.page_tokens = page_tokens, .last_used = 13});
    }
  });
  expect_family<Raw<half>>();
  expect_family<Raw<bfloat16>>();
  for (const DType type : {DType::f16, DType::bf16}) {
    expect_fused<Raw<half>>({.query_type = type});
    expect_fused<Raw<bfloat16>>({.query_type = type});
  }
}

// Keys and values know nothing of each other: a family of keys is tried with the values of the next, so that each way
// to load codes is there as keys and as values. A pair is compiled for the widths that it runs at: 128, or what its form
// needs, and others (Widths, and behind 128 in each test) where its codes are loaded in another way there.

TEST(AttendTiles, CodesWithAScalePerToken) {
  expect_family<Int8, Affine<4>>();
  expect_family<Affine<4>, Int8>();
  expect_family<Int4, Int2>();
  expect_family<Int2, Int1>();
  expect_family<Int1, Affine<8>>();
  expect_family<Affine<2>, KvTunerToken<4>>();
  using Floats = Group<GroupSpec{.bits = 4, .fit = Fit::min_max, .scale = ScaleType::f32}>;
  expect_family<Floats, Affine<2>>();
  expect_family<KvTunerToken<4>, Floats>();
}

TEST(AttendTiles, CodesInGroupsOfARow) {
  expect_family<Affine<4, 32>, Symmetric<4, 64>>();
  expect_family<Symmetric<8, 16>, Affine<8, 64>>();
  expect_family<Affine<2, 64>, Affine<4, 32>>();
  using Extreme = Group<GroupSpec{.bits = 4, .fit = Fit::extreme, .group = 32}>;
  expect_family<MikvGroup<4>, Extreme>();
  expect_family<Extreme, Symmetric<8, 16>>();
}

TEST(AttendTiles, ThreeBitsInTwoPlanes) {
  expect_family<Int3, Affine<3>>();
  expect_family<Affine<3>, Int3>();
  expect_family<Affine<3, 64>, Symmetric<3, 32>>();  // loads of one word; two groups in a load
  expect_family<Symmetric<3, 16>, Affine<3, 64>>();
  expect_family<KiviKeys<3, 32>, Affine<3, 32>>();
  expect_family<Int3, Affine<3>, 64>();
  expect_family<Int3, Affine<3>, 256>();
  expect_family<KiviKeys<3, 16>, Symmetric<3, 64>, 256>();
}

TEST(AttendTiles, GroupsSmallerThanALoadOfTheirLanes) {
  expect_family<Affine<2, 32>, Affine<1, 32>>();
  expect_family<Affine<1, 32>, Affine<2, 16>>();
  expect_family<Affine<2, 16>, Affine<2, 32>>();
  expect_family<NvFp4<>, Affine<4, 16>>();
  expect_family<Affine<4, 16>, NvFp4<>>();
}

TEST(AttendTiles, Widths) {
  for_widths<64, 80, 96, 256>([]<int width>() {
    expect_family<Int8, Affine<4>, width>();
    expect_family<Affine<4>, Int8, width>();
  });
  expect_family<Int4, Int2, 64>();
  expect_family<Int4, Int2, 256>();
  expect_family<Affine<4, 32>, Symmetric<4, 64>, 256>();
  expect_family<Symmetric<8, 16>, Affine<8, 64>, 64>();
  expect_family<Affine<8, 16>, Symmetric<8, 16>, 80>();
  expect_family<Fp8E4M3, Lloyd<4>, 80>();
  expect_family<Lloyd<4>, Fp8E5M2, 80>();
  expect_family<Affine<2, 16>, Affine<2, 32>, 256>();
}

TEST(AttendTiles, KeysWithAScalePerChannel) {
  expect_family<KiviKeys<4, 32>, Affine<4, 32>>();
  expect_family<KiviKeys<2, 32>, Affine<2, 32>>();
  expect_family<KiviKeys<8, 16>, Int8>();
  expect_family<KiviKeys<4, 0>, Raw<half>, 64>();
  expect_family<Group<GroupSpec{.bits = 4, .along = Along::tokens}>, Raw<bfloat16>>();
}

TEST(AttendTiles, SmallFloats) {
  expect_family<Fp8E4M3, Fp8E5M2>();
  expect_family<Fp8E5M2, MxFp4<>>();
  expect_family<MxFp4<>, Fp8E4M3>();
}

/// A table of one's own whose groups are smaller than what four lanes load at once: code 0 is no zero.
template <int bits>
struct Uneven : detail::GroupTiles<Uneven<bits>, GroupForm{.bits = bits, .table = true, .group = 16}> {
  static constexpr std::string_view name = "uneven";
  static constexpr auto levels = [] {
    std::array<float, std::size_t{1} << bits> all{};
    float x = -1;
    for (float& level : all) level = x, x += 2.1f / static_cast<float>(all.size());
    return all;
  }();
  static float scale_of(GroupBits b, const float* = nullptr) {
    return detail::half_to_float(static_cast<std::uint16_t>(b.scale));
  }
  static float zero_of(GroupBits, const float* = nullptr) { return 0; }
  static float level(std::uint8_t code) { return levels[code]; }
  static GroupBits quantize(const float* x, Index stride, Index n, const float*, std::uint8_t* codes, Index apart) {
    float most = 0;
    for (Index i = 0; i < n; ++i) most = std::max(most, std::abs(x[i * stride]));
    for (Index i = 0; i < n; ++i) {
      std::size_t best = 0;
      for (std::size_t c = 0; c < levels.size(); ++c)
        if (std::abs(levels[c] * most - x[i * stride]) < std::abs(levels[best] * most - x[i * stride])) best = c;
      codes[i * apart] = static_cast<std::uint8_t>(best);
    }
    return {detail::saturated_half(most), 0};
  }
};

TEST(AttendTiles, TablesOfLevels) {
  expect_family<Iq4Nl, Lloyd<4>>();
  expect_family<Lloyd<4, true>, Iq4Nl>();
  expect_family<Lloyd<3>, Lloyd<2>>();
  expect_family<Lloyd<2>, Lloyd<3, true>>();
  expect_family<Uneven<4>, Uneven<3>>();
  expect_family<Uneven<3>, Uneven<2>>();
  expect_family<Uneven<2>, Uneven<4>>();
  expect_family<TurboQuant<4>, TurboQuant<3>>();
  expect_family<TurboQuant<3>, TurboQuant<4>, 64>();
  expect_family<TurboQuant<3>, TurboQuant<4>, 256>();
  expect_family<Iq4Nl, Lloyd<4>, 96>();
}

TEST(AttendTiles, Ternary) {
  expect_family<Ternary<>, Ternary<TernaryFit::amax>>();
  expect_family<Ternary<TernaryFit::mean>, Int4>();
  expect_family<Rotated<Int4>, Rotated<Ternary<>>>();
}

TEST(AttendTiles, RawOnOneSide) {
  expect_family<Raw<half>, Int4>();
  expect_family<Raw<bfloat16>, Int8>();
}

TEST(AttendTiles, FoldedForms) {
  expect_family<Rotated<Int4>, ChannelAffine<Int8>>();
  expect_family<Rotated<Int8, 7>, Rotated<Affine<4, 32>, 3>, 96>();
  expect_family<Rotated<Int8, 7>, ChannelAffine<Int8>, 80>();
  expect_family<ChannelAffine<Int8>, Rotated<Int4>, 80>();
  expect_family<ZipVlKeys<8>, ZipVlValues<4>>();
  expect_family<Balanced<Rotated<Int8, 1>>, Rotated<ChannelScaled<Int8>>, 64>();
  expect_family<Rotated<KiviKeys<4, 32>>, Rotated<Int4>, 256>();
}

TEST(AttendTiles, GroupsOfQueryHeadsAndManyRows) {
  for (const Index group : {1, 2, 5, 8, 9, 16}) {
    expect_fused<Raw<half>, Raw<half>, 64>({.group = group, .page_tokens = 16, .mass = MassKind::mean});
    expect_fused<Int4, Int2, 64>({.group = group, .page_tokens = 16, .mass = MassKind::max});
  }
  expect_fused<Raw<half>, Raw<half>, 64>({.group = 2, .page_tokens = 16, .rows = 64, .rows_inside = true});
  expect_fused<Int8, Affine<4>, 64>(
      {.group = 3, .page_tokens = 32, .rows = 17, .rows_inside = true, .softcap = 3, .sinks = true});
}

TEST(AttendTiles, ABadNumberStaysWithTheRowsThatSeeIt) {
  // The last row stands at the last token, the others 5 before the next: the last alone sees what is 4 before the end.
  for (const bool in_key : {false, true})
    for (const Index group : {2, 3}) {
      const Recipe r{.group = group,
                     .page_tokens = 16,
                     .pages = {1},
                     .last_used = 16,
                     .rows = 3,
                     .rows_inside = true,
                     .bad_key = in_key,
                     .bad_value = !in_key};
      expect_fused<Raw<half>, Raw<half>, 64>(r);
      expect_fused<Raw<bfloat16>, Raw<bfloat16>, 64>(r);
    }
}

TEST(AttendTiles,
     LogitsThatGrow) {  // by more than an f16 holds, so that what was summed up is scaled down again and again
  const Recipe coded{.pages = {24}, .query_size = 8, .key_size = 4, .attended = {3e-2, 0}, .logit = {5e-2, 0}};
  expect_fused<Int8, Affine<4>>(coded);
  expect_fused<Affine<4, 32>, Symmetric<4, 64>>(coded);
  expect_fused<Raw<half>>({.pages = {24}, .query_size = 8, .key_size = 4});
  expect_fused<Raw<bfloat16>>({.pages = {24}, .query_type = DType::bf16, .query_size = 8, .key_size = 4});
}

TEST(AttendTiles, ScalesOfAnySize) {
  for (const double size : {1e-6, 1e-3, 1e3, 3e4}) {
    const double q = size > 1 ? 1 / size : 1;
    expect_fused<Int8, Affine<4>>({.query_size = q, .key_size = size, .value_size = size});
    expect_fused<Affine<4, 32>, Symmetric<4, 64>>({.query_size = q, .key_size = size, .value_size = size});
  }
  for (const double size : {1e-20, 1e-3, 1e3, 1e20}) {
    expect_fused<Raw<bfloat16>>({.query_size = 1 / size, .key_size = size, .value_size = size});
    expect_fused<Raw<half>>({.query_size = size < 1 ? size : 1});
  }
}

TEST(AttendTiles, SeveralFormsInOneList) {
  Recipe r{.kv_heads = 2,
           .group = 5,
           .width = 64,
           .page_tokens = 32,
           .last_used = 30,
           .dead = 0.2,
           .rows = 2,
           .rows_inside = true,
           .sinks = true,
           .mass = MassKind::sum};
  Scene s(r, 3);
  const auto add = [&]<class K, class V, Support wanted = Support::fused>(Index pages) {
    s.add(pages, form<K, V, 64, wanted>(r.page_tokens), wanted);
  };
  for (int again = 0; again < 2; ++again) {
    add.operator()<Raw<half>, Raw<half>>(2);
    add.operator()<Int4, Int2>(3);
    add.operator()<Int3, Int3>(1);
    add.operator()<Ternary<>, Ternary<>, Support::generic>(1);  // of 64 channels
    add.operator()<KiviKeys<4, 0>, Raw<half>>(2);
    add.operator()<Fp8E4M3, Fp8E5M2>(1);
    add.operator()<Int8, Affine<4>>(2);
  }
  s.expect_attends("several forms");
}

TEST(AttendTiles, EverythingElseIsDecoded) {
  expect_generic<Group<GroupSpec{.bits = 5}>>();
  expect_generic<Int3, Int3, 96>();
  expect_generic<KiviKeys<2, 8>, Int4>();
  expect_generic<TurboProduct<4>>();
  expect_generic<Ternary<>, Ternary<>, 64>();
  expect_generic<Ternary<TernaryFit::mean, Along::channels, 32>>();
  expect_generic<Ternary<TernaryFit::mean, Along::tokens, 32>>();
  expect_generic<Int8, Affine<4, 16>, 80>();
  expect_generic<Int2, Int2, 80>();
  expect_generic<Int2, Int1, 64>();
  expect_generic<Raw<float>>();
}

// Elsewhere kernels are taken for one width; a backend finds them for any.
TEST(AttendTiles, AHandleIsThatOfItsWidth) {
  using Work = Be::Work;
  const auto pair = [](Index tokens, Index key_dim, Index value_dim) {
    return Scene::be().pair<Pair<Int8, Affine<4>>>({tokens, key_dim}, {tokens, value_dim});
  };
  const void* decoded = &cuda::detail::generic_pair<Work, Pair<Int8, Affine<4>>>;
  for (const Index tokens : {16, 32, 64}) {
    for_widths<64, 80, 96, 128, 256>([&]<int width>() {
      const void* fused = cuda::detail::fused_ops<Work, Int8, Affine<4>, width>(tokens);
      EXPECT_NE(fused, nullptr) << width;
      EXPECT_EQ(pair(tokens, width, width), fused) << width;
    });
    EXPECT_EQ(pair(tokens, 48, 48), decoded);
    EXPECT_EQ(pair(tokens, 128, 64), decoded);
  }
  EXPECT_EQ(pair(8, 128, 128), decoded);
  const void* raw = Scene::be().pair<Pair<Raw<half>, Raw<half>>>({16, 64}, {16, 64});
  EXPECT_EQ(raw, nullptr);
}

TEST(AttendTiles, PagesPerTask) {
  using cuda::detail::pages_per_task;
  using cuda::detail::Stretch;
  const cuda::AttendTuning tuning;
  const auto size = [&](std::vector<Stretch> s, Index blocks) { return pages_per_task(s, blocks, 64, tuning); };
  EXPECT_EQ(size({}, 528), 1);
  EXPECT_EQ(size({{1, 1}}, 528), 1);
  // Eight lists of 512 pages on 528 places: one wave of tasks as long as that allows.
  const std::vector<Stretch> few(8, {512, 1});
  EXPECT_GE(size(few, 528), 8);
  EXPECT_LE(size(few, 528), 10);
  // More lists than places, all alike: whole lists.
  EXPECT_GE(size(std::vector<Stretch>(4096, {32, 1}), 528), 26);
  // A long one among short ones is cut, however many there are.
  std::vector<Stretch> uneven(63 * 8, {32, 1});
  uneven.insert(uneven.end(), 8, {2048, 1});
  EXPECT_LE(size(uneven, 528), 64);
  for (const Index blocks : {1, 4, 528})
    for (const Index pages : {1, 7, 64, 1000}) {
      const Index s = size({{pages, 3}}, blocks);
      EXPECT_TRUE(s >= 1 && s <= 64);
    }
}

}  // namespace
}  // namespace kvpare::test
