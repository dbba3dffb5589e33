// attend over coded pages through the cache: one form per cache, and several in every head.
#include "support/rig.hpp"
#include "support/run.hpp"

namespace bench {
namespace {

using kvpare::Pair;
using Half = kvpare::Raw<kvpare::half>;
using Int8 = kvpare::Symmetric<8, 32>;
using Int4 = kvpare::Symmetric<4, 32>;
using Int2 = kvpare::Affine<2, 32>;
using Pages = kvpare::Formats<Pair<Half, Half>, Pair<Int8, Int8>, Pair<Int4, Int4>, Pair<Int2, Int2>,
                              Pair<kvpare::Fp8E4M3, kvpare::Fp8E4M3>,
                              Pair<kvpare::KiviKeys<4>, kvpare::KiviValues<4>>,
                              Pair<kvpare::Ternary<>, kvpare::Ternary<>>>;
constexpr const char* names[] = {"half", "int8_g32", "int4_g32", "int2_g32_min", "fp8_e4m3", "kivi4", "ternary"};
constexpr int form_count = 7, mixed = form_count;  // mixed: pages of half, int8, int4 and int2 by turns
constexpr int parts = 4;

/// One long sequence. Layer l holds form forms[l % forms.size()].
class Rig {
 public:
  using Cache = kvpare::KvCache<kvpare::cpu::Backend, Pages>;

  Rig(const LayerShape& shape, Index token_count, std::vector<int> forms, kvpare::cpu::Options options)
      : tokens(token_count), forms_(std::move(forms)), token_bytes_(token_bytes(shape)),
        layers(layers_for(token_count)), backend(std::move(options)),
        cache(backend, {std::vector<LayerShape>(static_cast<std::size_t>(layers), shape)},
              {.page_tokens = 64, .pool_bytes = pool_bytes()}),
        sequence(cache.create()) {
    const auto rows = random_rows<kvpare::half>(tokens, shape.kv_heads, shape.key_dim);
    for (Index layer = 0; layer < layers; ++layer) {
      constexpr Index chunk = 512;
      for (Index first = 0; first < tokens; first += chunk) {
        const kvpare::ConstTensor source(rows.data() + first * shape.kv_heads * shape.key_dim,
                                         std::min(chunk, tokens - first), shape.kv_heads, shape.key_dim);
        kvpare::require(cache.append(sequence, layer, source, source, positions(first, source.rows)) ==
                            kvpare::Outcome::done,
                        "bench: the pool is full");
      }
      change_form(layer);
    }
  }

  int form_of(Index layer) const { return forms_[static_cast<std::size_t>(layer) % forms_.size()]; }
  /// Of the tokens of one layer.
  Index bytes(int form) const {
    if (form != mixed) return tokens * token_bytes_[static_cast<std::size_t>(form)];
    Index sum = 0;
    for (int f = 0; f < parts; ++f) sum += tokens / parts * token_bytes_[static_cast<std::size_t>(f)];
    return sum;
  }

  const Index tokens;

 private:
  static std::vector<Index> token_bytes(const LayerShape& shape) {
    std::vector<Index> bytes;
    Pages::for_each([&](int, auto pair) {
      bytes.push_back(shape.kv_heads * decltype(pair)::page_bytes(64, shape.key_dim, shape.value_dim) / 64);
    });
    return bytes;
  }
  Index layers_for(Index) const {
    Index turn = 0;
    for (const int f : forms_) turn += bytes(f);
    return std::max<Index>(2, kvpare::ceil_div(rotation_bytes(), turn)) * static_cast<Index>(forms_.size());
  }
  Index pool_bytes() const {
    Index all = 3 * bytes(0) + (Index{64} << 20);
    for (Index l = 0; l < layers; ++l) all += bytes(form_of(l)) * 21 / 20;
    return all;
  }
  void change_form(Index layer) {
    const int form = form_of(layer);
    if (form == 0) return;
    if (form != mixed) {
      cache.set_aging(sequence, layer, {.format = form});
      cache.age(sequence);
      return;
    }
    kvpare::Plan plan{.sequence = sequence, .epoch = cache.epoch(sequence), .layers = {}};
    plan.layers.resize(static_cast<std::size_t>(layers));
    for (int f = 1; f < parts; ++f) {
      kvpare::Tier tier{.format = f};
      for (const kvpare::HeadPages& list : cache.pages(sequence, layer)) {
        kvpare::Selection chosen(static_cast<Index>(list.entries.size()));
        for (Index e = f; e < chosen.entries(); e += parts)
          chosen.word(e) = list.entries[static_cast<std::size_t>(e)].live;
        tier.tokens.push_back(std::move(chosen));
      }
      plan.layers[static_cast<std::size_t>(layer)].tiers.push_back(std::move(tier));
    }
    cache.commit(plan);
  }

