// What codecs are told beside rows: positions and attention of tokens, at whatever moment they change their form and
// however they move, and what their states are made of. The codecs here write down what they hear.
#include <gtest/gtest.h>

#include <cstring>
#include <kvpare/kvpare.hpp>
#include <map>
#include <memory>
#include <set>
#include <sstream>

#include "oracle/attend.hpp"
#include "support/prompt_cases.hpp"

namespace kvpare::test {
namespace {

/// Keeps of every token its position and attention, as told, and its first channel; a row back says these and the
/// position told then. `moves`: rows one by one, or whole pages.
template <bool moves>
struct Recorder {
  enum : Index { position, attention, first_channel, position_read, floats = 3 };
  static constexpr float nobody_knows = -1, unknown = -2;  // no attention at all; none of this token

  static constexpr std::string_view name = moves ? "recorder" : "page_recorder";
  static constexpr bool rows_move = moves, reads_facts = true, reads_positions = true;
  static constexpr bool fits(TileShape s) { return s.width >= 4; }
  static constexpr Index tile_bytes(TileShape s) { return s.tokens * floats * 4; }
  static void encode(TileShape s, const float* rows, Index first, Index count, const TokenFacts& facts, const float*,
                     std::byte* tile) {
    for (Index r = 0; r < (moves ? count : s.tokens); ++r) {
      float told[floats] = {};
      if (r < count) {
        told[position] = facts.positions == nullptr ? nobody_knows : static_cast<float>(facts.positions[r]);
        told[attention] = facts.attention == nullptr ? nobody_knows : facts.attention[r];
        if (std::isnan(told[attention])) told[attention] = unknown;
        told[first_channel] = rows[r * s.width];
      }
      std::memcpy(tile + (first + r) * floats * 4, told, sizeof told);
    }
  }
  static void decode(TileShape s, const std::byte* tile, Index slot, Position at, const float*, float* row) {
    std::memcpy(row, tile + slot * floats * 4, floats * 4);
    row[position_read] = static_cast<float>(at);
    std::fill(row + position_read + 1, row + s.width, 0.0f);
  }
};

/// Rows as they are; its state is what it was measured by. `all`: of all tokens of the head.
template <bool all>
struct Witness {
  enum : Index {
    tokens,
    query_vectors,
    rope_pairs,
    rope_second,
    numbers,
    first_number,
    second_number,
    row_sum,
    position_sum,
    ascends,
    peak,
    count
  };
  enum : Index { min, max, sum_squares, layer_min, layer_max, query_squares, of_channels };

  static constexpr std::string_view name = all ? "witness_of_all" : "witness";
  static constexpr bool rows_move = true, needs_query_peak = true, needs_query_window = true, needs_rope = true,
                        state_reads_rows = true, ranges_of_all = all;
  static constexpr bool fits(TileShape) { return true; }
  static constexpr Index tile_bytes(TileShape s) { return s.tokens * s.width * 4; }
  static constexpr Index state_floats(Index width) { return count + of_channels * width; }
  static void make_state(Index width, const Measured& m, float* state) {
    state[tokens] = static_cast<float>(m.tokens), state[query_vectors] = static_cast<float>(m.query_vectors);
    state[rope_pairs] = static_cast<float>(m.rope.pairs);
    state[rope_second] = m.rope.pairs > 1 ? static_cast<float>(m.rope.inverse_frequencies[1]) : 0.0f;
    state[numbers] = static_cast<float>(m.number_count);
    state[first_number] = m.number_count > 0 ? m.numbers[0] : 0.0f;
    state[second_number] = m.number_count > 1 ? m.numbers[1] : 0.0f;
    double rows = 0, positions = 0;
    bool in_order = true;
    for (Index t = 0; t < m.tokens; ++t) {
      rows += static_cast<double>(m.rows[t * width + 1]) * (1 + m.positions[t]), positions += m.positions[t];
      in_order = in_order && (t == 0 || m.positions[t] > m.positions[t - 1]);
    }
    state[row_sum] = static_cast<float>(rows), state[position_sum] = static_cast<float>(positions);
    state[ascends] = in_order ? 1.0f : 0.0f;
    state[peak] = m.query_peak == nullptr ? -1.0f : m.query_peak[width - 1];
    const float* of_channel[of_channels] = {m.min, m.max, m.sum_squares, m.layer_min, m.layer_max, m.query_squares};
    for (Index what = 0; what < of_channels; ++what)
      for (Index c = 0; c < width; ++c)
        state[count + what * width + c] = of_channel[what] == nullptr ? -1.0f : of_channel[what][c];
  }
  static void encode(TileShape s, const float* rows, Index first, Index n, const float*, std::byte* tile) {
    std::memcpy(tile + first * s.width * 4, rows, static_cast<std::size_t>(n * s.width * 4));
  }
  static void decode(TileShape s, const std::byte* tile, Index slot, const float*, float* row) {
    std::memcpy(row, tile + slot * s.width * 4, static_cast<std::size_t>(s.width * 4));
  }
};
static_assert(Codec<Recorder<true>> && Codec<Recorder<false>> && Codec<Witness<true>> && MakesState<Witness<false>>);

using Told = Recorder<true>;
using Floats = Raw<float>;
enum : int { raw, recorder, page_recorder, witness, witness_of_all };
using Listed =
    Formats<Pair<Floats, Floats>, Pair<Recorder<true>, Recorder<true>>, Pair<Recorder<false>, Recorder<false>>,
            Pair<Witness<false>, Witness<false>>, Pair<Witness<true>, Witness<true>>>;

/// A prompt in a cache whose formats write down what they are told.
template <class B>
struct Facts : ::testing::Test {
  static constexpr Index layers = 2, heads = 2, group = 2, width = 16, page = 16, tokens = 400;
  using Cache = KvCache<B, Listed>;

