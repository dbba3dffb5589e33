// The picture of a measurement, drawn by gnuplot.
#pragma once

#include "report.hpp"

namespace story {

/// Throws InvalidArgument unless the budgets have one axis: all in tokens, or all shares.
void check_one_axis(const std::vector<kvpare::Keep>& budgets);

/// Nats per token over the budget: one line per policy, levels for those without one. Throws example::PlotError.
void plot_nats(const std::string& path, const Measured& measured, const std::vector<Setting>& settings,
               const std::vector<Result>& results);

/// Nats per token over the bytes in use as a token is attended.
void plot_nats_over_bytes(const std::string& path, const Measured& measured, const std::vector<Setting>& settings,
                          const std::vector<Result>& results);

}  // namespace story
