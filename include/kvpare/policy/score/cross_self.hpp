// CSP's importance: attention within a modality and across modalities, ranked apart.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <string_view>
#include <tuple>
#include <vector>

#include "../contracts.hpp"

namespace kvpare {

/// Scores a token by its place in two lists, one of attention from rows of its own modality, one of attention from rows of
/// others, so that the large scores of text among text do not crowd out the picture.
///
/// Formula  A = exp(s) / (n + sum exp(s)), s the logits of the window's rows
///          self[h, j] = sum of A[r, j] over the window's rows of j's modality, cross[h, j] = over the others; mean over the
///          query heads of kv head h
///          score = -min((rank of self[h, j]) / (1 - c), (rank of cross[h, j]) / c), ranks from 1 up
///          For every k the k best are then the union of the (1 - c) k best by self and the c k best by cross: nobody has
///          to know k. Modalities: text and system; image and video; audio; each class of the user's
/// Ranks    are among the candidates without the window's own and protected tokens: the selector's `recent_share` keeps
///          those, as a rule. They are placed as if each were alone among the others, and move no one. A part of 0 has no rank.
///          A list without share (c = 0, c = 1) goes on where the other ends; tokens without any rank come last, all alike
/// Shapes   the window's queries [rows, q_heads, key_dim], keys through pages -> scores [kv_heads, columns], below 0
/// Ties     equal parts go to the lower column; a token's places in both lists may tie with another's. A NaN logit makes its
///          row, and what that row sees, NaN
/// Cost     the window's rows over all keys, two sorts per kv head. With `window_share` all rows of a chunked prompt are
///          kept until its end, with `window` no more than that. Scratch 8 numbers per kv head and column
/// Source   CSP (Pei et al. 2024, arXiv 2412.04652). As in the released code, a union of both lists where the equation says
///          AND. Ours: one choice per kv head by its group's mean (the code selects per query head); a token in both lists
///          is kept once (the code stores it twice), and the room goes to both lists in their proportion, as does what
///          rounding leaves, rather than to the largest self + cross; a list that has run out leaves its room to the other.
///          Only scores use n: attention stays as it is
/// Mode     reference: the union of int(k c) by cross and int(k (1 - c)) by self and no more, k the budget beside the newest,
///          so that less than the budget stays where the lists overlap, or run out. The code's set where each kv head has
///          one query head and the newest that stay are as many as the rows looked at, but for a token where k c is a whole
///          number that doubles miss, tokens without any part, and c = 0, for which the code has constants left over. What
///          it stores twice counts twice in its attention, here once
struct CrossSelf {
  static constexpr std::string_view name = "cross_self";

  double cross = 0.5;         // c, share of attention across modalities
  double n = 1;               // added to the denominator of the softmax
  double window_share = 0.1;  // query rows looked at, from the end, as a share of those observed
  Index window = 0;           // so many rows instead; 0 = as window_share says
  bool estimate = false;      // c = share of the window's (row, key) pairs that are of two modalities
  Mode mode = Mode::paper;

