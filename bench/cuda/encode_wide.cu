// encode into 8 and 4 bits. Bytes of the new form: as in attend_8bit.cu and attend_4bit.cu.
#include "encode.cuh"

namespace bench {
namespace {

const bool added = add_encode<Both<kvpare::Fp8E4M3>>("fp8_e4m3") && add_encode<Both<kvpare::Int8>>("int8") &&
                   add_encode<Both<kvpare::Int4>>("int4") && add_encode<Both<kvpare::Symmetric<4, 32>>>("int4_g32") &&
                   add_encode<Both<kvpare::NvFp4<>>>("nvfp4");

}  // namespace
}  // namespace bench
