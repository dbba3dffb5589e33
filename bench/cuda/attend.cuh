// attend: one decode step of one layer, for every sequence of a batch. Added per form of page by attend_*.cu.
//
// Counted are keys and values of all tokens, once, scales and all; queries and outputs are less than a thousandth.
#pragma once

#include "support.cuh"

namespace bench {

/// Queries of a batch, and where results go.
class DecodeBatch {
 public:
  DecodeBatch(Device& device, const LayerShape& shape, std::span<const Index> tokens)
      : batch_(static_cast<Index>(tokens.size())), shape_(shape),
        queries_(random_array<kvpare::half>(device, batch_ * shape.q_heads * shape.key_dim, 3)),
        out_(device.backend, batch_ * shape.q_heads * shape.value_dim) {
    for (const Index n : tokens) at_.push_back(static_cast<Position>(n - 1));
  }

  template <class Cache>
  void attend(Cache& cache, Index layer, std::span<const SequenceId> sequences) {
    requests_.clear();
    for (Index b = 0; b < batch_; ++b)
      requests_.push_back(
          {.sequence = sequences[static_cast<std::size_t>(b)],
           .queries = {queries_.data() + b * shape_.q_heads * shape_.key_dim, 1, shape_.q_heads, shape_.key_dim},
           .positions = {&at_[static_cast<std::size_t>(b)], 1},
           .out = {out_.data() + b * shape_.q_heads * shape_.value_dim, 1, shape_.q_heads, shape_.value_dim}});
    cache.attend(layer, requests_);
  }

 private:
  Index batch_;
  LayerShape shape_;
  DeviceArray<kvpare::half> queries_, out_;
  std::vector<Position> at_;
  std::vector<kvpare::AttendRequest> requests_;
};

/// Seconds of a step. The cache is `Caches…`: the form that append writes, then, where it is another, the form to
/// measure.
template <class... P>
double attend(benchmark::State& state, const LayerShape& shape, const std::vector<Index>& tokens,
              Contents contents = {}, bool counters = true) {
  Device device;
  FilledCache<P...> filled(device, shape, tokens, contents);
  DecodeBatch batch(device, shape, tokens);
  if (counters) state.SetLabel(std::string(name_of(filled.cache.support(0, filled.form))));
  return measure(
      state, device, {filled.bytes(contents), filled.all_tokens()}, filled.layers,
      [&](Index i) { batch.attend(filled.cache, i % filled.layers, filled.sequences); }, counters);
}

/// Half of the pages of every head in the last form, the others as appended; and the two halves by themselves.
template <class Appended, class Coded>
void attend_mixed(benchmark::State& state, const LayerShape& shape, Index batch, Index tokens) {
  const std::vector<Index> half(static_cast<std::size_t>(batch), tokens / 2);
  const double parts =
      attend<Appended>(state, shape, half, {}, false) + attend<Appended, Coded>(state, shape, half, {}, false);
  const double all = attend<Appended, Coded>(state, shape, std::vector<Index>(static_cast<std::size_t>(batch), tokens),
                                             {.coded = 0.5});
  state.counters["of_parts"] = all / parts;
}

/// One sequence of 128k tokens among 63 of 2k; and 64 of 4k, per token.
template <class... P>
void attend_one_long(benchmark::State& state, const LayerShape& shape) {
  std::vector<Index> tokens(64, 2048);
  tokens[40] = 131072;
  const double balanced = attend<P...>(state, shape, std::vector<Index>(64, 4096), {}, false) / (64 * 4096);
  const double seconds = attend<P...>(state, shape, tokens) / (63 * 2048 + 131072);
  state.counters["of_balanced"] = seconds / balanced;
}

struct AttendCase {
  LayerShape shape;
  Index batch, tokens;
};

/// What every form is measured at; the largest, which takes seconds of bookkeeping to fill, only where it is asked for.
enum class Largest { no, yes };
inline std::vector<AttendCase> attend_cases(Largest largest = Largest::no) {
  std::vector<AttendCase> cases;
  const auto all = [&](const LayerShape& shape, Index batch, std::initializer_list<Index> tokens) {
    for (const Index n : tokens) cases.push_back({shape, batch, n});
  };
  all(llama_8b(), 1, {1024, 4096, 32768, 131072});
  all(llama_8b(), 8, {4096, 32768});
  all(llama_8b(), 64, {1024, 4096, 32768});
  if (largest == Largest::yes) all(llama_8b(), 64, {131072});
  all(qwen_vl_7b(), 1, {4096, 32768});
  all(qwen_vl_7b(), 64, {4096, 32768});
  return cases;
}

template <class... P>
bool add_attend(std::string_view form, std::span<const AttendCase> cases) {
  for (const AttendCase& c : cases)
    add(label("attend", form, c.shape, c.batch, c.tokens), [=](benchmark::State& state) {
      attend<P...>(state, c.shape, std::vector<Index>(static_cast<std::size_t>(c.batch), c.tokens));
    });
  return true;
}

template <class... P>
bool add_ragged(std::string_view form) {
  for (const Index tokens : {4096, 32768})
    add(label("attend_ragged", form, llama_8b(), 64, tokens), [=](benchmark::State& state) {
      attend<P...>(state, llama_8b(), std::vector<Index>(64, tokens), {.ragged = true});
    });
  return true;
}

template <class Appended, class Coded>
bool add_mixed(std::string_view form) {
  for (const Index tokens : {4096, 32768})
    add(label("attend_mixed", form, llama_8b(), 64, tokens),
        [=](benchmark::State& state) { attend_mixed<Appended, Coded>(state, llama_8b(), 64, tokens); });
  return true;
}

template <class... P>
bool add_one_long(std::string_view form) {
  return add(label("attend_one_long", form, llama_8b(), 64, 131072),
             [](benchmark::State& state) { attend_one_long<P...>(state, llama_8b()); });
}

using Half = kvpare::Pair<kvpare::Raw<kvpare::half>, kvpare::Raw<kvpare::half>>;
template <class C>
using Both = kvpare::Pair<C, C>;

}  // namespace bench
