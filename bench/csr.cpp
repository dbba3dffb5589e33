// CSR at 1 bit a number: decode attention over its codes, raw halves beside it, and matching pursuit.
#include <cmath>

#include <kvpare/backend/cpu/backend.hpp>
#include <kvpare/codec/sparse.hpp>
#include <kvpare/codec/unrotated.hpp>

#include "support/rig.hpp"
#include "support/run.hpp"

namespace bench {
namespace {

namespace cpu = kvpare::cpu;
using kvpare::half;
using kvpare::Side;
using Keys = kvpare::CsrKeys<4>;
using KeysBeforeRope = kvpare::Unrotated<Keys>;  // as the paper has them
using Values = kvpare::CsrValues<4>;
constexpr Index page_tokens = 64;

/// Atoms of length 1.
template <class C>
std::vector<float> dictionary(Index width) {
  const Index m = width / C::chunk_count;
  const auto x = random_rows<float>(C::atom_count, 1, m, 7);
  std::vector<float> state(static_cast<std::size_t>(C::state_floats(width)));
  auto* to = reinterpret_cast<std::byte*>(state.data());
  for (Index n = 0; n < C::atom_count; ++n) {
    double square = 0;
    for (Index i = 0; i < m; ++i) square += std::pow(static_cast<double>(x.data()[n * m + i]), 2);
    for (Index i = 0; i < m; ++i) {
      const half h(static_cast<float>(static_cast<double>(x.data()[n * m + i]) / std::sqrt(square)));
      std::memcpy(to + (n * m + i) * 2, &h, 2);
    }
  }
  return state;
}

/// The state of keys: atoms, behind the rotation where there is one.
template <class K>
std::vector<float> key_state(Index width) {
  std::vector<float> atoms = dictionary<Keys>(width);
  if constexpr (!std::is_same_v<K, Keys>) {
    const kvpare::Rope rope = kvpare::rope_of_base(width, 500000);
    atoms.insert(atoms.begin(), static_cast<std::size_t>(K::own_state_floats(width)), 0.0f);
    kvpare::Rotation::write_state(width, rope.view(), atoms.data());
  }
  return atoms;
}

/// Lists of all heads of as many layers as the rotation takes, raw or coded. All heads read one dictionary, as they would.
template <class K>
class Lists {
 public:
  Lists(const LayerShape& shape, Index tokens, bool coded)
      : shape_(shape), pages_(tokens / page_tokens), key_state_(key_state<K>(shape.key_dim)),
        value_state_(dictionary<Values>(shape.value_dim)), backend_({.threads = 1}),
        queries_(random_rows<float>(1, shape.q_heads, shape.key_dim, 2)),
        out_(static_cast<std::size_t>(shape.q_heads * shape.value_dim)) {
    const Index key_bytes = page_tokens * (coded ? Keys::row_bytes : shape.key_dim * 2),
                page_bytes = key_bytes + page_tokens * (coded ? Values::row_bytes : shape.value_dim * 2);
    bytes = shape.kv_heads * pages_ * page_bytes;
    layers_ = std::max<Index>(2, rotation_bytes() / bytes);
    memory_ = kvpare::Buffer<cpu::Backend, std::byte>(backend_, layers_ * bytes);
    if (coded)
      fill_codes();
    else
      fill_rows();

    kvpare::PageGeometry g;
    g.keys = memory_.data(), g.values = memory_.data() + key_bytes;
    g.key_page_bytes = g.value_page_bytes = page_bytes;
    if (coded) {
      g.key_codec = backend_.template codec<K, Side::keys>({page_tokens, shape.key_dim});
      g.value_codec = backend_.template codec<Values, Side::values>({page_tokens, shape.value_dim});
      g.key_tile_bytes = key_bytes, g.value_tile_bytes = page_bytes - key_bytes;
    } else {
      g.key_row_bytes = shape.key_dim * 2, g.value_row_bytes = shape.value_dim * 2;
      g.key_type = g.value_type = kvpare::DType::f16;
    }
    geometry_.push_back(g);
    state_ = {key_state_.data(), value_state_.data()};
    for (Index list = 0; list < layers_ * shape.kv_heads; ++list) {
      auto& entries = entries_.emplace_back();
      for (Index p = 0; p < pages_; ++p) {
        kvpare::Entry e;
        e.page = static_cast<kvpare::PageId>(list * pages_ + p), e.used = page_tokens, e.live = ~std::uint64_t{0};
        e.first = static_cast<kvpare::Position>(p * page_tokens);
        e.last = static_cast<kvpare::Position>((p + 1) * page_tokens - 1), e.state = coded ? 1 : 0;
        entries.push_back(e);
      }
    }
  }

