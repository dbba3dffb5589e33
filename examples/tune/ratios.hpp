// Layer budgets once for a model: how much of each layer PrefixKV keeps of prompts like those to come.
#pragma once

#include <iosfwd>
#include <kvpare/policy/budget/layer_ratios.hpp>
#include <span>
#include <vector>

#include "support/trace.hpp"

namespace tune {

/// Tokens kept by tokens given, layer by layer, when `prefix_kv(keep)` compresses this prompt.
std::vector<double> layer_ratios(const example::Trace& trace, double keep);

/// A file that kvpare::read_compressor takes: prefix_kv with these ratios.
void write_ratios(std::ostream& out, const kvpare::Ratios& ratios, double keep, std::size_t prompts);

}  // namespace tune
