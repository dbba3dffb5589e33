// What codecs have learnt of a model, layer by layer: ranges and codebooks, dictionaries. kvpare_tune --learn makes it.
#pragma once

#include <kvpare/core/error.hpp>
#include <kvpare/policy/precision/precision.hpp>
#include <string>
#include <vector>

#include "safetensors.hpp"

namespace example {

/// A safetensors file: "form" among its texts, and for each layer l
///
///   layers.{l}.keys, layers.{l}.values   [floats]   F32, as KvCache::share_state takes them; a side without states is left out.
///                                                   Of a dictionary two halves to a float: .view(float16) in numpy
struct States {
  kvpare::Form form;  // for pages of these codecs

  struct Layer {
    std::vector<float> keys, values;
    friend bool operator==(const Layer&, const Layer&) = default;
  };
  std::vector<Layer> layers;
  friend bool operator==(const States&, const States&) = default;
};

/// Throws BadFile on a file that is none.
States read_states(const std::string& path);
void write_states(const std::string& path, const States& states);

/// Gives states to a cache, for sequences from now on. Layers in a row that have the same ones have them in memory once. Throws
/// InvalidArgument where the cache has other layers or does not list the form.
template <class Cache>
void share_states(Cache& cache, const States& states) {
  const auto layers = static_cast<std::size_t>(cache.layers());
  kvpare::require(states.layers.size() == layers, "states: of ", states.layers.size(), " layers, the model has ", layers);
  int format = 0;
  for (const auto& listed : cache.formats()) {
    if (kvpare::Form(listed.keys.name, listed.values.name) == states.form) break;
    ++format;
  }
  kvpare::require(format < static_cast<int>(std::ssize(cache.formats())), "states: for ", print_setting(states.form),
                  ", which this cache has no pages of; --list shows those it has");
  for (std::size_t first = 0, end; first < layers; first = end) {
    for (end = first + 1; end < layers && states.layers[end] == states.layers[first];) ++end;
    cache.share_state(static_cast<kvpare::Index>(first), static_cast<kvpare::Index>(end) - 1, format,
                      states.layers[first].keys, states.layers[first].values);
  }
}

}  // namespace example
