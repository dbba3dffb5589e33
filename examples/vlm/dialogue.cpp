#include "dialogue.hpp"

#include <algorithm>

#include "cpu.hpp"
#include "dialogue.inl"

namespace vlm {

void Cost::operator+=(const Cost& more) {
  prefill_us += more.prefill_us, compress_us += more.compress_us;
  decode_us += more.decode_us, decode_steps += more.decode_steps;
  bytes_before += more.bytes_before, bytes_after += more.bytes_after;
  answers += more.answers, answer_bytes += more.answer_bytes, answer_tokens += more.answer_tokens;
  support = std::min(support, more.support);
}

Index layer_of_features(const kvpare::AnyCompressor& compressor) {
  return std::clamp<Index>(compressor.selector.skip_layers - 1, 0, layer_count - 1);
}

template class Dialogue<kvpare::cpu::Backend>;

}  // namespace vlm
