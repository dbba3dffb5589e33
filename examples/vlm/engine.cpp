#include "engine.hpp"

#include <stdexcept>

#include "cpu.hpp"
#include "engine.inl"
#if defined(KVPARE_VLM_CUDA)
#include "cuda.hpp"
#endif

namespace vlm {

kvpare::CacheOptions cache_options(Index page_tokens) {
  constexpr Index dialogues = 4, longest = 320;  // tokens; the longest dialogue of the set has fewer than 300
  constexpr Index token_bytes = layer_count * kv_heads * 2 * head_dim * static_cast<Index>(sizeof(float));
  return example::with_room_for_forms<Formats>(
      {.page_tokens = page_tokens, .pool_bytes = dialogues * (longest + page_tokens) * token_bytes}, attention_shapes());
}

#if !defined(KVPARE_VLM_CUDA)
namespace {

void check_cuda() { throw std::runtime_error("--device cuda: this build has no CUDA (KVPARE_CUDA=ON), there is: cpu"); }
std::unique_ptr<Engine> make_cuda_engine(Index) { return nullptr; }

}  // namespace
#endif

void check_device(Device device) {
  if (device == Device::cuda) check_cuda();
}

std::unique_ptr<Engine> make_engine(Device device, Index page_tokens, Index threads) {
  check_device(device);
  if (device == Device::cuda) return make_cuda_engine(page_tokens);
  return std::make_unique<EngineOn<kvpare::cpu::Backend>>(page_tokens, kvpare::cpu::Options{.threads = threads});
}

}  // namespace vlm