  Prompt p = [] {
    Prompt prompt = random_prompt(90, layers, tokens, heads, group, {});
    for (LayerShape& shape : prompt.model.layers) shape.rope = rope_of_base(width), shape.scale = 1e-4f;
    return prompt;
  }();
  B be;
  std::unique_ptr<Cache> cache;
  SequenceId id = {};

  Facts() { start(p.model, Index{4} << 20); }
  void start(const Model& model, Index pool_bytes) {
    cache = std::make_unique<Cache>(be, model, CacheOptions{.page_tokens = page, .pool_bytes = pool_bytes});
    id = cache->create();
  }

  Outcome append(Index layer, Index first, Index count) {
    const auto at = static_cast<std::size_t>(layer);
    const TensorBuffer<B> keys(be, p.keys[at], DType::f32), values(be, p.values[at], DType::f32);
    return cache->append(id, layer, keys.tensor().part(first, count), values.tensor().part(first, count),
                         FedCache<B>::positions(first, count));
  }
  void append(Index first, Index count) {
    for (Index l = 0; l < layers; ++l) ASSERT_EQ(append(l, first, count), Outcome::done);
  }
  template <class M>
  void observe(const M& method, Index first, Index count, bool final = true) {
    for (Index l = 0; l < layers; ++l) {
      const TensorBuffer<B> queries(be, p.queries[static_cast<std::size_t>(l)], DType::f32);
      cache->observe(id, l, method, queries.tensor().part(first, count), FedCache<B>::positions(first, count), final);
    }
  }

  /// The live tokens of a head as they are read, in the list's order.
  struct Token {
    Position position;
    int format;
    std::vector<double> key, value;
  };
  std::vector<Token> read(Index layer, Index head) {
    const HeadPages list = cache->pages(id, layer)[static_cast<std::size_t>(head)];
    const Index n = list.live_tokens();
    const Buffer<B, float> keys(be, n * width), values(be, n * width);
    const GatherRow rows[] = {{list, Side::keys, nullptr, width, keys.data()},
                              {list, Side::values, nullptr, width, values.data()}};
    be.gather(rows);
    const std::vector<float> k = download(be, keys), v = download(be, values);
    std::vector<Token> out;
    for (const Entry& e : list.entries)
      for_each_bit(e.live, [&](Index slot) {
        const auto at = std::ssize(out) * width;
        out.push_back({static_cast<Position>(list.position(e, slot)),
                       e.format,
                       {k.begin() + at, k.begin() + at + width},
                       {v.begin() + at, v.begin() + at + width}});
      });
    return out;
  }

