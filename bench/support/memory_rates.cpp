// The yardsticks of memory: how fast this machine reads and copies.
#include <cstdint>
#include <cstring>
#include <deque>

#include <benchmark/benchmark.h>
#include <kvpare/backend/cpu/backend.hpp>

#include "timing.hpp"
#include "yardstick.hpp"

namespace bench {

namespace {

constexpr Index piece_bytes = 1 << 20;  // timed as one

// Memory of the kind that caches live in, so that both see the same pages.
std::byte* touched_memory(int value) {
  static kvpare::cpu::Backend backend({.threads = 1});
  static std::deque<kvpare::Buffer<kvpare::cpu::Backend, std::byte>> buffers;
  std::byte* memory = buffers.emplace_back(backend, rotation_bytes()).data();
  std::memset(memory, value, static_cast<std::size_t>(rotation_bytes()));
  return memory;
}

std::byte* source() {
  static std::byte* const memory = touched_memory(1);
  return memory;
}
std::byte* destination() {
  static std::byte* const memory = touched_memory(2);
  return memory;
}

// One loop for every instruction set: a vector of a whole cache line is as many registers as the set needs. `streams`
// places are read side by side, `ahead` bytes before their use they are prefetched.
using Line = std::uint64_t __attribute__((vector_size(64)));

template <int streams, Index ahead>
inline __attribute__((always_inline)) std::uint64_t read_lines(const std::byte* from) {
  constexpr int lines = 8 / streams;
  constexpr Index stream_bytes = piece_bytes / streams;
  Line joined[8] = {};
  for (Index at = 0; at < stream_bytes; at += lines * 64)
#pragma GCC unroll 8
    for (int s = 0; s < streams; ++s)
#pragma GCC unroll 8
      for (int l = 0; l < lines; ++l) {
        const std::byte* place = from + s * stream_bytes + at + l * 64;
        if constexpr (ahead > 0) __builtin_prefetch(place + ahead);
        Line line;
        std::memcpy(&line, place, sizeof line);
        joined[s * lines + l] |= line;
      }
  std::uint64_t all = 0;
  for (const Line& line : joined)
    for (int i = 0; i < 8; ++i) all |= line[i];
  return all;
}

using ReadPiece = std::uint64_t (*)(const std::byte*);

template <int streams, Index ahead>
std::uint64_t read_plain(const std::byte* from) {
  return read_lines<streams, ahead>(from);
}
#if KVPARE_HAS_X86_SETS
template <int streams, Index ahead>
__attribute__((target("avx2"))) std::uint64_t read_avx2(const std::byte* from) {
  return read_lines<streams, ahead>(from);
}
template <int streams, Index ahead>
__attribute__((target("avx512f"))) std::uint64_t read_avx512(const std::byte* from) {
  return read_lines<streams, ahead>(from);
}
#endif

// The same for rows that lie apart.
inline __attribute__((always_inline)) std::uint64_t read_each(std::span<const std::byte* const> rows, Index row_bytes) {
  Line joined[4] = {};
  for (const std::byte* row : rows)
    for (Index at = 0; at < row_bytes; at += 256)
#pragma GCC unroll 4
      for (int l = 0; l < 4; ++l) {
        Line line;
        std::memcpy(&line, row + at + l * 64, sizeof line);
        joined[l] |= line;
      }
  const Line all = joined[0] | joined[1] | joined[2] | joined[3];
  return all[0] | all[1] | all[2] | all[3] | all[4] | all[5] | all[6] | all[7];
}

std::uint64_t read_each_plain(std::span<const std::byte* const> rows, Index row_bytes) {
  return read_each(rows, row_bytes);
}
#if KVPARE_HAS_X86_SETS
__attribute__((target("avx512f"))) std::uint64_t read_each_avx512(std::span<const std::byte* const> rows,
                                                                  Index row_bytes) {
  return read_each(rows, row_bytes);
}
#endif

double read_rate_of(ReadPiece read, Index threads) {
  const Index pieces = rotation_bytes() / piece_bytes / threads;
  const std::byte* from = source();
  return rate_of(threads, pieces, piece_bytes, [&](Index thread, Index piece) {
    benchmark::DoNotOptimize(read(from + (thread * pieces + piece) * piece_bytes));
  });
}

ReadPiece fastest_read() {
  std::vector<ReadPiece> loops = {read_plain<1, 0>, read_plain<4, 0>, read_plain<4, 1024>};
#if KVPARE_HAS_X86_SETS
  if (kvpare::cpu::supports(kvpare::cpu::Isa::avx2))
    loops.insert(loops.end(), {read_avx2<1, 0>, read_avx2<4, 0>, read_avx2<4, 1024>});
  if (kvpare::cpu::supports(kvpare::cpu::Isa::avx512))
    loops.insert(loops.end(), {read_avx512<1, 0>, read_avx512<4, 0>, read_avx512<4, 1024>});
#endif
  return *std::max_element(loops.begin(), loops.end(),
                           [](ReadPiece a, ReadPiece b) { return read_rate_of(a, 1) < read_rate_of(b, 1); });
}

}  // namespace

Index& rotation_bytes() {
  static Index bytes = Index{512} << 20;
  return bytes;
}

double read_rate(Index threads) {
  static const ReadPiece fastest = fastest_read();
  return read_rate_of(fastest, threads);
}

void read_rows(std::span<const std::byte* const> rows, Index row_bytes) {
#if KVPARE_HAS_X86_SETS
  if (kvpare::cpu::supports(kvpare::cpu::Isa::avx512))
    return benchmark::DoNotOptimize(read_each_avx512(rows, row_bytes));
#endif
  benchmark::DoNotOptimize(read_each_plain(rows, row_bytes));
}

double copy_rate(Index threads) {
  const Index pieces = rotation_bytes() / piece_bytes / threads;
  const std::byte* from = source();
  std::byte* to = destination();
  return rate_of(threads, pieces, 2.0 * piece_bytes, [&](Index thread, Index piece) {
    const Index at = (thread * pieces + piece) * piece_bytes;
    std::memcpy(to + at, from + at, piece_bytes);
  });
}

}  // namespace bench
