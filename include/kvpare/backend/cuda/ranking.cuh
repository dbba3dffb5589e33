// `reduce`, `sort_rows` and `select_top` on the device.
#pragma once

#include <stdexcept>

#include "workspace.cuh"

namespace kvpare::cuda {

template <class Work>
void reduce(Work&, std::span<const MaskedRow>, RowSummary*) {
  throw std::logic_error("reduce: not written yet");
}
template <class Work>
void sort_rows(Work&, std::span<const SortRow>) {
  throw std::logic_error("sort_rows: not written yet");
}
template <class Work>
void select_top(Work&, std::span<const TopRow>) {
  throw std::logic_error("select_top: not written yet");
}

}  // namespace kvpare::cuda
