// Tiles of sparse codes, attended to through their dictionary: queries meet atoms, not keys, and values add up to a weight per
// atom. What a stretch pays once is the dictionary times each query row, on either side; a token then costs one addition of a
// few lanes per atom. Short stretches are decoded.
//
// Encoding finds the candidates for the largest product with the kernels, in float, and decides among them by the codec's own
// products: the bytes are the codec's on every instruction set, and do not depend on what is coded together.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../../../codec/sparse.hpp"
#include "../canonical_tiles.hpp"
#include "fours.hpp"

namespace kvpare::cpu::fused {

/// The largest products of some rows with all atoms.
class AtomSearch {
 public:
  void start(const Kernels& k, const Dictionary& d, Index rows) {
    k_ = &k, d_ = d, rows_ = rows;
    stride_ = round_up(d.width, 16);
    packs_ = rows >= worth_packing;
    block_ = packs_ ? k.panel_tokens : 64;
    blocks_.clear();
    for (Index n = 0; n < d.count(); n += blocks_.back().count) blocks_.push_back({n, d.run(n, block_).count});
    most_.resize(static_cast<std::size_t>(rows) * blocks_.size());
    scaled_.resize(static_cast<std::size_t>(rows * stride_));
    out_.resize(static_cast<std::size_t>(std::min(rows, tile_rows) * 64));
    if (!packs_) return;
    panel_bytes_ = round_up(k.panel_bytes(d.width, DType::f16), 64);
    panels_.resize(static_cast<std::size_t>(panel_bytes_) * blocks_.size());
    const std::byte* rows_of[64];
    for (std::size_t b = 0; b < blocks_.size(); ++b) {
      for (Index j = 0; j < blocks_[b].count; ++j) rows_of[j] = d.atom(blocks_[b].first + j);
      k.pack_panel(rows_of, blocks_[b].count, d.width, DType::f16, panel(b));
    }
  }

  /// Notes the largest magnitude of every block of atoms, for every row of `rest`.
  void meet_all(const float* rest, Index rest_stride) {
    for (Index r = 0; r < rows_; ++r) scale(rest + r * rest_stride, scaled_.data() + r * stride_);
    for (std::size_t b = 0; b < blocks_.size(); ++b)
      for (Index first = 0; first < rows_; first += tile_rows) {
        const Index n = std::min(tile_rows, rows_ - first);
        if (packs_)
          k_->dot_panel(scaled_.data() + first * stride_, stride_, n, d_.width, panel(b), DType::f16, out_.data(), 64);
        else
          dot(first, n, b);
        for (Index r = 0; r < n; ++r)
          most_[static_cast<std::size_t>(first + r) * blocks_.size() + b] =
              largest(out_.data() + r * 64, blocks_[b].count);
      }
  }

  /// The atom that the codec would choose for row r, `rest` being what is left of it.
  BestAtom best(Index r, const float* rest) {
    const std::int32_t* most = most_.data() + static_cast<std::size_t>(r) * blocks_.size();
    const std::int32_t top = *std::max_element(most, most + blocks_.size());
    // A product in float is off by less than width * 2^-24 * ||r||, twice that for atoms that are not quite of length 1.
    double square = 0;
    for (Index i = 0; i < d_.width; ++i) {
      const auto x = static_cast<double>(scaled_[static_cast<std::size_t>(r * stride_ + i)]);
      square += x * x;
    }
    const double slack = static_cast<double>(d_.width) * 0x1p-22 * std::sqrt(square);
    const double least = static_cast<double>(std::bit_cast<float>(top)) - slack;
    const std::int32_t bound = least > 0 ? std::bit_cast<std::int32_t>(static_cast<float>(least)) : 0;
    BestAtom found;
    for (std::size_t b = 0; b < blocks_.size(); ++b) {
      if (most[b] < bound) continue;
      dot(r, 1, b);
      for (Index j = 0; j < blocks_[b].count; ++j)
        if (magnitude(out_[static_cast<std::size_t>(j)]) >= bound) {
          const Index n = blocks_[b].first + j;
          found.offer(n, d_.dot(rest, d_.atom(n)));
          if (square == 0 && found.index >= 0) return found;  // they are all 0: the first that is finite
        }
    }
    return found;
  }

 private:
  static constexpr Index tile_rows = 48, worth_packing = 8;
  struct Block {
    Index first, count;
  };

