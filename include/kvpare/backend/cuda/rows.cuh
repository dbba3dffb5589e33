// Rows of keys and values on the device: `append`, `compact`, `encode`, `repack`, `gather`, `statistics`, raw or coded.
#pragma once

#include <stdexcept>

#include "codecs.cuh"

namespace kvpare::cuda {

/// One side of some slots of a page as floats, raw or coded.
struct ReadJob {
  const PageGeometry* geometry = nullptr;  // host
  Side side = Side::keys;
  PageId page = 0;
  const float* state = nullptr;  // of that side
  std::uint64_t slots = 0;
  float* out = nullptr;  // the n-th set slot goes to out + n * out_stride
  Index out_stride = 0;
};

/// Reads rows of any forms as floats: one launch per form among the jobs.
template <class Work>
void read_rows(Work&, TileShape, std::span<const ReadJob>) {
  throw std::logic_error("read_rows: not written yet");
}

template <class Work>
void append(Work&, const AppendArguments&) {
  throw std::logic_error("append: not written yet");
}
template <class Work>
void compact(Work&, std::span<const CompactList>) {
  throw std::logic_error("compact: not written yet");
}
template <class Work>
void encode(Work&, std::span<const EncodeList>) {
  throw std::logic_error("encode: not written yet");
}
template <class Work>
void repack(Work&, std::span<const RepackTile>, RepackTo) {
  throw std::logic_error("repack: not written yet");
}
template <class Work>
void gather(Work&, std::span<const GatherRow>) {
  throw std::logic_error("gather: not written yet");
}
template <class Work>
void statistics(Work&, std::span<const StatisticsRow>) {
  throw std::logic_error("statistics: not written yet");
}

}  // namespace kvpare::cuda
