// Decode attention on pages of tokens in several numbers of bits (QAQ), against pages of each of these alone.
#include <limits>

#include <kvpare/backend/cpu/tiles.hpp>
#include <kvpare/codec/group.hpp>
#include <kvpare/codec/qaq.hpp>

#include "support/rig.hpp"
#include "support/run.hpp"

namespace {

using namespace bench;
using kvpare::Affine;
using kvpare::Qaq;
using kvpare::QaqSide;
using kvpare::Side;
using kvpare::TileShape;
namespace cpu = kvpare::cpu;

constexpr Index page_tokens = 64;

/// Pages of all heads of one layer, K and V by turns, in as many layers as the rotation takes. Half of the tokens of
/// a page have a range four times that of the others.
class Pages {
 public:
  template <class K, class V>
  static std::unique_ptr<Pages> of(const LayerShape& layer, Index token_count) {
    const TileShape shape{page_tokens, layer.key_dim};
    return std::make_unique<Pages>(layer, token_count, cpu::tile_ops<K>(Side::keys, shape, 16),
                                   cpu::tile_ops<V>(Side::values, shape, 16));
  }
  Pages(const LayerShape& layer, Index token_count, const cpu::TileOps* keys, const cpu::TileOps* values)
      : shape_{page_tokens, layer.key_dim}, heads_(layer.kv_heads), group_(layer.group()),
        pages_(token_count / page_tokens), keys_(keys), values_(values),
        key_bytes_(kvpare::round_up(keys_->tile_bytes(shape_), 64)),
        page_bytes_(key_bytes_ + kvpare::round_up(values_->tile_bytes(shape_), 64)),
        layers_(std::max<Index>(2, rotation_bytes() / bytes())), backend_({.threads = 1}),
        memory_(backend_, layers_ * bytes() + page_bytes_),
        queries_(random_rows<float>(layer.q_heads, 1, layer.key_dim, 2)),
        prepared_(backend_, keys_->query_bytes(group_, layer.key_dim)) {
    constexpr Index different = 16;  // pages; the others are copies
    for (Index page = 0; page < layers_ * heads_ * pages_; ++page) {
      std::byte* at = memory_.data() + page * page_bytes_;
      if (page < different)
        encode(at, static_cast<std::uint64_t>(page));
      else
        std::copy_n(memory_.data() + page % different * page_bytes_, page_bytes_, at);
    }
    for (Index t = 0; t < page_tokens; ++t) slots_[t] = static_cast<std::uint8_t>(t);
  }

  /// Of a layer.
  Index bytes() const { return heads_ * pages_ * page_bytes_; }
  const std::byte* first_tile(Side side) const { return memory_.data() + (side == Side::keys ? 0 : key_bytes_); }

  void step(Index i) {
    const std::byte* at = memory_.data() + i % layers_ * bytes();
    for (Index h = 0; h < heads_; ++h) {
      keys_->prepare_query(kernels_, queries_.data() + h * group_ * shape_.width, shape_.width, group_, shape_.width,
                           nullptr, prepared_.data());
      std::fill_n(peak_, group_, -std::numeric_limits<float>::infinity());
      std::fill_n(sum_, group_, 0.0f);
      for (Index p = 0; p < pages_; ++p, at += page_bytes_) {
        const std::byte* next = at + page_bytes_;
        keys_->score(kernels_, prepared_.data(), group_, rows(at), {next, key_bytes_}, scores_, page_tokens);
        kernels_.running_softmax(scores_, page_tokens, group_, page_tokens, peak_, sum_, alpha_);
        values_->accumulate(kernels_, scores_, page_tokens, alpha_, group_, rows(at + key_bytes_),
                            {next + key_bytes_, page_bytes_ - key_bytes_}, acc_, shape_.width);
      }
      benchmark::DoNotOptimize(acc_);
    }
  }

  /// One page, keys and values, of rows that are all different.
  void encode(std::byte* at, std::uint64_t seed) {
    auto rows = random_rows<float>(page_tokens, 1, shape_.width, seed + 10);
    for (Index t = 0; t < page_tokens; ++t)
      if ((static_cast<std::uint64_t>(t) * 7 + seed) % 4 < 2)
        for (Index c = 0; c < shape_.width; ++c) rows[static_cast<std::size_t>(t * shape_.width + c)] *= 4;
    encode(at, rows.data());
  }
  void encode(std::byte* at, const float* rows) {
    keys_->encode(kernels_, shape_, rows, 0, page_tokens, {}, nullptr, at);
    values_->encode(kernels_, shape_, rows, 0, page_tokens, {}, nullptr, at + key_bytes_);
  }
  void encode_first(const float* rows) { encode(memory_.data(), rows); }