  std::byte* panel(std::size_t b) { return panels_.data() + static_cast<Index>(b) * panel_bytes_; }
  /// By a power of two, so that the largest number is about 1 and no product overflows.
  void scale(const float* x, float* to) const {
    const float most = std::bit_cast<float>(kvpare::detail::magnitude_bits(x, d_.width));
    int exponent = 0;
    std::frexp(most, &exponent);
    const float factor = std::ldexp(1.0f, std::clamp(-exponent, -126, 126));
    for (Index i = 0; i < d_.width; ++i) to[i] = x[i] * factor;
    std::fill(to + d_.width, to + stride_, 0.0f);
  }
  void dot(Index first, Index n, std::size_t b) {
    k_->dot(scaled_.data() + first * stride_, stride_, n, d_.width,
            {d_.atom(blocks_[b].first), d_.atom_bytes(), slots_in_order.data(), static_cast<int>(blocks_[b].count),
             DType::f16},
            {}, out_.data(), 64);
  }
  /// |x| as an integer of the same order; 0 for what is not finite.
  static std::int32_t magnitude(float x) {
    const std::int32_t word = std::bit_cast<std::int32_t>(x) & 0x7fffffff;
    return word < 0x7f800000 ? word : 0;
  }
  static std::int32_t largest(const float* x, Index n) {
    std::int32_t most = 0;
    for (Index i = 0; i < n; ++i) {
      const std::int32_t word = magnitude(x[i]);
      most = word > most ? word : most;
    }
    return most;
  }

  const Kernels* k_ = nullptr;
  Dictionary d_;
  Index rows_ = 0, stride_ = 0, block_ = 64, panel_bytes_ = 0;
  bool packs_ = false;
  std::vector<Block> blocks_;
  std::vector<std::int32_t> most_;  // [rows][blocks]
  std::vector<float> scaled_, out_;
  std::vector<std::byte> panels_;
};

/// The bytes, and attention by decoding: for lists too short to meet the dictionary.
template <SparseCodec C>
struct DecodedSparseTiles : CanonicalTiles<C> {
  static void encode(const Kernels& k, TileShape shape, const float* rows, Index first, Index count, const TokenFacts&,
                     const float* state, std::byte* tile) {
    if (state == nullptr) return C::encode(shape, rows, first, count, state, tile);
    const Dictionary d = C::dictionary(shape.width, state);
    const Index chunk_rows = count * C::chunk_count, stride = round_up(d.width, 16);
    thread_local std::vector<float> rest_memory;
    float* rest = grown(rest_memory, chunk_rows * stride);
    for (Index r = 0; r < count; ++r)
      for (Index c = 0; c < C::chunk_count; ++c)
        C::take_chunk(shape.width, rows + r * shape.width, c, rest + (r * C::chunk_count + c) * stride);
    thread_local AtomSearch search;
    search.start(k, d, chunk_rows);
    for (Index g = 0; g < C::atoms_per_chunk; ++g) {
      search.meet_all(rest, stride);
      for (Index r = 0; r < chunk_rows; ++r) {
        float* x = rest + r * stride;
        C::put(d, search.best(r, x), r % C::chunk_count * C::atoms_per_chunk + g,
               tile + (first + r / C::chunk_count) * C::row_bytes, x);
      }
    }
  }

  /// The codec's numbers: its sum, in its order, of products that are exact.
  static void decode(const Kernels& k, TileShape shape, const std::byte* tile, Index slot, Position, const float* state,
                     float* row) {
    std::fill_n(row, shape.width, 0.0f);
    if (state == nullptr) return;
    const Dictionary d = C::dictionary(shape.width, state);
    const std::byte* at = tile + slot * C::row_bytes;
    std::byte atoms[C::atoms_per_chunk * kvpare::detail::max_coded_width / C::chunk_count * 2];
    for (Index chunk = 0; chunk < C::chunk_count; ++chunk) {
      float c[C::atoms_per_chunk];
      int n = 0;
      for (Index g = 0; g < C::atoms_per_chunk; ++g) {
        c[n] = C::coefficient(at, chunk * C::atoms_per_chunk + g);
        if (c[n] == 0) continue;
        std::memcpy(atoms + n++ * d.atom_bytes(), d.atom(C::index(at, chunk * C::atoms_per_chunk + g)),
                    static_cast<std::size_t>(d.atom_bytes()));
      }
      k.accumulate(c, n, nullptr, 1, d.width, {atoms, d.atom_bytes(), slots_in_order.data(), n, DType::f16}, {},
                   row + chunk * d.width, d.width);
    }
  }

