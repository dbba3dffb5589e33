// attend: one decode step of one layer over raw pages, dense, ragged and half dead.
#include "support/rig.hpp"
#include "support/run.hpp"

namespace bench {
namespace {

template <Element T>
void dense(benchmark::State& state, const LayerShape& shape, Index tokens, Index page_tokens, Index threads) {
  auto& rig = filled<T>(shape, tokens, {.page_tokens = page_tokens, .threads = threads});
  const Queries<T> queries(shape, 1, tokens - 1);
  const auto step = [&](Index i) { rig.cache.attend(i % rig.layers, {queries.of(rig.sequence)}); };

  // With several threads, every step has a twin on one thread just before it, in another layer.
  std::vector<double> alone;
  const auto prepare = [&](Index i) {
    if (threads == 1) return;
    rig.threads.use_one();
    alone.push_back(seconds_of([&] { step(i + rig.layers / 2); }));
    rig.threads.use_all();
  };
  const double bytes = static_cast<double>(tokens * rig.token_bytes(shape));
  const double seconds =
      run(state, {.bytes = bytes, .tokens = static_cast<double>(tokens), .against = {of_read_bw(bytes, threads)}}, step,
          prepare);
  if (threads > 1) state.counters["speedup"] = median(alone) / seconds;
}

enum class Holes { ragged, half_dead };

/// What stays of one head's list: ragged = the newest 1/4, 2/4, 3/4 or 4/4, by head; half_dead = a random half.
kvpare::Selection survivors(const kvpare::HeadPages& list, Index layer, Index head, Holes holes) {
  kvpare::Selection keep = kvpare::Selection::live(list.entries);
  const Index entries = keep.entries();
  for (Index e = 0; e < entries; ++e) {
    if (holes == Holes::half_dead)
      keep.word(e) &= kvpare::random_bits(3, layer, head, e);
    else if (e < entries * (3 - head % 4) / 4)
      keep.word(e) = 0;
  }
  return keep;
}

/// A sequence with evicted tokens beside its unharmed twin. They share all pages, so nothing is packed and dead slots
/// stay.
struct Twins {
  FilledCache<kvpare::half> filled;
  SequenceId unharmed = 0;
  std::vector<Index> live;  // [layer] tokens, over all heads

  Twins(const LayerShape& shape, Index tokens, Index threads, Holes holes)
      : filled(shape, FilledCache<kvpare::half>::enough_layers(shape, tokens),
               random_rows<kvpare::half>(tokens, shape.kv_heads, shape.key_dim), {.threads = threads}) {
    auto& cache = filled.cache;
    unharmed = cache.fork(filled.sequence);
    kvpare::Plan plan{.sequence = filled.sequence, .epoch = cache.epoch(filled.sequence), .layers = {}};
    for (Index layer = 0; layer < filled.layers; ++layer) {
      kvpare::LayerPlan& at = plan.layers.emplace_back();
      at.touched = true;
      live.push_back(0);
      for (const kvpare::HeadPages& list : cache.pages(filled.sequence, layer)) {
        at.keep.push_back(survivors(list, layer, static_cast<Index>(at.keep.size()), holes));
        live.back() += at.keep.back().count();
      }
    }
    cache.commit(plan);
  }
};

/// Reads every live row of a layer, page by page, keys first.
void read_live(std::span<const kvpare::HeadPages> lists, Index row_bytes) {
  const std::byte* rows[64];
  for (const kvpare::HeadPages& list : lists)
    for (const kvpare::Entry& e : list.entries) {
      const kvpare::PageGeometry& page = list.formats[e.format];
      std::size_t count = 0;
      kvpare::for_each_bit(e.live, [&](Index slot) { rows[count++] = page.key_row(e.page, slot); });
      read_rows({rows, count}, row_bytes);
      count = 0;
      kvpare::for_each_bit(e.live, [&](Index slot) { rows[count++] = page.value_row(e.page, slot); });
      read_rows({rows, count}, row_bytes);
    }
}

void with_holes(benchmark::State& state, const LayerShape& shape, Index tokens, Index threads, Holes holes) {
  auto& twins = kept(kvpare::message("twins", tokens, " ", threads, " ", static_cast<int>(holes)),
                     [&] { return std::make_unique<Twins>(shape, tokens, threads, holes); });
  auto& cache = twins.filled.cache;
  const Index layers = twins.filled.layers;
  const Queries<kvpare::half> queries(shape, 1, tokens - 1);
  const auto attend = [&](Index i, SequenceId sequence) { cache.attend(i % layers, {queries.of(sequence)}); };

  // Before every step, off its clock and in other layers: the same without holes, and what plain reads make of either.
  std::vector<double> whole, reading, reading_whole;
  const auto read = [&](Index i, SequenceId sequence) {
    const auto lists = cache.pages(sequence, i % layers);
    return seconds_of([&] { read_live(lists, shape.key_dim * static_cast<Index>(sizeof(kvpare::half))); });
  };
  const auto prepare = [&](Index i) {
    whole.push_back(seconds_of([&] { attend(i + layers / 2, twins.unharmed); }));
    reading.push_back(read(i + layers / 4, twins.filled.sequence));
    reading_whole.push_back(read(i + 3 * layers / 4, twins.unharmed));
  };
  const double live = static_cast<double>(std::accumulate(twins.live.begin(), twins.live.end(), Index{0})) /
                      static_cast<double>(layers * shape.kv_heads);  // mean tokens of a head
  const double token_bytes = static_cast<double>(twins.filled.token_bytes(shape));
  const double seconds = run(
      state, {.bytes = live * token_bytes, .tokens = live, .against = {of_read_bw(live * token_bytes, threads)}},
      [&](Index i) { attend(i, twins.filled.sequence); }, prepare);
  const double share = live / static_cast<double>(tokens);
  state.counters["per_byte_of_dense"] = seconds / share / median(whole);
  state.counters["plain_read_per_byte_of_dense"] = median(reading) / share / median(reading_whole);
}

template <Element T>
void add_dense(const LayerShape& shape, Index tokens, Index threads, Index page_tokens = 64) {
  const Settings one_page_size = {{"threads", threads}},
                 named_page_size = {{"page", page_tokens}, {"threads", threads}};
  add(label("attend", kvpare::dtype_of<T>(), shape, tokens, page_tokens == 64 ? one_page_size : named_page_size),
      [=](benchmark::State& state) { dense<T>(state, shape, tokens, page_tokens, threads); });
}

void add_with_holes(const char* name, const LayerShape& shape, Index tokens, Index threads, Holes holes) {
  add(label(name, DType::f16, shape, tokens, {{"threads", threads}}),
      [=](benchmark::State& state) { with_holes(state, shape, tokens, threads, holes); });
}

const bool added = [] {
  for (const LayerShape& shape : {llama_8b(), qwen_vl_7b()})
    for (Index tokens : {1024, 4096, 16384, 32768})
      for (Index threads : {1, 2}) add_dense<kvpare::half>(shape, tokens, threads);
  for (Index page_tokens : {16, 32}) add_dense<kvpare::half>(llama_8b(), 4096, 1, page_tokens);
  for (Index tokens : {1024, 4096}) {
    add_dense<kvpare::bfloat16>(llama_8b(), tokens, 1);
    add_dense<float>(llama_8b(), tokens, 1);
    for (Index threads : {1, 2}) {
      add_with_holes("attend/ragged", llama_8b(), tokens, threads, Holes::ragged);
      add_with_holes("attend/half_dead", llama_8b(), tokens, threads, Holes::half_dead);
    }
  }
  return true;
}();

}  // namespace
}  // namespace bench
