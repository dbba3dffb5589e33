// The picture of an inspection: which tokens stay, layer by layer, and what that costs each layer.
#pragma once

#include <string>
#include <vector>

#include "inspect.hpp"

namespace inspect {

/// Draws into a .svg or .png file, with gnuplot. Throws PlotError.
void plot(const std::string& path, const std::string& title, const example::Trace& trace,
          const std::vector<Result>& results, const Options& options);

}  // namespace inspect
