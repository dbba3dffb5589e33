// One byte budget over eviction and precision: the plan against the formula, worked out from the rows that were given.
#include <gtest/gtest.h>

#include <kvpare/codec/group.hpp>
#include <kvpare/codec/round_trip.hpp>
#include <kvpare/kvpare.hpp>
#include <map>
#include <numeric>

#include "support/inputs.hpp"

namespace kvpare::test {
namespace {

using Int4 = Symmetric<4, 16>;
using Int2 = Affine<2, 16>;
using Listed = Formats<Pair<Raw<float>, Raw<float>>, Pair<Int4, Int4>, Pair<Int2, Int2>>;
enum : int { raw, int4, int2 };

class JointPlan : public ::testing::Test {
 public:
  static constexpr Index tokens = 60, page = 16, kv_heads = 4, group = 2, width = 32;  // four pages: all are measured
  static constexpr float scale = 0.25f;

  static LayerShape shape() {
    return {.q_heads = kv_heads * group, .kv_heads = kv_heads, .key_dim = width, .value_dim = width, .scale = scale};
  }

  cpu::Backend be{{.threads = 1}};
  KvCache<cpu::Backend, Listed> cache{be, Model{{shape()}}, {.page_tokens = page, .pool_bytes = 1 << 20}};
  SequenceId id = cache.create();
  oracle::Array3 keys{tokens, kv_heads, width}, values{tokens, kv_heads, width}, queries{tokens, kv_heads * group, width};
  std::vector<Position> positions = std::vector<Position>(tokens);

  /// `sharpness` scales the queries, so that logits lie within or far beyond 1 of each other.
  void fill(const AnyCompressor& method, double sharpness, std::uint64_t seed) {
    Dice dice{seed};
    keys = random_array(dice, tokens, kv_heads, width, DType::f32, 2);
    values = random_array(dice, tokens, kv_heads, width, DType::f32);
    queries = random_array(dice, tokens, kv_heads * group, width, DType::f32, sharpness);
    std::iota(positions.begin(), positions.end(), 0);
    give(method);
  }

  /// `tokens` more of them from position `first` on, and queries that look at them: each is the key of its own position.
  void append_and_observe(Dice& dice, Index first, const AnyCompressor& method) {
    std::iota(positions.begin(), positions.end(), static_cast<Position>(first));
    keys = random_array(dice, tokens, kv_heads, width, DType::f32, 2);
    values = random_array(dice, tokens, kv_heads, width, DType::f32);
    for (Index t = 0; t < tokens; ++t)
      for (Index head = 0; head < kv_heads * group; ++head)
        for (Index c = 0; c < width; ++c) queries.at(t, head, c) = keys.at(t, head / group, c);
    give(method);
  }
  void give(const AnyCompressor& method) {
    const TensorBuffer<cpu::Backend> k(be, keys, DType::f32), v(be, values, DType::f32), q(be, queries, DType::f32);
    ASSERT_EQ(cache.append(id, 0, k.tensor(), v.tensor(), positions), Outcome::done);
    cache.observe(id, 0, method, q.tensor(), positions);
  }

  static std::vector<float> rows_of(const oracle::Array3& all, Index head) {
    std::vector<float> rows;
    for (Index t = 0; t < tokens; ++t)
      for (Index c = 0; c < width; ++c) rows.push_back(static_cast<float>(all.at(t, head, c)));
    return rows;
  }

