// KVQuant beside int4: attention on its pages, keys before and after RoPE, and how fast tokens are coded.
#include <limits>

#include <kvpare/backend/cpu/tiles.hpp>
#include <kvpare/codec/kv_quant.hpp>

#include "support/rig.hpp"
#include "support/run.hpp"

namespace {

using namespace bench;
using kvpare::Position;
using kvpare::Side;
using kvpare::TileShape;
namespace cpu = kvpare::cpu;

constexpr Index page_tokens = 64;
using Int4 = kvpare::Symmetric<4, 32>;

/// Pages of all heads of one layer, keys and values by turns, in as many layers as the rotation takes. Positions are those of
/// one sequence, or with gaps, as where every other token has been evicted.
template <class K, class V>
class Pages {
 public:
  Pages(const LayerShape& layer, Index token_count, bool gaps)
      : shape_{page_tokens, layer.key_dim}, heads_(layer.kv_heads), group_(layer.group()),
        pages_(token_count / page_tokens), keys_(cpu::tile_ops<K>(Side::keys, shape_, 16)),
        values_(cpu::tile_ops<V>(Side::values, shape_, 16)),
        key_bytes_(kvpare::round_up(keys_->tile_bytes(shape_), 64)),
        page_bytes_(key_bytes_ + kvpare::round_up(values_->tile_bytes(shape_), 64)),
        layers_(std::max<Index>(2, rotation_bytes() / bytes())), backend_({.threads = 1}),
        memory_(backend_, layers_ * bytes() + page_bytes_),
        rows_(random_rows<float>(page_tokens * learned_pages, 1, layer.key_dim)),
        queries_(random_rows<float>(layer.q_heads, 1, layer.key_dim, 2)),
        prepared_(backend_, keys_->query_bytes(group_, layer.key_dim)) {
    for (Index t = 0; t < std::max(token_count, page_tokens * learned_pages); ++t)
      positions_.push_back(static_cast<Position>(gaps ? 2 * t + t % 3 : t));
    for (Index t = 0; t < page_tokens; ++t) slots_[t] = static_cast<std::uint8_t>(t);
    key_state_ = state_of<K>(), value_state_ = state_of<V>();
    // One page as it is coded at each place: more would only be other numbers.
    for (Index page = 0; page < layers_ * heads_ * pages_; ++page) {
      std::byte* at = memory_.data() + page * page_bytes_;
      if (page == 0)
        encode(at);
      else
        std::copy_n(memory_.data(), page_bytes_, at);
    }
  }

  /// Of a layer.
  Index bytes() const { return heads_ * pages_ * page_bytes_; }

  void step(Index i) {
    const std::byte* at = memory_.data() + i % layers_ * bytes();
    for (Index h = 0; h < heads_; ++h) {
      keys_->prepare_query(kernels_, queries_.data() + h * group_ * shape_.width, shape_.width, group_, shape_.width,
                           key_state_.data(), prepared_.data());
      std::fill_n(peak_, group_, -std::numeric_limits<float>::infinity());
      std::fill_n(sum_, group_, 0.0f);
      for (Index p = 0; p < pages_; ++p, at += page_bytes_) {
        const std::byte* next = at + page_bytes_;
        keys_->score(kernels_, prepared_.data(), group_, rows(at, key_state_, p), {next, key_bytes_}, scores_,
                     page_tokens);
        kernels_.running_softmax(scores_, page_tokens, group_, page_tokens, peak_, sum_, alpha_);
        values_->accumulate(kernels_, scores_, page_tokens, alpha_, group_, rows(at + key_bytes_, value_state_, p),
                            {next + key_bytes_, page_bytes_ - key_bytes_}, acc_, shape_.width);
      }
      benchmark::DoNotOptimize(acc_);
    }
  }

  /// A page of one head, keys and values.
  void encode(std::byte* at) {
    const kvpare::TokenFacts facts{positions_.data(), nullptr};
    keys_->encode(kernels_, shape_, rows_.data(), 0, page_tokens, facts, key_state_.data(), at);
    values_->encode(kernels_, shape_, rows_.data(), 0, page_tokens, facts, value_state_.data(), at + key_bytes_);
  }
  std::byte* first() { return memory_.data(); }

