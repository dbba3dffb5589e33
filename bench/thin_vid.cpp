// Decode attention over thin keys and VidKV's pages, against the plain form each of them replaces; and how fast they encode.
#include <limits>

#include <kvpare/backend/cpu/tiles.hpp>
#include <kvpare/codec/vid_kv.hpp>

#include "support/rig.hpp"
#include "support/run.hpp"

namespace {

using namespace bench;
using kvpare::Side;
using kvpare::TileShape;
namespace cpu = kvpare::cpu;

constexpr Index page_tokens = 64, stretch_pages = 32;  // `attend` prepares queries anew for every stretch

/// A state as a codec would make it of the first page.
template <class C>
std::vector<float> state_of(const std::vector<float>& rows, Index width) {
  std::vector<float> state(static_cast<std::size_t>(kvpare::state_floats<C>(width)));
  if constexpr (kvpare::MakesState<C>) {
    const auto w = static_cast<std::size_t>(width);
    std::vector<float> low(w), high(w), squares(w);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      low[i % w] = std::min(low[i % w], rows[i]), high[i % w] = std::max(high[i % w], rows[i]);
      squares[i % w] += rows[i] * rows[i];
    }
    kvpare::Measured measured;
    measured.min = measured.layer_min = low.data(), measured.max = measured.layer_max = high.data();
    measured.sum_squares = measured.query_squares = squares.data();
    measured.tokens = static_cast<Index>(rows.size()) / width;
    C::make_state(width, measured, state.data());
  }
  return state;
}

/// Pages of all heads of one layer, K and V by turns, in as many layers as the rotation takes.
template <class K, class V>
class Pages {
 public:
  Pages(const LayerShape& layer, Index token_count)
      : shape_{page_tokens, layer.key_dim}, heads_(layer.kv_heads), group_(layer.group()),
        pages_(token_count / page_tokens), keys_(cpu::tile_ops<K>(Side::keys, shape_, 16)),
        values_(cpu::tile_ops<V>(Side::values, shape_, 16)),
        key_bytes_(kvpare::round_up(keys_->tile_bytes(shape_), 64)),
        page_bytes_(key_bytes_ + kvpare::round_up(values_->tile_bytes(shape_), 64)),
        layers_(std::max<Index>(2, rotation_bytes() / bytes())), backend_({.threads = 1}),
        rows_(random_rows<float>(page_tokens, 1, layer.key_dim)), key_state_(state_of<K>(rows_, layer.key_dim)),
        value_state_(state_of<V>(rows_, layer.key_dim)), memory_(backend_, layers_ * bytes() + page_bytes_),
        queries_(random_rows<float>(layer.q_heads, 1, layer.key_dim, 2)),
        prepared_(backend_, keys_->query_bytes(group_, layer.key_dim)) {
    for (Index page = 0; page < layers_ * heads_ * pages_; ++page) {
      std::byte* at = memory_.data() + page * page_bytes_;
      if (page > 0)
        std::copy_n(memory_.data(), page_bytes_, at);
      else
        encode(at);
    }
    for (Index t = 0; t < page_tokens; ++t) slots_[t] = static_cast<std::uint8_t>(t);
  }

  Index bytes() const { return heads_ * pages_ * page_bytes_; }  // of a layer

  void attend(Index i) {
    const std::byte* at = memory_.data() + i % layers_ * bytes();
    for (Index h = 0; h < heads_; ++h) {
      std::fill_n(peak_, group_, -std::numeric_limits<float>::infinity());
      std::fill_n(sum_, group_, 0.0f);
      for (Index p = 0; p < pages_; ++p, at += page_bytes_) {
        if (p % stretch_pages == 0)
          keys_->prepare_query(kernels_, queries_.data() + h * group_ * shape_.width, shape_.width, group_,
                               shape_.width, key_state_.data(), prepared_.data());
        const std::byte* next = at + page_bytes_;
        keys_->score(kernels_, prepared_.data(), group_, rows(at, key_state_), {next, key_bytes_}, scores_,
                     page_tokens);
        kernels_.running_softmax(scores_, page_tokens, group_, page_tokens, peak_, sum_, alpha_);
        values_->accumulate(kernels_, scores_, page_tokens, alpha_, group_, rows(at + key_bytes_, value_state_),
                            {next + key_bytes_, page_bytes_ - key_bytes_}, acc_, shape_.width);
      }
      if (values_->folds) values_->finish_output(group_, shape_.width, value_state_.data(), sum_, acc_, shape_.width);
      benchmark::DoNotOptimize(acc_);
    }
  }
  void encode(std::byte* page) {
    keys_->encode(kernels_, shape_, rows_.data(), 0, page_tokens, {}, key_state_.data(), page);
    values_->encode(kernels_, shape_, rows_.data(), 0, page_tokens, {}, value_state_.data(), page + key_bytes_);
  }
  void encode_keys() {
    keys_->encode(kernels_, shape_, rows_.data(), 0, page_tokens, {}, key_state_.data(), memory_.data());
    benchmark::DoNotOptimize(memory_.data());
  }
  void encode_values() {
    values_->encode(kernels_, shape_, rows_.data(), 0, page_tokens, {}, value_state_.data(),
                    memory_.data() + key_bytes_);
    benchmark::DoNotOptimize(memory_.data());
  }

