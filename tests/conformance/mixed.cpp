// The verbs over lists of several forms, on every backend: coded rows read as their codecs say, canonical bytes say the same,
// and attention, its mass and statistics are those of the rows that are read. What nobody may read is NaN, or any bytes.
#include <gtest/gtest.h>

#include <kvpare/codec/folded.hpp>
#include <kvpare/codec/group.hpp>
#include <kvpare/codec/rotation.hpp>
#include <kvpare/pipeline/kv_cache.hpp>

#include "oracle/attend.hpp"
#include "oracle/attention_mass.hpp"
#include "oracle/statistics.hpp"
#include "support/inputs.hpp"
#include "support/tolerance.hpp"

namespace kvpare::test {
namespace {

/// A codec from outside the library, which no backend can know: sixteen levels a number, a byte each.
struct Steps {
  static constexpr std::string_view name = "steps";
  static constexpr bool rows_move = true;
  static constexpr bool fits(TileShape) { return true; }
  static constexpr Index tile_bytes(TileShape s) { return s.tokens * s.width; }
  KVPARE_HD static void encode(TileShape s, const float* rows, Index first, Index count, const float*, std::byte* tile) {
    for (Index i = 0; i < count * s.width; ++i)
      tile[first * s.width + i] =
          static_cast<std::byte>(rows[i] == rows[i] ? std::lround(std::clamp(rows[i], -1.0f, 1.0f) * 8) + 8 : 255);
  }
  KVPARE_HD static void decode(TileShape s, const std::byte* tile, Index slot, const float*, float* row) {
    for (Index c = 0; c < s.width; ++c) {
      const int code = static_cast<int>(tile[slot * s.width + c]);
      row[c] = code == 255 ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(code - 8) / 8;
    }
  }
};

enum : int { raw, int8, kivi, kivi_keys, steps, rotated, scaled };
using Half = Raw<half>;
using Listed =
    Formats<Pair<Half, Half>, Pair<Int8, Int8>, Pair<KiviKeys<4, 16>, KiviValues<4, 16>>, Pair<KiviKeys<4, 16>, Half>,
            Pair<Steps, Steps>, Pair<Rotated<Int8>, Rotated<Int4>>, Pair<ChannelAffine<Fixed<8>>, ChannelScaled<Int8>>>;

struct Case {
  std::string name;
  Index kv_heads = 2, group = 4, key_dim = 64, value_dim = 64, page_tokens = 16, tokens = 150;
  Index rows = 1;
  Index window = 0;
  float softcap = 0;
  bool sinks = false;
  MassKind mass = MassKind::none;
};

std::vector<Case> cases() {
  std::vector<Case> all{{.name = "plain"},
                        {.name = "single head", .group = 1, .page_tokens = 32, .mass = MassKind::sum},
                        {.name = "five to a head",
                         .group = 5,
                         .key_dim = 32,
                         .value_dim = 64,
                         .page_tokens = 64,
                         .tokens = 280,
                         .rows = 3,
                         .mass = MassKind::mean},
                        {.name = "seven to a head",
                         .kv_heads = 1,
                         .group = 7,
                         .key_dim = 64,
                         .value_dim = 32,
                         .rows = 2,
                         .softcap = 3,
                         .mass = MassKind::max},
                        {.name = "window", .page_tokens = 32, .rows = 5, .window = 40, .mass = MassKind::sum},
                        {.name = "sinks", .rows = 2, .sinks = true},
                        {.name = "64 rows", .kv_heads = 1, .group = 2, .rows = 64, .mass = MassKind::mean},
                        {.name = "window, softcap and sinks",
                         .group = 1,
                         .key_dim = 128,
                         .value_dim = 32,
                         .rows = 17,
                         .window = 25,
                         .softcap = 5,
                         .sinks = true},
                        {.name = "many pages",
                         .kv_heads = 1,
                         .group = 4,
                         .key_dim = 32,
                         .value_dim = 32,
                         .tokens = 2500,
                         .mass = MassKind::sum}};
  return all;
}

/// A sequence whose tokens took their forms in turn, interleaved, and of which some were evicted.
template <class B>
struct Scene {
  using Cache = KvCache<B, Listed>;
  B& be;
  Case c;
  Dice dice;
  LayerShape shape = shape_of(c);
  Index pool_bytes = Index{4} << 20;
  Buffer<B, std::byte> memory = garbage(be, pool_bytes);
  Cache cache{
      be, Model{{shape}}, {.page_tokens = c.page_tokens, .pool_bytes = pool_bytes, .pool_memory = memory.data()}};
  SequenceId id = cache.create();
  oracle::Array3 keys, values;                            // as given
  std::vector<oracle::CachedHead> heads;                  // as read, in list order
  std::vector<std::vector<std::pair<int, Index>>> forms;  // of these: format, slot

