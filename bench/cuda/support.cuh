// What the CUDA benchmarks share: a device with a yardstick, steps timed as a graph, caches full of random tokens.
#pragma once

#include <benchmark/benchmark.h>

#include <chrono>
#include <cmath>
#include <exception>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <kvpare/cuda.cuh>

#include "../support/shapes.hpp"

namespace bench {

using kvpare::Position;
using kvpare::SequenceId;

inline constexpr Index page_tokens = 64;
inline constexpr Index rotation_bytes = Index{512} << 20;  // that the inputs of one benchmark take, at least
inline constexpr Index most_bytes = Index{100} << 30;      // and at most
inline constexpr Index most_inputs = 256;

inline void check(cudaError_t code, const char* what) {
  kvpare::require(code == cudaSuccess, what, ": ", cudaGetErrorString(code));
}

// ---- the device (device.cu)

/// Bytes per second of a device copy over 1 GiB, those read and those written both counted: the faster of
/// cudaMemcpyAsync and a kernel, each by its median.
double copy_rate(cudaStream_t stream);

/// Throws unless the device has room for so many bytes, and they are no more than `most_bytes`. The yardstick's own
/// memory is set aside first.
void require_room(double bytes);

/// Thrown by `require_room`: the case is skipped, which is no error.
struct DoesNotFit : std::exception {
  explicit DoesNotFit(std::string t) : text(std::move(t)) {}
  const char* what() const noexcept override { return text.c_str(); }
  std::string text;
};

/// A stream and a backend on it.
class Device {
 public:
  Device() : backend({.stream = own_.stream}) {}
  cudaStream_t stream() { return own_.stream; }
  void wait() { check(cudaStreamSynchronize(own_.stream), "running the kernels"); }

 private:
  struct OwnStream {
    cudaStream_t stream = nullptr;
    OwnStream() { check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream"); }
    OwnStream(const OwnStream&) = delete;
    OwnStream& operator=(const OwnStream&) = delete;
    ~OwnStream() { cudaStreamDestroy(stream); }
  };
  OwnStream own_;

 public:
  kvpare::cuda::Backend backend;
};

// ---- timing

/// What one step must move, and the tokens it goes through.
struct Cost {
  double bytes = 0, tokens = 0;
};

inline double median(std::vector<double> values) {
  if (values.empty()) return 0;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

/// Device time between two points of a stream.
class Clock {
 public:
  Clock() {
    check(cudaEventCreate(&first_), "making an event");
    check(cudaEventCreate(&last_), "making an event");
  }
  Clock(const Clock&) = delete;
  Clock& operator=(const Clock&) = delete;
  ~Clock() { cudaEventDestroy(first_), cudaEventDestroy(last_); }

  template <class Work>
  double seconds_of(cudaStream_t stream, const Work& work) {
    check(cudaEventRecord(first_, stream), "recording an event");
    work();
    check(cudaEventRecord(last_, stream), "recording an event");
    check(cudaEventSynchronize(last_), "running the kernels");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, first_, last_), "reading a clock");
    return static_cast<double>(ms) * 1e-3;
  }

 private:
  cudaEvent_t first_ = nullptr, last_ = nullptr;
};

/// Calls captured once, run many times.
class Graph {
 public:
  /// Throws where what `queue` does cannot be captured.
  template <class Queue>
  Graph(cudaStream_t stream, const Queue& queue) {
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "beginning a capture");
    std::string mistake;
    try {
      queue();
    } catch (const std::exception& e) {
      mistake = e.what();
    }
    const cudaError_t ended = cudaStreamEndCapture(stream, &graph_);
    if (ended != cudaSuccess || !mistake.empty()) {
      if (graph_ != nullptr) cudaGraphDestroy(graph_);
      cudaGetLastError();
      kvpare::require(mistake.empty(), "capturing: ", mistake);
      check(ended, "ending a capture");
    }
    check(cudaGraphInstantiate(&ready_, graph_, 0), "making a graph ready");
    check(cudaGraphUpload(ready_, stream), "uploading a graph");
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() {
    if (ready_ != nullptr) cudaGraphExecDestroy(ready_);
    if (graph_ != nullptr) cudaGraphDestroy(graph_);
  }

  void run(cudaStream_t stream) { check(cudaGraphLaunch(ready_, stream), "running a graph"); }

