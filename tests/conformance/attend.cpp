// The verb `attend`, on every backend, against the textbook.
#include <gtest/gtest.h>

#include <map>

#include "oracle/attend.hpp"
#include "support/paged_tokens.hpp"
#include "support/tolerance.hpp"

namespace kvpare::test {
namespace {

const double nan = std::numeric_limits<double>::quiet_NaN();
const double inf = std::numeric_limits<double>::infinity();

/// One sequence of one layer.
struct Sequence {
  std::vector<PlacedHead> heads;
  oracle::Array3 queries;
  std::vector<Position> positions;
};

struct Problem {
  std::string name;
  LayerShape shape;
  DType type = DType::f32, out_type = DType::f32;
  MassKind mass = MassKind::none;
  Paging paging;
  std::vector<Sequence> batch;
};

/// What a case asks for; the random part follows from it.
struct Recipe {
  std::string name;
  Index kv_heads = 2, group = 4, key_dim = 64, value_dim = 64;
  DType type = DType::f16;
  Index page_tokens = 16;
  Layout layout = Layout::pool;
  std::vector<Index> lengths = {40};  // of the sequences
  Index ragged = 0;                   // head h holds this many tokens less, times h
  double dead = 0;
  Index gap = 0;  // positions skipped at most between tokens
  Index rows = 1;
  bool rows_inside = false;  // the rows are the sequence's last tokens, causal among themselves
  Index window = 0;
  float softcap = 0;
  bool sinks = false;
  MassKind mass = MassKind::none;
};

Problem problem_of(const Recipe& r, std::uint64_t seed) {
  Dice dice{seed};
  Problem p;
  p.name = r.name;
  p.type = r.type, p.out_type = r.rows % 2 == 0 ? r.type : DType::f32;
  p.mass = r.mass;
  p.paging = {r.page_tokens, r.layout, r.type, seed + 1};
  p.shape.kv_heads = r.kv_heads, p.shape.q_heads = r.kv_heads * r.group;
  p.shape.key_dim = r.key_dim, p.shape.value_dim = r.value_dim;
  p.shape.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(r.key_dim)));
  p.shape.softcap = r.softcap, p.shape.window = r.window;
  for (Index h = 0; h < p.shape.q_heads && r.sinks; ++h)
    p.shape.sink_logits.push_back(static_cast<float>(3 * dice.symmetric()));
  for (const Index length : r.lengths) {
    Sequence s;
    Index end = 0;
    for (Index h = 0; h < r.kv_heads; ++h) {
      s.heads.push_back(random_head(dice, std::max<Index>(0, length - h * r.ragged), r.key_dim, r.value_dim, r.type,
                                    r.gap, r.dead, 2));
      if (!s.heads.back().empty()) end = std::max(end, s.heads.back().back().token.position + 1);
    }
    s.queries = random_array(dice, r.rows, p.shape.q_heads, r.key_dim, r.type, 3);
    const Index first = r.rows_inside ? std::max<Index>(0, end - r.rows) : end;
    for (Index row = 0; row < r.rows; ++row) s.positions.push_back(static_cast<Position>(first + row));
    p.batch.push_back(std::move(s));
  }
  return p;
}

oracle::AttendInput input_of(const Problem& p, const Sequence& s) {
  oracle::AttendInput in;
  in.queries = s.queries;
  in.positions.assign(s.positions.begin(), s.positions.end());
  for (const PlacedHead& head : s.heads) in.heads.push_back(live_tokens(head));
  in.value_width = p.shape.value_dim;
  in.how = {.scale = static_cast<double>(p.shape.scale),
            .softcap = static_cast<double>(p.shape.softcap),
            .window = p.shape.window};
  in.sink.assign(p.shape.sink_logits.begin(), p.shape.sink_logits.end());
  return in;
}

constexpr float mass_before = 0.25f;

/// What one sequence got back. `mass` is [kv head][slot]; dead slots included.
struct Answer {
  oracle::Array3 out;
  std::vector<std::byte> out_bytes;
  std::vector<float> lse;
  std::vector<std::vector<float>> mass;
};

