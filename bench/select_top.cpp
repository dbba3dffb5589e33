// select_top: the k best of each row, beside the standard library's way.
#include "support/run.hpp"
#include "support/score_rows.hpp"

namespace bench {
namespace {

/// Indices of the k largest, ascending: nth_element, then sort.
void nth_element_top(const float* scores, Index columns, Index k, std::vector<std::int32_t>& order) {
  order.resize(static_cast<std::size_t>(columns));
  std::iota(order.begin(), order.end(), 0);
  std::nth_element(order.begin(), order.begin() + k, order.end(),
                   [&](std::int32_t a, std::int32_t b) { return scores[a] > scores[b]; });
  order.resize(static_cast<std::size_t>(k));
  std::sort(order.begin(), order.end());
}

void select_top(benchmark::State& state, Index rows, Index columns, Index k, Index threads) {
  ScoreRows& scores = score_rows(rows, columns, threads);
  const Index words = columns / 64;
  std::vector<std::uint64_t> chosen(static_cast<std::size_t>(rows * words));
  std::vector<kvpare::TopRow> tops(static_cast<std::size_t>(rows));
  std::vector<std::int32_t> order;
  std::vector<double> by_nth_element;
  const auto prepare = [&](Index i) {
    for (Index r = 0; r < rows; ++r)
      tops[static_cast<std::size_t>(r)] = {
          .scores = scores.row(i, r), .k = &k, .chosen = chosen.data() + r * words, .columns = columns};
    by_nth_element.push_back(seconds_of([&] {
      for (Index r = 0; r < rows; ++r) nth_element_top(scores.row(i + scores.sets / 2, r), columns, k, order);
    }));
    benchmark::DoNotOptimize(order.data());
  };
  const double seconds = run(
      state, {.bytes = scores.bytes(), .tokens = scores.tokens(), .against = {of_read_bw(scores.bytes(), threads)}},
      [&](Index) { scores.backend.select_top(tops); }, prepare);
  state.counters["times_nth_element"] = median(by_nth_element) / seconds;  // whose time is that of one thread
}

const bool added = [] {
  for (const auto& [columns, k] : {std::pair<Index, Index>{2048, 256}, {32768, 2048}})
    for (Index threads : {1, 2})
      add(score_label("select_top", 8, columns, {{"k", k}, {"threads", threads}}),
          [=, columns = columns, k = k](benchmark::State& state) { select_top(state, 8, columns, k, threads); });
  return true;
}();

}  // namespace
}  // namespace bench
