// Decode attention on codes, page by page: keys, softmax, values, as `attend` calls them, without the cache around.
#include <limits>

#include <kvpare/backend/cpu/tiles.hpp>
#include <kvpare/codec/fp8.hpp>
#include <kvpare/codec/group.hpp>
#include <kvpare/codec/ternary.hpp>

#include "support/rig.hpp"
#include "support/run.hpp"

namespace {

using namespace bench;
using kvpare::Side;
using kvpare::TileShape;
namespace cpu = kvpare::cpu;

constexpr Index page_tokens = 64;

/// Pages of all heads of one layer, K and V by turns, in as many layers as the rotation takes.
template <class K, class V>
class CodedPages {
 public:
  CodedPages(const LayerShape& layer, Index token_count, int probability_bits)
      : shape_{page_tokens, layer.key_dim}, heads_(layer.kv_heads), group_(layer.group()),
        pages_(token_count / page_tokens), keys_(cpu::tile_ops<K>(Side::keys, shape_, probability_bits)),
        values_(cpu::tile_ops<V>(Side::values, shape_, probability_bits)),
        key_bytes_(kvpare::round_up(keys_->tile_bytes(shape_), 64)),
        page_bytes_(key_bytes_ + kvpare::round_up(values_->tile_bytes(shape_), 64)),
        layers_(std::max<Index>(2, rotation_bytes() / bytes())), backend_({.threads = 1}),
        memory_(backend_, layers_ * bytes() + page_bytes_),
        queries_(random_rows<float>(layer.q_heads, 1, layer.key_dim, 2)),
        prepared_(backend_, keys_->query_bytes(group_, layer.key_dim)) {
    const auto rows = random_rows<float>(page_tokens, 1, layer.key_dim);
    for (Index page = 0; page < layers_ * heads_ * pages_; ++page) {
      std::byte* at = memory_.data() + page * page_bytes_;
      if (page > 0) {
        std::copy_n(memory_.data(), page_bytes_, at);
        continue;
      }
      keys_->encode(kernels_, shape_, rows.data(), 0, page_tokens, {}, nullptr, at);
      values_->encode(kernels_, shape_, rows.data(), 0, page_tokens, {}, nullptr, at + key_bytes_);
    }
    for (Index t = 0; t < page_tokens; ++t) slots_[t] = static_cast<std::uint8_t>(t);
  }

  /// Of a layer.
  Index bytes() const { return heads_ * pages_ * page_bytes_; }

  void step(Index i) {
    const std::byte* at = memory_.data() + i % layers_ * bytes();
    for (Index h = 0; h < heads_; ++h) {
      keys_->prepare_query(kernels_, queries_.data() + h * group_ * shape_.width, shape_.width, group_, shape_.width,
                           nullptr, prepared_.data());
      std::fill_n(peak_, group_, -std::numeric_limits<float>::infinity());
      std::fill_n(sum_, group_, 0.0f);
      for (Index p = 0; p < pages_; ++p, at += page_bytes_) {
        const std::byte* next = at + page_bytes_;
        if constexpr (kvpare::is_raw<K>) {  // rows as they lie: what codes are to beat
          kernels_.dot(queries_.data() + h * group_ * shape_.width, shape_.width, group_, shape_.width, raw_rows(at),
                       raw_rows(next), scores_, page_tokens);
          kernels_.running_softmax(scores_, page_tokens, group_, page_tokens, peak_, sum_, alpha_);
          kernels_.accumulate(scores_, page_tokens, alpha_, group_, shape_.width, raw_rows(at + key_bytes_),
                              raw_rows(next + key_bytes_), acc_, shape_.width);
          continue;
        }
        keys_->score(kernels_, prepared_.data(), group_, rows(at), {next, key_bytes_}, scores_, page_tokens);
        kernels_.running_softmax(scores_, page_tokens, group_, page_tokens, peak_, sum_, alpha_);
        values_->accumulate(kernels_, scores_, page_tokens, alpha_, group_, rows(at + key_bytes_),
                            {next + key_bytes_, page_bytes_ - key_bytes_}, acc_, shape_.width);
      }
      benchmark::DoNotOptimize(acc_);
    }
  }

  /// One token of every head, keys and values.
  void append(Index slot) {
    for (Index h = 0; h < heads_; ++h) {
      std::byte* at = memory_.data() + h * pages_ * page_bytes_;
      const float* row = queries_.data() + h * group_ * shape_.width;
      keys_->encode(kernels_, shape_, row, slot, 1, {}, nullptr, at);
      values_->encode(kernels_, shape_, row, slot, 1, {}, nullptr, at + key_bytes_);
    }
  }

 private:
  cpu::TileRows rows(const std::byte* tile) const {
    return {tile, shape_, nullptr, slots_, static_cast<int>(page_tokens), true};
  }

  cpu::RowSet raw_rows(const std::byte* tile) const {
    return {tile, shape_.width * 2, slots_, static_cast<int>(page_tokens), DType::f16};
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

template <class K, class V>
bool add_codes(std::string_view name, int probability_bits) {
  for (const LayerShape& shape : {llama_8b(), qwen_vl_7b()})
    for (const Index tokens : {1024, 4096, 16384, 32768}) {
      const std::string text = kvpare::message("codes/cpu/", name, "/Q:", shape.q_heads, "/H:", shape.kv_heads,
                                               "/D:", shape.key_dim, "/N:", tokens, "/p:", probability_bits);
      add(text, [=](benchmark::State& state) {
        auto& pages = kept(text, [&] { return std::make_unique<CodedPages<K, V>>(shape, tokens, probability_bits); });
        const double bytes = static_cast<double>(pages.bytes());
        run(state, {.bytes = bytes, .tokens = static_cast<double>(tokens), .against = {of_read_bw(bytes, 1)}},
            [&](Index i) { pages.step(i); });
      });
    }
  if constexpr (!K::rows_move || kvpare::is_raw<K>) return true;
  const std::string text = kvpare::message("codes_append/cpu/", name, "/H:8/D:128/N:1024/p:", probability_bits);
  add(text, [=](benchmark::State& state) {
    auto& pages = kept(text, [&] { return std::make_unique<CodedPages<K, V>>(llama_8b(), 1024, probability_bits); });
    for (Index slot = 0; auto _ : state) pages.append(slot++ % page_tokens);
  });
  return true;
}

template <class C>
bool add_codes(std::string_view name, int probability_bits = 16) {
  return add_codes<C, C>(name, probability_bits);
}

using kvpare::Affine;
using kvpare::Symmetric;
[[maybe_unused]] const bool added =
    add_codes<kvpare::Raw<kvpare::half>>("half_by_rows") && add_codes<kvpare::Fp8E4M3>("fp8_e4m3") &&
    add_codes<Symmetric<8, 32>>("int8_g32") && add_codes<Symmetric<4, 32>>("int4_g32") &&
    add_codes<Symmetric<4, 32>>("int4_g32", 8) && add_codes<Affine<4, 32>>("int4_g32_min") &&
    add_codes<Affine<2, 32>>("int2_g32_min") && add_codes<kvpare::Ternary<>>("ternary") &&
    add_codes<kvpare::KiviKeys<4>, kvpare::KiviValues<4>>("kivi4", 16) &&
    add_codes<kvpare::KiviKeys<2>, kvpare::KiviValues<2>>("kivi2", 16);

}  // namespace
