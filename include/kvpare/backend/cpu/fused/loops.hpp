// The loops over codes of the instruction set that some kernels are of.
//
// Tiles are compiled once for all sets: what differs is a leaf, one call per tile or row, and the set is chosen there.
#pragma once

#include "sets.hpp"

namespace kvpare::cpu::fused {

#if KVPARE_HAS_X86_SETS
#define KVPARE_OF_SET(...)                                       \
  switch (isa_) {                                                \
    case Isa::avx2: return avx2::Set::__VA_ARGS__;               \
    case Isa::avx2_vnni: return avx2_vnni::Set::__VA_ARGS__;     \
    case Isa::avx512: return avx512::Set::__VA_ARGS__;           \
    case Isa::avx512_vnni: return avx512_vnni::Set::__VA_ARGS__; \
    default: return plain::Set::__VA_ARGS__;                     \
  }
#else
#define KVPARE_OF_SET(...)                                       \
  switch (isa_) {                                                \
    default: return plain::Set::__VA_ARGS__;                     \
  }
#endif

/// The members of `<set>::Set`, see loops.inl.
class Loops {
 public:
  explicit Loops(const Kernels& k) : isa_(k.isa) {}

  // Keys.

  template <int bits, bool table, bool wide>
  void prepare_query(const Layout& layout, const Values& values, const float* q, Index q_stride, Index rows,
                     std::byte* prepared) const {
    KVPARE_OF_SET(template prepare_query<bits, table, wide>(layout, values, q, q_stride, rows, prepared))
  }
  template <int bits, bool table, bool wide>
  void score_keys(const KeyCall& call) const {
    KVPARE_OF_SET(template score_keys<bits, table, wide>(call))
  }
  template <bool e5m2>
  float small_unit() const {
    KVPARE_OF_SET(template small_unit<e5m2>)
  }
  template <bool e5m2>
  void score_small_keys(const KeyCall& call) const {
    KVPARE_OF_SET(template score_small_keys<e5m2>(call))
  }
  template <bool unused = false>
  void score_mixed_keys(const MixedKeyCall& call) const {
    KVPARE_OF_SET(template score_mixed_keys<unused>(call))
  }
  template <bool unused = false>
  void score_listed(const ListedNumbers& list, const TileRows& keys, const float* q, Index rows, float* out,
                    Index out_stride) const {
    KVPARE_OF_SET(template score_listed<unused>(list, keys, q, rows, out, out_stride))
  }

  // Keys as floats, and turned.

  template <int bits>
  void decode_keys(const Layout& layout, const Values& values, const float* levels, const std::byte* tile, Index first,
                   const float* gain, const float* shift, float* out) const {
    KVPARE_OF_SET(template decode_keys<bits>(layout, values, levels, tile, first, gain, shift, out))
  }
  template <bool unused = false>
  void add_listed(const ListedNumbers& list, Index first, Index width, const float* gain, float* block) const {
    KVPARE_OF_SET(template add_listed<unused>(list, first, width, gain, block))
  }
  template <bool unused = false>
  void turn_offsets(TurnedQuery& q) const {
    KVPARE_OF_SET(template turn_offsets<unused>(q))
  }
  template <bool unused = false>
  void turn_block(const TurnedQuery& q, const Position* positions, float* cosines, float* sines) const {
    KVPARE_OF_SET(template turn_block<unused>(q, positions, cosines, sines))
  }
  template <bool unused = false>
  void turn_rows(const TurnedQuery& q, Position position, const float* rows, Index n, float* to) const {
    KVPARE_OF_SET(template turn_rows<unused>(q, position, rows, n, to))
  }
  template <bool unused = false>
  void step_rows(const TurnedQuery& q, Index n, float* rows) const {
    KVPARE_OF_SET(template step_rows<unused>(q, n, rows))
  }
  template <bool unused = false>
  void score_turned(const TurnedQuery& q, const float* block, const float* cosines, const float* sines,
                    const float* turned, const float* rest, Index rows, std::uint64_t listed, Index first, float* out,
                    Index out_stride) const {
    KVPARE_OF_SET(template score_turned<unused>(q, block, cosines, sines, turned, rest, rows, listed, first, out,
                                                out_stride))
  }

  // Values.

  template <int bits, Levels levels, bool wide>
  void accumulate_values(const ValueCall& call) const {
    KVPARE_OF_SET(template accumulate_values<bits, levels, wide>(call))
  }
  template <bool e5m2>
  void accumulate_small_values(const ValueCall& call) const {
    KVPARE_OF_SET(template accumulate_small_values<e5m2>(call))
  }
  template <bool wide>
  void accumulate_mixed_values(const MixedValueCall& call) const {
    KVPARE_OF_SET(template accumulate_mixed_values<wide>(call))
  }
  template <bool unused = false>
  void accumulate_listed(const ListedNumbers& list, const TileRows& values, const float* p, Index p_stride, Index rows,
                         float* acc, Index acc_stride) const {
    KVPARE_OF_SET(template accumulate_listed<unused>(list, values, p, p_stride, rows, acc, acc_stride))
  }

  // Codes.

  /// Groups that `quantize` takes are multiples of this.
  Index quantize_lanes() const { KVPARE_OF_SET(quantize_lanes) }
  template <Rule rule, Rounding rounding>
  bool quantize(int bits, bool exact, const float* x, Index width, Index group, std::uint8_t* codes, half* scales,
                half* zeros) const {
    KVPARE_OF_SET(template quantize<rule, rounding>(bits, exact, x, width, group, codes, scales, zeros))
  }
  template <bool unused = false>
  void place(const Layout& layout, std::byte* tile, Index slot, const std::uint8_t* codes) const {
    KVPARE_OF_SET(template place<unused>(layout, tile, slot, codes))
  }
  template <bool unused = false>
  void unpack_ternary(const Layout& layout, const std::byte* tile, Index units, std::byte* to) const {
    KVPARE_OF_SET(template unpack_ternary<unused>(layout, tile, units, to))
  }

 private:
  Isa isa_;
};
#undef KVPARE_OF_SET

}  // namespace kvpare::cpu::fused