template <Backend B>
std::vector<Answer> run(B& be, const Problem& p) {
  std::vector<PagedTokens<B>> pages;
  std::vector<TensorBuffer<B>> queries, outs;
  std::vector<Buffer<B, float>> lse;
  std::vector<std::vector<Buffer<B, float>>> mass;
  std::vector<std::vector<float*>> mass_rows;
  std::vector<AttendSequence> batch;
  for (const Sequence& s : p.batch) {
    pages.emplace_back(be, s.heads, p.shape.key_dim, p.shape.value_dim, p.paging);
    queries.emplace_back(be, s.queries, p.type);
    outs.emplace_back(be, oracle::Array3(s.queries.a, s.queries.b, p.shape.value_dim, nan), p.out_type);
    lse.emplace_back(be, s.queries.a * s.queries.b);
    mass.emplace_back(), mass_rows.emplace_back();
    for (Index h = 0; h < p.shape.kv_heads && p.mass != MassKind::none; ++h) {
      mass.back().push_back(
          upload(be, std::vector<float>(static_cast<std::size_t>(pages.back().slots(h)), mass_before)));
      mass_rows.back().push_back(mass.back().back().data());
    }
  }
  for (std::size_t i = 0; i < p.batch.size(); ++i)
    batch.push_back(
        {pages[i].heads(), queries[i].tensor(), p.batch[i].positions, outs[i].writable(), lse[i].data(), mass_rows[i]});
  be.attend(p.shape, batch, p.mass);

  std::vector<Answer> answers;
  for (std::size_t i = 0; i < p.batch.size(); ++i) {
    answers.push_back({outs[i].download(), outs[i].raw(), download(be, lse[i]), {}});
    for (const auto& row : mass[i]) answers.back().mass.push_back(download(be, row));
  }
  return answers;
}

/// The textbook's answer, made once for all backends.
struct Wanted {
  Problem problem;
  std::vector<oracle::AttendResult> results;
  std::vector<std::vector<std::vector<double>>> mass;  // [sequence][kv head][live token]
};

const Wanted& wanted_of(const Recipe& r, std::uint64_t seed) {
  static std::map<std::pair<std::string, std::uint64_t>, Wanted> memory;
  auto& w = memory[{r.name, seed}];
  if (!w.results.empty()) return w;
  w.problem = problem_of(r, seed);
  for (const Sequence& s : w.problem.batch) {
    const auto in = input_of(w.problem, s);
    w.results.push_back(oracle::attend(in));
    using oracle::Fold;
    const Fold fold = r.mass == MassKind::max ? Fold::max : r.mass == MassKind::mean ? Fold::mean : Fold::sum;
    if (r.mass != MassKind::none) w.mass.push_back(oracle::attend_mass(in, fold, Fold::sum));
  }
  return w;
}

/// NaN on one side only, or more than the tolerance apart, fails; the first few places are printed.
void compare(const Problem& p, const Sequence& s, const oracle::AttendResult& wanted, const Answer& got) {
  int printed = 0;
  for (Index r = 0; r < wanted.out.a; ++r)
    for (Index h = 0; h < wanted.out.b; ++h) {
      const double lse = static_cast<double>(got.lse[static_cast<std::size_t>(r * wanted.out.b + h)]);
      const bool lse_close = close(lse, wanted.lse.at(r, h), tolerance(Operation::logit));
      EXPECT_TRUE(lse_close) << p.name << ": lse of row " << r << " head " << h << ": " << lse << ", wanted "
                             << wanted.lse.at(r, h);
      if (!lse_close && ++printed > 4) return;
      for (Index c = 0; c < wanted.out.c; ++c) {
        const auto near =
            close(got.out.at(r, h, c), wanted.out.at(r, h, c), tolerance(Operation::attended, p.out_type));
        EXPECT_TRUE(near) << p.name << ": out of row " << r << " (position " << s.positions[static_cast<std::size_t>(r)]
                          << ") head " << h << " channel " << c;
        if (!near && ++printed > 4) return;
      }
    }
}