  std::vector<int> forms_;
  std::vector<Index> token_bytes_;

 public:
  const Index layers;
  kvpare::cpu::Backend backend;
  Cache cache;
  SequenceId sequence;
};

void one_form(benchmark::State& state, const LayerShape& shape, Index tokens, int form, Index threads,
              int probability_bits) {
  static Threads team(2);
  auto& rig = kept(kvpare::message("form ", form, " ", tokens, " ", shape.q_heads, " ", threads, " ", probability_bits), [&] {
    kvpare::cpu::Options options = team.options();
    options.probability_bits = probability_bits;
    return std::make_unique<Rig>(shape, tokens, std::vector<int>{form}, std::move(options));
  });
  const Queries<kvpare::half> queries(shape, 1, tokens - 1);
  const auto step = [&](Index i) { rig.cache.attend(i % rig.layers, {queries.of(rig.sequence)}); };
  std::vector<double> alone;
  threads == 1 ? team.use_one() : team.use_all();
  const auto prepare = [&](Index i) {
    if (threads == 1) return;
    team.use_one();
    alone.push_back(seconds_of([&] { step(i + rig.layers / 2); }));
    team.use_all();
  };
  const double bytes = static_cast<double>(rig.bytes(form));
  std::vector<Against> against = {of_read_bw(bytes, threads)};
  if (threads == 1)  // both products of a step, at the rate of Eigen's float product of one kv head's queries and keys
    against.push_back(of_sgemm(4.0 * static_cast<double>(shape.q_heads * tokens * shape.key_dim),
                               {.m = shape.group(), .n = tokens, .k = shape.key_dim}, 1));
  const double seconds =
      run(state, {.bytes = bytes, .tokens = static_cast<double>(tokens), .against = std::move(against)}, step, prepare);
  if (threads > 1) state.counters["speedup"] = median(alone) / seconds;
}

/// Layers by turns: mixed, then each of its parts alone.
void several_forms(benchmark::State& state, const LayerShape& shape, Index tokens) {
  static Threads team(1);
  team.use_one();
  auto& rig = kept(kvpare::message("mixed ", tokens, " ", shape.q_heads), [&] {
    return std::make_unique<Rig>(shape, tokens, std::vector<int>{mixed, 0, 1, 2, 3}, team.options());
  });
  const Queries<kvpare::half> queries(shape, 1, tokens - 1);
  const Index turns = rig.layers / (parts + 1);
  std::vector<double> pure[parts];
  const auto attend = [&](Index layer) { rig.cache.attend(layer, {queries.of(rig.sequence)}); };
  const auto prepare = [&](Index i) {
    for (int f = 0; f < parts; ++f)
      pure[f].push_back(seconds_of([&] { attend((i + turns / 2) % turns * (parts + 1) + 1 + f); }));
  };
  const double bytes = static_cast<double>(rig.bytes(mixed));
  const double seconds = run(
      state, {.bytes = bytes, .tokens = static_cast<double>(tokens), .against = {of_read_bw(bytes, 1)}},
      [&](Index i) { attend(i % turns * (parts + 1)); }, prepare);
  double sum = 0;
  for (auto& times : pure) sum += median(times) / parts;
  state.counters["of_parts"] = seconds / sum;
}

const bool added = [] {
  for (const LayerShape& shape : {llama_8b(), qwen_vl_7b()}) {
    const auto name = [&](const char* form, Index tokens) {
      return kvpare::message("attend_forms/cpu/", form, "/Q:", shape.q_heads, "/H:", shape.kv_heads, "/D:", shape.key_dim,
                             "/N:", tokens);
    };
    for (const Index tokens : {1024, 4096, 16384, 32768}) {
      for (int form = 0; form < form_count; ++form)
        for (const Index threads : {1, 2})
          for (const int bits : {16, 8})
            if (bits == 16 || (form == 2 && threads == 1))
              add(kvpare::message(name(names[form], tokens), "/p:", bits, "/threads:", threads),
                  [=](benchmark::State& state) { one_form(state, shape, tokens, form, threads, bits); });
      add(name("mixed", tokens), [=](benchmark::State& state) { several_forms(state, shape, tokens); });
    }
  }
  return true;
}();

}  // namespace
}  // namespace bench
