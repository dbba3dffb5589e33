#include "record.hpp"

#include "context.hpp"

namespace story {

example::Trace record_text(const Decoder& decoder, std::span<const int> tokens) {
  example::Trace trace;
  trace.softmax_scale = decoder.attention_shapes().layers.front().scale;
  trace.metadata = {{"rope_theta", "10000"}, {"rope_pairing", "interleaved"}};  // channel 2i with channel 2i + 1
  kvpare::cpu::Backend backend({.threads = 1});
  Context context(decoder, backend, {}, {.most_tokens = std::ssize(tokens)});
  context.read(tokens, [&](const LayerRows& rows) {
    if (rows.layer == 0) trace.positions.insert(trace.positions.end(), rows.positions.begin(), rows.positions.end());
    trace.append(rows.layer, rows.queries, rows.keys, rows.values);
  });
  return trace;
}

}  // namespace story