void compare_mass(const Problem& p, const Sequence& s, const std::vector<std::vector<double>>& wanted,
                  const Answer& got) {
  for (std::size_t h = 0; h < s.heads.size(); ++h) {
    std::size_t live = 0;
    for (std::size_t slot = 0; slot < got.mass[h].size(); ++slot) {
      const bool is_live = slot < s.heads[h].size() && s.heads[h][slot].live;
      const double added = is_live ? wanted[h][live++] : 0;
      EXPECT_TRUE(close(static_cast<double>(got.mass[h][slot]), static_cast<double>(mass_before) + added,
                        tolerance(Operation::mass)))
          << p.name << ": mass of head " << h << " slot " << slot << (is_live ? "" : " (dead)");
    }
  }
}

template <Backend B>
void conforms(B& be, const Recipe& r, std::uint64_t seed = 1) {
  const Wanted& wanted = wanted_of(r, seed);
  const auto answers = run(be, wanted.problem);
  for (std::size_t i = 0; i < answers.size(); ++i) {
    compare(wanted.problem, wanted.problem.batch[i], wanted.results[i], answers[i]);
    if (r.mass != MassKind::none) compare_mass(wanted.problem, wanted.problem.batch[i], wanted.mass[i], answers[i]);
  }
}

template <class Rig>
class Attend : public OnRig<Rig> {};
TYPED_TEST_SUITE(Attend, AllRigs, RigNames);

TYPED_TEST(Attend, GroupsOfQueryHeads) {
  for (const Index group : {1, 4, 5, 7})
    for (const Index kv_heads : {1, 3})
      conforms(this->be(), {.name = message("group ", group, " kv ", kv_heads),
                            .kv_heads = kv_heads,
                            .group = group,
                            .lengths = {37},
                            .rows = 2});
}

TYPED_TEST(Attend, WidthsOfKeysAndValues) {
  const std::pair<Index, Index> widths[] = {{1, 1},   {3, 3},     {64, 64},   {72, 72},   {80, 80},
                                            {96, 96}, {128, 128}, {192, 192}, {256, 256}, {192, 128},
                                            {3, 128}, {80, 1},    {17, 33}};
  for (const auto& [key, value] : widths)
    for (const DType type : {DType::f32, DType::f16, DType::bf16})
      conforms(this->be(), {.name = message("widths ", key, " ", value, " ", name_of(type)),
                            .key_dim = key,
                            .value_dim = value,
                            .type = type,
                            .lengths = {35}});
}

TYPED_TEST(Attend, LengthsAroundAPage) {
  for (const Index page : {16, 32, 64})
    for (const Index length : {Index{0}, Index{1}, page - 1, page, page + 1, 3 * page + 5})
      for (const Layout layout : {Layout::pool, Layout::nhd, Layout::hnd})
        conforms(this->be(), {.name = message("length ", length, " page ", page, " layout ", static_cast<int>(layout)),
                              .key_dim = 24,
                              .value_dim = 40,
                              .page_tokens = page,
                              .layout = layout,
                              .lengths = {length},
                              .rows = 3,
                              .mass = MassKind::sum});
}

TYPED_TEST(Attend, ListsOfSeveralStretches) {
  conforms(this->be(), {.name = "long",
                        .kv_heads = 2,
                        .group = 5,
                        .key_dim = 32,
                        .value_dim = 48,
                        .page_tokens = 32,
                        .lengths = {4500},
                        .ragged = 2100,
                        .dead = 0.1,
                        .rows = 2,
                        .mass = MassKind::mean});
  conforms(this->be(), {.name = "long, causal",
                        .kv_heads = 1,
                        .group = 2,
                        .key_dim = 16,
                        .value_dim = 16,
                        .page_tokens = 64,
                        .lengths = {2080},
                        .rows = 64,
                        .rows_inside = true});
  conforms(this->be(), {.name = "long, window over the seam",
                        .kv_heads = 1,
                        .group = 2,
                        .key_dim = 16,
                        .value_dim = 16,
                        .page_tokens = 16,
                        .lengths = {2100},
                        .rows = 60,
                        .rows_inside = true,
                        .window = 50});
}

