// What only a device can show: verbs queued on a stream that is being captured, replayed as a graph; several streams at once.
#include <gtest/gtest.h>

#include <kvpare/cuda.cuh>

#include "support/paged_tokens.hpp"
#include "support/tolerance.hpp"

namespace kvpare::test {
namespace {

struct OwnStream {
  cudaStream_t stream = nullptr;
  OwnStream() { cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking); }
  ~OwnStream() { cudaStreamDestroy(stream); }
};

class Graph : public OnRig<CudaRig> {};

/// One layer of one sequence, ready to be attended to.
struct Step {
  static constexpr Index kv_heads = 2, group = 4, width = 128, tokens = 700;
  LayerShape shape{.q_heads = kv_heads * group, .kv_heads = kv_heads, .key_dim = width, .value_dim = width, .scale = 0.09f};
  oracle::Array3 asked;
  PagedTokens<cuda::Backend> pages;
  TensorBuffer<cuda::Backend> queries, out;
  Buffer<cuda::Backend, float> lse;
  std::vector<Position> positions{static_cast<Position>(tokens)};

  Step(cuda::Backend& be, Dice& dice)
      : asked(random_array(dice, 1, shape.q_heads, width, DType::f16)),
        pages(be, heads(dice), width, width, {64, Layout::pool, DType::f16, 3}), queries(be, asked, DType::f16),
        out(be, oracle::Array3(1, shape.q_heads, width), DType::f32), lse(be, shape.q_heads) {}

  static std::vector<PlacedHead> heads(Dice& dice) {
    std::vector<PlacedHead> all;
    for (Index h = 0; h < kv_heads; ++h) all.push_back(random_head(dice, tokens, width, width, DType::f16, 0, 0.1, 2));
    return all;
  }
  void attend(cuda::Backend& be) {
    const AttendSequence one{pages.heads(), queries.tensor(), positions, out.writable(), lse.data()};
    be.attend(shape, std::span(&one, 1), MassKind::none);
  }
};

TEST_F(Graph, AttendIsCapturedAndReplayedWithNewQueries) {
  const OwnStream own;
  cuda::Backend be({.stream = own.stream});
  Dice dice{9};
  Step step(be, dice);
  step.attend(be);  // scratch takes its size
  const auto first = step.out.download();

  cudaGraph_t graph = nullptr;
  cudaGraphExec_t ready = nullptr;
  ASSERT_EQ(cudaStreamBeginCapture(own.stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  step.attend(be);
  ASSERT_EQ(cudaStreamEndCapture(own.stream, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&ready, graph, 0), cudaSuccess);

  // Something else uses the same scratch in between.
  Step other(be, dice);
  other.attend(be);
  const auto wanted = other.out.download();

  // A replay reads what stands in its buffers then.
  const std::vector<std::byte> queries = other.queries.raw();
  be.to_backend(const_cast<void*>(step.queries.tensor().data), queries.data(), static_cast<Index>(queries.size()));
  ASSERT_EQ(cudaGraphLaunch(ready, own.stream), cudaSuccess);
  const auto replayed = step.out.download();
  step.attend(be);
  const auto again = step.out.download();
  EXPECT_EQ(replayed.values, again.values) << "a replay and a call give the same bits";
  EXPECT_NE(replayed.values, first.values);
  EXPECT_NE(replayed.values, wanted.values);
  cudaGraphExecDestroy(ready), cudaGraphDestroy(graph);
}

TEST_F(Graph, NoVerbSynchronises) {
  const OwnStream own;
  cuda::Backend be({.stream = own.stream});
  Dice dice{10};
  Step step(be, dice);
  step.attend(be);
  cudaStreamSynchronize(own.stream);
  // Work that takes far longer than queuing a verb: if a verb waited for it, the stream would be idle after the verb.
  const Buffer<cuda::Backend, float> busy(be, Index{1} << 26);
  for (int i = 0; i < 200; ++i) fill(be, busy.data(), busy.size(), 1.0f);
  step.attend(be);
  EXPECT_EQ(cudaStreamQuery(own.stream), cudaErrorNotReady) << "attend waited for the stream";
  cudaStreamSynchronize(own.stream);
}

TEST_F(Graph, BackendsOnTwoStreamsDoNotMeet) {
  const OwnStream a, b;
  cuda::Backend on_a({.stream = a.stream}), on_b({.stream = b.stream});
  Dice dice{11};
  Step first(on_a, dice), second(on_b, dice);
  first.attend(on_a), second.attend(on_b);
  const auto alone_a = first.out.download(), alone_b = second.out.download();
  for (int round = 0; round < 50; ++round) first.attend(on_a), second.attend(on_b);
  EXPECT_EQ(first.out.download().values, alone_a.values);
  EXPECT_EQ(second.out.download().values, alone_b.values);
}

}  // namespace
}  // namespace kvpare::test