  /// What every recorded token was told is true: its position, then and now, and `attention(layer, head, position)`.
  /// Returns how many there are.
  template <class F>
  Index verify(const F& attention, const std::string& what) {
    Index recorded = 0;
    for (Index l = 0; l < layers; ++l)
      for (Index h = 0; h < heads; ++h)
        for (const Token& token : read(l, h)) {
          if (token.format != recorder && token.format != page_recorder) continue;
          ++recorded;
          for (const auto* row : {&token.key, &token.value}) {
            const auto& given = (row == &token.key ? p.keys : p.values)[static_cast<std::size_t>(l)];
            EXPECT_EQ((*row)[Told::position], token.position) << what << ", layer " << l << ", head " << h;
            EXPECT_EQ((*row)[Told::position_read], token.position) << what << ", layer " << l << ", head " << h;
            EXPECT_EQ((*row)[Told::first_channel], given.at(token.position, h, 0)) << what << ", " << token.position;
            EXPECT_EQ(static_cast<float>((*row)[Told::attention]), attention(l, h, token.position))
                << what << ", layer " << l << ", head " << h << ", position " << token.position;
          }
        }
    return recorded;
  }
  Index verify_unwatched(const std::string& what) {
    return verify([](Index, Index, Position) { return Told::nobody_knows; }, what);
  }

  /// Attention reads the rows that are read back: what a row says of its position is in them.
  void verify_attended(const std::string& what) {
    for (Index l = 0; l < layers; ++l) {
      oracle::AttendInput in;
      in.queries = oracle::Array3(3, heads * group, width);
      for (std::size_t i = 0; i < in.queries.values.size(); ++i) in.queries.values[i] = i % 5 == 0 ? -20 : 30;
      in.positions = {tokens, tokens / 2, tokens / 4};
      in.value_width = width;
      in.how = settings_of(p.shape(l));
      for (Index h = 0; h < heads; ++h) {
        oracle::CachedHead head;
        for (const Token& token : read(l, h)) head.push_back({token.position, token.key, token.value});
        in.heads.push_back(std::move(head));
      }
      const oracle::Array3 wanted = oracle::attend(in).out;
      const TensorBuffer<B> q(be, in.queries, DType::f32), out(be, oracle::Array3(3, heads * group, width), DType::f32);
      const std::vector<Position> positions(in.positions.begin(), in.positions.end());
      cache->attend(l, {{.sequence = id, .queries = q.tensor(), .positions = positions, .out = out.writable()}});
      const oracle::Array3 got = out.download();
      for (std::size_t i = 0; i < got.values.size(); ++i)
        ASSERT_NEAR(got.values[i], wanted.values[i], 1e-4 * std::max(1.0, std::abs(wanted.values[i]))) << what;
    }
  }