TYPED_TEST(Attend, HeadsMayDifferInLengthAndHaveHoles) {
  for (const double dead : {0.0, 0.5, 0.95})
    for (const Index gap : {0, 5})
      conforms(this->be(), {.name = message("dead ", dead, " gap ", gap),
                            .kv_heads = 3,
                            .group = 4,
                            .key_dim = 20,
                            .value_dim = 12,
                            .lengths = {90},
                            .ragged = 45,
                            .dead = dead,
                            .gap = gap,
                            .rows = 4,
                            .rows_inside = true,
                            .mass = MassKind::max});
}

TYPED_TEST(Attend, RowsSeeOnlyEarlierPositions) {
  for (const Index rows : {1, 2, 17, 63, 64})
    for (const Index length : {Index{64}, Index{100}})
      conforms(this->be(), {.name = message("causal ", rows, " ", length),
                            .key_dim = 16,
                            .value_dim = 16,
                            .lengths = {length},
                            .gap = 2,
                            .rows = rows,
                            .rows_inside = true,
                            .mass = MassKind::sum});
}

TYPED_TEST(Attend, WindowSoftcapAndSinks) {
  for (const Index window : {0, 1, 7, 16, 40})
    for (const float softcap : {0.0f, 0.7f, 30.0f})
      for (const bool sinks : {false, true})
        conforms(this->be(), {.name = message("window ", window, " cap ", softcap, " sinks ", sinks),
                              .kv_heads = 2,
                              .group = 2,
                              .key_dim = 24,
                              .value_dim = 8,
                              .lengths = {70},
                              .gap = 1,
                              .rows = 9,
                              .rows_inside = true,
                              .window = window,
                              .softcap = softcap,
                              .sinks = sinks,
                              .mass = MassKind::mean});
}

TYPED_TEST(Attend, SequencesOfABatchDoNotMeet) {
  conforms(this->be(), {.name = "batch",
                        .kv_heads = 2,
                        .group = 3,
                        .key_dim = 16,
                        .value_dim = 24,
                        .lengths = {0, 1, 200, 33, 2500},
                        .ragged = 20,
                        .dead = 0.2,
                        .rows = 2,
                        .mass = MassKind::sum});
}

TYPED_TEST(Attend, LayoutNeverMatters) {
  // The same tokens in the same slots: not a bit may differ. Other page sizes sum in another order.
  Recipe recipe{.name = "layout",
                .kv_heads = 2,
                .group = 3,
                .key_dim = 40,
                .value_dim = 24,
                .lengths = {150},
                .dead = 0.3,
                .gap = 2,
                .rows = 5,
                .rows_inside = true,
                .mass = MassKind::mean};
  const Wanted& wanted = wanted_of(recipe, 1);
  Problem p = wanted.problem;
  const auto first = run(this->be(), p);
  for (const Layout layout : {Layout::pool, Layout::nhd, Layout::hnd, Layout::dense})
    for (const std::uint64_t shuffle : {2u, 3u}) {
      p.paging.layout = layout, p.paging.shuffle = shuffle;
      const auto again = run(this->be(), p);
      EXPECT_EQ(again[0].out_bytes, first[0].out_bytes);
      EXPECT_EQ(again[0].lse, first[0].lse);
      EXPECT_EQ(again[0].mass, first[0].mass);
    }
  for (const Index page : {1, 5, 32, 64}) {  // engines have pages of any size
    p.paging.page_tokens = page;
    const auto again = run(this->be(), p);
    compare(p, p.batch[0], wanted.results[0], again[0]);
    compare_mass(p, p.batch[0], wanted.mass[0], again[0]);
  }
}

