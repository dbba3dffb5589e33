// Rows as a few atoms of a dictionary: an index and a coefficient each, found by matching pursuit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "../core/text.hpp"
#include "codec.hpp"
#include "group_tiles.hpp"
#include "rounding.hpp"

namespace kvpare {

/// Atoms of one head, as halves [count, width] wherever they lie: those that many heads share, then those of this one.
struct Dictionary {
  struct Part {
    const std::byte* atoms = nullptr;
    Index count = 0;
  };
  Part shared, own;
  Index width = 0;  // channels of an atom

  Index count() const { return shared.count + own.count; }
  Index atom_bytes() const { return width * 2; }
  const std::byte* atom(Index n) const {
    return n < shared.count ? shared.atoms + n * atom_bytes() : own.atoms + (n - shared.count) * atom_bytes();
  }
  float element(const std::byte* atom, Index i) const {
    std::uint16_t bits;
    std::memcpy(&bits, atom + i * 2, 2);
    return detail::half_to_float(bits);
  }

  /// At most `most` atoms from `first` on that lie one behind the other.
  Part run(Index first, Index most) const {
    const Index end = first < shared.count ? shared.count : count();
    return {atom(first), end - first < most ? end - first : most};
  }

  /// ⟨r, atom⟩, the same bits everywhere: every product of a float and a half is exact in double.
  double dot(const float* r, const std::byte* atom) const {
    return detail::sum_of(width,
                          [&](Index i) { return static_cast<double>(r[i]) * static_cast<double>(element(atom, i)); });
  }
};

/// Where a search among atoms stands: the first one with the largest |⟨r, atom⟩|. Products that are not finite do not count.
struct BestAtom {
  Index index = -1;
  double product = 0;

  void offer(Index n, double p) {
    if (!std::isfinite(p)) return;
    if (index < 0 || std::abs(p) > std::abs(product) || (std::abs(p) == std::abs(product) && n < index))
      index = n, product = p;
  }
};

/// Sums of a few atoms of a dictionary, in `chunks` stretches of channels, each of `nonzeros` atoms.
///
/// Value    x' = Σ_g c_g d[n_g] for each chunk
/// Codes    matching pursuit: r = x; `nonzeros` times: n = argmax |⟨r, d_n⟩|, ties to the lowest, c = ⟨r, d_n⟩ as a half,
///          r = r - c d_n. Coefficients are not fitted again, and an atom may come twice. (The paper takes c from r unrounded;
///          what a half loses is left to the atoms after it here.) The same bits on every machine; by a
///          backend's own search for atoms of length up to 2.
/// Layout   per row:  n [chunks][nonzeros], 16 bits each | c [chunks][nonzeros], halves
/// Bytes    tile_bytes({T, W}) = T * 4 * chunks * nonzeros: 32 * chunks * nonzeros / W bits per number, no scales.
///          W = 128: 1 bit for keys of (4, 1) and values of (2, 2), 1.5 for (6, 1), 2 for (8, 1), 4 for (16, 1)
/// Error    no atom makes the rest longer: ||r|| falls by the share (⟨r, d⟩ / ||r||)² of the best atom, step by step.
///          Nothing is promised for atoms that are not of length 1.
/// State    atoms as halves, two to a float: `atoms` of a dictionary that was learnt for many prompts, then `online` of this
///          one, [atoms + online][W / chunks], all chunks and all heads of a layer from the same. Null: no dictionary, all rows
///          are 0. An atom with an infinity or a NaN is never chosen. Indices beyond the last atom mean the last.
///          `atoms` are the caller's (KvCache::share_state), `online` are made of the tokens of a layer that change their form
///          first, see learn_online; set_state gives both. A sequence that has atoms of its own has them and a copy of the
///          shared ones in memory of its own: pairs name both by one number, and attention multiplies them in one go.
/// NaN      counts as 0, infinities and all above 2^126 as 2^126; coefficients above 65504 are 65504
/// Source   "CSR: Achieving 1 Bit Key-Value Cache via Sparse Representation", arXiv 2412.11741. The paper's keys are coded before
///          RoPE; here they are as they come, which is what lets attention meet the dictionary instead of the keys.
template <int nonzeros, int chunks = 1, Index atoms = 8192, Index online = 0>
struct Sparse {
  static_assert(nonzeros >= 1 && nonzeros <= 64 && chunks >= 1 && chunks <= 16, "1 to 64 atoms, 1 to 16 chunks");
  static_assert(atoms >= 0 && online >= 0 && atoms + online >= 1 && atoms + online <= 65536, "indices have 16 bits");

