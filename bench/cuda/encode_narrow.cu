// encode into 2 bits and fewer. Bytes of the new form: as in attend_2bit.cu.
#include "encode.cuh"

namespace bench {
namespace {

using Kivi2 = kvpare::Pair<kvpare::KiviKeys<2>, kvpare::KiviValues<2>>;

const bool added = add_encode<Both<kvpare::Int2>>("int2") && add_encode<Kivi2>("kivi2") &&
                   add_encode<Both<kvpare::Ternary<>>>("ternary") && add_encode<Both<kvpare::Int1>>("int1");

}  // namespace
}  // namespace bench