  /// From now on nothing is sent to the device: kernels find what the last run sent.
  void send_nothing() {
    std::size_t count = 0;
    check(cudaGraphGetNodes(graph_, nullptr, &count), "counting nodes");
    std::vector<cudaGraphNode_t> nodes(count);
    check(cudaGraphGetNodes(graph_, nodes.data(), &count), "listing nodes");
    for (cudaGraphNode_t node : nodes) {
      cudaGraphNodeType type{};
      check(cudaGraphNodeGetType(node, &type), "asking what a node is");
      if (type == cudaGraphNodeTypeMemcpy) check(cudaGraphNodeSetEnabled(ready_, node, 0), "switching a node off");
    }
  }

 private:
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t ready_ = nullptr;
};

/// Counters of one benchmark, see bench/README.md.
inline void set_counters(benchmark::State& state, const Cost& cost, double seconds, double copying) {
  state.counters["us"] = seconds * 1e6;
  if (cost.bytes > 0) {
    state.counters["bytes_per_second"] = cost.bytes / seconds;
    state.counters["of_copy"] = cost.bytes / seconds / copying;
  }
  if (cost.tokens > 0) state.counters["tokens_per_second"] = cost.tokens / seconds;
}

/// Times step(0), step(1), …, which queue one step each; inputs repeat after `inputs` steps. Gives the median seconds
/// of a step on the device. Steps run as one graph; where they cannot be captured they are queued one by one, and
/// `captured` is 0. Without `counters`, as part of another benchmark, the state is left alone.
template <class Step>
double measure(benchmark::State& state, Device& device, const Cost& cost, Index inputs, const Step& step,
               bool counters = true) {
  constexpr double least_seconds = 2e-3;  // of a graph
  constexpr int runs = 9;
  Clock clock;
  const auto queue = [&](Index count) {
    for (Index i = 0; i < count; ++i) step(i);
  };
  queue(inputs);  // warm-up: scratch memory takes its size
  device.wait();
  std::vector<double> queueing;
  for (Index i = 0; i < std::min<Index>(2 * inputs, 32); ++i) {
    const auto start = std::chrono::steady_clock::now();
    step(i % inputs);
    queueing.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    device.wait();
  }
  const double estimate = clock.seconds_of(device.stream(), [&] { queue(inputs); }) / static_cast<double>(inputs);
  const Index wanted = std::min<Index>(static_cast<Index>(least_seconds / std::max(estimate, 1e-7)) + 1, most_inputs);
  const Index steps = kvpare::round_up(wanted, inputs);

  std::unique_ptr<Graph> graph;
  std::string refused;
  try {
    graph = std::make_unique<Graph>(device.stream(), [&] { queue(steps); });
  } catch (const std::exception& e) {
    refused = e.what();
  }
  const auto run = [&] {
    if (graph != nullptr)
      graph->run(device.stream());
    else
      queue(steps);
  };
  double copying = counters ? copy_rate(device.stream()) : 0;
  run();
  device.wait();
  std::vector<double> each;
  const auto once = [&] {
    each.push_back(clock.seconds_of(device.stream(), run) / static_cast<double>(steps));
    return each.back();
  };
  if (counters) {
    for (auto _ : state) state.SetIterationTime(once());
    copying = (copying + copy_rate(device.stream())) / 2;
  } else {
    for (int i = 0; i < runs; ++i) once();
  }
  const double seconds = median(each);
  if (!counters) return seconds;
  set_counters(state, cost, seconds, copying);
  state.counters["queue_us"] = median(queueing) * 1e6;
  state.counters["captured"] = graph != nullptr;
  if (!refused.empty()) state.SetLabel(refused);
  // All steps then work on the lists of the last one: fair where it alone is more than any cache holds.
  if (graph != nullptr && cost.bytes >= static_cast<double>(Index{256} << 20)) {
    graph->send_nothing();
    run();
    std::vector<double> alone;
    for (int i = 0; i < runs; ++i) alone.push_back(clock.seconds_of(device.stream(), run) / static_cast<double>(steps));
    const double without = median(alone);
    state.counters["us_nothing_sent"] = without * 1e6;
    state.counters["of_copy_nothing_sent"] = cost.bytes / without / copying;
  }
  return seconds;
}

/// A benchmark by name. What it throws is its error; a case that does not fit is skipped, "skipped: …".
inline bool add(const std::string& name, const std::function<void(benchmark::State&)>& body) {
  benchmark::RegisterBenchmark(name.c_str(),
                               [=](benchmark::State& state) {
                                 try {
                                   body(state);
                                 } catch (const DoesNotFit& e) {
                                   state.SkipWithError(e.what());
                                 } catch (const std::exception& e) {
                                   state.SkipWithError(e.what());
                                 }
                               })
      ->UseManualTime()
      ->Iterations(9)
      ->Unit(benchmark::kMicrosecond);
  return true;
}

// ---- models and names

/// "attend/cuda/int4/Q:32/H:8/D:128/B:64/N:4096"
inline std::string label(std::string_view verb, std::string_view form, const LayerShape& shape, Index batch,
                         Index tokens) {
  return kvpare::message(verb, "/cuda/", form, "/Q:", shape.q_heads, "/H:", shape.kv_heads, "/D:", shape.key_dim,
                         "/B:", batch, "/N:", tokens);
}

// ---- random numbers in device memory

/// About normally distributed, mean 0, deviation 1: the sum of four uniform numbers.
template <class T>
struct FillRandom {
  T* to;
  std::uint64_t seed;
  KVPARE_HD void operator()(Index i) const {
    const std::uint64_t bits = kvpare::random_bits(seed, i);
    int sum = -2 * 65535;
    for (int part = 0; part < 4; ++part) sum += static_cast<int>(bits >> 16 * part & 0xffff);
    to[i] = T(static_cast<float>(sum) * (1.7320508f / 65536));
  }
};

template <class T>
using DeviceArray = kvpare::Buffer<kvpare::cuda::Backend, T>;

template <class T>
DeviceArray<T> random_array(Device& device, Index size, std::uint64_t seed) {
  DeviceArray<T> values(device.backend, size);
  device.backend.each(size, FillRandom<T>{values.data(), seed});
  return values;
}

// ---- filled caches

/// Bytes of keys and values of a token of one kv head, scales and all.
template <class P>
double token_bytes(const LayerShape& shape) {
  return static_cast<double>(P::Key::tile_bytes({page_tokens, shape.key_dim}) +
                             P::Value::tile_bytes({page_tokens, shape.value_dim})) /
         page_tokens;
}

/// What part of its tokens a head keeps, and how many of those, the oldest, leave the form that append writes.
struct Contents {
  bool ragged = false;  // heads keep the newest 1/4, 2/4, 3/4, 4/4 of their tokens, in turn
  double coded = 1;     // share of the pages
};

/// Sequences of some lengths in every layer, in one form: the last of the list, which may be the only one.
template <class... P>
class FilledCache {
 public:
  using Cache = kvpare::KvCache<kvpare::cuda::Backend, kvpare::Formats<P...>>;
  using Appended = std::tuple_element_t<0, std::tuple<P...>>;
  using Coded = std::tuple_element_t<sizeof...(P) - 1, std::tuple<P...>>;
  static constexpr int form = static_cast<int>(sizeof...(P)) - 1;