 private:
  static constexpr ShortText text = [] {
    ShortText t("sparse");
    t << Index{nonzeros};
    if (chunks > 1) t << "_c" << Index{chunks};
    if (atoms > 0) t << "_n" << atoms;
    if (online > 0) t << "_online" << online;
    return t;
  }();

 public:
  static constexpr std::string_view name = text.view();
  static constexpr bool rows_move = true;
  static constexpr bool host_only = true, state_of_layer = true, needs_state = true;
  static constexpr bool state_reads_rows = online > 0;

  /// Atoms of a chunk, chunks of a row, atoms to choose from.
  static constexpr Index atoms_per_chunk = nonzeros, chunk_count = chunks, atom_count = atoms + online;
  static constexpr Index shared_atoms = atoms, own_atoms = online;
  /// Of a row: indices, then as many coefficients.
  static constexpr Index pairs = Index{nonzeros} * chunks, row_bytes = pairs * 4;

  static constexpr bool fits(TileShape t) {
    return t.width >= chunks && t.width <= detail::max_coded_width && t.width % chunks == 0;
  }
  static constexpr Index tile_bytes(TileShape t) { return t.tokens * row_bytes; }
  static constexpr Index state_floats(Index width) { return (atom_count * (width / chunks) + 1) / 2; }
  static constexpr Index given_floats(Index width) { return online > 0 ? (atoms * (width / chunks) + 1) / 2 : 0; }

  static Dictionary dictionary(Index width, const float* state) {
    Dictionary d;
    d.width = width / chunks;
    const auto* bytes = reinterpret_cast<const std::byte*>(state);
    d.shared = {bytes, atoms}, d.own = {bytes + atoms * d.atom_bytes(), online};
    return d;
  }

  static void encode(TileShape t, const float* rows, Index first, Index count, const float* state, std::byte* tile) {
    if (state == nullptr) {
      if (count > 0) std::memset(tile + first * row_bytes, 0, static_cast<std::size_t>(count * row_bytes));
      return;
    }
    const Dictionary d = dictionary(t.width, state);
    float rest[detail::max_coded_width];
    for (Index r = 0; r < count; ++r)
      for (Index c = 0; c < chunks; ++c) {
        take_chunk(t.width, rows + r * t.width, c, rest);
        for (Index g = 0; g < nonzeros; ++g) {
          BestAtom best;
          for (Index n = 0; n < atom_count; ++n) best.offer(n, d.dot(rest, d.atom(n)));
          put(d, best, c * nonzeros + g, tile + (first + r) * row_bytes, rest);
        }
      }
  }

  static void decode(TileShape t, const std::byte* tile, Index slot, const float* state, float* row) {
    for (Index i = 0; i < t.width; ++i) row[i] = 0;
    if (state == nullptr) return;
    const Dictionary d = dictionary(t.width, state);
    const std::byte* at = tile + slot * row_bytes;
    for (Index i = 0; i < pairs; ++i) {
      const float c = coefficient(at, i);
      if (c == 0) continue;
      const std::byte* atom = d.atom(index(at, i));
      float* to = row + i / nonzeros * d.width;
      for (Index j = 0; j < d.width; ++j) to[j] += c * d.element(atom, j);  // an exact product
    }
  }

  static void make_state(Index width, const Measured& measured, float* state) requires(online > 0) {
    if constexpr (atoms > 0) {
      const auto bytes = static_cast<std::size_t>(atoms * (width / chunks) * 2);
      if (measured.given != nullptr)
        std::memcpy(state, measured.given, bytes);
      else
        std::memset(state, 0, bytes);
    }
    learn_online(width, measured.rows, measured.positions, measured.tokens, state);
  }

