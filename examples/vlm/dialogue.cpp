#include "dialogue.hpp"

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

template class Dialogue<kvpare::cpu::Backend>;

}  // namespace vlm