 private:
  cpu::TileRows rows(const std::byte* tile, const std::vector<float>& state) const {
    return {tile, shape_, state.empty() ? nullptr : state.data(), slots_, static_cast<int>(page_tokens), true};
  }

  const cpu::Kernels& kernels_ = cpu::kernels(cpu::chosen_isa());
  TileShape shape_;
  Index heads_, group_, pages_;
  const cpu::TileOps* keys_;
  const cpu::TileOps* values_;
  Index key_bytes_, page_bytes_, layers_;
  cpu::Backend backend_;
  std::vector<float> rows_, key_state_, value_state_;
  kvpare::Buffer<cpu::Backend, std::byte> memory_;
  std::vector<float> queries_;
  kvpare::Buffer<cpu::Backend, std::byte> prepared_;
  std::uint8_t slots_[page_tokens] = {};
  alignas(64) float scores_[8 * page_tokens], acc_[8 * 256];
  float peak_[8], sum_[8], alpha_[8];
};

template <class K, class V, class PlainK, class PlainV>
struct Both {
  Both(const LayerShape& layer, Index tokens) : pages(layer, tokens), plain(layer, tokens) {}
  Pages<K, V> pages;
  Pages<PlainK, PlainV> plain;
};

/// `of_plain`: time of a step over that of the other form, a step of each by turns. (For raw rows `codes` has the plain loops.)
template <class K, class V, class PlainK, class PlainV>
bool add_attend(std::string_view name) {
  for (const Index tokens : {1024, 4096, 16384, 32768}) {
    const LayerShape shape = llama_8b();
    const std::string text = kvpare::message("thin_vid/cpu/", name, "/Q:", shape.q_heads, "/H:", shape.kv_heads,
                                             "/D:", shape.key_dim, "/N:", tokens, "/threads:1");
    add(text, [=](benchmark::State& state) {
      auto& both = kept(text, [&] { return std::make_unique<Both<K, V, PlainK, PlainV>>(shape, tokens); });
      const double bytes = static_cast<double>(both.pages.bytes());
      std::vector<double> plain;
      const double seconds = run(
          state, {.bytes = bytes, .tokens = static_cast<double>(tokens), .against = {of_read_bw(bytes, 1)}},
          [&](Index i) { both.pages.attend(i); },
          [&](Index i) { plain.push_back(seconds_of([&] { both.plain.attend(i); })); });
      state.counters["of_plain"] = seconds / median(plain);
    });
  }
  return true;
}

/// Tokens of one head's keys, and of its values.
template <class K, class V>
bool add_encode(std::string_view name) {
  for (const bool keys : {true, false})
    add(kvpare::message("thin_vid_encode/cpu/", name, keys ? "/keys" : "/values", "/H:1/D:128/N:1024/threads:1"),
        [=](benchmark::State& state) {
          Pages<K, V> pages(llama_8b(), 1024);
          run(state, {.bytes = 0, .tokens = static_cast<double>(page_tokens)},
              [&](Index) { keys ? pages.encode_keys() : pages.encode_values(); });
        });
  return true;
}

using Half = kvpare::Raw<kvpare::half>;
using Int4 = kvpare::Symmetric<4, 32>;
using Int2 = kvpare::Affine<2, 32>;
using Whole4 = kvpare::Int4;
template <class C, int percent, Index align>
using Thin = kvpare::Thin<C, percent, align>;
using kvpare::KiviKeys;
using kvpare::KiviValues;
using kvpare::VidKvKeys;
using kvpare::VidKvValues;

[[maybe_unused]] const bool added =
    add_attend<Thin<Int4, 50, 32>, Int4, Int4, Int4>("thin50a32_int4_g32") &&
    add_attend<Thin<Whole4, 50, 8>, Whole4, Whole4, Whole4>("thin50a8_int4") &&
    add_attend<Thin<Whole4, 40, 16>, Whole4, Whole4, Whole4>("thin40a16_int4") &&
    add_attend<Thin<KiviKeys<4>, 50, 16>, KiviValues<4>, KiviKeys<4>, KiviValues<4>>("thin50a16_kivi4") &&
    add_attend<Thin<KiviKeys<2>, 40, 16>, KiviValues<2>, KiviKeys<2>, KiviValues<2>>("thin40a16_kivi2") &&
    add_attend<Thin<Half, 40, 1>, Thin<Half, 0, 1>, Thin<Half, 0, 1>, Thin<Half, 0, 1>>("thin40_half") &&
    add_attend<VidKvKeys<50>, VidKvValues<>, Int2, Int2>("vid_kv50") &&
    add_attend<VidKvKeys<50>, VidKvValues<>, KiviKeys<2>, KiviValues<2>>("vid_kv50_of_kivi2") &&
    add_attend<VidKvKeys<25>, VidKvValues<>, Int2, Int2>("vid_kv25") &&
    add_attend<VidKvKeys<75>, VidKvValues<>, Int2, Int2>("vid_kv75") &&
    add_encode<Thin<Int4, 50, 32>, Int4>("thin50a32_int4_g32") &&
    add_encode<VidKvKeys<50>, VidKvValues<>>("vid_kv50") && add_encode<KiviKeys<2>, KiviValues<2>>("kivi2");

}  // namespace
