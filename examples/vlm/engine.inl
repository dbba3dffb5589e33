// Engine on a backend, for the files that compile it for one.
#pragma once

#include <concepts>
#include <utility>

#include "conversation.hpp"
#include "engine.hpp"

namespace vlm {

/// `Owner` is what is made: the backend, or one with what it needs.
template <kvpare::Backend B, std::derived_from<B> Owner = B>
class EngineOn : public Engine {
 public:
  template <class... Options>
  explicit EngineOn(Index page_tokens, Options&&... options)
      : backend_(std::forward<Options>(options)...), cache_(backend_, attention_shapes(), cache_options(page_tokens)) {}

  void share_states(const example::States& states) override { example::share_states(cache_, states); }

  Result converse(const Decoder& decoder, const Scene& scene, const kvpare::AnyCompressor& compressor,
                  const std::vector<Task>& tasks, const Visit& visit) override {
    return Conversation<B>(decoder, cache_, scene, compressor).run(tasks, visit);
  }

  std::vector<std::vector<std::vector<Index>>> kept_patches(const Decoder& decoder, const Scene& scene,
                                                            const Turn& asked,
                                                            const kvpare::AnyCompressor& compressor) override {
    const Dialogue<B> dialogue(decoder, cache_, scene.image, asked.prompt, compressor);
    std::vector<std::vector<std::vector<Index>>> kept(layer_count);
    for (Index l = 0; l < layer_count; ++l)
      for (Index h = 0; h < kv_heads; ++h)
        kept[static_cast<std::size_t>(l)].push_back(dialogue.kept_patches(l, h));
    return kept;
  }

  void watch(const Decoder& decoder, Matrix prompt, const Decoder::Watch& watch) override {
    const kvpare::SequenceId sequence = cache_.create();
    decoder.forward(cache_, sequence, std::move(prompt), 0, watch);
    cache_.release(sequence);
  }

  void print_formats(std::ostream& out) const override { example::print_formats(out, cache_); }

 private:
  Owner backend_;
  Cache<B> cache_;
};

}  // namespace vlm
