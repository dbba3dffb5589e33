// Model files of examples/story: refused in words, or every float of the file is where the header says.
#include <cstring>

#include "fuzz/target.hpp"
#include "story/model_file.hpp"
#include "support/bad_file.hpp"

using kvpare::test::must;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  try {
    const story::Weights w = story::parse_model(bytes, "input");
    const auto& s = w.shape;
    story::Index floats =
        w.embedding.size() + w.final_norm.size() + w.own_classifier.size() + s.longest * (s.head_dim() / 2) * 2;
    for (const auto& l : w.layers)
      for (const story::Index n : {l.attention_norm.size(), l.mlp_norm.size(), l.query.size(), l.key.size(),
                                   l.value.size(), l.output.size(), l.gate.size(), l.up.size(), l.down.size()})
        floats += n;
    must(static_cast<std::size_t>(floats) * 4 + 28 == size, "weights do not fill the file");
    must(std::memcmp(w.embedding.data(), bytes.data() + 28, 4) == 0, "the embedding does not come first");
    const float* last = w.own_classifier.size() > 0 ? w.own_classifier.data() + w.own_classifier.size() - 1 : nullptr;
    must(last == nullptr || std::memcmp(last, bytes.data() + size - 4, 4) == 0, "the classifier does not come last");
    must(w.classifier().rows() == s.vocabulary && w.classifier().cols() == s.width, "the classifier has another shape");
  } catch (const example::BadFile& e) {
    must(std::string(e.what()).size() > std::string("input: ").size(), "a refusal says nothing");
  }
  return 0;
}
