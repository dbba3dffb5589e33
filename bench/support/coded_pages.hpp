// Decode attention on codes, page by page, as `attend` goes: keys, softmax, values; without the cache around.
#pragma once

#include <algorithm>
#include <cstring>
#include <kvpare/backend/cpu/backend.hpp>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "rig.hpp"
#include "run.hpp"

namespace bench {

namespace cpu = kvpare::cpu;
using kvpare::Position;
using kvpare::Side;
using kvpare::TileShape;

constexpr Index coded_page_tokens = 64;

/// What pages are made of. Rows of so many pages as differ; the others are copies of these.
struct CodedSetup {
  const cpu::TileOps *keys = nullptr, *values = nullptr;
  std::vector<float> rows;                         // [64 * different pages, width]
  std::vector<Position> positions;                 // [at least the tokens of a list, and the rows]
  std::vector<float> key_state, value_state = {};  // empty: neutral
};

/// A state as a codec makes it of these rows and of queries like them.
template <class C>
std::vector<float> state_of(const std::vector<float>& rows, const std::vector<Position>& positions, Index width) {
  std::vector<float> state(static_cast<std::size_t>(kvpare::state_floats<C>(width)));
  if constexpr (kvpare::MakesState<C>) {
    const auto w = static_cast<std::size_t>(width);
    std::vector<float> low(w, std::numeric_limits<float>::infinity()), high(w, -low[0]), squares(w);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      low[i % w] = std::min(low[i % w], rows[i]), high[i % w] = std::max(high[i % w], rows[i]);
      squares[i % w] += rows[i] * rows[i];
    }
    const kvpare::Rope rope = kvpare::rope_of_base(width, 500000);
    kvpare::Measured measured;
    measured.min = measured.layer_min = low.data(), measured.max = measured.layer_max = high.data();
    measured.sum_squares = measured.query_squares = squares.data();
    measured.tokens = measured.query_vectors = static_cast<Index>(rows.size()) / width;
    measured.rows = rows.data(), measured.positions = positions.data(), measured.rope = rope.view();
    C::make_state(width, measured, state.data());
  }
  return state;
}

/// Tokens one after the other, or with gaps, as where every other one has been evicted.
template <class K, class V>
CodedSetup coded(const LayerShape& layer, Index tokens, int probability_bits = 16, Index different = 1, bool gaps = false) {
  const TileShape shape{coded_page_tokens, layer.key_dim};
  CodedSetup setup{cpu::tile_ops<K>(Side::keys, shape, probability_bits),
                   cpu::tile_ops<V>(Side::values, shape, probability_bits),
                   random_rows<float>(coded_page_tokens * different, 1, layer.key_dim),
                   {},
                   {}};
  for (Index t = 0; t < std::max(tokens, coded_page_tokens * different); ++t)
    setup.positions.push_back(static_cast<Position>(gaps ? 2 * t + t % 3 : t));
  setup.key_state = state_of<K>(setup.rows, setup.positions, layer.key_dim);
  setup.value_state = state_of<V>(setup.rows, setup.positions, layer.key_dim);
  return setup;
}

/// Pages of all heads of one layer, K and V by turns, in as many layers as the rotation takes.
class CodedPages {
 public:
  CodedPages(const LayerShape& layer, Index token_count, CodedSetup setup)
      : shape_{coded_page_tokens, layer.key_dim}, heads_(layer.kv_heads), group_(layer.group()),
        pages_(token_count / coded_page_tokens), with_(std::move(setup)),
        key_bytes_(kvpare::round_up(with_.keys->tile_bytes(shape_), 64)),
        page_bytes_(key_bytes_ + kvpare::round_up(with_.values->tile_bytes(shape_), 64)),
        layers_(std::max<Index>(2, rotation_bytes() / bytes())), backend_({.threads = 1}),
        memory_(backend_, layers_ * bytes() + page_bytes_),
        queries_(random_rows<float>(layer.q_heads, 1, layer.key_dim, 2)),
        prepared_(backend_, with_.keys->query_bytes(group_, layer.key_dim)) {
    const Index different = static_cast<Index>(with_.rows.size()) / (coded_page_tokens * shape_.width);
    for (Index page = 0; page < layers_ * heads_ * pages_; ++page) {
      std::byte* at = memory_.data() + page * page_bytes_;
      if (page >= different) {
        std::copy_n(memory_.data() + page % different * page_bytes_, page_bytes_, at);
        continue;
      }
      for (const Side side : {Side::keys, Side::values}) encode(side, page);
    }
    for (Index t = 0; t < coded_page_tokens; ++t) slots_[t] = static_cast<std::uint8_t>(t);
  }

  Index bytes() const { return heads_ * pages_ * page_bytes_; }  // of a layer
  const std::byte* first_tile(Side side) const { return memory_.data() + (side == Side::keys ? 0 : key_bytes_); }

