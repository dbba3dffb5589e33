#include "record.hpp"

#include <algorithm>
#include <utility>

namespace vlm {

example::Trace record_prompt(const Decoder& decoder, std::span<const std::uint8_t> rgb, std::span<const int> prompt,
                             std::map<std::string, std::string> metadata, Device device) {
  Matrix x = decoder.embed_prompt(rgb, prompt);
  example::Trace trace;
  trace.token_class.assign(static_cast<std::size_t>(x.rows()), static_cast<std::uint8_t>(kvpare::TokenClass::text));
  std::fill(trace.token_class.begin() + image_begin, trace.token_class.begin() + image_end,
            static_cast<std::uint8_t>(kvpare::TokenClass::image));
  trace.softmax_scale = attention_shapes().layers.front().scale;
  trace.metadata = std::move(metadata);
  trace.metadata["rope_theta"] = "10000";
  trace.metadata["rope_pairing"] = "halves";  // channel i with channel i + head_dim / 2

  make_engine(device, 16)->watch(decoder, std::move(x), [&](Index layer, const NewRows& rows) {
    trace.positions.assign(rows.positions.begin(), rows.positions.end());
    trace.append(layer, rows.queries, rows.keys, rows.values);
  });
  return trace;
}

}  // namespace vlm