  static constexpr auto fields() {
    return std::tuple{
        Field<CrossSelf, double>{"cross", &CrossSelf::cross, 0.0, 1.0,
                                 "share of what is kept that goes to attention across modalities"},
        Field<CrossSelf, double>{"n", &CrossSelf::n, 0.0, 1e6, "added to the denominator of the softmax"},
        Field<CrossSelf, double>{"window_share", &CrossSelf::window_share, 0.0, 1.0,
                                 "query rows looked at, from the end, as a share of those observed; at least one"},
        Field<CrossSelf, Index>{"window", &CrossSelf::window, 0, 1 << 20,
                                "query rows looked at, from the end; 0 = as window_share says"},
        Choice{"estimate", &CrossSelf::estimate,
               "take for cross the share of (row, key) pairs that are of two modalities"},
        Choice{"mode", &CrossSelf::mode,
               "tokens in both lists leave room for others, or for nobody, as in the released code"}};
  }
  constexpr bool has_reference() const { return true; }
  constexpr bool scores_budgets() const { return mode == Mode::reference; }
  constexpr Reads reads() const {
    return window > 0 ? Reads{.rows = Reads::Rows::last, .count = window} : Reads{.rows = Reads::Rows::all};
  }
  friend bool operator==(const CrossSelf&, const CrossSelf&) = default;
};

namespace detail {

/// What CSP tells apart.
constexpr std::uint8_t modality_of(std::uint8_t token_class) {
  switch (static_cast<TokenClass>(token_class)) {
    case TokenClass::system:
      return static_cast<std::uint8_t>(TokenClass::text);
    case TokenClass::video:
      return static_cast<std::uint8_t>(TokenClass::image);
    default:
      return token_class;
  }
}

/// Places in a sorted list, from 1 up, for those whose part is above 0.
struct ListPlaces {
  const Index* order;   // [lists, columns] as sort_rows has it
  const float* values;  // [lists, columns]
  const Index* count;   // [lists]
  Index columns;
  std::int32_t* place;  // [lists, columns], 0 = none
  KVPARE_HD void operator()(Index i) const {
    const Index list = i / columns, at = i % columns;
    if (at < count[list] && values[i] > 0) place[list * columns + order[i]] = static_cast<std::int32_t>(at + 1);
  }
};

struct BetterPlace {
  const float* parts;           // [2, heads, columns] self, cross
  const float* values;          // [2, heads, columns] in descending order
  const Index* count;           // [2, heads]
  const std::int32_t* place;    // [2, heads, columns]
  const std::uint64_t* ranked;  // [heads, words] who is in the lists
  Index heads, columns, words, word_tokens;
  double share[2], last;
  float* out;  // [heads, columns]