 private:
  cpu::TileRows rows(const std::byte* tile) const {
    return {tile, shape_, nullptr, slots_, static_cast<int>(page_tokens), true, nullptr};
  }

  const cpu::Kernels& kernels_ = cpu::kernels(cpu::chosen_isa());
  TileShape shape_;
  Index heads_, group_, pages_;
  const cpu::TileOps* keys_;
  const cpu::TileOps* values_;
  Index key_bytes_, page_bytes_, layers_;
  cpu::Backend backend_;
  kvpare::Buffer<cpu::Backend, std::byte> memory_;
  std::vector<float> queries_;
  kvpare::Buffer<cpu::Backend, std::byte> prepared_;
  std::uint8_t slots_[page_tokens] = {};
  alignas(64) float scores_[8 * page_tokens], acc_[8 * 256];
  float peak_[8], sum_[8], alpha_[8];
};

/// QAQ's pages, and beside them pages of each number of bits that theirs have.
struct Rig {
  std::unique_ptr<Pages> pages;
  std::vector<std::unique_ptr<Pages>> parts;
  std::vector<double> shares;

  template <class K, class V>
  static std::unique_ptr<Rig> of(const LayerShape& layer, Index tokens) {
    auto rig = std::make_unique<Rig>();
    rig->pages = Pages::of<K, V>(layer, tokens);
    const TileShape shape{page_tokens, layer.key_dim};
    double share[9] = {};
    std::uint8_t bits[kvpare::detail::qaq_most_blocks] = {};
    K::read_bits(shape, rig->pages->first_tile(Side::keys), bits);
    for (const std::uint8_t b : bits) share[b] += 0.125;
    V::read_bits(shape, rig->pages->first_tile(Side::values), bits);
    for (const std::uint8_t b : bits) share[b] += 0.125;
    for (int b = 0; b <= 8; ++b)
      kvpare::detail::with_qaq_bits(share[b] > 0 ? b : 0, [&]<int one>() {
        rig->parts.push_back(Pages::of<Affine<one>, Affine<one>>(layer, tokens));
        rig->shares.push_back(share[b]);
      });
    return rig;
  }
};

/// Steps over QAQ's pages, each between steps over its parts: `of_parts` is their ratio.
template <class K, class V>
void add_qaq(std::string_view name) {
  for (const Index tokens : {1024, 4096, 16384, 32768}) {
    const LayerShape shape = llama_8b();
    const std::string text = kvpare::message("qaq/cpu/", name, "/Q:", shape.q_heads, "/H:", shape.kv_heads,
                                             "/D:", shape.key_dim, "/N:", tokens);
    add(text, [=](benchmark::State& state) {
      auto& rig = kept(text, [&] { return Rig::of<K, V>(shape, tokens); });
      std::vector<std::vector<double>> alone(rig.parts.size());
      const auto prepare = [&](Index i) {
        for (std::size_t p = 0; p < rig.parts.size(); ++p)
          alone[p].push_back(seconds_of([&] { rig.parts[p]->step(i); }));
      };
      const double bytes = static_cast<double>(rig.pages->bytes());
      const double seconds = run(
          state, {.bytes = bytes, .tokens = static_cast<double>(tokens), .against = {of_read_bw(bytes, 1)}},
          [&](Index i) { rig.pages->step(i); }, prepare);
      double sum = 0;
      for (std::size_t p = 0; p < rig.parts.size(); ++p) sum += rig.shares[p] * median(alone[p]);
      state.counters["of_parts"] = seconds / sum;
    });
  }
  const std::string text = kvpare::message("qaq_encode/cpu/", name, "/H:8/D:128/N:1024");
  add(text, [=](benchmark::State& state) {
    auto& rig = kept(text, [&] { return Pages::of<K, V>(llama_8b(), 1024); });
    const auto rows = random_rows<float>(page_tokens, 1, 128, 3);
    run(state, {.tokens = page_tokens}, [&](Index) { rig.encode_first(rows.data()); });
  });
}

[[maybe_unused]] const bool added = [] {
  add_qaq<Qaq<3, QaqSide::keys>, Qaq<3, QaqSide::values>>("3_bits");
  add_qaq<Qaq<3, QaqSide::keys, 0>, Qaq<3, QaqSide::values, 0>>("3_bits_no_outliers");
  add_qaq<Qaq<2, QaqSide::keys>, Qaq<2, QaqSide::values>>("2_bits");
  return true;
}();

}  // namespace
