// What a model's attention layers look like.
#pragma once

#include <limits>
#include <optional>
#include <vector>

#include "config.hpp"
#include "error.hpp"
#include "rope.hpp"

namespace kvpare {

/// One attention layer.
///
/// Logit of query head h and key j:  s = scale * q·k;  with softcap c > 0:  s = c * tanh(s / c).
/// Query head h reads kv head h / (q_heads / kv_heads).
struct LayerShape {
  Index q_heads = 0, kv_heads = 0;
  Index key_dim = 0, value_dim = 0;     // channels per head; they may differ
  float scale = 0;                      // usually 1 / sqrt(key_dim); never derived from a stored width, so say it
  float softcap = 0;                    // 0 = none
  Index window = 0;                     // sliding window: a row sees keys with position > its own - window; 0 = all
  std::vector<float> sink_logits = {};  // per query head: exp(sink) joins the softmax denominator; empty = none
  bool compress = true;                 // false: policies leave this layer as it is
  std::optional<Rope> rope = {};        // what turned queries and keys; for policies that want them unturned

  constexpr Index group() const { return q_heads / kv_heads; }
  friend bool operator==(const LayerShape&, const LayerShape&) = default;
};

/// Throws unless every number of the shape makes sense; `layer` only names it in the message.
inline void check(const LayerShape& s, Index layer) {
  require(s.kv_heads >= 1, "layer ", layer, ": kv_heads = ", s.kv_heads, ", must be at least 1");
  require(s.q_heads >= 1 && s.q_heads % s.kv_heads == 0, "layer ", layer, ": q_heads = ", s.q_heads,
          ", must be a positive multiple of kv_heads = ", s.kv_heads);
  require(s.key_dim >= 1 && s.key_dim <= 4096, "layer ", layer, ": key_dim = ", s.key_dim,
          ", must be within [1, 4096]");
  require(s.value_dim >= 1 && s.value_dim <= 4096, "layer ", layer, ": value_dim = ", s.value_dim,
          ", must be within [1, 4096]");
  require(s.scale > 0 && s.scale <= std::numeric_limits<float>::max(), "layer ", layer, ": scale = ", s.scale,
          ", must be positive and finite (usually 1 / sqrt(key_dim))");
  require(s.softcap >= 0 && s.softcap <= std::numeric_limits<float>::max(), "layer ", layer, ": softcap = ", s.softcap,
          ", must be 0 (none) or positive and finite");
  require(s.window >= 0, "layer ", layer, ": window = ", s.window, ", must be 0 (none) or positive");
  require(s.sink_logits.empty() || static_cast<Index>(s.sink_logits.size()) == s.q_heads, "layer ", layer, ": ",
          s.sink_logits.size(), " sink logits, must be none or one per query head (", s.q_heads, ")");
  if (s.rope) check(*s.rope, s.key_dim, layer);
}

/// The rotation of a layer by logical positions. Throws where there is none, in the name of `whom` needs it.
template <class Whom>
const Rope& plain_rope_of(const LayerShape& s, Index layer, const Whom& whom) {
  require(s.rope.has_value(), whom, ": layer ", layer, " has no rope, it must be said in LayerShape::rope");
  require(s.rope->axes.empty(), whom, ": the rope of layer ", layer,
          " turns by three numbers of a token (axes); a cache knows one, its position");
  return *s.rope;
}

/// The layers of a model, in order.
struct Model {
  std::vector<LayerShape> layers;
  friend bool operator==(const Model&, const Model&) = default;
};

inline void check(const Model& model) {
  require(!model.layers.empty(), "model: no layers");
  for (std::size_t l = 0; l < model.layers.size(); ++l) check(model.layers[l], static_cast<Index>(l));
}

}  // namespace kvpare