  /// One token's attention in one layer.
  void step(Index i) {
    constexpr Index stretch_pages = 32;  // `attend` prepares queries anew for every stretch
    const std::byte* at = memory_.data() + i % layers_ * bytes();
    for (Index h = 0; h < heads_; ++h) {
      std::fill_n(peak_, group_, -std::numeric_limits<float>::infinity());
      std::fill_n(sum_, group_, 0.0f);
      for (Index p = 0; p < pages_; ++p, at += page_bytes_) {
        if (p % stretch_pages == 0)
          with_.keys->prepare_query(kernels_, queries_.data() + h * group_ * shape_.width, shape_.width, group_, shape_.width,
                                    state(Side::keys), prepared_.data());
        const std::byte* next = at + page_bytes_;
        with_.keys->score(kernels_, prepared_.data(), group_, rows(Side::keys, at, p), {next, key_bytes_}, scores_,
                          coded_page_tokens);
        kernels_.running_softmax(scores_, coded_page_tokens, group_, coded_page_tokens, peak_, sum_, alpha_);
        with_.values->accumulate(kernels_, scores_, coded_page_tokens, alpha_, group_, rows(Side::values, at + key_bytes_, p),
                                 {next + key_bytes_, page_bytes_ - key_bytes_}, acc_, shape_.width);
      }
      if (with_.values->folds)
        with_.values->finish_output(group_, shape_.width, state(Side::values), sum_, acc_, shape_.width);
      benchmark::DoNotOptimize(acc_);
    }
  }

  /// One side of a whole page of one head, of the rows that it has.
  void encode(Side side, Index page) {
    const kvpare::TokenFacts facts{with_.positions.data() + page * coded_page_tokens, nullptr};
    ops(side).encode(kernels_, shape_, with_.rows.data() + page * coded_page_tokens * shape_.width, 0, coded_page_tokens,
                     facts, state(side), tile(side, page));
    benchmark::DoNotOptimize(memory_.data());
  }
  /// One token of every head, keys and values.
  void append(Index slot) {
    for (Index h = 0; h < heads_; ++h)
      for (const Side side : {Side::keys, Side::values})
        ops(side).encode(kernels_, shape_, queries_.data() + h * group_ * shape_.width, slot, 1, {}, state(side),
                         tile(side, h * pages_));
  }

 private:
  const cpu::TileOps& ops(Side side) const { return side == Side::keys ? *with_.keys : *with_.values; }
  const float* state(Side side) const {
    const auto& of = side == Side::keys ? with_.key_state : with_.value_state;
    return of.empty() ? nullptr : of.data();
  }
  std::byte* tile(Side side, Index page) { return memory_.data() + page * page_bytes_ + (side == Side::keys ? 0 : key_bytes_); }
  cpu::TileRows rows(Side side, const std::byte* at, Index page) const {
    return {at,   shape_, state(side), slots_, static_cast<int>(coded_page_tokens),
            true, with_.positions.data() + page * coded_page_tokens};
  }

  const cpu::Kernels& kernels_ = cpu::kernels(cpu::chosen_isa());
  TileShape shape_;
  Index heads_, group_, pages_;
  CodedSetup with_;
  Index key_bytes_, page_bytes_, layers_;
  cpu::Backend backend_;
  kvpare::Buffer<cpu::Backend, std::byte> memory_;
  std::vector<float> queries_;
  kvpare::Buffer<cpu::Backend, std::byte> prepared_;
  std::uint8_t slots_[coded_page_tokens] = {};
  alignas(64) float scores_[8 * coded_page_tokens], acc_[8 * 256];
  float peak_[8], sum_[8], alpha_[8];
};

/// Pages, and beside them others, each with its share of what they are measured by.
struct Beside {
  std::unique_ptr<CodedPages> pages;
  std::vector<std::pair<double, std::unique_ptr<CodedPages>>> others;
};
template <class Make>  // Beside(const LayerShape&, Index tokens)
void add_beside(const std::string& name, const char* counter, const Make& make) {
  for (const Index tokens : {1024, 4096, 16384, 32768}) {
    const LayerShape shape = llama_8b();
    const std::string text =
        kvpare::message(name, "/Q:", shape.q_heads, "/H:", shape.kv_heads, "/D:", shape.key_dim, "/N:", tokens, "/threads:1");
    add(text, [=](benchmark::State& state) {
      auto& rig = kept(text, [&] { return std::make_unique<Beside>(make(shape, tokens)); });
      std::vector<std::vector<double>> alone(rig.others.size());
      const double bytes = static_cast<double>(rig.pages->bytes());
      const double seconds = run(
          state, {.bytes = bytes, .tokens = static_cast<double>(tokens), .against = {of_read_bw(bytes, 1)}},
          [&](Index i) { rig.pages->step(i); },
          [&](Index i) {
            for (std::size_t o = 0; o < alone.size(); ++o)
              alone[o].push_back(seconds_of([&] { rig.others[o].second->step(i); }));
          });
      double sum = 0;
      for (std::size_t o = 0; o < alone.size(); ++o) sum += rig.others[o].first * median(alone[o]);
      state.counters[counter] = seconds / sum;
    });
  }
}
template <class K, class V, class PlainK, class PlainV>
void add_beside(const std::string& name, const char* counter, Index different = 1, bool gaps = false) {
  add_beside(name, counter, [=](const LayerShape& shape, Index tokens) {
    Beside rig{std::make_unique<CodedPages>(shape, tokens, coded<K, V>(shape, tokens, 16, different, gaps)), {}};
    rig.others.emplace_back(1, std::make_unique<CodedPages>(shape, tokens, coded<PlainK, PlainV>(shape, tokens)));
    return rig;
  });
}

/// Tokens of one head's keys, and of its values, by whole pages.
template <class K, class V>
void add_encode(const std::string& name, Index different = 1) {
  for (const Side side : {Side::keys, Side::values})
    add(kvpare::message(name, side == Side::keys ? "/keys" : "/values", "/H:1/D:128/N:64/threads:1"),
        [=](benchmark::State& state) {
          CodedPages pages(llama_8b(), 1024, coded<K, V>(llama_8b(), 1024, 16, different));
          run(state, {.tokens = static_cast<double>(coded_page_tokens)},
              [&](Index i) { pages.encode(side, i % different); });
        });
}

}  // namespace bench