  /// c_f: values by their spread, logits by theirs where it is above 1.
  template <class C>
  double error_of(Index head) const {
    const std::vector<float> k = rows_of(keys, head), v = rows_of(values, head);
    const std::vector<float> coded_k = round_trip<C>(k, width, page), coded_v = round_trip<C>(v, width, page);
    double value_error = 0, value_spread = 0, logit_error = 0, logit_spread = 0;
    for (Index c = 0; c < width; ++c) {
      double q_square = 0, k_mean = 0, v_mean = 0;
      for (Index t = 0; t < tokens; ++t) {
        for (Index g = 0; g < group; ++g) q_square += std::pow(queries.at(t, head * group + g, c), 2) / (tokens * group);
        k_mean += keys.at(t, head, c) / tokens, v_mean += values.at(t, head, c) / tokens;
      }
      for (Index t = 0; t < tokens; ++t) {
        const auto at = static_cast<std::size_t>(t * width + c);
        const double dk = static_cast<double>(coded_k[at]) - keys.at(t, head, c);
        const double dv = static_cast<double>(coded_v[at]) - values.at(t, head, c);
        logit_error += q_square * scale * scale * dk * dk / tokens;
        logit_spread += q_square * scale * scale * std::pow(keys.at(t, head, c) - k_mean, 2) / tokens;
        value_error += dv * dv, value_spread += std::pow(values.at(t, head, c) - v_mean, 2);
      }
    }
    return std::min(1.0, value_error / value_spread + logit_error / std::max(1.0, logit_spread));
  }

  struct Expected {
    std::vector<std::map<int, std::vector<Position>>> tokens;  // [head][format]
    Index bytes = 0;
  };
  Expected expected(const AnyCompressor& method, double trust, Index budget) {
    const LayerScores scores = cache.scores(id, 0, method);
    std::vector<BudgetList> lists;
    std::vector<std::vector<Position>> orders;
    const double n = tokens;
    for (Index h = 0; h < kv_heads; ++h) {
      std::vector<double> a(scores.values[static_cast<std::size_t>(h)].begin(), scores.values[static_cast<std::size_t>(h)].end());
      const double sum = std::accumulate(a.begin(), a.end(), 0.0);
      for (double& x : a) x /= sum;
      std::vector<Position>& order = orders.emplace_back(positions);
      std::stable_sort(order.begin(), order.end(), [&](Position x, Position y) {
        return a[static_cast<std::size_t>(x)] > a[static_cast<std::size_t>(y)];
      });
      const double squares = std::inner_product(a.begin(), a.end(), a.begin(), 0.0);
      BudgetList list;
      // The cost of evicting order[i], order[i + 1], ...: trust (Σ a)² + (1 - trust) (count / n)² + Σ A.
      const auto evicted_from = [&](std::size_t i) {
        double mass = 0, weights = 0;
        for (std::size_t j = i; j < order.size(); ++j) {
          const double x = a[static_cast<std::size_t>(order[j])];
          mass += x, weights += trust * x * x + (1 - trust) * squares / n;
        }
        const double share = static_cast<double>(order.size() - i) / n;
        return trust * mass * mass + (1 - trust) * share * share + weights;
      };
      for (std::size_t i = 0; i < order.size(); ++i) {
        const double x = a[static_cast<std::size_t>(order[i])];
        list.weights.push_back(trust * x * x + (1 - trust) * squares / n);
        list.losses.push_back(evicted_from(i) - evicted_from(i + 1));
      }
      list.forms = {{Pair<Raw<float>, Raw<float>>::page_bytes(page, width, width), 0},
                    {Pair<Int4, Int4>::page_bytes(page, width, width), error_of<Int4>(h)},
                    {Pair<Int2, Int2>::page_bytes(page, width, width), error_of<Int2>(h)}};
      lists.push_back(list);
    }
    const BudgetSplit split = split_bytes(lists, page, budget);
    Expected e{{}, split.bytes};
    for (std::size_t h = 0; h < lists.size(); ++h) {
      auto& of_head = e.tokens.emplace_back();
      auto next = orders[h].begin();
      for (const int format : {raw, int4, int2}) {
        const auto end = next + split.counts[h][static_cast<std::size_t>(format)];
        of_head[format].assign(next, end);
        std::sort(of_head[format].begin(), of_head[format].end());
        next = end;
      }
    }
    return e;
  }

