// A policy of one's own takes one struct, one function on the backend's verbs, and no registration. It then goes with every
// budget, selector, precision and backend that the library has. This one knows that a token which is looked at but has little
// to say, such as the attention sink at the start of a prompt, may go.
#include <cmath>
#include <cstdio>
#include <kvpare/kvpare.hpp>
#include <numeric>
#include <string_view>
#include <tuple>
#include <vector>

using namespace kvpare;

/// Scores a token by what it adds to the outputs of the newest rows: their attention to it, times the length of its value.
///
/// Formula  score[h, j] = ||v_hj|| * sum over the newest `rows` rows of their attention to j, mean over the queries of kv head h
/// Source   after VATP (Guo et al. 2024, arXiv 2406.12335), which adds up all rows and takes the 1-norm
struct Contribution {
  static constexpr std::string_view name = "contribution";
  Index rows = 16;  // newest rows of the prompt that count

  static constexpr auto fields() {
    return std::tuple{
        Field<Contribution, Index>{"rows", &Contribution::rows, 1, 4096, "newest rows of the prompt that count"}};
  }
  constexpr Reads reads() const { return {.rows = Reads::Rows::last, .count = rows}; }
  friend bool operator==(const Contribution&, const Contribution&) = default;
};

/// Runs where the backend does: a struct of its own, since a GPU's compiler takes no lambda for it.
struct TimesLength {
  const float* squares;           // [slots] of each token's value
  const std::int32_t* column_of;  // [slots] where its score is, -1 = no token
  float* scores;                  // [columns] attention so far
  KVPARE_HD void operator()(Index slot) const {
    if (column_of[slot] >= 0) scores[column_of[slot]] *= std::sqrt(squares[slot]);
  }
};

template <Backend B>
void score(B& be, const Contribution&, const Observation<B>& seen, Scores out) {
  fill(be, out.data, out.heads * out.columns, 0.0f);
  const ObservedKeys<B> keys(be, seen);
  auto attention = keys.attention(seen);
  attention.out = out.data;
  be.attention_mass(attention);

  for (Index h = 0; h < out.heads; ++h) {
    const HeadPages& pages = seen.heads[static_cast<std::size_t>(h)];
    std::vector<std::int32_t> columns(static_cast<std::size_t>(pages.slots()), -1);
    for_each_token(seen, h, [&](Index slot, Index column) {
      columns[static_cast<std::size_t>(slot)] = static_cast<std::int32_t>(column);
    });
    const Buffer<B, std::int32_t> column_of(be, columns);
    const Buffer<B, float> squares(be, pages.slots());
    const StatisticsRow values{.pages = pages,
                               .side = Side::values,
                               .width = seen.shape->value_dim,
                               .per_slot = true,
                               .sum_squares = squares.data()};
    be.statistics({&values, 1});
    be.each(pages.slots(), TimesLength{squares.data(), column_of.data(), out.data + h * out.columns});
  }
}

static_assert(Scorer<Contribution, cpu::Backend>);

int main() {
  cpu::Backend backend;
  const LayerShape layer{.q_heads = 8, .kv_heads = 2, .key_dim = 64, .value_dim = 64, .scale = 0.125f};
  KvCache<cpu::Backend, Formats<Pair<Raw<half>, Raw<half>>>> cache(backend, {{layer}}, {.pool_bytes = 8 << 20});

  // A prompt of 600 tokens. All queries look at token 0, which says nothing; tokens 300 to 307 are loud.
  const Index tokens = 600;
  std::vector<Position> positions(tokens);
  std::iota(positions.begin(), positions.end(), 0);
  std::vector<float> keys(tokens * 2 * 64), values(keys.size()), queries(tokens * 8 * 64);
  for (Index i = 0; i < std::ssize(keys); ++i) {
    const Index token = i / (2 * 64);
    keys[i] = token == 0 ? 1.0f : 2 * random_unit(1, i) - 1;
    values[i] = (token == 0 ? 0.0f : token >= 300 && token < 308 ? 8.0f : 1.0f) * (2 * random_unit(2, i) - 1);
  }
  for (Index i = 0; i < std::ssize(queries); ++i) queries[i] = 4 * random_unit(3, i) - 1;
  const SequenceId prompt = cache.create();
  if (cache.append(prompt, 0, {keys.data(), tokens, 2, 64}, {values.data(), tokens, 2, 64}, positions) != Outcome::done)
    return 1;

  // As a value: Compressor{Contribution{.rows = 32}, Uniform{}, TopK{}, Keep::ratio(0.04)}. Or by name, from a list of one's own:
  for (const char* name : {"last_row", "contribution"}) {
    AnyOf<LastRow, Contribution> scorer;
    if (!scorer.choose(name)) return 1;
    const Compressor method{scorer, Uniform{}, TopK{}, Keep::ratio(0.04)};
    const SequenceId sequence = cache.fork(prompt);
    cache.observe(sequence, 0, method, {queries.data(), tokens, 8, 64}, positions);
    cache.compress(sequence, method);
    std::printf("%-12s keeps", name);
    for (const Position p : cache.kept(sequence, 0, 0)) std::printf(" %d", p);
    std::printf("\n");
    cache.release(sequence);
  }
}
