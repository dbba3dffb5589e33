// Rows of scores for the verbs that rank and sum them: more than the last-level cache holds.
#pragma once

#include "rig.hpp"

namespace bench {

struct ScoreRows {
  ScoreRows(Index row_count, Index column_count, Index threads)
      : rows(row_count), columns(column_count),
        sets(std::max<Index>(2, rotation_bytes() / (rows * columns * static_cast<Index>(sizeof(float))))),
        scores(random_rows<float>(sets, rows, columns)), backend({.threads = threads}) {}

  /// Row `row` of the i-th set, in turns.
  const float* row(Index i, Index row) const { return scores.data() + (i % sets * rows + row) * columns; }
  double bytes() const { return static_cast<double>(rows * columns) * sizeof(float); }
  double tokens() const { return static_cast<double>(rows * columns); }

  Index rows, columns, sets;
  std::vector<float> scores;
  kvpare::cpu::Backend backend;
};

inline ScoreRows& score_rows(Index rows, Index columns, Index threads) {
  return kept(kvpare::message("scores ", rows, "x", columns, " ", threads),
              [&] { return std::make_unique<ScoreRows>(rows, columns, threads); });
}

/// "select_top/cpu/float/rows:8/N:32768/threads:1"
inline std::string score_label(std::string_view verb, Index rows, Index columns, Settings settings) {
  std::string text = kvpare::message(verb, "/cpu/float/rows:", rows, "/N:", columns);
  for (const auto& [name, value] : settings) text += kvpare::message("/", name, ":", value);
  return text;
}

}  // namespace bench