 private:
  static constexpr Index learned_pages = 8;

  template <class C>
  std::vector<float> state_of() {
    std::vector<float> state(static_cast<std::size_t>(kvpare::state_floats<C>(shape_.width) + 1));
    const kvpare::Rope rope = kvpare::rope_of_base(shape_.width, 500000);
    kvpare::Measured measured;
    measured.rows = rows_.data(), measured.tokens = page_tokens * learned_pages;
    measured.positions = positions_.data(), measured.rope = rope.view();
    if constexpr (kvpare::MakesState<C>) C::make_state(shape_.width, measured, state.data());
    return state;
  }
  cpu::TileRows rows(const std::byte* tile, const std::vector<float>& state, Index page) const {
    return {tile,
            shape_,
            state.data(),
            slots_,
            static_cast<int>(page_tokens),
            true,
            positions_.data() + page * page_tokens};
  }

  TileShape shape_;
  Index heads_, group_, pages_;
  const cpu::Kernels& kernels_ = cpu::kernels(cpu::chosen_isa());
  const cpu::TileOps *keys_, *values_;
  Index key_bytes_, page_bytes_, layers_;
  cpu::Backend backend_;
  kvpare::Buffer<cpu::Backend, std::byte> memory_;
  std::vector<float> rows_, queries_, key_state_, value_state_;
  kvpare::Buffer<cpu::Backend, std::byte> prepared_;
  std::vector<Position> positions_;
  std::uint8_t slots_[page_tokens] = {};
  alignas(64) float scores_[8 * page_tokens], acc_[8 * 256];
  float peak_[8], sum_[8], alpha_[8];
};

/// of_int4: the median time of a step over that of int4, taken by turns.
template <class K, class V>
bool add_kv_quant(std::string_view name, bool gaps = false) {
  struct Both {
    Both(const LayerShape& shape, Index tokens, bool gaps) : own(shape, tokens, gaps), int4(shape, tokens, false) {}
    Pages<K, V> own;
    Pages<Int4, Int4> int4;
  };
  for (const Index tokens : {1024, 4096, 16384, 32768}) {
    const std::string text = kvpare::message("kv_quant/cpu/", name, "/Q:32/H:8/D:128/N:", tokens);
    add(text, [=](benchmark::State& state) {
      auto& both = kept(text, [&] { return std::make_unique<Both>(llama_8b(), tokens, gaps); });
      std::vector<double> int4;
      const double bytes = static_cast<double>(both.own.bytes());
      const double seconds = run(
          state, {.bytes = bytes, .tokens = static_cast<double>(tokens), .against = {of_read_bw(bytes, 1)}},
          [&](Index i) { both.own.step(i); }, [&](Index i) { int4.push_back(seconds_of([&] { both.int4.step(i); })); });
      state.counters["of_int4"] = seconds / median(int4);
    });
  }
  const std::string text = kvpare::message("kv_quant_encode/cpu/", name, "/H:8/D:128/N:1024");
  add(text, [=](benchmark::State& state) {
    auto& both = kept(text, [&] { return std::make_unique<Both>(llama_8b(), 1024, gaps); });
    for (auto _ : state)
      for (Index h = 0; h < 8; ++h) both.own.encode(both.own.first());
    state.counters["tokens_per_second"] =
        benchmark::Counter(static_cast<double>(page_tokens), benchmark::Counter::kIsIterationInvariantRate);
  });
  return true;
}

[[maybe_unused]] const bool added =
    add_kv_quant<kvpare::KvQuantKeys<4>, kvpare::KvQuantValues<4>>("kv_quant4") &&
    add_kv_quant<kvpare::KvQuantKeys<4>, kvpare::KvQuantValues<4>>("kv_quant4_gaps", true) &&
    add_kv_quant<kvpare::KvQuantKeys<3>, kvpare::KvQuantValues<3>>("kv_quant3") &&
    add_kv_quant<kvpare::KvQuantKeys<2>, kvpare::KvQuantValues<2>>("kv_quant2") &&
    add_kv_quant<kvpare::KvQuantRotatedKeys<4>, kvpare::KvQuantValues<4>>("kv_quant4_rotated") &&
    add_kv_quant<Int4, Int4>("int4_g32");

}  // namespace