  static LayerShape shape_of(const Case& c) {
    LayerShape s{.q_heads = c.kv_heads * c.group,
                 .kv_heads = c.kv_heads,
                 .key_dim = c.key_dim,
                 .value_dim = c.value_dim,
                 .scale = static_cast<float>(1 / std::sqrt(static_cast<double>(c.key_dim))),
                 .window = c.window};
    s.softcap = c.softcap;
    for (Index h = 0; c.sinks && h < s.q_heads; ++h) s.sink_logits.push_back(0.25f * static_cast<float>(h) - 0.5f);
    return s;
  }
  static Buffer<B, std::byte> garbage(B& be, Index bytes) {
    return Buffer<B, std::byte>(
        be, std::span<const std::byte>(std::vector<std::byte>(static_cast<std::size_t>(bytes), std::byte{0xff})));
  }
  /// NaN in all they hold: evicted before anyone looks.
  static bool is_garbage(Index position) { return position % 13 == 6; }
  /// The form of a token; whole stretches go into tiles, the rest interleaves.
  int form_of(Index p) const {
    if (p / c.page_tokens % 4 == 1) return kivi;
    if (p / c.page_tokens % 4 == 3) return kivi_keys;
    constexpr int turns[] = {raw, int8, steps, rotated, scaled, int8, raw};
    return turns[p % 7];
  }

  Scene(B& backend, const Case& wanted, std::uint64_t seed) : be(backend), c(wanted), dice{seed} {
    keys = random_array(dice, c.tokens, c.kv_heads, c.key_dim, DType::f16);
    values = random_array(dice, c.tokens, c.kv_heads, c.value_dim, DType::f16);
    const double nan = std::numeric_limits<double>::quiet_NaN();
    for (Index p = 0; p < c.tokens; ++p) {
      if (!is_garbage(p) || form_of(p) == scaled)
        continue;  // the ranges of a state leave NaN out, but not what is coded with it
      if (form_of(p) == kivi || form_of(p) == kivi_keys) {
        for (Index h = 0; h < c.kv_heads; ++h)  // keys share scales over tokens
          for (Index w = 0; w < c.value_dim; ++w) values.at(p, h, w) = nan;
        continue;
      }
      for (Index h = 0; h < c.kv_heads; ++h) {
        for (Index w = 0; w < c.key_dim; ++w) keys.at(p, h, w) = nan;
        for (Index w = 0; w < c.value_dim; ++w) values.at(p, h, w) = nan;
      }
    }
    std::vector<Position> positions(static_cast<std::size_t>(c.tokens));
    std::iota(positions.begin(), positions.end(), 0);
    EXPECT_EQ(cache.append(id, 0, TensorBuffer<B>(be, keys, DType::f16).tensor(),
                           TensorBuffer<B>(be, values, DType::f16).tensor(), positions),
              Outcome::done);
    take_forms();
    evict();
    read();
  }

