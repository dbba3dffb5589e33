// What kernels call compiles as device code: codecs of every family, the lists of pages that lead to tiles, and every functor
// that the library gives to `each`. Compiled only, and with warnings as errors: nvcc merely warns of a host function in a
// kernel.
#include <kvpare/codec/block_float.hpp>
#include <kvpare/codec/folded.hpp>
#include <kvpare/codec/fp8.hpp>
#include <kvpare/codec/ggml.hpp>
#include <kvpare/codec/group.hpp>
#include <kvpare/codec/raw.hpp>
#include <kvpare/codec/ternary.hpp>
#include <kvpare/codec/turbo_quant.hpp>
#include <kvpare/pipeline/kv_cache.hpp>
#include <kvpare/runtime/make_compressor.hpp>

namespace kvpare::test {

// Codecs.

struct Tile {
  float *rows, *state;
  Measured ranges;
  std::byte* bytes;
  std::uint8_t* codes;
  GroupBits* bits;
  Index slot;
};

template <Codec C>
__global__ void all_of(Tile t) {
  constexpr TileShape shape{64, 128};
  static_assert(C::fits(shape) && C::tile_bytes(shape) > 0);
  if constexpr (MakesState<C>) C::make_state(shape.width, t.ranges, t.state);
  if constexpr (C::rows_move)
    C::encode(shape, t.rows, t.slot, 1, t.state, t.bytes);
  else if constexpr (FoldedCodec<C>)
    C::encode_over(shape, t.rows, 0, t.slot, t.state, t.bytes);
  else
    C::encode(shape, t.rows, 0, t.slot, t.state, t.bytes);
  C::decode(shape, t.bytes, t.slot, t.state, t.rows);
  if constexpr (FoldedCodec<C>) {
    C::forward(shape.width, t.state, t.rows);
    C::backward(shape.width, t.state, t.rows);
    t.rows[0] = C::fold_query(shape.width, t.state, t.rows);
    C::fold_output(shape.width, t.state, t.rows[0], t.rows);
  }
  if constexpr (GgmlCodec<C>) {
    from_ggml<C>(shape.width, t.bytes, t.bytes + t.slot);
    to_ggml<C>(shape.width, t.bytes, t.bytes + t.slot);
  }
  if constexpr (GroupCodec<C>) {
    *t.bits = C::quantize(t.rows, t.slot, C::group_of(shape), t.state, t.codes, t.slot);
    t.rows[0] = C::scale_of(*t.bits, t.state), t.rows[1] = C::zero_of(*t.bits, t.state), t.rows[2] = C::level(*t.codes);
    if constexpr (C::rows_move) {
      C::read_row(shape, t.bytes, t.slot, t.codes, t.bits);
      C::write_row(shape, t.bytes, t.slot + 1, t.codes, t.bits);
    } else {
      *t.bits = C::read_run(shape, t.bytes, t.slot, t.codes);
      C::write_run(shape, t.bytes, t.slot + 1, t.codes, *t.bits);
    }
  }
}

template <Codec... Cs>
void launch_all(Tile t) {
  (all_of<Cs><<<1, 1>>>(t), ...);
}
template void launch_all<Raw<float>, Raw<half>, Raw<bfloat16>>(Tile);
template void launch_all<Int8, Int4, Int1, Symmetric<5, 32>, Symmetric<2, 64>, Affine<8>, Mlx<4>, TurboValues<3>,
                         MikvGroup<4>, KvTunerToken<4>>(Tile);
template void launch_all<KiviKeys<4>, KiviKeys<2, 0>, KiviValues<1>,
                         Group<GroupSpec{.bits = 4, .along = Along::tokens, .group = 32, .packing = Packing::halves}>,
                         Group<GroupSpec{.bits = 2, .scale = ScaleType::f32, .ties = Ties::down}>>(Tile);
template void launch_all<Fp8E4M3, Fp8E5M2, MxFp4<>, MxFp4<Ties::down>, NvFp4<>, NvFp4<Ties::down>>(Tile);
template void launch_all<Q8_0, Q5_1, Q5_0, Q4_1, Q4_0, Iq4Nl, Q2_0, Q1_0>(Tile);
template void launch_all<Ternary<>, Ternary<TernaryFit::mean, Along::tokens, 32>, Ternary<TernaryFit::amax>>(Tile);
template void launch_all<Fixed<4>, ZipVlKeys<4>, ZipVlValues<2>, MikvKeys<2>, Balanced<Rotated<KiviKeys<2>>>,
                         Rotated<Int4>, Balanced<Rotated<Int4, 1>>>(Tile);
template void launch_all<TurboQuant<2>, TurboQuant<4, true>, TurboProduct<3>, Lloyd<1>>(Tile);

// How a row is found.

__global__ void all_of(HeadPages list, ConstTensor rows, Index row, Index* out) {
  const Entry& e = list.entries[static_cast<std::size_t>(row / list.page_tokens)];
  const PageGeometry& g = list.formats[e.format];
  out[0] = list.slots() + list.live_tokens() + list.ascends();
  out[1] = list.position(e, row % list.page_tokens);
  out[2] = g.key_row(e.page, row) - g.value_row(e.page, row);
  out[3] = list.state_of(e).keys != nullptr;
  out[4] = static_cast<const std::byte*>(rows.part(row, 1).at(0, 1)) - static_cast<const std::byte*>(rows.data);
  for_each_bit(e.live & low_bits(row), [&](Index bit) { out[5] += bit; });
}

// Functors: a backend whose `each` launches them, and whose other verbs do nothing.

template <class F>
__global__ void run_each(Index n, F f) {
  const Index i = Index{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < n) f(i);
}

struct Launching {
  static constexpr std::string_view name = "launching";
  struct Ticket {};
  void* allocate(Index) { return nullptr; }
  void release(void*) {}
  void to_backend(void*, const void*, Index) {}
  Ticket to_host(void*, const void*, Index) { return {}; }
  void wait(Ticket) {}
  template <class F>
  void each(Index n, const F& f) {
    run_each<<<1, 1>>>(n, f);
  }
  void reduce(std::span<const MaskedRow>, RowSummary*) {}
  void sort_rows(std::span<const SortRow>) {}
  void select_top(std::span<const TopRow>) {}
  template <class Logit, class EntryOf>
  void attention_mass(const MassArguments<Logit, EntryOf>&) {}
  void statistics(std::span<const StatisticsRow>) {}
  void gather(std::span<const GatherRow>) {}
  void product(const ProductArguments&) {}
  void append(const AppendArguments&) {}
  void compact(std::span<const CompactList>) {}
  void encode(std::span<const EncodeList>) {}
  void repack(std::span<const RepackTile>, RepackTo) {}
  template <Codec C, Side>
  const void* codec(TileShape) const {
    return nullptr;
  }
  template <class P>
  const void* pair(TileShape, TileShape) const {
    return nullptr;
  }
  Support support(const PageGeometry&) const { return Support::unsupported; }
  void attend(const LayerShape&, std::span<const AttendSequence>, MassKind) {}
};
static_assert(Backend<Launching>);

// With the arguments that they really get: a cache whose formats make states, and every policy there is.
using Coded = Formats<Pair<Raw<half>, Raw<half>>, Pair<ZipVlKeys<4>, ZipVlValues<2>>, Pair<MikvKeys<2>, Fp8E4M3>,
                      Pair<NvFp4<>, MxFp4<>>>;

void every_functor(KvCache<Launching, Coded>& cache, const AnyCompressor& compressor) {
  cache.observe({}, 0, compressor, {}, {});
  cache.compress({}, compressor);
  cache.decode(0, std::span<const AttendRequest>(), compressor);
}

}  // namespace kvpare::test

template class kvpare::KvCache<kvpare::test::Launching, kvpare::test::Coded>;
