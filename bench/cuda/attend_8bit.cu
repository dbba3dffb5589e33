// attend over 8-bit codes. Bytes per token of a kv head (head_dim 128, keys and values):
//
//   fp8_e4m3   256: codes alone
//   int8       260: codes, a half scale per token and side
//   q8_0       272: codes, a half scale per 32 numbers
#include "attend.cuh"

namespace bench {
namespace {

using Fp8 = Both<kvpare::Fp8E4M3>;
using Int8 = Both<kvpare::Int8>;
using Q8_0 = Both<kvpare::Q8_0>;

const bool added = add_attend<Half, Int8>("int8", attend_cases(Largest::yes)) &&
                   add_attend<Half, Fp8>("fp8_e4m3", attend_cases()) &&
                   add_attend<Half, Q8_0>("q8_0", std::vector<AttendCase>{{llama_8b(), 64, 4096}}) &&
                   add_ragged<Half, Int8>("int8") && add_one_long<Half, Int8>("int8");

}  // namespace
}  // namespace bench