  void take_forms() {
    // In lots, the later half first, so that positions of one form interleave as well.
    for (const bool later : {true, false}) {
      Plan plan = empty();
      for (int format = 1; format < Listed::count; ++format) {
        Tier tier{.format = format, .tokens = {}, .fresh_state = true};  // ranges of each lot's own
        for (const HeadPages& list : cache.pages(id, 0)) {
          Selection& s = tier.tokens.emplace_back(static_cast<Index>(list.entries.size()));
          for (std::size_t e = 0; e < list.entries.size(); ++e)
            for_each_bit(list.entries[e].live, [&](Index slot) {
              const Index p = list.position(list.entries[e], slot);
              const bool tile = form_of(p) == kivi || form_of(p) == kivi_keys;
              if (form_of(p) == format && list.entries[e].format == raw && (tile ? later : (p % 2 == 0) == later))
                s.insert(static_cast<Index>(e), slot);
            });
        }
        plan.layers[0].tiers.push_back(std::move(tier));
      }
      (void)cache.commit(plan);
    }
  }
  void evict() {
    Plan plan = empty();
    plan.layers[0].touched = true;
    for (const HeadPages& list : cache.pages(id, 0)) {
      const Index head = std::ssize(plan.layers[0].keep);
      Selection& keep = plan.layers[0].keep.emplace_back(static_cast<Index>(list.entries.size()));
      for (std::size_t e = 0; e < list.entries.size(); ++e)
        for_each_bit(list.entries[e].live, [&](Index slot) {
          const Index p = list.position(list.entries[e], slot);
          if (!is_garbage(p) && (p + head) % 29 != 3) keep.insert(static_cast<Index>(e), slot);
        });
    }
    (void)cache.commit(plan);
  }
  Plan empty() const {
    Plan plan;
    plan.sequence = id, plan.epoch = cache.epoch(id);
    plan.layers.resize(1);
    return plan;
  }
  void read() {
    for (const HeadPages& list : cache.pages(id, 0)) {
      const Index n = list.live_tokens();
      const Buffer<B, float> k(be, n * c.key_dim), v(be, n * c.value_dim);
      const GatherRow rows[] = {{list, Side::keys, nullptr, c.key_dim, k.data()},
                                {list, Side::values, nullptr, c.value_dim, v.data()}};
      be.gather(rows);
      const std::vector<float> key = download(be, k), value = download(be, v);
      oracle::CachedHead& head = heads.emplace_back();
      auto& of_head = forms.emplace_back();
      for (std::size_t e = 0; e < list.entries.size(); ++e)
        for_each_bit(list.entries[e].live, [&](Index slot) {
          const auto at = static_cast<std::ptrdiff_t>(head.size());
          head.push_back({list.position(list.entries[e], slot),
                          {key.begin() + at * c.key_dim, key.begin() + (at + 1) * c.key_dim},
                          {value.begin() + at * c.value_dim, value.begin() + (at + 1) * c.value_dim}});
          of_head.emplace_back(list.entries[e].format, static_cast<Index>(e) * c.page_tokens + slot);
        });
    }
  }
};

template <class Rig>
class Mixed : public OnRig<Rig> {};
TYPED_TEST_SUITE(Mixed, AllRigs, RigNames);

/// Backends take queries and probabilities as integers over codes: at most 2 % of the codec's own error.
constexpr double attended = 4e-3, logit = 8e-3;

// Bodies are templates of the backend, not of the rig: compiled twice, run seven times.

template <class Be>
void reads_as_coded(Be& be) {
  for (const Case& c : cases()) {
    Scene<Be> s(be, c, 3);
    std::map<int, Index> count;
    bool interleaved = false;
    for (std::size_t h = 0; h < s.heads.size(); ++h)
      for (std::size_t t = 0; t < s.heads[h].size(); ++t) {
        const oracle::CachedToken& token = s.heads[h][t];
        const int format = s.forms[h][t].first;
        ++count[format];
        interleaved = interleaved || (t > 0 && token.position < s.heads[h][t - 1].position);
        // 8 bits: half of 1/127; 4 bits of [-1, 1] in 15 steps; 16 steps; rotated 4 bits spread over the head.
        const double key_bound[] = {0, 0.0042, 0.068, 0.068, 0.0626, 0.02, 0.006},
                     value_bound[] = {0, 0.0042, 0.068, 0, 0.0626, 0.45, 0.006};
        for (Index w = 0; w < c.key_dim; ++w)
          ASSERT_NEAR(oracle::item(token.key, w), s.keys.at(token.position, static_cast<Index>(h), w),
                      key_bound[format])
              << c.name << " format " << format << " position " << token.position;
        for (Index w = 0; w < c.value_dim; ++w)
          ASSERT_NEAR(oracle::item(token.value, w), s.values.at(token.position, static_cast<Index>(h), w),
                      value_bound[format])
              << c.name << " format " << format << " position " << token.position;
      }
    for (int format = 0; format < Listed::count; ++format)
      EXPECT_GT(count[format], 0) << c.name << " format " << format;
    EXPECT_TRUE(interleaved);
  }
}
TYPED_TEST(Mixed, EveryTokenReadsAsItsCodecSays) { reads_as_coded(this->be()); }

/// Tiles as canonical bytes decode, in plain code, to what `gather` reads; and back into another page they read the same.
template <class Be>
void canonical_bytes(Be& be) {
  for (const Case& c : {cases()[0], cases()[2], cases()[3]}) {
    Scene<Be> s(be, c, 5);
    const auto lists = s.cache.pages(s.id, 0);
    for (std::size_t h = 0; h < lists.size(); ++h)
      for (const Side side : {Side::keys, Side::values}) {
        const Index width = side == Side::keys ? c.key_dim : c.value_dim;
        for (std::size_t e = 0; e < lists[h].entries.size(); ++e) {
          const Entry& entry = lists[h].entries[e];
          const PageGeometry& g = lists[h].formats[entry.format];
          if ((side == Side::keys ? g.key_codec : g.value_codec) == nullptr) continue;
          const Index bytes = side == Side::keys ? g.key_tile_bytes : g.value_tile_bytes;
          const Buffer<Be, std::byte> canonical(s.be, round_up(bytes, 64));
          const RepackTile tile{&g, side, entry.page, width, c.page_tokens, canonical.data()};
          s.be.repack(std::span(&tile, 1), RepackTo::canonical);
          const std::vector<std::byte> there = download(s.be, canonical);
          std::vector<float> state_memory;
          const CodecState codec_state = lists[h].state_of(entry);
          const float* state = side == Side::keys ? codec_state.keys : codec_state.values;
          Listed::for_each([&]<class P>(int format, P) {
            if (format != entry.format) return;
            const auto check = [&]<Codec C>(C*) {
              if (state != nullptr) {
                state_memory.resize(static_cast<std::size_t>(state_floats<C>(width)));
                s.be.wait(s.be.to_host(state_memory.data(), state, std::ssize(state_memory) * 4));
              }
              std::vector<float> row(static_cast<std::size_t>(width));
              for (std::size_t t = 0; t < s.heads[h].size(); ++t) {
                const Index slot = s.forms[h][t].second - static_cast<Index>(e) * c.page_tokens;
                if (slot < 0 || slot >= c.page_tokens) continue;
                C::decode({c.page_tokens, width}, there.data(), slot,
                          state_memory.empty() ? nullptr : state_memory.data(), row.data());
                const auto& read = side == Side::keys ? s.heads[h][t].key : s.heads[h][t].value;
                for (Index w = 0; w < width; ++w)
                  ASSERT_NEAR(row[static_cast<std::size_t>(w)], oracle::item(read, w), 2e-6)
                      << C::name << " slot " << slot;
              }
            };
            if (side == Side::keys)
              check(static_cast<typename P::Key*>(nullptr));
            else
              check(static_cast<typename P::Value*>(nullptr));
          });
          s.be.repack(std::span(&tile, 1), RepackTo::page);
          const Buffer<Be, std::byte> again(s.be, round_up(bytes, 64));
          const RepackTile back{&g, side, entry.page, width, c.page_tokens, again.data()};
          s.be.repack(std::span(&back, 1), RepackTo::canonical);
          const std::vector<std::byte> second = download(s.be, again);
          ASSERT_TRUE(std::equal(there.begin(), there.begin() + bytes, second.begin()))
              << c.name << " format " << entry.format;
        }
      }
  }
}
TYPED_TEST(Mixed, CanonicalBytesSayWhatIsRead) { canonical_bytes(this->be()); }

template <class Be>
void attends(Be& be) {
  for (const Case& c : cases()) {
    Scene<Be> s(be, c, 7);
    oracle::AttendInput in;
    in.queries = random_array(s.dice, c.rows, s.shape.q_heads, c.key_dim, DType::f32, 2);
    for (Index r = 0; r < c.rows; ++r) in.positions.push_back(r == 0 ? c.tokens - 1 : s.dice.within(-1, c.tokens + 2));
    in.heads = s.heads, in.value_width = c.value_dim;
    in.how = {.scale = static_cast<double>(s.shape.scale), .softcap = c.softcap, .window = c.window};
    in.sink.assign(s.shape.sink_logits.begin(), s.shape.sink_logits.end());
    const TensorBuffer<Be> q(s.be, in.queries, DType::f32),
        out(s.be, oracle::Array3(c.rows, s.shape.q_heads, c.value_dim), DType::f32);
    const Buffer<Be, float> lse(s.be, c.rows * s.shape.q_heads);
    const std::vector<Position> positions(in.positions.begin(), in.positions.end());
    std::vector<Buffer<Be, float>> mass;
    std::vector<float*> mass_rows;
    const auto lists = s.cache.pages(s.id, 0);
    for (const HeadPages& list : lists) {
      if (c.mass == MassKind::none) break;
      mass.emplace_back(s.be, std::span<const float>(std::vector<float>(static_cast<std::size_t>(list.slots()), 0.0f)));
      mass_rows.push_back(mass.back().data());
    }
    s.cache.attend(0,
                   {{.sequence = s.id,
                     .queries = q.tensor(),
                     .positions = positions,
                     .out = out.writable(),
                     .lse = lse.data(),
                     .mass = mass_rows}},
                   c.mass);
    const oracle::AttendResult wanted = oracle::attend(in);
    const oracle::Array3 got = out.download();
    for (std::size_t i = 0; i < got.values.size(); ++i)
      ASSERT_TRUE(close(got.values[i], wanted.out.values[i], {attended, 0})) << c.name << " out " << i;
    const std::vector<float> got_lse = download(s.be, lse);
    for (std::size_t i = 0; i < got_lse.size(); ++i)
      ASSERT_TRUE(close(got_lse[i], wanted.lse.values[i], {logit, 0})) << c.name << " lse " << i;
    if (c.mass == MassKind::none) continue;
    using oracle::Fold;
    const Fold fold = c.mass == MassKind::sum ? Fold::sum : c.mass == MassKind::mean ? Fold::mean : Fold::max;
    const auto wanted_mass = oracle::attend_mass(in, fold, Fold::sum);
    for (std::size_t h = 0; h < lists.size(); ++h) {
      const std::vector<float> of_head = download(s.be, mass[h]);
      std::vector<bool> live(of_head.size());
      for (std::size_t t = 0; t < s.heads[h].size(); ++t) {
        const auto slot = static_cast<std::size_t>(s.forms[h][t].second);
        live[slot] = true;
        ASSERT_TRUE(close(of_head[slot], wanted_mass[h][t], {1e-5, 2 * logit}))
            << c.name << " mass of head " << h << " slot " << slot;
      }
      for (std::size_t slot = 0; slot < live.size(); ++slot)
        ASSERT_TRUE(live[slot] || of_head[slot] == 0) << c.name << ": a dead slot has mass";
    }
  }
}
TYPED_TEST(Mixed, AttendsToWhatIsRead) { attends(this->be()); }

template <class Be>
void attention_mass(Be& be) {
  for (const Case& c : cases()) {
    if (c.sinks) continue;  // sinks are `extra` there
    Scene<Be> s(be, c, 9);
    const Index rows = std::min<Index>(c.rows + 4, 20);
    oracle::AttentionMassInput in;
    in.queries = random_array(s.dice, rows, s.shape.q_heads, c.key_dim, DType::f32, 2);
    for (Index r = 0; r < rows; ++r) in.row_positions.push_back(s.dice.within(c.tokens / 2, c.tokens + 1));
    in.keys = oracle::Array3(c.tokens, c.kv_heads, c.key_dim);
    for (Index p = 0; p < c.tokens; ++p) in.key_positions.push_back(p);
    const auto lists = s.cache.pages(s.id, 0);
    std::vector<Buffer<Be, std::int32_t>> maps;
    std::vector<const std::int32_t*> column_of;
    for (std::size_t h = 0; h < s.heads.size(); ++h) {
      std::vector<bool> live(static_cast<std::size_t>(c.tokens));
      std::vector<std::int32_t> map(static_cast<std::size_t>(lists[h].slots()), 0);
      for (std::size_t t = 0; t < s.heads[h].size(); ++t) {
        const oracle::CachedToken& token = s.heads[h][t];
        live[static_cast<std::size_t>(token.position)] = true;
        map[static_cast<std::size_t>(s.forms[h][t].second)] = static_cast<std::int32_t>(token.position);
        for (Index w = 0; w < c.key_dim; ++w)
          in.keys.at(token.position, static_cast<Index>(h), w) = oracle::item(token.key, w);
      }
      in.key_mask.push_back(live);
      column_of.push_back(maps.emplace_back(s.be, std::span<const std::int32_t>(map)).data());
    }
    in.how = {.scale = static_cast<double>(s.shape.scale), .softcap = c.softcap, .window = c.window};
    in.heads = oracle::Heads::kv_mean;
    const oracle::AttentionMass wanted = oracle::attention_mass(in);

    const TensorBuffer<Be> q(s.be, in.queries, DType::f32);
    const Buffer<Be, Position> positions(
        s.be, std::span<const Position>(std::vector<Position>(in.row_positions.begin(), in.row_positions.end())));
    const Buffer<Be, float> out(
        s.be, std::span<const float>(std::vector<float>(static_cast<std::size_t>(c.kv_heads * c.tokens), 0.0f)));
    const Buffer<Be, float> lse(s.be, rows * s.shape.q_heads);
    MassArguments<> a;
    a.shape = &s.shape, a.keys = lists, a.column_of = column_of, a.columns = c.tokens;
    a.queries = q.tensor(), a.row_positions = positions.data();
    a.out = out.data(), a.row_lse = lse.data();
    s.be.attention_mass(a);
    const std::vector<float> got = download(s.be, out), got_lse = download(s.be, lse);
    for (Index h = 0; h < c.kv_heads; ++h)
      for (Index p = 0; p < c.tokens; ++p)
        ASSERT_TRUE(close(got[static_cast<std::size_t>(h * c.tokens + p)], wanted.out.at(0, h, p), {1e-5, 2 * logit}))
            << c.name << " head " << h << " position " << p;
    for (std::size_t i = 0; i < got_lse.size(); ++i)
      ASSERT_TRUE(close(got_lse[i], wanted.lse.values[i], {logit, 0})) << c.name << " lse " << i;
  }
}
TYPED_TEST(Mixed, AttentionMassIsThatOfWhatIsRead) { attention_mass(this->be()); }

template <class Be>
void statistics(Be& be) {
  for (const Case& c : {cases()[0], cases()[2]}) {
    Scene<Be> s(be, c, 11);
    const auto lists = s.cache.pages(s.id, 0);
    for (std::size_t h = 0; h < lists.size(); ++h)
      for (const Side side : {Side::keys, Side::values})
        for (const bool per_slot : {false, true}) {
          const Index width = side == Side::keys ? c.key_dim : c.value_dim, n = per_slot ? lists[h].slots() : width;
          const Buffer<Be, float> least(s.be, n), most(s.be, n), sum(s.be, n), squares(s.be, n);
          StatisticsRow row;
          row.pages = lists[h], row.side = side, row.width = width, row.per_slot = per_slot;
          row.min = least.data(), row.max = most.data(), row.sum = sum.data(), row.sum_squares = squares.data();
          s.be.statistics(std::span(&row, 1));
          const std::vector<float> got[] = {download(s.be, least), download(s.be, most), download(s.be, sum),
                                            download(s.be, squares)};
          const auto at = [&](std::size_t t, Index w) {
            return oracle::item(side == Side::keys ? s.heads[h][t].key : s.heads[h][t].value, w);
          };
          const auto expect = [&](Index i, double lo, double hi, double total, double square) {
            const auto u = static_cast<std::size_t>(i);
            ASSERT_EQ(got[0][u], static_cast<float>(lo));
            ASSERT_EQ(got[1][u], static_cast<float>(hi));
            ASSERT_NEAR(got[2][u], total, 1e-3);
            ASSERT_NEAR(got[3][u], square, 1e-3);
          };
          if (per_slot)
            for (std::size_t t = 0; t < s.heads[h].size(); ++t) {
              double lo = 1e9, hi = -1e9, total = 0, square = 0;
              for (Index w = 0; w < width; ++w)
                lo = std::min(lo, at(t, w)), hi = std::max(hi, at(t, w)), total += at(t, w),
                square += at(t, w) * at(t, w);
              expect(s.forms[h][t].second, lo, hi, total, square);
            }
          else
            for (Index w = 0; w < width; ++w) {
              double lo = 1e9, hi = -1e9, total = 0, square = 0;
              for (std::size_t t = 0; t < s.heads[h].size(); ++t)
                lo = std::min(lo, at(t, w)), hi = std::max(hi, at(t, w)), total += at(t, w),
                square += at(t, w) * at(t, w);
              expect(w, lo, hi, total, square);
            }
        }
  }
}
TYPED_TEST(Mixed, StatisticsAreThoseOfWhatIsRead) { statistics(this->be()); }

/// Rows that move keep their bytes, wherever they go: what is read after packing is what was read before, to the last bit.
template <class Be>
void packs(Be& be) {
  for (const Case& c : {cases()[0], cases()[1], cases()[2]}) {
    Scene<Be> s(be, c, 13);
    std::vector<std::map<Index, oracle::CachedToken>> before;
    for (const oracle::CachedHead& head : s.heads)
      for (auto& of_head = before.emplace_back(); const oracle::CachedToken& t : head) of_head[t.position] = t;
    Plan plan = s.empty();
    plan.dense = true;
    plan.layers[0].touched = true;
    for (const HeadPages& list : s.cache.pages(s.id, 0)) {
      Selection& keep = plan.layers[0].keep.emplace_back(static_cast<Index>(list.entries.size()));
      for (std::size_t e = 0; e < list.entries.size(); ++e)
        for_each_bit(list.entries[e].live, [&](Index slot) {
          if (list.position(list.entries[e], slot) % 3 != 1) keep.insert(static_cast<Index>(e), slot);
        });
    }
    EXPECT_GT(s.cache.commit(plan).rows_moved, 0);
    s.heads.clear(), s.forms.clear();
    s.read();
    for (std::size_t h = 0; h < s.heads.size(); ++h)
      for (const oracle::CachedToken& t : s.heads[h]) {
        ASSERT_EQ(t.key, before[h].at(t.position).key) << c.name;
        ASSERT_EQ(t.value, before[h].at(t.position).value) << c.name;
      }
  }
}
TYPED_TEST(Mixed, PackingCodedRowsChangesNoBit) { packs(this->be()); }

}  // namespace
}  // namespace kvpare::test