  std::vector<std::map<int, std::vector<Position>>> held() const {
    std::vector<std::map<int, std::vector<Position>>> all;
    for (const HeadPages& list : cache.pages(id, 0)) {
      auto& of_head = all.emplace_back();
      for (const int format : {raw, int4, int2}) of_head[format];
      for (const Entry& entry : list.entries)
        for_each_bit(entry.live, [&](Index slot) { of_head[entry.format].push_back(list.position(entry, slot)); });
      for (auto& [format, at] : of_head) std::sort(at.begin(), at.end());
    }
    return all;
  }
};

TEST_F(JointPlan, IsThatOfTheFormula) {
  std::map<int, Index> used;
  for (const double sharpness : {0.3, 6.0})  // logits that differ by less than 1, and by much more
    for (const double trust : {0.0, 0.4, 1.0})
      for (Index budget = 3000; budget < 24000; budget += 750) {
        SCOPED_TRACE(message("sharpness ", sharpness, " trust ", trust, " budget ", budget));
        const auto method = make_compressor(
            message("h2o(keep=", budget, "B, among=all) + joint(forms=int4_g16+int2_g16_min, trust=", trust, ")"));
        id = cache.create();
        fill(method, sharpness, static_cast<std::uint64_t>(budget) + 1);
        const Expected e = expected(method, trust, budget);
        const CompressReport r = cache.compress(id, method);
        EXPECT_EQ(held(), e.tokens);
        EXPECT_EQ(r.page_bytes_after, e.bytes);
        EXPECT_LE(e.bytes, budget);
        for (const auto& of_head : e.tokens)
          for (const auto& [format, at] : of_head) used[format] += std::ssize(at);
        cache.release(id);
      }
  for (const int format : {raw, int4, int2}) EXPECT_GT(used[format], 0) << format;
}

TEST_F(JointPlan, FormsAreMeasuredOnTokensAsAppended) {
  // Four lots, all in 2 bits; a fifth one that the queries look at, in as many bytes as all five take in 2 bits. It is worth
  // the bytes of the older ones. Coded rows that are coded again lose next to nothing: measured on them, 2 bits would do.
  const Index lot = kv_heads * ceil_div(tokens, page) * Pair<Int2, Int2>::page_bytes(page, width, width);
  const auto method = [&](Index budget, const char* evict) {
    return make_compressor(message("snap_kv(window=60, pool=1, keep=", budget, "B, among=all) + joint(forms=int2_g16_min, trust=1, evict=",
                                   evict, ")"));
  };
  Dice dice{11};
  for (Index n = 0; n < 5; ++n) {
    const auto now = n < 4 ? method(lot * (n + 1), "no") : method(lot * 5, "yes");
    append_and_observe(dice, n * tokens, now);
    cache.compress(id, now);
  }
  Index raw_of_last = 0;
  for (const auto& of_head : held())
    for (const Position p : of_head.at(raw)) raw_of_last += p >= 4 * tokens;
  EXPECT_GT(raw_of_last, 0);
}

TEST_F(JointPlan, TokensThatWereCodedMakeRoomForNewOnes) {
  const Index budget = 12000;
  const auto method =
      make_compressor(message("snap_kv(window=60, pool=1, keep=", budget, "B, among=all) + joint(forms=int4_g16+int2_g16_min)"));
  Dice dice{9};
  const auto held_forms = [&] {
    std::map<int, Index> count;
    for (const auto& of_head : held())
      for (const auto& [format, at] : of_head) count[format] += std::ssize(at);
    return count;
  };
  for (Index first = 0; first < 10 * tokens; first += tokens) {
    append_and_observe(dice, first, method);
    const Plan plan = cache.plan(id, method);
    const CompressReport r = cache.commit(plan);
    ASSERT_LE(r.page_bytes_after, plan.promised_bytes);  // new codes fill up pages
    ASSERT_LE(plan.promised_bytes, budget);
    ASSERT_EQ(cache.pool().stats().bytes_in_use, r.page_bytes_after);
  }
  Index of_last = 0, all = 0;
  for (const auto& of_head : held())
    for (const auto& [format, at] : of_head)
      for (const Position p : at) of_last += p >= 9 * tokens, ++all;
  EXPECT_GT(of_last, all / 2);
  EXPECT_GT(held_forms()[int4] + held_forms()[int2], 0);
}

}  // namespace
}  // namespace kvpare::test
