// The verb `attention_mass`, on every backend, against the textbook.
#include <gtest/gtest.h>

#include <map>
#include <optional>

#include "oracle/attention_mass.hpp"
#include "support/paged_tokens.hpp"
#include "support/tolerance.hpp"

namespace kvpare::test {
namespace {

const double nan = std::numeric_limits<double>::quiet_NaN();

/// What a case asks for.
struct Recipe {
  std::string name;
  Index kv_heads = 2, group = 3, width = 32, tokens = 70, rows = 12;
  DType type = DType::f32;
  std::optional<DType> query_type = {};  // else that of the keys
  Index page_tokens = 16;
  Layout layout = Layout::pool;
  double dead = 0;
  Index gap = 0;
  bool ragged = false;        // heads hold different tokens: columns are ranks, with a map from slots
  bool rows_inside = true;    // the rows are the last tokens; else they come after all
  Index rows_before_all = 0;  // so many rows precede every key: they see nothing
  Index window = 0;
  float softcap = 0;
  bool masked = false;  // a key mask
  bool listed = false;  // a list of rows
  bool weighted = false, weighted_per_head = false;
  bool given_lse = false, extra = false;
  bool classes = false;  // two parts
  HeadGroups heads = HeadGroups::kv_head;
  bool take_max = false;
  bool own_logit = false, own_entry = false;
  double peak_share = 0.5;
};

struct Problem {
  Recipe recipe;
  LayerShape shape;
  std::vector<PlacedHead> heads;
  std::vector<std::vector<Index>> token_of;      // [kv head][slot] -> token
  oracle::AttentionMassInput input;              // [tokens] with a mask per head
  std::vector<std::vector<std::uint64_t>> mask;  // [kv head][entry], empty = none
  std::vector<Index> row_list;
  std::vector<float> weights, lse, extra;  // as the verb takes them
  std::vector<std::uint8_t> row_class, key_class;
  Index columns = 0;
};

/// A logit and an entry of the caller's own; the oracle runs the same rules in double.
struct TiltedLogit {
  KVPARE_HD float operator()(float s, Index row, Index column) const {
    return 0.5f * s + 0.01f * static_cast<float>(column) - 0.125f * static_cast<float>(row);
  }
};
struct SquaredEntry {
  KVPARE_HD float operator()(float p, Index row, Index column) const {
    return p * p + static_cast<float>((row + column) % 3) * p;
  }
};

Problem problem_of(const Recipe& r, std::uint64_t seed) {
  Dice dice{seed};
  Problem p;
  p.recipe = r;
  p.shape.kv_heads = r.kv_heads, p.shape.q_heads = r.kv_heads * r.group, p.shape.key_dim = r.width,
  p.shape.value_dim = 1;
  p.shape.scale = static_cast<float>(2 / std::sqrt(static_cast<double>(r.width)));
  p.shape.softcap = r.softcap, p.shape.window = r.window;
  auto& in = p.input;
  const Index q_heads = p.shape.q_heads;

  in.keys = random_array(dice, r.tokens, r.kv_heads, r.width, r.type);
  in.queries = random_array(dice, r.rows, q_heads, r.width, r.query_type.value_or(r.type), 2);
  Index position = 5;
  for (Index t = 0; t < r.tokens; ++t)
    in.key_positions.push_back(position += 1 + (r.gap > 0 ? dice.below(r.gap + 1) : 0));
  for (Index row = 0; row < r.rows; ++row) {
    if (row < r.rows_before_all)
      in.row_positions.push_back(row);
    else if (r.rows_inside)
      in.row_positions.push_back(
          r.tokens >= r.rows ? in.key_positions[static_cast<std::size_t>(r.tokens - r.rows + row)] : position + row);
    else
      in.row_positions.push_back(position + row);
  }
  in.how = {
      .scale = static_cast<double>(p.shape.scale), .softcap = static_cast<double>(p.shape.softcap), .window = r.window};

  for (Index h = 0; h < r.kv_heads; ++h) {
    auto& head = p.heads.emplace_back();
    auto& tokens = p.token_of.emplace_back();
    auto& visible = in.key_mask.emplace_back();
    auto& mask = p.mask.emplace_back();
    for (Index t = 0; t < r.tokens; ++t) {
      const bool held = !r.ragged || dice.chance(0.6);
      // Aligned heads share their dead tokens.
      const bool live =
          held && !(r.ragged || h == 0 ? dice.chance(r.dead) : !p.heads[0][static_cast<std::size_t>(t)].live);
      bool in_mask = live;
      if (held) {
        PlacedToken placed;
        placed.live = live;
        placed.token.position = in.key_positions[static_cast<std::size_t>(t)];
        for (Index c = 0; c < r.width; ++c) placed.token.key.push_back(in.keys.at(t, h, c));
        placed.token.value = {0.0};
        const std::size_t slot = head.size();
        if (r.masked) {
          if (slot % static_cast<std::size_t>(r.page_tokens) == 0) mask.push_back(0);
          in_mask = dice.chance(0.5);
          if (in_mask) mask.back() |= std::uint64_t{1} << (slot % static_cast<std::size_t>(r.page_tokens));
          in_mask = in_mask && live;  // a mask may name dead slots
        }
        head.push_back(std::move(placed));
        tokens.push_back(t);
      }
      visible.push_back(in_mask);
    }
  }
  p.columns = r.ragged ? r.tokens : round_up(std::max<Index>(r.tokens, 1), r.page_tokens);

  if (r.listed) {
    in.rows.emplace();
    for (Index row = 0; row < r.rows; ++row)
      if (dice.chance(0.5)) in.rows->push_back(row);
    p.row_list = *in.rows;
  }
  const auto weight = [&] {
    return dice.chance(0.3) ? 0.0 : static_cast<double>(static_cast<float>(0.25 + dice.unit()));
  };
  if (r.weighted)
    for (Index row = 0; row < r.rows; ++row) in.weights.push_back(weight());
  if (r.weighted_per_head) {
    in.head_weights.emplace(q_heads, r.rows);
    for (Index row = 0; row < r.rows; ++row)
      for (Index h = 0; h < q_heads; ++h) in.head_weights->at(h, row) = weight();
  }
  p.weights = to_floats(in.weights);
  for (Index row = 0; row < r.rows && r.weighted_per_head; ++row)
    for (Index h = 0; h < q_heads; ++h) p.weights.push_back(static_cast<float>(in.head_weights->at(h, row)));
  const auto numbers = [&](double low, double high) {
    oracle::Array2 x(r.rows, q_heads);
    for (double& v : x.values) v = static_cast<double>(static_cast<float>(low + (high - low) * dice.unit()));
    return x;
  };
  if (r.given_lse) in.lse = numbers(2, 6), p.lse = to_floats(in.lse->values);
  if (r.extra) in.extra = numbers(-2, 4), p.extra = to_floats(in.extra->values);
  if (r.classes) {
    for (Index row = 0; row < r.rows; ++row) in.row_class.push_back(static_cast<int>(dice.below(3)));
    for (Index t = 0; t < r.tokens; ++t) in.key_class.push_back(static_cast<int>(dice.below(3)));
    p.row_class.assign(in.row_class.begin(), in.row_class.end());
    p.key_class.assign(in.key_class.begin(), in.key_class.end());
    p.key_class.resize(static_cast<std::size_t>(p.columns), 0);
  }
  const auto how = in.how;
  if (r.own_logit)
    in.logit = [how](double dot, Index row, Index key) {
      return 0.5 * oracle::capped_logit(how, dot) + static_cast<double>(0.01f) * static_cast<double>(key) -
             0.125 * static_cast<double>(row);
    };
  if (r.own_entry)
    in.entry = [](double x, Index row, Index key) { return x * x + static_cast<double>((row + key) % 3) * x; };
  in.combine = r.take_max ? oracle::Combine::max : oracle::Combine::sum;
  in.heads = r.heads == HeadGroups::layer     ? oracle::Heads::layer_mean
             : r.heads == HeadGroups::kv_head ? oracle::Heads::kv_mean
                                              : oracle::Heads::query;
  in.share = static_cast<double>(static_cast<float>(r.peak_share));
  return p;
}

/// What outputs hold before the call: they are added to (or joined with), rows not used stay.
constexpr float out_before = 0.125f, row_before = -77;

struct Answer {
  std::vector<float> out, seen, row_lse, row_peak, part_mass;
  std::vector<Index> near_peak;
  friend bool operator==(const Answer&, const Answer&) = default;
};

/// Hands the verb its arguments with the functors the case asks for.
template <Backend B, class Logit, class EntryOf>
void call(B& be, const MassArguments<>& plain, Logit logit, EntryOf entry) {
  MassArguments<Logit, EntryOf> a;
  a.shape = plain.shape, a.keys = plain.keys, a.key_mask = plain.key_mask, a.column_of = plain.column_of,
  a.columns = plain.columns;
  a.queries = plain.queries, a.row_positions = plain.row_positions, a.row_list = plain.row_list,
  a.row_count = plain.row_count;
  a.row_weights = plain.row_weights, a.per_head_weights = plain.per_head_weights, a.lse = plain.lse,
  a.extra = plain.extra;
  a.row_class = plain.row_class, a.key_class = plain.key_class, a.heads = plain.heads, a.take_max = plain.take_max;
  a.out = plain.out, a.seen = plain.seen, a.row_lse = plain.row_lse, a.row_peak = plain.row_peak,
  a.peak_share = plain.peak_share;
  a.row_near_peak = plain.row_near_peak, a.row_part_mass = plain.row_part_mass;
  a.logit = logit, a.entry = entry;
  be.attention_mass(a);
}

/// Outputs and the arguments that stay the same over the chunks of one prompt.
template <Backend B>
struct Outputs {
  Buffer<B, float> out, seen;
  Outputs(B& be, const Problem& p)
      : out(upload(be,
                   std::vector<float>(static_cast<std::size_t>((p.recipe.classes ? 2 : 1) * heads_of(p) * p.columns),
                                      out_before))),
        seen(upload(be, std::vector<float>(static_cast<std::size_t>(p.shape.kv_heads * p.columns), out_before))) {}
  static Index heads_of(const Problem& p) {
    return p.recipe.heads == HeadGroups::layer     ? 1
           : p.recipe.heads == HeadGroups::kv_head ? p.shape.kv_heads
                                                   : p.shape.q_heads;
  }
};

/// Rows [first, first + count) onto `to`. Per-row arrays of the problem are cut to these rows.
template <Backend B>
Answer run_rows(B& be, const Problem& p, Outputs<B>& to, Index first, Index count) {
  const Index q_heads = p.shape.q_heads;
  const PagedTokens<B> pages(be, p.heads, p.shape.key_dim, 1,
                             {p.recipe.page_tokens, p.recipe.layout, p.recipe.type, 3});
  const TensorBuffer<B> queries(be, p.input.queries, p.recipe.query_type.value_or(p.recipe.type));
  std::vector<Position> positions(p.input.row_positions.begin() + first, p.input.row_positions.begin() + first + count);
  const auto part = [&](const auto& all, Index per_row) {
    auto begin = all.begin() + (all.empty() ? 0 : first * per_row);
    return std::remove_cvref_t<decltype(all)>(begin, all.empty() ? begin : begin + count * per_row);
  };
  const auto row_positions = upload(be, positions);
  std::vector<Buffer<B, std::uint64_t>> masks;
  std::vector<Buffer<B, std::int32_t>> maps;
  std::vector<const std::uint64_t*> mask_rows;
  std::vector<const std::int32_t*> map_rows;
  for (Index h = 0; h < p.shape.kv_heads; ++h) {
    if (p.recipe.masked) {
      masks.push_back(upload(be, p.mask[static_cast<std::size_t>(h)]));
      mask_rows.push_back(masks.back().data());
    }
    if (p.recipe.ragged) {
      std::vector<std::int32_t> map(static_cast<std::size_t>(pages.slots(h)), -1);
      for (std::size_t slot = 0; slot < p.token_of[static_cast<std::size_t>(h)].size(); ++slot)
        map[slot] = static_cast<std::int32_t>(p.token_of[static_cast<std::size_t>(h)][slot]);
      maps.push_back(upload(be, map));
      map_rows.push_back(maps.back().data());
    }
  }
  const auto list = upload(be, p.row_list);
  const auto list_count = upload(be, std::vector<Index>{static_cast<Index>(p.row_list.size())});
  const auto weights = upload(be, part(p.weights, p.recipe.weighted_per_head ? q_heads : 1));
  const auto lse = upload(be, part(p.lse, q_heads)), extra = upload(be, part(p.extra, q_heads));
  const auto row_class = upload(be, part(p.row_class, 1)), key_class = upload(be, p.key_class);
  const auto per_row = [&](Index parts) {
    return upload(be, std::vector<float>(static_cast<std::size_t>(parts * count * q_heads), row_before));
  };
  const Buffer<B, float> row_lse = per_row(1), row_peak = per_row(1), part_mass = per_row(p.recipe.classes ? 2 : 1);
  const auto near_peak = upload(be, std::vector<Index>(static_cast<std::size_t>(count * q_heads), -77));

  MassArguments<> a;
  a.shape = &p.shape, a.keys = pages.heads(), a.key_mask = mask_rows, a.column_of = map_rows, a.columns = p.columns;
  a.queries = queries.tensor().part(first, count), a.row_positions = row_positions.data();
  if (p.recipe.listed) a.row_list = list.data(), a.row_count = list_count.data();
  a.row_weights = weights.data(), a.per_head_weights = p.recipe.weighted_per_head, a.lse = lse.data(),
  a.extra = extra.data();
  a.row_class = row_class.data(), a.key_class = key_class.data(), a.heads = p.recipe.heads,
  a.take_max = p.recipe.take_max;
  a.out = to.out.data(), a.seen = to.seen.data(), a.row_lse = row_lse.data(), a.row_peak = row_peak.data();
  a.peak_share = static_cast<float>(p.recipe.peak_share), a.row_near_peak = near_peak.data(),
  a.row_part_mass = part_mass.data();
  if (p.recipe.own_logit && p.recipe.own_entry)
    call(be, a, TiltedLogit{}, SquaredEntry{});
  else if (p.recipe.own_logit)
    call(be, a, TiltedLogit{}, Probability{});
  else if (p.recipe.own_entry)
    call(be, a, PlainLogit{}, SquaredEntry{});
  else
    be.attention_mass(a);
  return {download(be, to.out),   download(be, to.seen),   download(be, row_lse),
          download(be, row_peak), download(be, part_mass), download(be, near_peak)};
}

template <Backend B>
Answer run(B& be, const Problem& p) {
  Outputs<B> to(be, p);
  return run_rows(be, p, to, 0, p.recipe.rows);
}

/// Compares up to the first mismatch; a second one seldom says more.
void compare(const Problem& p, const oracle::AttentionMass& wanted, const Answer& got) {
  const auto near = [&](double x, double want, Tolerance t, const std::string& what) {
    const auto is_close = close(x, want, t);
    EXPECT_TRUE(is_close) << p.recipe.name << ": " << what;
    return static_cast<bool>(is_close);
  };
  const double before = static_cast<double>(out_before);
  const Index parts = p.recipe.classes ? 2 : 1, rows = p.recipe.rows, q_heads = p.shape.q_heads;
  const auto column_tokens = [&](Index column) { return column < p.recipe.tokens ? column : Index{-1}; };
  for (Index part = 0; part < parts; ++part)
    for (Index h = 0; h < wanted.out.b; ++h)
      for (Index c = 0; c < p.columns; ++c) {
        const Index t = column_tokens(c);
        const double mass = t < 0 ? 0 : wanted.out.at(parts == 1 ? oracle::part_all : part + 1, h, t);
        // A layer's maximum of heads that do not hold the token: see the oracle; what is never visible stays as it was.
        const double want = p.recipe.take_max ? std::max(before, mass) : before + mass;
        if (!near(static_cast<double>(got.out[static_cast<std::size_t>((part * wanted.out.b + h) * p.columns + c)]),
                  want, tolerance(Operation::mass), message("out[part ", part, ", head ", h, ", column ", c, "]")))
          return;
      }
  for (Index h = 0; h < p.shape.kv_heads && p.recipe.heads == HeadGroups::kv_head; ++h)
    for (Index c = 0; c < p.columns; ++c) {
      const Index t = column_tokens(c);
      if (!near(static_cast<double>(got.seen[static_cast<std::size_t>(h * p.columns + c)]),
                before + (t < 0 ? 0 : wanted.seen.at(h, t)), tolerance(Operation::mass),
                message("seen[head ", h, ", column ", c, "]")))
        return;
    }
  for (Index r = 0; r < rows; ++r)
    for (Index h = 0; h < q_heads; ++h) {
      const std::size_t at = static_cast<std::size_t>(r * q_heads + h);
      const bool listed = !p.recipe.listed || std::find(p.row_list.begin(), p.row_list.end(), r) != p.row_list.end();
      const double w = (p.recipe.weighted ? p.input.weights[static_cast<std::size_t>(r)] : 1.0) *
                       (p.input.head_weights ? p.input.head_weights->at(h, r) : 1.0);
      const std::string where = message("[row ", r, ", head ", h, "]");
      const bool used = listed && w != 0;
      const double unused = static_cast<double>(row_before);
      if (!near(static_cast<double>(got.row_lse[at]), used ? wanted.lse.at(r, h) : unused, tolerance(Operation::logit),
                "row_lse" + where))
        return;
      if (!near(static_cast<double>(got.row_peak[at]), used ? wanted.peak.at(r, h) : unused,
                tolerance(Operation::probability), "row_peak" + where))
        return;
      if (!near(static_cast<double>(got.near_peak[at]), used ? wanted.count.at(r, h) : -77, {},
                "row_near_peak" + where))
        return;
      for (Index part = 0; part < parts; ++part)
        if (!near(static_cast<double>(got.part_mass[static_cast<std::size_t>(part * rows * q_heads) + at]),
                  used ? wanted.mass.at(parts == 1 ? oracle::part_all : part + 1, r, h) : unused,
                  tolerance(Operation::mass), message("row_part_mass ", part, where)))
          return;
    }
}

/// A problem and the textbook's answer, made once for all backends.
struct Wanted {
  Problem problem;
  oracle::AttentionMass result;
};
const Wanted& wanted_of(const Recipe& r, std::uint64_t seed = 1) {
  static std::map<std::string, Wanted> memory;
  auto [at, is_new] = memory.try_emplace(r.name);
  if (is_new)
    at->second.problem = problem_of(r, seed), at->second.result = oracle::attention_mass(at->second.problem.input);
  return at->second;
}

template <Backend B>
void conforms(B& be, const Recipe& r) {
  const Wanted& wanted = wanted_of(r);
  compare(wanted.problem, wanted.result, run(be, wanted.problem));
}

template <class Rig>
class AttentionMass : public OnRig<Rig> {};
TYPED_TEST_SUITE(AttentionMass, AllRigs, RigNames);

TYPED_TEST(AttentionMass, GroupsAndWidths) {
  for (const Index group : {1, 4, 5, 7})
    for (const Index width : {1, 3, 72, 80, 128})
      conforms(this->be(), {.name = message("group ", group, " width ", width),
                            .group = group,
                            .width = width,
                            .type = width % 2 ? DType::f16 : DType::bf16});
  for (const DType type : {DType::f32, DType::f16, DType::bf16})
    for (const Index width : {64, 96, 192, 256})
      conforms(this->be(), {.name = message(name_of(type), " ", width), .width = width, .tokens = 40, .type = type});
}

TYPED_TEST(AttentionMass, QueriesOfAnotherType) {
  for (const DType type : {DType::f32, DType::f16, DType::bf16})
    for (const DType query_type : {DType::f32, DType::f16, DType::bf16})
      for (const Index width : {40, 136})
        conforms(this->be(), {.name = message(name_of(type), " for ", name_of(query_type), " ", width),
                              .width = width,
                              .rows = 9,
                              .type = type,
                              .query_type = query_type});
}

TYPED_TEST(AttentionMass, KeysWiderThanAnyHead) {
  for (const Index width : {300, 520})
    for (const Index rows : {3, 30})
      conforms(this->be(), {.name = message("wide ", width, " rows ", rows),
                            .width = width,
                            .rows = rows,
                            .type = width == 300 ? DType::f32 : DType::f16,
                            .heads = HeadGroups::query_head});
}

TYPED_TEST(AttentionMass, ManyQueriesOnHalfKeys) {
  for (const HeadGroups heads : {HeadGroups::query_head, HeadGroups::kv_head, HeadGroups::layer})
    for (const bool options : {false, true}) {
      if (is_small<TypeParam>() && options != (heads == HeadGroups::query_head)) continue;
      conforms(this->be(), {.name = message("half keys, heads ", static_cast<int>(heads), " options ", options),
                            .group = 4,
                            .width = 24,
                            .tokens = 330,
                            .rows = 130,
                            .type = options ? DType::f16 : DType::bf16,
                            .page_tokens = 32,
                            .dead = options ? 0.3 : 0.0,
                            .ragged = options,
                            .window = options ? 90 : 0,
                            .masked = options,
                            .weighted = options,
                            .classes = options,
                            .heads = heads,
                            .take_max = options});
    }
}

TYPED_TEST(AttentionMass, LengthsPagesAndLayouts) {
  for (const Index page : {7, 16, 32, 64})
    for (const Index tokens : {Index{0}, Index{1}, page - 1, page, page + 1})
      for (const Layout layout : {Layout::pool, Layout::nhd, Layout::hnd, Layout::dense})
        conforms(this->be(), {.name = message("page ", page, " tokens ", tokens, " layout ", static_cast<int>(layout)),
                              .width = 8,
                              .tokens = tokens,
                              .rows = 5,
                              .page_tokens = page,
                              .layout = layout,
                              .rows_inside = false});
}

TYPED_TEST(AttentionMass, ManyRowsAndKeys) {
  conforms(this->be(),
           {.name = "prompt", .kv_heads = 1, .group = 2, .width = 16, .tokens = 600, .rows = 600, .page_tokens = 32});
  conforms(this->be(), {.name = "prompt, holes",
                        .kv_heads = 2,
                        .group = 2,
                        .width = 16,
                        .tokens = 500,
                        .rows = 333,
                        .dead = 0.3,
                        .gap = 3,
                        .weighted = true});
}

TYPED_TEST(AttentionMass, MoreKeysThanOneStepOfABlock) {
  for (const DType type : {DType::f32, DType::bf16})
    for (const bool classes : {false, true}) {
      if (is_small<TypeParam>() && classes != (type == DType::bf16)) continue;
      conforms(this->be(), {.name = message("long ", name_of(type), " classes ", classes),
                            .group = 4,
                            .width = 8,
                            .tokens = 1300,
                            .rows = 120,
                            .type = type,
                            .page_tokens = 64,
                            .dead = classes ? 0.1 : 0.0,
                            .weighted = true,
                            .classes = classes});
    }
}

TYPED_TEST(AttentionMass, HolesAndRaggedHeads) {
  for (const double dead : {0.0, 0.4, 1.0})
    for (const bool ragged : {false, true})
      for (const bool masked : {false, true})
        conforms(this->be(), {.name = message("dead ", dead, " ragged ", ragged, " masked ", masked),
                              .kv_heads = 3,
                              .width = 12,
                              .rows = 20,
                              .dead = dead,
                              .gap = 2,
                              .ragged = ragged,
                              .masked = masked});
}

TYPED_TEST(AttentionMass, WeightsAndListsOfRows) {
  for (const bool listed : {false, true})
    for (const int weights : {0, 1, 2})
      for (const Index rows : {3, 40})
        conforms(this->be(), {.name = message("listed ", listed, " weights ", weights, " rows ", rows),
                              .width = 12,
                              .rows = rows,
                              .listed = listed,
                              .weighted = weights == 1,
                              .weighted_per_head = weights == 2});
}

TYPED_TEST(AttentionMass, HeadsSumsAndMaxima) {
  for (const HeadGroups heads : {HeadGroups::query_head, HeadGroups::kv_head, HeadGroups::layer})
    for (const bool take_max : {false, true})
      for (const bool classes : {false, true})
        for (const bool ragged : {false, true})
          conforms(this->be(), {.name = message("heads ", static_cast<int>(heads), " max ", take_max, " classes ",
                                                classes, " ragged ", ragged),
                                .width = 12,
                                .tokens = 90,
                                .rows = 70,
                                .ragged = ragged,
                                .weighted = true,
                                .classes = classes,
                                .heads = heads,
                                .take_max = take_max});
}

TYPED_TEST(AttentionMass, WindowAndSoftcap) {
  for (const Index window : {1, 9, 64})
    for (const float softcap : {0.0f, 1.5f})
      conforms(this->be(), {.name = message("window ", window, " cap ", softcap),
                            .width = 12,
                            .rows = 50,
                            .gap = 1,
                            .window = window,
                            .softcap = softcap});
}

TYPED_TEST(AttentionMass, GivenAndExtraDenominators) {
  for (const int which : {1, 2})
    for (const float softcap : {0.0f, 2.0f})
      conforms(this->be(), {.name = message("denominator ", which, " cap ", softcap),
                            .width = 12,
                            .rows = 20,
                            .rows_before_all = 3,
                            .softcap = softcap,
                            .given_lse = which == 1,
                            .extra = which == 2});
}

TYPED_TEST(AttentionMass, LogitsAndEntriesOfTheCaller) {
  for (const int which : {1, 2, 3})
    for (const bool ragged : {false, true})
      conforms(this->be(), {.name = message("own ", which, " ragged ", ragged),
                            .width = 12,
                            .rows = 20,
                            .ragged = ragged,
                            .softcap = which == 3 ? 3.0f : 0.0f,
                            .classes = ragged,
                            .own_logit = (which & 1) != 0,
                            .own_entry = (which & 2) != 0});
}

TYPED_TEST(AttentionMass, SharesOfThePeak) {
  for (const double share : {0.0, 0.9, 1.0})
    conforms(this->be(), {.name = message("share ", share), .width = 12, .rows = 30, .peak_share = share});
}

TYPED_TEST(AttentionMass, RowsThatSeeNothingAddNothing) {
  conforms(this->be(), {.name = "blind rows", .rows = 10, .rows_before_all = 4});
  conforms(this->be(), {.name = "blind rows, all", .rows = 5, .rows_before_all = 5});
}

TYPED_TEST(AttentionMass, AGivenLseOfMinusInfinityAddsNothing) {  // what `row_lse` says of a row that saw nothing
  for (const bool classes : {false, true}) {
    Problem p = problem_of({.name = "given nothing",
                            .tokens = 64,
                            .rows = 16,
                            .rows_inside = false,
                            .given_lse = true,
                            .classes = classes},
                           17);
    const Index row = 3;
    p.input.rows.emplace();
    for (Index r = 0; r < p.recipe.rows; ++r)
      if (r != row) p.input.rows->push_back(r);
    for (Index h = 0; h < p.shape.q_heads; ++h)
      p.lse[static_cast<std::size_t>(row * p.shape.q_heads + h)] = -std::numeric_limits<float>::infinity();
    const auto wanted = oracle::attention_mass(p.input);
    const Answer got = run(this->be(), p);
    for (Index part = 0; part < (classes ? 2 : 1); ++part)
      for (Index h = 0; h < p.shape.kv_heads; ++h)
        for (Index t = 0; t < p.recipe.tokens; ++t)
          ASSERT_TRUE(close(
              static_cast<double>(got.out[static_cast<std::size_t>((part * p.shape.kv_heads + h) * p.columns + t)]),
              static_cast<double>(out_before) + wanted.out.at(classes ? part + 1 : oracle::part_all, h, t),
              tolerance(Operation::mass)))
              << "part " << part << " head " << h << " token " << t;
  }
}

TYPED_TEST(AttentionMass, SumsAddUpOverChunks) {
  for (const HeadGroups heads : {HeadGroups::query_head, HeadGroups::kv_head, HeadGroups::layer})
    for (const bool take_max : {false, true}) {
      const Wanted& wanted = wanted_of({.name = message("chunks ", static_cast<int>(heads), " ", take_max),
                                        .width = 12,
                                        .tokens = 64,
                                        .rows = 64,
                                        .weighted = true,
                                        .heads = heads,
                                        .take_max = take_max});
      const Problem& p = wanted.problem;
      Outputs<typename TestFixture::B> to(this->be(), p);
      Answer got;
      for (Index first = 0; first < 64; first += 24)
        got = run_rows(this->be(), p, to, first, std::min<Index>(24, 64 - first));
      double furthest = 0;
      for (Index h = 0; h < wanted.result.out.b; ++h)
        for (Index t = 0; t < 64; ++t) {
          // The largest of each chunk is joined after heads are averaged, as the oracle's `accumulate` does.
          const double mass = wanted.result.out.at(0, h, t),
                       x = static_cast<double>(got.out[static_cast<std::size_t>(h * p.columns + t)]);
          if (!take_max)
            furthest = std::max(
                furthest, std::abs(x - (static_cast<double>(out_before) + mass)) - tolerance(Operation::mass).of(mass));
        }
      EXPECT_LE(furthest, 0) << p.recipe.name;
      if (!take_max) continue;
      oracle::AttentionMass joined;
      for (Index first = 0; first < 64; first += 24) {
        oracle::AttentionMassInput in = p.input;
        in.rows.emplace();
        for (Index r = first; r < std::min<Index>(64, first + 24); ++r) in.rows->push_back(r);
        if (first == 0)
          joined = oracle::attention_mass(in);
        else
          oracle::accumulate(in, joined);
      }
      for (Index h = 0; h < joined.out.b; ++h)
        for (Index t = 0; t < 64; ++t)
          ASSERT_TRUE(close(static_cast<double>(got.out[static_cast<std::size_t>(h * p.columns + t)]),
                            std::max(static_cast<double>(out_before), joined.out.at(0, h, t)),
                            tolerance(Operation::mass)))
              << p.recipe.name << " head " << h << " token " << t;
    }
}

TYPED_TEST(AttentionMass, ABadNumberStaysWithTheRowsThatSeeIt) {
  for (const int where : {0, 1}) {  // in a key; in all of a query
    Problem p = problem_of({.name = "bad",
                            .kv_heads = 2,
                            .group = 2,
                            .width = 8,
                            .tokens = 40,
                            .rows = 40,
                            .heads = HeadGroups::query_head},
                           7);
    if (where == 0) p.input.keys.at(30, 1, 2) = nan, p.heads[1][30].token.key[2] = nan;
    if (where == 1) p.input.queries.at(25, 3, 0) = nan;
    const Answer got = run(this->be(), p);
    compare(p, oracle::attention_mass(p.input), got);
    for (Index t = 0; t < 40; ++t)
      EXPECT_FALSE(std::isnan(got.out[static_cast<std::size_t>(t)])) << "head 0 sees nothing bad";
    EXPECT_TRUE(std::isnan(got.out[static_cast<std::size_t>(3 * p.columns)]))
        << "a row that sees NaN must not look like one that sees nothing";
  }
}

TYPED_TEST(AttentionMass, LayoutNeverMatters) {
  Problem p = problem_of({.name = "layout", .tokens = 100, .rows = 30, .dead = 0.2, .gap = 2}, 11);
  const Answer first = run(this->be(), p);
  for (const Layout layout : {Layout::nhd, Layout::hnd, Layout::dense}) {
    p.recipe.layout = layout;
    EXPECT_TRUE(run(this->be(), p) == first) << static_cast<int>(layout);
  }
}

TYPED_TEST(AttentionMass, FollowsItsTokens) {
  // Rows come after all keys, so keys may swap places: their masses must swap with them.
  Problem p = problem_of({.name = "permute", .kv_heads = 1, .tokens = 50, .rows = 10, .rows_inside = false}, 13);
  const Answer before = run(this->be(), p);
  const auto order = Dice{99}.permutation(50);
  Problem q = p;
  for (Index t = 0; t < 50; ++t)
    q.heads[0][static_cast<std::size_t>(t)].token.key =
        p.heads[0][static_cast<std::size_t>(order[static_cast<std::size_t>(t)])].token.key;
  const Answer after = run(this->be(), q);
  for (Index t = 0; t < 50; ++t)
    EXPECT_TRUE(close(static_cast<double>(after.out[static_cast<std::size_t>(t)]),
                      static_cast<double>(before.out[static_cast<std::size_t>(order[static_cast<std::size_t>(t)])]),
                      tolerance(Operation::mass)));
}

TEST(AttentionMassThreads, NotABitDependsOnThem) {
  for (const bool classes : {false, true}) {
    const Problem p = problem_of(
        {.name = "threads", .kv_heads = 3, .width = 16, .tokens = 700, .rows = 400, .dead = 0.1, .classes = classes},
        21);
    cpu::Backend one({.threads = 1});
    const Answer wanted = run(one, p);
    for (const Index threads : {2, 3, 7}) {
      cpu::Backend many({.threads = threads});
      EXPECT_TRUE(run(many, p) == wanted) << threads;
    }
  }
}

}  // namespace
}  // namespace kvpare::test
