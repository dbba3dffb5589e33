// attend over 4-bit codes. Bytes per token of a kv head (head_dim 128, keys and values):
//
//   int4       132: codes, a half scale per token and side
//   int4_g32   144: codes, a half scale per 32 numbers
//   nvfp4      144: codes, an fp8 scale per 16 numbers
//
// At the rate of a device copy these leave about 3.7 lane instructions per number, all told.
#include "attend.cuh"

namespace bench {
namespace {

using Int4 = Both<kvpare::Int4>;
using Int4G32 = Both<kvpare::Symmetric<4, 32>>;
using Nvfp4 = Both<kvpare::NvFp4<>>;

const bool added =
    add_attend<Half, Int4>("int4", attend_cases(Largest::yes)) &&
    add_attend<Half, Int4G32>("int4_g32", attend_cases()) &&
    add_attend<Half, Nvfp4>("nvfp4", std::vector<AttendCase>{{llama_8b(), 1, 4096}, {llama_8b(), 64, 4096}}) &&
    add_ragged<Half, Int4>("int4") && add_mixed<Half, Int4>("half+int4") && add_one_long<Half, Int4>("int4");

}  // namespace
}  // namespace bench