  /// 16 rows as floats [channel][16], times gain plus shift by channel where they are given.
  static void decode_block(const Kernels& k, TileShape shape, const std::byte* tile, Index first, const float* state,
                           const float* gain, const float* shift, float* out) {
    alignas(64) float rows[16 * kvpare::detail::max_coded_width];
    const Index width = shape.width;
    for (int t = 0; t < 16; ++t) fetch_atoms(shape, tile, first + t, state);
    for (int t = 0; t < 16; ++t) {
      float* row = rows + t * width;
      decode(k, shape, tile, first + t, 0, state, row);
      for (Index c = 0; c < width && gain != nullptr; ++c) row[c] = row[c] * gain[c] + shift[c];
    }
    Index c = 0;
    for (; c + 4 <= width; c += 4)
      for (Index t = 0; t < 16; t += 4) {
        Four x[4];
        for (Index i = 0; i < 4; ++i) x[i] = load_four(rows + (t + i) * width + c);
        transpose(x);
        for (Index i = 0; i < 4; ++i) store_four(out + (c + i) * 16 + t, x[i]);
      }
    for (; c < width; ++c)
      for (Index t = 0; t < 16; ++t) out[c * 16 + t] = rows[t * width + c];
  }

  static void score(const Kernels& k, const std::byte* prepared, Index rows, const TileRows& keys, AheadBytes ahead,
                    float* out, Index out_stride) {
    k.dot(reinterpret_cast<const float*>(prepared), DecodedSparseTiles::query_stride(keys.shape.width), rows,
          keys.shape.width, decoded(k, keys, ahead), {}, out, out_stride);
  }
  static void accumulate(const Kernels& k, const float* p, Index p_stride, const float* alpha, Index rows,
                         const TileRows& values, AheadBytes ahead, float* acc, Index acc_stride) {
    k.accumulate(p, p_stride, alpha, rows, values.shape.width, decoded(k, values, ahead), {}, acc, acc_stride);
  }

 protected:
  static float* grown(std::vector<float>& memory, Index floats) {
    if (static_cast<Index>(memory.size()) < floats) memory.resize(static_cast<std::size_t>(floats));
    return memory.data();
  }
  static void fetch(AheadBytes ahead) {
    for (Index at = 0; at < ahead.bytes; at += 64) __builtin_prefetch(ahead.data + at, 0, 2);
  }

 private:
  /// They lie anywhere in a dictionary that is larger than a core's cache.
  static void fetch_atoms(TileShape shape, const std::byte* tile, Index slot, const float* state) {
    if (state == nullptr) return;
    const Dictionary d = C::dictionary(shape.width, state);
    const std::byte* row = tile + slot * C::row_bytes;
    for (Index i = 0; i < C::pairs; ++i) fetch({d.atom(C::index(row, i)), d.atom_bytes()});
  }
  static RowSet decoded(const Kernels& k, const TileRows& tile, AheadBytes ahead) {
    fetch(ahead);
    thread_local std::vector<float> memory;
    const Index width = tile.shape.width;
    float* rows = grown(memory, 64 * width);
    constexpr int early = 4;
    for (int t = 0; t < std::min(early, tile.count); ++t) fetch_atoms(tile.shape, tile.tile, tile.slots[t], tile.state);
    for (int t = 0; t < tile.count; ++t) {
      if (t + early < tile.count) fetch_atoms(tile.shape, tile.tile, tile.slots[t + early], tile.state);
      decode(k, tile.shape, tile.tile, tile.slots[t], 0, tile.state, rows + t * width);
    }
    return {reinterpret_cast<const std::byte*>(rows), width * 4, slots_in_order.data(), tile.count, DType::f32};
  }
};

/// Tiles attended to through the dictionary.
template <SparseCodec C>
struct SparseTiles : DecodedSparseTiles<C> {
  using Decoded = DecodedSparseTiles<C>;
  /// For stretches of fewer tokens than these, and for more rows: products and weights of many rows want more memory than a
  /// core has near, and a decoded row serves them all.
  using Short = Decoded;
  static constexpr bool has_sums = true;
  static constexpr Index short_tokens = C::atom_count / 8, most_rows = 32;
  /// Stretches of a list should have so many tokens: each atom is met a few times.
  static constexpr Index long_stretch = 4 * C::atom_count;

  // Keys: the products of the queries with all atoms, [chunks][atoms][lanes].

