// The CPU backend without instruction sets: what a device's kernels are compared with. Its codecs are compiled once, not
// for every set that a cpu::Backend chooses among.
#pragma once

#include <kvpare/backend/cpu/backend.hpp>

namespace kvpare::test {

class PlainCpu : public cpu::Backend {
 public:
  PlainCpu() : cpu::Backend({.threads = 1, .isa = cpu::Isa::plain}) {}

  template <Codec C, Side side>
  const void* codec(TileShape shape) const {
    if (!C::fits(shape)) return nullptr;
    return cpu::detail::with_tiles<C, side, cpu::fused::plain::Set, true>(
        shape, [&]<class Tiles, Support support>() -> const cpu::TileOps* {
          return &cpu::detail::table_of<C, Tiles, support>;
        });
  }
};
static_assert(kvpare::Backend<PlainCpu>);

}  // namespace kvpare::test