  void step(Index i) {
    std::vector<kvpare::HeadPages> heads;
    for (Index h = 0; h < shape_.kv_heads; ++h)
      heads.push_back({entries_[static_cast<std::size_t>(i % layers_ * shape_.kv_heads + h)],
                       nullptr,
                       geometry_,
                       page_tokens,
                       {&state_, 1}});
    const kvpare::Position position[] = {static_cast<kvpare::Position>(pages_ * page_tokens)};
    const kvpare::AttendSequence s{heads, kvpare::ConstTensor(queries_.data(), 1, shape_.q_heads, shape_.key_dim),
                                   position, kvpare::Tensor(out_.data(), 1, shape_.q_heads, shape_.value_dim)};
    backend_.attend(shape_, {&s, 1}, kvpare::MassKind::none);
  }

  Index bytes = 0;  // of a layer

 private:
  void fill_rows() {
    const auto rows = random_rows<half>(page_tokens, 1, shape_.key_dim);
    const Index size = page_tokens * shape_.key_dim * 2;
    for (Index at = 0; at + size <= memory_.bytes(); at += size) std::memcpy(memory_.data() + at, rows.data(), size);
  }
  /// Any atom, as a trained dictionary would have it: none is rare.
  void fill_codes() {
    static_assert(Keys::pairs == Values::pairs && Keys::atom_count == Values::atom_count);
    std::uint16_t row[Keys::pairs * 2];
    for (Index at = 0, n = 0; at < memory_.bytes(); at += Keys::row_bytes)
      for (Index i = 0; i < Keys::pairs; ++i, ++n) {
        row[i] = static_cast<std::uint16_t>(kvpare::random_bits(1, static_cast<std::uint64_t>(n)) % Keys::atom_count);
        row[Keys::pairs + i] = half(kvpare::random_unit(2, n) - 0.5f).bits;
        std::memcpy(memory_.data() + at, row, sizeof row);
      }
  }

  LayerShape shape_;
  Index pages_, layers_ = 0;
  std::vector<float> key_state_, value_state_;
  cpu::Backend backend_;
  kvpare::Buffer<cpu::Backend, std::byte> memory_;
  std::vector<kvpare::PageGeometry> geometry_;
  kvpare::CodecState state_;
  std::vector<std::vector<kvpare::Entry>> entries_;
  std::vector<float> queries_, out_;
};

/// `of_raw`: time over that of raw halves, one step of each by turns.
template <class K>
void attend_codes(benchmark::State& state, const LayerShape& shape, Index tokens) {
  Lists<K> coded(shape, tokens, true), raw(shape, tokens, false);
  std::vector<double> of_raw;
  const double seconds = run(
      state, {.bytes = static_cast<double>(coded.bytes), .tokens = static_cast<double>(tokens)},
      [&](Index i) { coded.step(i); }, [&](Index i) { of_raw.push_back(seconds_of([&] { raw.step(i); })); });
  state.counters["of_raw"] = seconds / median(of_raw);
}

/// Tokens of one head, so many rows at once; a token of a layer is as many heads.
template <class C>
void encode(benchmark::State& state, const LayerShape& shape, Index tokens, Index at_once) {
  const auto rows = random_rows<float>(page_tokens, 1, shape.key_dim, 3);
  const auto atoms = dictionary<C>(shape.key_dim);
  const kvpare::TileShape tile{page_tokens, shape.key_dim};
  std::vector<std::byte> codes(static_cast<std::size_t>(C::tile_bytes(tile)));
  const cpu::TileOps* ops = cpu::tile_ops<C>(Side::keys, tile, 16);
  run(state, {.tokens = static_cast<double>(tokens)}, [&](Index) {
    for (Index t = 0; t < tokens; t += at_once)
      ops->encode(cpu::kernels(cpu::chosen_isa()), tile, rows.data() + t % page_tokens * shape.key_dim, t % page_tokens,
                  at_once, {}, atoms.data(), codes.data());
  });
}

const bool added = [] {
  const LayerShape shape = llama_8b();
  for (const Index tokens : {1024, 4096, 16384, 32768}) {
    const auto name = [&](const char* what) {
      return kvpare::message("csr/", what, "/cpu/Q:", shape.q_heads, "/H:", shape.kv_heads, "/D:", shape.key_dim, "/N:", tokens,
                             "/atoms:8192");
    };
    add(name("attend"), [=](benchmark::State& state) { attend_codes<Keys>(state, shape, tokens); });
    add(name("attend_before_rope"), [=](benchmark::State& state) { attend_codes<KeysBeforeRope>(state, shape, tokens); });
  }
  for (const Index rows : {1, 8, 64}) {
    add(kvpare::message("csr/encode_keys/cpu/D:128/N:1024/rows:", rows),
        [=](benchmark::State& state) { encode<Keys>(state, shape, 1024, rows); });
    add(kvpare::message("csr/encode_values/cpu/D:128/N:1024/rows:", rows),
        [=](benchmark::State& state) { encode<Values>(state, shape, 1024, rows); });
  }
  return true;
}();

}  // namespace
}  // namespace bench
