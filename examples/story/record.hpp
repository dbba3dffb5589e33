// Records what the model's attention is given for a text, for kvpare_inspect.
#pragma once

#include "decoder.hpp"
#include "support/trace.hpp"

namespace story {

/// The prefill of a text over a full cache. Throws InvalidArgument on tokens outside of the vocabulary.
example::Trace record_text(const Decoder& decoder, std::span<const int> tokens);

}  // namespace story