  /// Fills the `online` atoms of a state with rows of a prompt, [tokens, width], each chunk a vector divided by its length.
  /// A third are the newest ones by position ("sampled"); the others ("guard") are, of up to 4096 vectors spread over the
  /// rest, those that the atoms before them are worst at: most of it is left beside their best atom. What finds no vector is 0.
  /// Cost  min(4096, vectors) * (atoms + online / 3) * width / chunks products, on one thread: 4.5e9 for 8192 + 1024 atoms of 128
  /// Deviation  the paper says neither how the guard is found nor what it sees; here one atom is looked at, not `nonzeros`
  static void learn_online(Index width, const float* rows, const Position* positions, Index tokens, float* state) {
    const Dictionary d = dictionary(width, state);
    auto* own = reinterpret_cast<std::byte*>(state) + atoms * d.atom_bytes();
    std::memset(own, 0, static_cast<std::size_t>(online * d.atom_bytes()));
    std::vector<Index> newest(static_cast<std::size_t>(tokens));
    for (std::size_t i = 0; i < newest.size(); ++i) newest[i] = static_cast<Index>(i);
    std::stable_sort(newest.begin(), newest.end(), [&](Index a, Index b) { return positions[a] > positions[b]; });

    std::vector<float> unit(static_cast<std::size_t>(d.width));
    const auto take = [&](Index vector) {  // by its place among the newest; false: it has no direction
      const float* row = rows + newest[static_cast<std::size_t>(vector / chunks)] * width;
      double square = 0;
      take_chunk(width, row, vector % chunks, unit.data());
      for (const float x : unit) square += static_cast<double>(x) * static_cast<double>(x);
      for (float& x : unit) x = static_cast<float>(static_cast<double>(x) / std::sqrt(square));
      return square > 0;
    };
    const auto write = [&](Index n) {
      for (Index i = 0; i < d.width; ++i) {
        const std::uint16_t bits = detail::saturated_half(unit[static_cast<std::size_t>(i)]);
        std::memcpy(own + n * d.atom_bytes() + i * 2, &bits, 2);
      }
    };
    const Index vectors = tokens * chunks, sampled = (online + 2) / 3;
    Index made = 0, at = 0;
    for (; at < vectors && made < sampled; ++at)
      if (take(at)) write(made++);

    constexpr Index most = 4096;
    const Index known = atoms + made, left = vectors - at, looked_at = left < most ? left : most;
    std::vector<float> seen(static_cast<std::size_t>(known * d.width));
    for (Index n = 0; n < known; ++n)
      for (Index i = 0; i < d.width; ++i) seen[static_cast<std::size_t>(n * d.width + i)] = d.element(d.atom(n), i);
    std::vector<std::pair<float, Index>> by_error;  // the largest |product|, vector
    for (Index i = 0; i < looked_at; ++i) {
      const Index vector = at + i * left / looked_at;
      if (!take(vector)) continue;
      float best = 0;
      for (Index n = 0; n < known; ++n) {
        const float* atom = seen.data() + n * d.width;
        const auto p = static_cast<float>(
            detail::sum_of(d.width, [&](Index c) { return unit[static_cast<std::size_t>(c)] * atom[c]; }));
        if (std::abs(p) > best) best = std::abs(p);
      }
      by_error.emplace_back(best, vector);
    }
    std::sort(by_error.begin(), by_error.end());
    for (const auto& [product, vector] : by_error) {
      if (made == online) break;
      take(vector), write(made++);
    }
  }

  // What a row is made of, and how it is made: for backends that search faster and choose the same.

  static Index index(const std::byte* row, Index pair) {
    std::uint16_t n;
    std::memcpy(&n, row + pair * 2, 2);
    return n < atom_count ? Index{n} : atom_count - 1;
  }
  static float coefficient(const std::byte* row, Index pair) {
    std::uint16_t c;
    std::memcpy(&c, row + (pairs + pair) * 2, 2);
    return detail::half_to_float(c);
  }
  static void take_chunk(Index width, const float* row, Index chunk, float* rest) {
    const Index n = width / chunks;
    for (Index i = 0; i < n; ++i) rest[i] = detail::as_coded(row[chunk * n + i]);
  }
  /// Writes a pair of a row and takes it off the rest.
  static void put(const Dictionary& d, const BestAtom& best, Index pair, std::byte* row, float* rest) {
    const auto n = static_cast<std::uint16_t>(best.index < 0 ? 0 : best.index);
    constexpr double most = 65504;
    const double product = best.product > most ? most : best.product < -most ? -most : best.product;
    const std::uint16_t c = detail::float_to_half(static_cast<float>(product));
    std::memcpy(row + pair * 2, &n, 2);
    std::memcpy(row + (pairs + pair) * 2, &c, 2);
    const float factor = detail::half_to_float(c);
    if (factor == 0) return;
    const std::byte* atom = d.atom(n);
    for (Index i = 0; i < d.width; ++i) rest[i] -= factor * d.element(atom, i);  // an exact product
  }
};

/// CSR-s of the paper at heads of 128: 32 s / 128 bits per number.
template <int s, Index atoms = 8192, Index online = 0>
using CsrKeys = Sparse<s, 1, atoms, online>;
template <int s, Index atoms = 8192, Index online = 0>
using CsrValues = Sparse<s / 2, 2, atoms, online>;

static_assert(Codec<CsrKeys<4>> && Codec<CsrValues<4>>);

/// A codec whose rows are sums of atoms: see Sparse for what it says of itself.
template <class C>
concept SparseCodec = Codec<C> && requires(Index width, const float* state) {
  { C::dictionary(width, state) } -> std::same_as<Dictionary>;
  { C::atoms_per_chunk } -> std::convertible_to<Index>;
};

}  // namespace kvpare
