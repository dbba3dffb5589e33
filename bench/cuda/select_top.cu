// select_top: the k best columns of every row, as bitmaps. 4 bytes read and 1/8 written per column; about 40 lane
// instructions (ranking.cuh).
#include "support.cuh"

namespace bench {
namespace {

void select_top(benchmark::State& state, Index rows, Index columns, Index k) {
  Device device;
  const Index words = columns / 64;
  const Index sets = std::clamp<Index>(rotation_bytes / (rows * columns * 4), 1, most_inputs);
  require_room(static_cast<double>(sets * rows * columns) * 4.2);
  const auto scores = random_array<float>(device, sets * rows * columns, 5);
  const DeviceArray<Index> wanted(device.backend, std::vector<Index>(static_cast<std::size_t>(rows), k));
  const DeviceArray<std::uint64_t> chosen(device.backend, rows * words);
  std::vector<kvpare::TopRow> tops(static_cast<std::size_t>(rows));
  const auto step = [&](Index i) {
    for (Index r = 0; r < rows; ++r)
      tops[static_cast<std::size_t>(r)] = {.scores = scores.data() + (i % sets * rows + r) * columns,
                                           .k = wanted.data() + r,
                                           .chosen = chosen.data() + r * words,
                                           .columns = columns};
    device.backend.select_top(tops);
  };
  const double numbers = static_cast<double>(rows * columns);
  measure(state, device, {numbers * 4.125, numbers}, sets, step);
}

const bool added = [] {
  struct Case {
    Index rows, columns, k;
  };
  for (const Case& c : {Case{64, 32768, 2048}, Case{1, 32768, 2048}, Case{28 * 4, 8192, 819}})
    add(kvpare::message("select_top/cuda/float/rows:", c.rows, "/N:", c.columns, "/k:", c.k),
        [=](benchmark::State& state) { select_top(state, c.rows, c.columns, c.k); });
  return true;
}();

}  // namespace
}  // namespace bench