  /// As many layers as the rotation takes, where no number of them is given; `room` for so many more tokens of every
  /// sequence as they are appended.
  FilledCache(Device& on, const LayerShape& layer, std::vector<Index> lengths, Contents contents = {},
              Index layers_ = 0, Index room = 0)
      : device(on), shape(layer), tokens(std::move(lengths)), layers(layers_ > 0 ? layers_ : enough_layers()),
        source_keys_(random_array<kvpare::half>(on, source_size(), 1)),
        source_values_(random_array<kvpare::half>(on, source_size(), 2)),
        cache(on.backend, {std::vector<LayerShape>(static_cast<std::size_t>(layers), shape)},
              {.page_tokens = page_tokens, .pool_bytes = checked_room(contents, room)}) {
    for (const Index length : tokens) {
      const SequenceId id = cache.create();
      sequences.push_back(id);
      for (Index l = 0; l < layers; ++l) {
        append(id, l, length);
        if (contents.ragged) evict(id, l);
        if (form > 0 && contents.coded > 0) code(id, l, contents.coded);
      }
    }
    device.wait();
  }

  /// Appends random tokens at the next positions of a layer.
  void append(SequenceId id, Index layer, Index count) {
    for (Index first = 0; first < count; first += source_tokens()) {
      const Index part = std::min(source_tokens(), count - first);
      std::vector<Position> at(static_cast<std::size_t>(part));
      std::iota(at.begin(), at.end(), static_cast<Position>(first));
      const kvpare::ConstTensor keys(source_keys_.data(), part, shape.kv_heads, shape.key_dim),
          values(source_values_.data(), part, shape.kv_heads, shape.value_dim);
      kvpare::require(cache.append(id, layer, keys, values, at) == kvpare::Outcome::done, "bench: the pool is full");
    }
  }