  static Index query_bytes(Index rows, Index) { return round_up(cells * round_up(rows, lanes) * 4, 64); }
  static void prepare_query(const Kernels& k, const float* q, Index q_stride, Index rows, Index width,
                            const float* state, std::byte* prepared) {
    if (state == nullptr) return;
    const Dictionary d = C::dictionary(width, state);
    const Index row_lanes = round_up(rows, lanes);
    thread_local std::vector<float> memory;
    float* dots = Decoded::grown(memory, rows * 64);
    for (Index chunk = 0; chunk < C::chunk_count; ++chunk)
      for (Index n = 0; n < C::atom_count;) {
        const Dictionary::Part run = d.run(n, 64);
        k.dot(q + chunk * d.width, q_stride, rows, d.width,
              {run.atoms, d.atom_bytes(), slots_in_order.data(), static_cast<int>(run.count), DType::f16}, {}, dots,
              64);
        float* to = reinterpret_cast<float*>(prepared) + (chunk * C::atom_count + n) * row_lanes;
        for (Index j = 0; j < run.count; ++j, to += row_lanes) {
          for (Index i = 0; i < rows; ++i) to[i] = dots[i * 64 + j];
          std::fill_n(to + rows, row_lanes - rows, 0.0f);
        }
        n += run.count;
      }
  }
  static void score(const Kernels& k, const std::byte* prepared, Index rows, const TileRows& keys, AheadBytes ahead,
                    float* out, Index out_stride) {
    if (keys.count == 0) return;
    Decoded::fetch(ahead);
    if (keys.state == nullptr) {
      for (Index i = 0; i < rows; ++i) std::fill_n(out + i * out_stride, keys.count, 0.0f);
      return;
    }
    const auto* products = reinterpret_cast<const float*>(prepared);
    float coefficients[64 * C::pairs];
    take_coefficients(k, keys, coefficients);
    const Index row_lanes = round_up(rows, lanes);
    for (Index i = 0; i < rows; i += lanes) {
      Vec sums[64];
      if (row_lanes == lanes)
        gather<lanes>(keys, coefficients, products, lanes, sums);
      else
        gather<0>(keys, coefficients, products + i, row_lanes, sums);
      const Index some = std::min(rows - i, lanes);
      for (Index l = 0; l < some; ++l)
        for (int t = 0; t < keys.count; ++t) out[(i + l) * out_stride + t] = sums[t][static_cast<int>(l)];
    }
  }

  // Values, as weights of atoms: factors [lanes] | weights [chunks][atoms][lanes]. What a weight stands for is factor * weight:
  // a rescale is one multiplication per row, not one per atom. A factor of 0: all weights of the row are 0 yet.

  static Index sums_bytes(Index rows, Index) {
    const Index row_lanes = round_up(rows, lanes);
    return round_up(row_lanes * 4, 64) + cells * row_lanes * 4;
  }
  static void start_sums(Index rows, Index, std::byte* memory) {
    const Sums sums(memory, rows);
    std::fill_n(sums.factors, sums.row_lanes, 0.0f);
    std::fill_n(sums.weights, cells * sums.row_lanes, 0.0f);
  }
  static void add_to_sums(const Kernels& k, const float* p, Index p_stride, const float* alpha, Index rows,
                          const TileRows& values, AheadBytes ahead, std::byte* memory) {
    Decoded::fetch(ahead);
    const Sums sums(memory, rows);
    rescale(sums, alpha, rows);
    if (values.count == 0 || values.state == nullptr) return;
    float coefficients[64 * C::pairs];
    take_coefficients(k, values, coefficients);
    for (Index i = 0; i < rows; i += lanes) {
      const Index some = std::min(rows - i, lanes);
      float shares[64 * lanes] = {};
      for (Index l = 0; l < some; ++l) {
        const float inverse = 1 / sums.factors[i + l];
        for (int t = 0; t < values.count; ++t) shares[t * lanes + l] = p[(i + l) * p_stride + t] * inverse;
      }
      if (sums.row_lanes == lanes)
        scatter<lanes>(values, coefficients, shares, sums.weights, lanes);
      else
        scatter<0>(values, coefficients, shares, sums.weights + i, sums.row_lanes);
    }
  }
  /// Formula  acc[i] = Σ_n factor_i weight_i[n] d_n
  static void finish_sums(const Kernels& k, Index rows, Index width, const float* state, std::byte* memory, float* acc,
                          Index acc_stride) {
    for (Index i = 0; i < rows; ++i) std::fill_n(acc + i * acc_stride, width, 0.0f);
    if (state == nullptr) return;
    const Sums sums(memory, rows);
    const Dictionary d = C::dictionary(width, state);
    thread_local std::vector<float> shares_memory;
    float* shares = Decoded::grown(shares_memory, rows * 64);
    std::uint8_t slots[64];
    for (Index chunk = 0; chunk < C::chunk_count; ++chunk)
      for (Index n = 0; n < C::atom_count;) {
        const Dictionary::Part run = d.run(n, 64);
        const float* weights = sums.weights + (chunk * C::atom_count + n) * sums.row_lanes;
        int used = 0;
        for (Index j = 0; j < run.count; ++j, weights += sums.row_lanes) {
          if (std::all_of(weights, weights + rows, [](float w) { return w == 0; })) continue;  // it may not be finite
          slots[used] = static_cast<std::uint8_t>(j);
          for (Index i = 0; i < rows; ++i) shares[i * 64 + used] = weights[i] * sums.factors[i];
          ++used;
        }
        k.accumulate(shares, 64, nullptr, rows, d.width, {run.atoms, d.atom_bytes(), slots, used, DType::f16}, {},
                     acc + chunk * d.width, acc_stride);
        n += run.count;
      }
  }

