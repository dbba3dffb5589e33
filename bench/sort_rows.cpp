// sort_rows: whole rows in descending order, with their running sums.
#include "support/run.hpp"
#include "support/score_rows.hpp"

namespace bench {
namespace {

void sort_rows(benchmark::State& state, Index rows, Index columns, Index threads) {
  ScoreRows& scores = score_rows(rows, columns, threads);
  std::vector<Index> order(static_cast<std::size_t>(rows * columns)), counts(static_cast<std::size_t>(rows));
  std::vector<double> sums(order.size());
  std::vector<kvpare::SortRow> sorted(static_cast<std::size_t>(rows));
  const auto prepare = [&](Index i) {
    for (Index r = 0; r < rows; ++r)
      sorted[static_cast<std::size_t>(r)] = {.row = {.values = scores.row(i, r), .columns = columns},
                                             .columns = order.data() + r * columns,
                                             .running_sum = sums.data() + r * columns,
                                             .count = counts.data() + r};
  };
  run(
      state, {.bytes = scores.bytes(), .tokens = scores.tokens(), .against = {of_read_bw(scores.bytes(), threads)}},
      [&](Index) { scores.backend.sort_rows(sorted); }, prepare);
}

const bool added = [] {
  for (Index columns : {2048, 32768})
    for (Index threads : {1, 2})
      add(score_label("sort_rows", 8, columns, {{"threads", threads}}),
          [=](benchmark::State& state) { sort_rows(state, 8, columns, threads); });
  return true;
}();

}  // namespace
}  // namespace bench
