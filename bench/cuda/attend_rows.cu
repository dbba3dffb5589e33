// attend over rows as they are: 512 bytes per token of a kv head (head_dim 128), 256 of them keys.
//
// Instructions, per 16 tokens of a head and per warp: attend_fused.cuh has the count.
#include "attend.cuh"

namespace bench {
namespace {

using Bfloat16 = Both<kvpare::Raw<kvpare::bfloat16>>;

std::vector<AttendCase> with_batch_of_32(Largest largest = Largest::no) {
  std::vector<AttendCase> cases = attend_cases(largest);
  cases.push_back({llama_8b(), 32, 4096});
  return cases;
}

const bool added = add_attend<Bfloat16>("bfloat16", with_batch_of_32(Largest::yes)) &&
                   add_attend<Half>("half", with_batch_of_32()) && add_ragged<Half>("half") &&
                   add_one_long<Half>("half");

}  // namespace
}  // namespace bench
