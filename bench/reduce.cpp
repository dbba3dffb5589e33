// reduce: sum, moments, extremes and their place, per row of scores.
#include "support/run.hpp"
#include "support/score_rows.hpp"

namespace bench {
namespace {

void reduce(benchmark::State& state, Index rows, Index columns, Index threads) {
  ScoreRows& scores = score_rows(rows, columns, threads);
  std::vector<kvpare::RowSummary> out(static_cast<std::size_t>(rows));
  std::vector<kvpare::MaskedRow> masked(static_cast<std::size_t>(rows));
  const auto prepare = [&](Index i) {
    for (Index r = 0; r < rows; ++r)
      masked[static_cast<std::size_t>(r)] = {.values = scores.row(i, r), .columns = columns};
  };
  run(
      state, {.bytes = scores.bytes(), .tokens = scores.tokens(), .against = {of_read_bw(scores.bytes(), threads)}},
      [&](Index) { scores.backend.reduce(masked, out.data()); }, prepare);
}

const bool added = [] {
  for (Index columns : {2048, 32768})
    for (Index threads : {1, 2})
      add(score_label("reduce", 8, columns, {{"threads", threads}}),
          [=](benchmark::State& state) { reduce(state, 8, columns, threads); });
  return true;
}();

}  // namespace
}  // namespace bench