 private:
  using Vec = plain::Vec;
  static constexpr Index lanes = plain::lanes, cells = C::chunk_count * C::atom_count;

  struct Sums {
    Index row_lanes;
    float* factors;
    float* weights;
    Sums(std::byte* memory, Index rows)
        : row_lanes(round_up(rows, lanes)), factors(reinterpret_cast<float*>(memory)),
          weights(reinterpret_cast<float*>(memory + round_up(row_lanes * 4, 64))) {}
  };

  static const std::byte* row_of(const TileRows& tile, int t) { return tile.tile + tile.slots[t] * C::row_bytes; }
  /// What a pair's atom has products or weights at: chunk by chunk.
  static Index cell_of(const std::byte* row, Index pair) {
    return pair / C::atoms_per_chunk * C::atom_count + C::index(row, pair);
  }
  static void take_coefficients(const Kernels& k, const TileRows& tile, float* to) {
    std::uint16_t packed[64 * C::pairs];
    for (int t = 0; t < tile.count; ++t)
      std::memcpy(packed + t * C::pairs, row_of(tile, t) + C::pairs * 2, static_cast<std::size_t>(C::pairs * 2));
    k.to_float(reinterpret_cast<const std::byte*>(packed), DType::f16, tile.count * C::pairs, to);
  }

  /// sums[t] = Σ_g c[t][g] products[cell]; `fixed` is the stride where it is known at compile time.
  template <Index fixed>
  static void gather(const TileRows& tile, const float* c, const float* products, Index stride, Vec* sums) {
    for (int t = 0; t < tile.count; ++t, c += C::pairs) {
      const std::byte* row = row_of(tile, t);
      Vec sum = plain::zero();
      for (Index g = 0; g < C::pairs; ++g)
        sum = plain::fma(plain::broadcast(c[g]), plain::load(products + cell_of(row, g) * (fixed > 0 ? fixed : stride)),
                         sum);
      sums[t] = sum;
    }
  }
  template <Index fixed>
  static void scatter(const TileRows& tile, const float* c, const float* shares, float* weights, Index stride) {
    for (int t = 0; t < tile.count; ++t, c += C::pairs, shares += lanes) {
      const std::byte* row = row_of(tile, t);
      const Vec share = plain::load(shares);
      for (Index g = 0; g < C::pairs; ++g) {
        float* weight = weights + cell_of(row, g) * (fixed > 0 ? fixed : stride);
        plain::store(weight, plain::fma(plain::broadcast(c[g]), share, plain::load(weight)));
      }
    }
  }

  /// The factors of a page; null: 1. Weights are at most 2^60 times what they stand for.
  static void rescale(const Sums& sums, const float* alpha, Index rows) {
    bool apply = false;
    for (Index i = 0; i < rows; ++i) {
      float& factor = sums.factors[i];
      if (factor == 0) {
        factor = 1;
      } else if (alpha != nullptr) {
        factor *= alpha[i];
        apply = apply || !(factor >= 0x1p-60f);
      }
    }
    if (!apply) return;
    float* weights = sums.weights;
    for (Index n = 0; n < cells; ++n, weights += sums.row_lanes)
      for (Index i = 0; i < rows; ++i) weights[i] = sums.factors[i] == 0 ? 0.0f : weights[i] * sums.factors[i];
    std::fill_n(sums.factors, rows, 1.0f);
  }
};

}  // namespace kvpare::cpu::fused
