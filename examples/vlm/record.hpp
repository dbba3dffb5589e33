// Records what the model's attention is given for a prompt, for kvpare_inspect.
#pragma once

#include "engine.hpp"
#include "support/trace.hpp"

namespace vlm {

/// The prefill of a dialogue that begins with this picture and this prompt. `metadata` goes along. Throws
/// InvalidArgument on what is no image or no word.
example::Trace record_prompt(const Decoder& decoder, std::span<const std::uint8_t> rgb, std::span<const int> prompt,
                             std::map<std::string, std::string> metadata = {}, Device device = Device::cpu);

}  // namespace vlm
