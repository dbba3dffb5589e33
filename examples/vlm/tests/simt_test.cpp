// A dialogue on the CUDA backend's kernels, run on the host, is the CPU's: same choice, same answer, same logits.
#include <gtest/gtest.h>

#include "../cpu.hpp"
#include "../decoder.inl"
#include "../dialogue.inl"
#include "../evaluation_set.hpp"
#include "simt/backend.hpp"

namespace {

using namespace vlm;
using Simt = kvpare::test::simt::Backend;

// Few formats: most of this program's life is its compilation.
using Floats = kvpare::Raw<float>;
using Few = kvpare::Formats<kvpare::Pair<Floats, Floats>, kvpare::Pair<kvpare::Int8, kvpare::Int8>>;

struct Outcome {
  std::vector<std::vector<Index>> kept;  // [layer * kv_heads + head]
  Row first_logits, last_logits;
  std::vector<int> answer, forked_answer;
  Index bytes_before = 0, bytes_after = 0;
};

template <kvpare::Backend B>
Outcome talk(B& backend, const Decoder& decoder, const Scene& scene, const char* policy) {
  Cache<B, Few> cache(backend, attention_shapes(), {.page_tokens = 16, .pool_bytes = 4 << 20});
  kvpare::AnyCompressor compressor = kvpare::make_compressor(policy);
  compressor.selector.among = kvpare::visual;
  Dialogue<B, Few> dialogue(decoder, cache, scene.image, scene.first.prompt, compressor);
  Outcome out;
  for (Index l = 0; l < layer_count; ++l)
    for (Index h = 0; h < kv_heads; ++h) out.kept.push_back(dialogue.kept_patches(l, h));
  out.first_logits = dialogue.logits();
  Dialogue<B, Few> fork = dialogue.fork();
  out.answer = dialogue.answer(scene.first.longest_answer());
  out.last_logits = dialogue.logits();
  fork.read(scene.same[0].prompt);
  out.forked_answer = fork.answer(1);
  out.bytes_before = dialogue.cost().bytes_before, out.bytes_after = dialogue.cost().bytes_after;
  return out;
}

void expect_near(const Row& got, const Row& wanted) {
  ASSERT_EQ(got.size(), wanted.size());
  EXPECT_LE((got - wanted).cwiseAbs().maxCoeff(), 1e-3f);
}

TEST(SimtTest, ADialogueIsTheCpus) {
  const Decoder decoder(Safetensors::open(KVPARE_VLM_DATA "/vlm.safetensors"));
  const Scene scene = read_evaluation_set(KVPARE_VLM_DATA).scenes[2];
  kvpare::cpu::Backend cpu({.threads = 1});
  Simt simt;
  for (const char* policy : {"full", "snap_kv(keep=0.2, rows=text, pool=1)", "air_cache(keep=0.1) + in_form(form=int8)",
                             "top_v(keep=0.2)"}) {
    SCOPED_TRACE(policy);
    const Outcome wanted = talk(cpu, decoder, scene, policy), got = talk(simt, decoder, scene, policy);
    EXPECT_EQ(got.kept, wanted.kept);
    EXPECT_EQ(got.answer, wanted.answer);
    EXPECT_EQ(got.forked_answer, wanted.forked_answer);
    EXPECT_EQ(got.bytes_before, wanted.bytes_before);
    EXPECT_EQ(got.bytes_after, wanted.bytes_after);
    expect_near(got.first_logits, wanted.first_logits);
    expect_near(got.last_logits, wanted.last_logits);
  }
}

}  // namespace