  KVPARE_HD void operator()(Index i) const {
    const Index head = i / columns, column = i % columns, all = heads * columns;
    if (parts[i] != parts[i] || parts[all + i] != parts[all + i]) {
      out[i] = parts[i] + parts[all + i];
      return;
    }
    const bool is_ranked = has_column(ranked + head * words, column, word_tokens);
    double best = last;
    for (Index part = 0; part < 2; ++part) {
      const Index list = part * heads + head;
      const Index at = is_ranked ? place[part * all + i] : place_beside(list, parts[part * all + i]);
      if (at == 0) continue;
      const double when = share[part] > 0 ? static_cast<double>(at) / share[part] : static_cast<double>(columns + at);
      if (when < best) best = when;
    }
    out[i] = -static_cast<float>(best < 0x1p100 ? best : 0x1p100);
  }
  /// The place of someone who is not in the list, behind its equals.
  KVPARE_HD Index place_beside(Index list, float value) const {
    if (!(value > 0)) return 0;
    Index low = 0, high = count[list];
    while (low < high) {
      const Index middle = (low + high) / 2;
      if (values[list * columns + middle] >= value)
        low = middle + 1;
      else
        high = middle;
    }
    return low + 1;
  }
};

}  // namespace detail

template <Backend B>
void score(B& be, const CrossSelf& policy, const Observation<B>& seen, Scores out) {
  const Columns& columns = *seen.columns;
  const Index heads = out.heads, n = columns.count, words = columns.words(), q_heads = seen.shape->q_heads;
  fill(be, out.data, heads * n, 0.0f);
  if (seen.rows() == 0 || n == 0) return;

  // The window's rows, and what the host knows of them and of the keys.
  const Index wanted = policy.window > 0
                           ? policy.window
                           : static_cast<Index>(policy.window_share * static_cast<double>(seen.rows()) + 1e-9);
  const Index rows = std::clamp<Index>(wanted, 1, seen.rows()), first = seen.rows() - rows;
  std::vector<std::uint8_t> row_class, key_class;
  for (Index r = 0; r < rows; ++r)
    row_class.push_back(detail::modality_of(static_cast<std::uint8_t>(seen.row_class(first + r))));
  for (const std::uint8_t c : columns.classes) key_class.push_back(detail::modality_of(c));
  std::vector<std::uint64_t> members = columns.of_class(seen.among), ranked;
  for (std::size_t w = 0; w < members.size(); ++w) members[w] &= ~columns.is_protected[w];
  for (Index r = first; r < seen.rows(); ++r) {
    const std::int32_t c = seen.row_columns[static_cast<std::size_t>(r)];
    members[static_cast<std::size_t>(c / columns.word_tokens)] &= ~(std::uint64_t{1} << (c % columns.word_tokens));
  }
  for (Index h = 0; h < heads; ++h)
    for (Index w = 0; w < words; ++w)
      ranked.push_back(members[static_cast<std::size_t>(w)] & columns.live_in(h)[static_cast<std::size_t>(w)]);

  double cross = policy.cross;
  if (policy.estimate) {
    std::array<double, token_classes> of_rows{}, of_keys{};
    const auto live = columns.live_in_any();
    for (const std::uint8_t c : row_class) of_rows[c] += 1;
    double keys = 0, same = 0;
    for (Index c = 0; c < n; ++c)
      if (columns.has(live, c) && columns.has(members, c))
        of_keys[key_class[static_cast<std::size_t>(c)]] += 1, keys += 1;
    for (std::size_t c = 0; c < of_rows.size(); ++c) same += of_rows[c] * of_keys[c];
    cross = keys > 0 ? 1 - same / (keys * static_cast<double>(rows)) : 0;
  }

  // n joins the denominator, and sinks where the layer has them.
  std::vector<float> extra;
  const std::vector<float>& sinks = seen.shape->sink_logits;
  if (policy.n > 0 || !sinks.empty())
    for (Index i = 0; i < rows * q_heads; ++i) {
      const double ln_n = std::log(policy.n),  // -inf for 0
          sink = sinks.empty() ? ln_n : static_cast<double>(sinks[static_cast<std::size_t>(i % q_heads)]);
      extra.push_back(static_cast<float>(
          sinks.empty() ? ln_n : std::max(ln_n, sink) + std::log1p(std::exp(-std::abs(ln_n - sink)))));
    }

  const ObservedKeys<B> keys(be, seen);
  const Buffer<B, float> extras(be, extra), parts(be, 2 * heads * n), values(be, 2 * heads * n);
  const Buffer<B, std::uint8_t> row_classes(be, row_class), key_classes(be, key_class);
  const Buffer<B, std::uint64_t> ranked_bits(be, ranked);
  const Buffer<B, Index> order(be, 2 * heads * n), count(be, 2 * heads);
  const Buffer<B, std::int32_t> place(be, 2 * heads * n);
  fill(be, parts.data(), parts.size(), 0.0f);
  fill(be, place.data(), place.size(), std::int32_t{0});

  auto mass = keys.arguments(seen);
  mass.queries = seen.queries.part(first, rows), mass.row_positions += first;
  mass.extra = extras.data();
  mass.row_class = row_classes.data(), mass.key_class = key_classes.data();
  mass.out = parts.data();
  be.attention_mass(mass);

  std::vector<SortRow> lists;
  for (Index list = 0; list < 2 * heads; ++list)
    lists.push_back({{parts.data() + list * n, ranked_bits.data() + list % heads * words, n, columns.word_tokens},
                     order.data() + list * n,
                     values.data() + list * n,
                     nullptr,
                     count.data() + list});
  be.sort_rows(lists);
  be.each(2 * heads * n, detail::ListPlaces{order.data(), values.data(), count.data(), n, place.data()});
  const double lesser = std::min(cross, 1 - cross) > 0 ? std::min(cross, 1 - cross) : 1;
  be.each(heads * n, detail::BetterPlace{parts.data(),
                                         values.data(),
                                         count.data(),
                                         place.data(),
                                         ranked_bits.data(),
                                         heads,
                                         n,
                                         words,
                                         columns.word_tokens,
                                         {1 - cross, cross},
                                         static_cast<double>(2 * n + 1) / lesser,
                                         out.data});
}

}  // namespace kvpare
