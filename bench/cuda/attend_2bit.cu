// attend over codes of 2 bits and fewer. Bytes per token of a kv head (head_dim 128, keys and values):
//
//   int2       68: codes, a half scale per token and side
//   kivi2      96: keys along 32 tokens, values along 32 channels, a half scale and minimum each
//   ternary    56: five codes to a byte, a half scale per token and side
//   int1       36: signs, a half scale per token and side
//
// At the rate of a device copy 2 bits leave about 1.9 lane instructions per number, 1 bit half of that.
#include "attend.cuh"

namespace bench {
namespace {

using Int2 = Both<kvpare::Int2>;
using Kivi2 = kvpare::Pair<kvpare::KiviKeys<2>, kvpare::KiviValues<2>>;
using Ternary = Both<kvpare::Ternary<>>;
using Int1 = Both<kvpare::Int1>;

const bool added = add_attend<Half, Int2>("int2", attend_cases()) && add_attend<Half, Kivi2>("kivi2", attend_cases()) &&
                   add_attend<Half, Ternary>("ternary", attend_cases()) &&
                   add_attend<Half, Int1>("int1", attend_cases());

}  // namespace
}  // namespace bench