  /// Tokens of a sequence, mean over its heads.
  double held(Contents contents) const {
    double sum = 0;
    for (Index h = 0; h < shape.kv_heads; ++h) sum += contents.ragged ? static_cast<double>(h % 4 + 1) / 4 : 1;
    return sum / static_cast<double>(shape.kv_heads);
  }
  double all_tokens() const { return static_cast<double>(std::accumulate(tokens.begin(), tokens.end(), Index{0})); }
  /// Of one layer.
  double bytes(Contents contents) const {
    const double heads = static_cast<double>(shape.kv_heads) * held(contents);
    return all_tokens() * heads *
           (contents.coded * token_bytes<Coded>(shape) + (1 - contents.coded) * token_bytes<Appended>(shape));
  }

  Device& device;
  const LayerShape shape;
  const std::vector<Index> tokens;  // per sequence, whole pages
  const Index layers;

 private:
  Index enough_layers() const {
    const double one = all_tokens() * static_cast<double>(shape.kv_heads) * token_bytes<Coded>(shape);
    return std::clamp<Index>(static_cast<Index>(std::ceil(static_cast<double>(rotation_bytes) / one)), 1, most_inputs);
  }
  Index source_tokens() const { return std::min<Index>(8192, *std::max_element(tokens.begin(), tokens.end())); }
  Index source_size() const { return source_tokens() * shape.kv_heads * shape.key_dim; }
  Index checked_room(Contents contents, Index room) const {
    const double longest = static_cast<double>(*std::max_element(tokens.begin(), tokens.end()) * shape.kv_heads);
    const double raw = form > 0 ? longest * token_bytes<Appended>(shape) : 0;  // of one layer, until it is coded
    const double more =
        static_cast<double>(room * std::ssize(tokens) * layers * shape.kv_heads) * token_bytes<Appended>(shape);
    const double all =
        (static_cast<double>(layers) * bytes(contents) * (contents.ragged ? 1.7 : 1) + raw + more) * 1.06 +
        static_cast<double>(Index{64} << 20);
    require_room(all);
    return static_cast<Index>(all);
  }
  kvpare::Plan empty_plan(SequenceId id) const {
    kvpare::Plan plan;
    plan.sequence = id, plan.epoch = cache.epoch(id);
    plan.layers.resize(static_cast<std::size_t>(layers));
    return plan;
  }
  void evict(SequenceId id, Index layer) {
    kvpare::Plan plan = empty_plan(id);
    kvpare::LayerPlan& at = plan.layers[static_cast<std::size_t>(layer)];
    at.touched = true;
    for (const kvpare::HeadPages& list : cache.pages(id, layer)) {
      kvpare::Selection keep = kvpare::Selection::live(list.entries);
      const Index entries = keep.entries(), head = static_cast<Index>(at.keep.size());
      for (Index e = 0; e < entries * (3 - head % 4) / 4; ++e) keep.word(e) = 0;
      at.keep.push_back(keep);
    }
    cache.commit(plan);
  }
  void code(SequenceId id, Index layer, double share) {
    kvpare::Plan plan = empty_plan(id);
    kvpare::Tier tier{.format = form};
    for (const kvpare::HeadPages& list : cache.pages(id, layer)) {
      kvpare::Selection words = kvpare::Selection::live(list.entries);
      const Index entries = words.entries();
      for (Index e = static_cast<Index>(std::llround(share * static_cast<double>(entries))); e < entries; ++e)
        words.word(e) = 0;
      tier.tokens.push_back(words);
    }
    plan.layers[static_cast<std::size_t>(layer)].tiers.push_back(std::move(tier));
    const kvpare::CompressReport report = cache.commit(plan);
    kvpare::require(report.tokens_waiting == 0, "bench: ", report.tokens_waiting, " tokens did not take their form");
  }

  DeviceArray<kvpare::half> source_keys_, source_values_;

 public:
  Cache cache;
  std::vector<SequenceId> sequences;
};

}  // namespace bench