TYPED_TEST(Attend, ABadNumberStaysWithTheRowsThatSeeIt) {
  const Problem good = problem_of({.name = "bad",
                                   .kv_heads = 2,
                                   .group = 2,
                                   .key_dim = 16,
                                   .value_dim = 16,
                                   .lengths = {2100},
                                   .rows = 8,
                                   .rows_inside = true},
                                  5);
  const auto clean = run(this->be(), good)[0];
  for (const double bad : {nan, inf})
    for (const int where : {0, 1, 2}) {  // in a key, a value, a query
      if (is_small<TypeParam>() && std::isnan(bad) != (where == 1)) continue;
      Problem p = good;
      Sequence& s = p.batch[0];
      const Index place = 2095, bad_row = 5;  // seen by the rows at 2095 and later: rows 3..7
      if (where == 0) s.heads[1][static_cast<std::size_t>(place)].token.key[3] = bad;
      if (where == 1) s.heads[1][static_cast<std::size_t>(place)].token.value[3] = bad;
      if (where == 2) s.queries.at(bad_row, 2, 3) = bad;
      const auto got = run(this->be(), p)[0];
      for (Index r = 0; r < 8; ++r)
        for (Index h = 0; h < 4; ++h) {
          const bool touched =
              where == 2 ? r == bad_row && h == 2 : h >= 2 && s.positions[static_cast<std::size_t>(r)] >= place;
          bool any_bad = false, same = true;
          for (Index c = 0; c < 16; ++c) {
            any_bad = any_bad || !std::isfinite(got.out.at(r, h, c));
            same = same && got.out.at(r, h, c) == clean.out.at(r, h, c);
          }
          const std::string at = message("bad ", bad, " in ", where, ": row ", r, " head ", h);
          // An infinite logit may win the whole softmax: then the answer is a number.
          if (!touched) {
            EXPECT_TRUE(same) << at << " sees nothing bad";
          } else if (std::isnan(bad) || where == 1) {
            EXPECT_TRUE(any_bad) << at << " hides a bad number";
          }
        }
    }
}

TYPED_TEST(Attend, RowsThatSeeNothingAreZeroEvenWithSinks) {
  Problem p = problem_of({.name = "blind",
                          .kv_heads = 1,
                          .group = 2,
                          .key_dim = 8,
                          .value_dim = 8,
                          .lengths = {20},
                          .rows = 2,
                          .sinks = true,
                          .mass = MassKind::sum},
                         3);
  for (PlacedToken& t : p.batch[0].heads[0]) t.token.position += 100;
  p.batch[0].positions = {99, 105};
  const auto got = run(this->be(), p)[0];
  for (Index h = 0; h < 2; ++h) {
    EXPECT_EQ(got.lse[static_cast<std::size_t>(h)], -inf);
    for (Index c = 0; c < 8; ++c) EXPECT_EQ(got.out.at(0, h, c), 0);
  }
  compare(p, p.batch[0], oracle::attend(input_of(p, p.batch[0])), got);
}

TYPED_TEST(Attend, SoftmaxWeightsSumToOne) {  // values of 1 come back as 1, however large the logits
  Problem p = problem_of({.name = "ones",
                          .kv_heads = 1,
                          .group = 4,
                          .key_dim = 64,
                          .value_dim = 8,
                          .type = DType::f32,
                          .lengths = {3000},
                          .rows = 1},
                         9);
  for (PlacedToken& t : p.batch[0].heads[0]) std::fill(t.token.value.begin(), t.token.value.end(), 1.0);
  for (double& q : p.batch[0].queries.values) q *= 1000;
  const auto got = run(this->be(), p)[0];
  for (const double x : got.out.values) EXPECT_NEAR(x, 1, 1e-5);
}

TEST(AttendThreads, NotABitDependsOnThem) {
  const Problem p = problem_of({.name = "threads",
                                .kv_heads = 3,
                                .group = 2,
                                .key_dim = 32,
                                .value_dim = 32,
                                .lengths = {5000, 40, 2500},
                                .ragged = 900,
                                .dead = 0.2,
                                .rows = 3,
                                .mass = MassKind::sum},
                               4);
  cpu::Backend one({.threads = 1});
  const auto wanted = run(one, p);
  for (const Index threads : {2, 3, 7}) {
    cpu::Backend many({.threads = threads});
    const auto got = run(many, p);
    for (std::size_t i = 0; i < got.size(); ++i) {
      EXPECT_EQ(got[i].out_bytes, wanted[i].out_bytes) << threads;
      EXPECT_EQ(got[i].lse, wanted[i].lse) << threads;
      EXPECT_EQ(got[i].mass, wanted[i].mass) << threads;
    }
  }
}

}  // namespace
}  // namespace kvpare::test
