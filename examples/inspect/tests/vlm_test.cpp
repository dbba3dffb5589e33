// From kvpare_vlm to a trace and back: a policy keeps of the recorded prompt what it keeps in the dialogue itself.
#include <gtest/gtest.h>

#include "../../vlm/cpu.hpp"
#include "../../vlm/dialogue.hpp"
#include "../../vlm/evaluate.hpp"
#include "../../vlm/record.hpp"
#include "../inspect.hpp"

namespace {

using kvpare::Index;

TEST(VlmTest, TheRecordedPromptIsCompressedAsTheDialogueIs) {
  const vlm::Decoder decoder(vlm::Safetensors::open(KVPARE_VLM_DATA "/vlm.safetensors"));
  const vlm::EvaluationSet set = vlm::read_evaluation_set(KVPARE_VLM_DATA);
  kvpare::cpu::Backend backend({.threads = 1});
  vlm::Cache<kvpare::cpu::Backend> cache(backend, vlm::attention_shapes(), vlm::cache_options(16));
  for (const std::size_t number : {0, 12, 77}) {
    const vlm::Scene& scene = set.scenes[number];
    const example::Trace recorded = vlm::record_prompt(decoder, scene.image, scene.first.prompt);
    const std::string file = print_trace(recorded, "trace");
    const example::Trace trace = parse_trace(example::Safetensors::parse(file, "trace"));
    EXPECT_EQ(trace, recorded);
    ASSERT_EQ(trace.tokens(), vlm::image_end + std::ssize(scene.first.prompt));

    const std::vector<std::string> policies = {"air_cache(keep=0.1)", "air_cache(keep=0.05, alpha=0.2)",
                                               "snap_kv(keep=0.1, rows=text, among=visual)",
                                               "h2o(keep=0.2, among=visual)", "ada_kv(keep=0.1, among=visual)"};
    const auto results = inspect::run(trace, policies, {.page_tokens = 16});
    for (const inspect::Result& result : results) {
      const vlm::Dialogue dialogue(decoder, cache, scene.image, scene.first.prompt,
                                   kvpare::make_compressor(result.policy));
      ASSERT_EQ(result.layers.size(), static_cast<std::size_t>(vlm::layer_count));
      for (Index l = 0; l < vlm::layer_count; ++l)
        for (Index h = 0; h < vlm::kv_heads; ++h) {
          std::vector<Index> patches;
          for (const Index token : result.layers[static_cast<std::size_t>(l)].kept[static_cast<std::size_t>(h)])
            if (token >= vlm::image_begin && token < vlm::image_end) patches.push_back(token - vlm::image_begin);
          EXPECT_EQ(patches, dialogue.kept_patches(l, h)) << result.policy << " scene " << number << " layer " << l;
          EXPECT_LT(std::ssize(patches), vlm::visual_tokens / 2);
        }
      EXPECT_EQ(result.before.pages, dialogue.cost().bytes_before);
      EXPECT_EQ(result.after.pages, dialogue.cost().bytes_after);
    }
  }
}

}  // namespace