  Precision in_form(const char* form, Index keep_raw) const {
    Precision precision;
    precision.said = "told";
    precision.kept = Form(form);
    precision.keep_raw_keys = precision.keep_raw_values = keep_raw;
    return precision;
  }
  /// Scores of a layer, by head and position.
  std::vector<std::map<Position, float>> scores(Index layer, const auto& method) const {
    const LayerScores all = cache->scores(id, layer, method);
    std::vector<std::map<Position, float>> out(all.values.size());
    for (std::size_t h = 0; h < out.size(); ++h)
      for (std::size_t i = 0; i < all.positions.size(); ++i) out[h][all.positions[i]] = all.values[h][i];
    return out;
  }
};
using Backends = ::testing::Types<cpu::Backend, WalledBackend>;
TYPED_TEST_SUITE(Facts, Backends);

// ---- positions

TYPED_TEST(Facts, PositionsAreToldAtEveryChangeAndAtEveryRead) {
  for (const char* form : {"recorder", "page_recorder"}) {
    this->id = this->cache->create();
    Compressor method{KeyNorm{}, Uniform{}, TopK{}, Keep::ratio(0.7), this->in_form(form, 12)};
    this->append(0, 130);
    this->cache->compress(this->id, method);
    const Index first = this->verify_unwatched("after a prompt");
    EXPECT_GT(first, 4 * 60);
    EXPECT_NE(this->cache->kept(this->id, 0, 0), this->cache->kept(this->id, 0, 1))
        << "lists must have holes of their own";
    this->verify_attended("after a prompt");
    for (Index t = 130; t < 200; ++t) this->append(t, 1);  // tokens age one by one
    EXPECT_GT(this->verify_unwatched("with age"), first);
    method.keep = Keep::ratio(0.4);
    this->cache->compress(this->id, method);  // recorded rows go, others move up
    EXPECT_GT(this->verify_unwatched("after a second turn"), 0);
    this->verify_attended("after a second turn");

    const SequenceId original = this->id;
    this->id = this->cache->fork(original);
    this->append(200, 60);
    this->cache->release(original);
    EXPECT_GT(this->verify_unwatched("of a fork"), 0);
    std::stringstream stream;
    save(stream, *this->cache, this->id);
    this->cache->release(this->id);
    const auto back = load(stream, *this->cache);
    ASSERT_TRUE(back.has_value());
    this->id = *back;
    EXPECT_GT(this->verify_unwatched("from a snapshot"), 0);
    this->append(260, 40);
    EXPECT_GT(this->verify_unwatched("further on"), 0);
    this->cache->truncate(this->id, 170);
    EXPECT_GT(this->verify_unwatched("cut"), 0);
    this->verify_attended("cut");
    this->cache->release(this->id);
  }
}

// ---- attention

TYPED_TEST(Facts, AttentionIsToldAsItIsScored) {
  for (const char* form : {"recorder", "page_recorder"})
    for (const double keep : {1.0, 0.6}) {
      this->id = this->cache->create();
      Compressor method{RecentMaximum{}, Uniform{}, TopK{}, Keep::ratio(keep), this->in_form(form, 12)};
      this->append(0, 90);
      this->observe(method, 0, 90);
      std::vector<std::vector<std::map<Position, float>>> told;
      for (Index l = 0; l < this->layers; ++l) told.push_back(this->scores(l, method));
      this->cache->compress(this->id, method);
      const auto as_told = [&](Index l, Index h, Position at) {
        return told[static_cast<std::size_t>(l)][static_cast<std::size_t>(h)].at(at);
      };
      EXPECT_GT(this->verify(as_told, message(form, ", kept ", keep)), 100);
      std::set<float> different;
      for (const auto& [at, score] : told[0][0]) different.insert(score);
      EXPECT_GT(different.size(), 60u) << "told apart";

      // Between decode steps a token is told what it scored when it came to change.
      if (keep < 1) continue;
      method.keep = Keep::tokens(100000);
      std::set<Position> known;
      for (const auto& token : this->read(0, 0)) {
        if (token.format != raw) known.insert(token.position);
      }
      const TensorBuffer<TypeParam> out(this->be, oracle::Array3(1, 4, 16), DType::f32);
      for (Index t = 90; t < 150; ++t) {
        for (Index l = 0; l < this->layers; ++l) {
          const auto now = this->scores(l, method);
          ASSERT_EQ(this->append(l, t, 1), Outcome::done);
          for (Index h = 0; h < this->heads; ++h)
            for (const auto& token : this->read(l, h))
              if (token.format == raw) {
                const auto found = now[static_cast<std::size_t>(h)].find(token.position);
                if (found != now[static_cast<std::size_t>(h)].end())
                  told[static_cast<std::size_t>(l)][static_cast<std::size_t>(h)][token.position] = found->second;
              } else if (!known.contains(token.position)) {
                told[static_cast<std::size_t>(l)][static_cast<std::size_t>(h)][token.position] =
                    now[static_cast<std::size_t>(h)].at(token.position);
              }
          for (const auto& token : this->read(l, 0))
            if (token.format != raw && l + 1 == this->layers) known.insert(token.position);
          const TensorBuffer<TypeParam> q(this->be, this->p.queries[static_cast<std::size_t>(l)], DType::f32);
          const Position at[] = {static_cast<Position>(t)};
          this->cache->decode(
              l, {{.sequence = this->id, .queries = q.tensor().part(t, 1), .positions = at, .out = out.writable()}},
              method);
        }
        this->verify(as_told, message(form, ", step ", t));
        if (::testing::Test::HasFailure()) return;
      }
      EXPECT_GT(std::ssize(known), 120);
      this->cache->release(this->id);
    }
}

TYPED_TEST(Facts, NobodyKnowsTheAttentionThatNoScorerWatches) {
  const Compressor h2o_in_form{AccumulatedAttention{}, Uniform{}, TopK{}, Keep::ratio(1),
                               this->in_form("recorder", 12)};
  this->append(0, 60);
  this->observe(h2o_in_form, 0, 60);
  this->cache->compress(this->id, h2o_in_form);
  EXPECT_EQ(this->verify_unwatched("another scorer"), 4 * 48);
}

TYPED_TEST(Facts, TokensThatNoRowHasSeenAreUnknown) {
  const auto method = recent_maximum();
  this->cache->tag(this->id, span(48, 64));
  this->append(0, 40);
  this->observe(method, 0, 40);
  this->append(40, 40);
  std::vector<std::vector<std::map<Position, float>>> told;
  for (Index l = 0; l < this->layers; ++l) told.push_back(this->scores(l, method));
  const auto as_told = [&](Index l, Index h, Position at) {
    return at >= 40 ? Told::unknown : told[static_cast<std::size_t>(l)][static_cast<std::size_t>(h)].at(at);
  };
  // First some that stand between the others, so that what nobody has seen goes to slots of its own.
  for (Index l = 0; l < this->layers; ++l) this->cache->set_aging(this->id, l, {.format = recorder, .classes = visual});
  this->cache->age(this->id);
  EXPECT_EQ(this->verify(as_told, "the image"), 4 * 16);
  for (Index l = 0; l < this->layers; ++l) this->cache->set_aging(this->id, l, {.format = recorder});
  this->cache->age(this->id);
  EXPECT_EQ(this->verify(as_told, "all"), 4 * 80);
}

/// A full pool: lists change a few pages at a time, and what is known goes along.
TYPED_TEST(Facts, InAFullPool) {
  for (const char* form : {"recorder", "page_recorder"}) {
    this->start(this->p.model, 128 << 10);
    const Compressor method{RecentMaximum{}, Uniform{}, TopK{}, Keep::ratio(1), this->in_form(form, 0)};
    Index held = 0;
    while (held < 384 && this->append(0, held, 16) == Outcome::done && this->append(1, held, 16) == Outcome::done)
      held += 16;
    this->cache->truncate(this->id, static_cast<Position>(held));
    ASSERT_LT(held, 384) << "the pool must be full";
    this->observe(method, 0, held);
    std::vector<std::vector<std::map<Position, float>>> told;
    for (Index l = 0; l < this->layers; ++l) told.push_back(this->scores(l, method));
    const CompressReport report = this->cache->compress(this->id, method);
    EXPECT_EQ(report.tokens_waiting, 0) << form;
    EXPECT_EQ(
        this->verify([&](Index l, Index h,
                         Position at) { return told[static_cast<std::size_t>(l)][static_cast<std::size_t>(h)].at(at); },
                     form),
        4 * held);
    this->verify_attended(form);
  }
}

// ---- states

/// What a state says of a head's side is what its tokens, and the newest rows, say.
template <class F, bool all>
void verify_state(F& t, const Witness<all>&, Index layer, const SequenceImage::State& state,
                  const std::vector<Positions>& measured, Index rows, const std::vector<float>& numbers,
                  bool in_order = true) {
  using W = Witness<all>;
  constexpr Index width = F::width, floats = W::state_floats(width);
  ASSERT_EQ(std::ssize(state.values), F::heads * 2 * floats);
  for (Index h = 0; h < F::heads; ++h)
    for (const Side side : {Side::keys, Side::values}) {
      const float* got = state.values.data() + (2 * h + (side == Side::values)) * floats;
      const auto channel = [&](Index what, Index c) { return static_cast<double>(got[W::count + what * width + c]); };
      const auto& given = (side == Side::keys ? t.p.keys : t.p.values)[static_cast<std::size_t>(layer)];
      const auto& queries = t.p.queries[static_cast<std::size_t>(layer)];
      const Positions& tokens = measured[static_cast<std::size_t>(h)];
      const std::string what = message("layer ", layer, ", head ", h, side == Side::keys ? ", keys" : ", values");
      EXPECT_EQ(got[W::tokens], static_cast<float>(tokens.size())) << what;
      double row_sum = 0, position_sum = 0;
      for (const Position at : tokens) row_sum += given.at(at, h, 1) * (1 + at), position_sum += at;
      EXPECT_NEAR(static_cast<double>(got[W::row_sum]), row_sum, 1e-2) << what;
      EXPECT_EQ(static_cast<double>(got[W::position_sum]), position_sum) << what;
      EXPECT_EQ(got[W::ascends], in_order ? 1 : 0) << what;
      EXPECT_EQ(got[W::numbers], static_cast<float>(numbers.size())) << what;
      if (numbers.size() == 2) {
        EXPECT_EQ(got[W::first_number], numbers[0]) << what;
        EXPECT_EQ(got[W::second_number], numbers[1]) << what;
      }
      const bool keys = side == Side::keys;
      EXPECT_EQ(got[W::rope_pairs], keys ? width / 2 : 0) << what;
      EXPECT_EQ(got[W::rope_second], keys ? static_cast<float>(t.p.shape(layer).rope->inverse_frequencies[1]) : 0)
          << what;
      const Index newest = std::min<Index>(rows, query_window);
      EXPECT_EQ(got[W::query_vectors], keys ? static_cast<float>(newest * F::group) : 0) << what;
      double peak = 0;
      for (Index r = 0; r < rows; ++r)
        for (Index q = h * F::group; q < (h + 1) * F::group; ++q)
          peak = std::max(peak, std::abs(queries.at(r, q, width - 1)));
      EXPECT_EQ(static_cast<double>(got[W::peak]), keys ? peak : -1) << what;
      for (Index c = 0; c < width; ++c) {
        double low = 1e9, high = -1e9, squares = 0, layer_low = 1e9, layer_high = -1e9, query = 0;
        for (Index other = 0; other < F::heads; ++other)
          for (const Position at : measured[static_cast<std::size_t>(other)]) {
            const double x = given.at(at, other, c);
            layer_low = std::min(layer_low, x), layer_high = std::max(layer_high, x);
            if (other == h) low = std::min(low, x), high = std::max(high, x), squares += x * x;
          }
        for (Index r = rows - newest; r < rows; ++r)
          for (Index q = h * F::group; q < (h + 1) * F::group; ++q) query += queries.at(r, q, c) * queries.at(r, q, c);
        EXPECT_EQ(channel(W::min, c), low) << what << ", channel " << c;
        EXPECT_EQ(channel(W::max, c), high) << what << ", channel " << c;
        EXPECT_NEAR(channel(W::sum_squares, c), squares, 1e-4 * squares) << what << ", channel " << c;
        EXPECT_EQ(channel(W::layer_min, c), layer_low) << what << ", channel " << c;
        EXPECT_EQ(channel(W::layer_max, c), layer_high) << what << ", channel " << c;
        EXPECT_NEAR(channel(W::query_squares, c), keys ? query : -1, 1e-4 * std::max(1.0, query))
            << what << ", channel " << c;
      }
    }
}

template <class F, bool all>
void states_say_what_was_measured(F& t, const std::vector<Index>& chunks, bool evicts) {
  t.id = t.cache->create();
  constexpr Index keep_raw = 20;
  Precision precision = t.in_form(all ? "witness_of_all" : "witness", keep_raw);
  precision.numbers = {1.5f, -2.25f};
  const Compressor method{AccumulatedAttention{}, Uniform{}, TopK{}, Keep::ratio(evicts ? 0.6 : 1), precision};
  Index rows = 0;
  for (const Index chunk : chunks) {
    t.append(rows, chunk);
    t.observe(method, rows, chunk);
    rows += chunk;
  }
  t.cache->compress(t.id, method);
  const SequenceImage image = t.cache->image(t.id);
  for (Index l = 0; l < F::layers; ++l) {
    std::vector<Positions> measured;
    for (Index h = 0; h < F::heads; ++h) {
      measured.push_back(t.cache->kept(t.id, l, h));
      if (!all) measured.back().resize(measured.back().size() - keep_raw);
    }
    const SequenceImage::Layer& of_layer = image.layers[static_cast<std::size_t>(l)];
    ASSERT_EQ(of_layer.states.size(), 1u);
    EXPECT_EQ(of_layer.aging.numbers, precision.numbers);
    verify_state(t, Witness<all>{}, l, of_layer.states[0], measured, rows, precision.numbers);
  }

  // States and numbers come back as they were, and states are made no more.
  std::stringstream stream;
  save(stream, *t.cache, t.id);
  const auto back = load(stream, *t.cache);
  ASSERT_TRUE(back.has_value());
  EXPECT_EQ(t.cache->image(*back), image);
  const SequenceId fork = t.cache->fork(*back);
  EXPECT_EQ(t.cache->image(fork), image);
  t.id = fork;
  t.append(rows, 40);
  const SequenceImage later = t.cache->image(fork);
  for (std::size_t l = 0; l < later.layers.size(); ++l) EXPECT_EQ(later.layers[l].states, image.layers[l].states);
  t.cache->release(fork), t.cache->release(*back);
}

TYPED_TEST(Facts, StatesSayWhatWasMeasured) {
  const std::vector<std::vector<Index>> observed = {{90}, {33, 32, 25}, {7, 41, 1, 1, 1, 30, 9},
                                                    {25}, {31, 1},      {1, 32, 1}};
  for (const auto& chunks : observed)
    for (const bool evicts : {false, true}) {
      if (evicts && std::accumulate(chunks.begin(), chunks.end(), Index{0}) < 60) continue;
      states_say_what_was_measured<TestFixture, false>(*this, chunks, evicts);
      states_say_what_was_measured<TestFixture, true>(*this, chunks, evicts);
      if (::testing::Test::HasFailure()) FAIL() << ::testing::PrintToString(chunks) << (evicts ? ", evicts" : "");
    }
}

/// Some tokens have changed their form before, so that lists hold pages in no order: rows come in the list's, each with
/// its position.
TYPED_TEST(Facts, RowsOfPagesSideBySideComeWithTheirPositions) {
  this->cache->tag(this->id, span(10, 74));
  this->append(0, 120);
  this->observe(h2o(), 0, 120);
  for (Index l = 0; l < this->layers; ++l) this->cache->set_aging(this->id, l, {.format = witness, .classes = visual});
  this->cache->age(this->id);
  for (Index l = 0; l < this->layers; ++l)
    this->cache->set_aging(this->id, l, {.format = witness_of_all, .keep_raw_values = 10, .numbers = {3, 4}});
  this->cache->age(this->id);
  const SequenceImage image = this->cache->image(this->id);
  for (Index l = 0; l < this->layers; ++l) {
    std::vector<Positions> measured;
    for (Index h = 0; h < this->heads; ++h) measured.push_back(this->cache->kept(this->id, l, h));
    const auto& states = image.layers[static_cast<std::size_t>(l)].states;
    ASSERT_EQ(states.size(), 2u);
    verify_state(*this, Witness<true>{}, l, states[1], measured, 120, {3, 4}, false);
  }
}

TYPED_TEST(Facts, WhatAStateNeedsIsAskedFor) {
  this->append(0, 60);
  const Compressor method{KeyNorm{}, Uniform{}, TopK{}, Keep::ratio(1), this->in_form("witness", 12)};
  EXPECT_NE(error_of([&] {
              this->cache->compress(this->id, method);
            }).find("witness keys depend on the queries, but no queries were observed"),
            std::string::npos);
  Model plain = this->p.model;
  for (LayerShape& shape : plain.layers) shape.rope.reset();
  this->start(plain, 1 << 20);
  this->append(0, 60);
  this->observe(h2o(), 0, 60);
  EXPECT_NE(error_of([&] { this->cache->compress(this->id, method); }).find("witness: layer 0 has no rope"),
            std::string::npos);
  EXPECT_EQ(this->cache->kept(this->id, 0, 0).size(), 60u);
}

// ---- round trips

TEST(RoundTripFacts, AreTold) {
  constexpr Index width = 8, page = 16, tokens = 40;
  Dice dice{3};
  std::vector<float> rows(tokens * width);
  for (float& x : rows) x = static_cast<float>(dice.symmetric());
  RoundTripFacts facts;
  for (Index t = 0; t < tokens; ++t) {
    facts.positions.push_back(static_cast<Position>(3 * t + 5));
    facts.attention.push_back(t == 33 ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(t) / 64);
  }
  const auto check = [&](const std::vector<float>& decoded, auto&& position, auto&& attention) {
    for (Index t = 0; t < tokens; ++t) {
      const float* row = decoded.data() + t * width;
      EXPECT_EQ(row[Told::position], position(t)) << t;
      EXPECT_EQ(row[Told::position_read], position(t)) << t;
      EXPECT_EQ(row[Told::attention], attention(t)) << t;
      EXPECT_EQ(row[Told::first_channel], rows[static_cast<std::size_t>(t * width)]) << t;
    }
  };
  const auto place = [](Index t) { return static_cast<float>(3 * t + 5); };
  const auto share = [](Index t) { return t == 33 ? Told::unknown : static_cast<float>(t) / 64; };
  check(round_trip<Recorder<true>>(rows, width, page, facts), place, share);
  check(round_trip<Recorder<false>>(rows, width, page, facts), place, share);
  check(
      round_trip<Recorder<true>>(rows, width, page), [](Index t) { return static_cast<float>(t); },
      [](Index) { return Told::nobody_knows; });
}

}  // namespace
}  // namespace kvpare::test
