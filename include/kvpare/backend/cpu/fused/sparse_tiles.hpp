// Tiles of sparse codes, attended to through their dictionary: queries meet atoms, not keys, and values add up to a weight per
// atom. What a head pays once is (atoms that its tokens use) products per query row on either side; a token then costs one
// addition of a few lanes per atom.
//
// Encoding finds the candidates for the largest product with the kernels, in float, and decides among them by the codec's own
// products: the bytes are the codec's on every instruction set, and do not depend on what is coded together.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "../../../codec/sparse.hpp"
#include "../tile_ops.hpp"

namespace kvpare::cpu::fused {

template <SparseCodec C>
struct SparseTiles {
  /// Stretches of a list should have so many tokens, that each atom is met a few times.
  static constexpr Index long_stretch = 4 * C::atom_count;
  /// Sums of more rows than these want more memory than a core has near; then rows are decoded, which many rows share.
  static constexpr Index most_summed_rows = 32;

  static Index tile_bytes(TileShape shape) { return C::tile_bytes(shape); }

  static void encode(const Kernels& k, TileShape shape, const float* rows, Index first, Index count, const float* state,
                     std::byte* tile) {
    if (state == nullptr) return C::encode(shape, rows, first, count, state, tile);
    const Dictionary d = C::dictionary(shape.width, state);
    const Index chunk_rows = count * C::chunk_count, stride = round_up(d.width, 16);
    thread_local std::vector<float> rest_memory;
    float* rest = grown(rest_memory, chunk_rows * stride);
    for (Index r = 0; r < count; ++r)
      for (Index c = 0; c < C::chunk_count; ++c)
        C::take_chunk(shape.width, rows + r * shape.width, c, rest + (r * C::chunk_count + c) * stride);
    thread_local Search search;
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

  /// As the codec's, with the kernels.
  static void decode(const Kernels& k, TileShape shape, const std::byte* tile, Index slot, const float* state,
                     float* row) {
    std::fill_n(row, shape.width, 0.0f);
    if (state == nullptr) return;
    const Dictionary d = C::dictionary(shape.width, state);
    float atom[kvpare::detail::max_coded_width];
    const std::byte* at = tile + slot * C::row_bytes;
    for (Index i = 0; i < C::pairs; ++i) {
      const float c = C::coefficient(at, i);
      if (c == 0) continue;
      k.to_float(d.atom(C::index(at, i)), DType::f16, d.width, atom);
      k.add_scaled(atom, d.width, c, row + i / C::atoms_per_chunk * d.width);
    }
  }

  static void move_rows(TileShape, const std::byte* from, Index from_slot, std::byte* to, Index to_slot, Index count) {
    std::memmove(to + to_slot * C::row_bytes, from + from_slot * C::row_bytes,
                 static_cast<std::size_t>(count * C::row_bytes));
  }
  static void to_canonical(TileShape shape, const std::byte* from, std::byte* to) {
    std::memcpy(to, from, static_cast<std::size_t>(C::tile_bytes(shape)));
  }
  static void from_canonical(TileShape shape, const std::byte* from, std::byte* to) { to_canonical(shape, from, to); }

  // Keys: queries as floats | which products are known | the products [chunks][atoms][lanes]. They are made as tokens ask for
  // them, so a short list does not pay for the whole dictionary.

  static Index query_bytes(Index rows, Index width) {
    return rows * query_stride(width) * 4 + known_bytes + cells * round_up(rows, lanes) * 4;
  }
  static void prepare_query(const Kernels&, const float* q, Index q_stride, Index rows, Index width, const float*,
                            std::byte* prepared) {
    for (Index i = 0; i < rows; ++i)
      std::memcpy(prepared + i * query_stride(width) * 4, q + i * q_stride, static_cast<std::size_t>(width * 4));
    std::memset(prepared + rows * query_stride(width) * 4, 0, static_cast<std::size_t>(known_bytes));
  }
  /// Writes products that were not known yet into `prepared`, which belongs to one thread.
  static void score(const Kernels& k, const std::byte* prepared, Index rows, const TileRows& keys, AheadBytes ahead,
                    float* out, Index out_stride) {
    if (keys.count == 0 || rows == 0) return;
    fetch(ahead);
    if (keys.state == nullptr) {
      for (Index i = 0; i < rows; ++i) std::fill_n(out + i * out_stride, keys.count, 0.0f);
      return;
    }
    const Index row_lanes = round_up(rows, lanes);
    auto* memory = const_cast<std::byte*>(prepared);
    const float* q = reinterpret_cast<const float*>(memory);
    std::byte* known = memory + rows * query_stride(keys.shape.width) * 4;
    float* products = reinterpret_cast<float*>(known + known_bytes);
    Codes& codes = unpacked(k, keys);
    learn(k, C::dictionary(keys.shape.width, keys.state), q, query_stride(keys.shape.width), rows, codes, keys.count,
          known, products);

    for (Index i = 0; i < rows; i += lanes) {
      Vec sums[64];
      const float* from = products + i;
      for (int t = 0; t < keys.count; ++t) {
        const std::int32_t* cell = codes.cells + t * C::pairs;
        const float* c = codes.coefficients + t * C::pairs;
        Vec sum = plain::zero();
        for (Index g = 0; g < C::pairs; ++g)
          sum = plain::fma(plain::broadcast(c[g]), plain::load(from + cell[g] * row_lanes), sum);
        sums[t] = sum;
      }
      const Index some = std::min(rows - i, lanes);
      for (Index l = 0; l < some; ++l)
        for (int t = 0; t < keys.count; ++t) out[(i + l) * out_stride + t] = sums[t][static_cast<int>(l)];
    }
  }

  // Values, decoded: for many rows.

  static void accumulate(const Kernels& k, const float* p, Index p_stride, const float* alpha, Index rows,
                         const TileRows& values, AheadBytes ahead, float* acc, Index acc_stride) {
    fetch(ahead);
    static constexpr auto in_order = [] {
      std::array<std::uint8_t, 64> slots{};
      for (std::uint8_t s = 0; s < 64; ++s) slots[s] = s;
      return slots;
    }();
    const Index width = values.shape.width;
    thread_local std::vector<float> memory;
    float* rows_of = grown(memory, 64 * width);
    for (int t = 0; t < values.count; ++t)
      decode(k, values.shape, values.tile, values.slots[t], values.state, rows_of + t * width);
    k.accumulate(p, p_stride, alpha, rows, width,
                 {reinterpret_cast<const std::byte*>(rows_of), width * 4, in_order.data(), values.count, DType::f32}, {},
                 acc, acc_stride);
  }
  static void finish_output(Index, Index, const float*, const float*, float*, Index) {}

  // Values, as weights of atoms: factors [lanes] | which weights have begun | weights [chunks][atoms][lanes]. What a weight
  // stands for is factor * weight: a rescale is one multiplication per row, not one per atom.

  static Index sums_bytes(Index rows, Index) {
    return round_up(round_up(rows, lanes) * 4, 64) + known_bytes + cells * round_up(rows, lanes) * 4;
  }
  static void start_sums(Index rows, Index, std::byte* memory) {
    const Sums sums(memory, rows);
    std::fill_n(sums.factors, sums.row_lanes, 1.0f);
    std::memset(sums.known, 0, static_cast<std::size_t>(known_bytes));
  }
  static void add_to_sums(const Kernels& k, const float* p, Index p_stride, const float* alpha, Index rows,
                          const TileRows& values, AheadBytes ahead, std::byte* memory) {
    if (rows == 0) return;
    fetch(ahead);
    const Sums sums(memory, rows);
    if (alpha != nullptr) rescale(sums, alpha, rows);
    if (values.count == 0 || values.state == nullptr) return;
    const Codes& codes = unpacked(k, values);
    for (Index i = 0; i < rows; i += lanes) {
      const Index some = std::min(rows - i, lanes);
      alignas(16) float inverse[lanes] = {}, shares[64 * lanes] = {};
      for (Index l = 0; l < some; ++l) {
        inverse[l] = 1 / sums.factors[i + l];
        for (int t = 0; t < values.count; ++t) shares[t * lanes + l] = p[(i + l) * p_stride + t] * inverse[l];
      }
      const bool last = i + lanes >= rows;
      for (int t = 0; t < values.count; ++t) {
        const Vec share = plain::load(shares + t * lanes);
        const std::int32_t* cell = codes.cells + t * C::pairs;
        const float* c = codes.coefficients + t * C::pairs;
        for (Index g = 0; g < C::pairs; ++g) {
          float* weight = sums.weights + cell[g] * sums.row_lanes;
          if (sums.known[cell[g]] == std::byte{0}) [[unlikely]] {
            std::fill_n(weight + i, sums.row_lanes - i, 0.0f);
            std::fill_n(weight, i, 0.0f);
            sums.known[cell[g]] = std::byte{1};
          }
          plain::store(weight + i, plain::fma(plain::broadcast(c[g]), share, plain::load(weight + i)));
        }
      }
      (void)last;
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
    float* shares = grown(shares_memory, rows * 64);
    std::uint8_t slots[64];
    for (Index chunk = 0; chunk < C::chunk_count; ++chunk)
      for (Index n = 0; n < C::atom_count;) {
        const Dictionary::Part run = d.run(n, 64);
        const std::byte* known = sums.known + chunk * C::atom_count + n;
        const float* weights = sums.weights + (chunk * C::atom_count + n) * sums.row_lanes;
        int used = 0;
        for (Index j = 0; j < run.count; ++j) {
          if (known[j] == std::byte{0}) continue;
          slots[used] = static_cast<std::uint8_t>(j);
          for (Index i = 0; i < rows; ++i) shares[i * 64 + used] = weights[j * sums.row_lanes + i] * sums.factors[i];
          ++used;
        }
        if (used > 0)
          k.accumulate(shares, 64, nullptr, rows, d.width, {run.atoms, d.atom_bytes(), slots, used, DType::f16}, {},
                       acc + chunk * d.width, acc_stride);
        n += run.count;
      }
  }

 private:
  using Vec = plain::Vec;
  static constexpr Index lanes = plain::lanes;
  static constexpr Index cells = C::chunk_count * C::atom_count, known_bytes = round_up(cells, 64);

  static Index query_stride(Index width) { return round_up(width, 16); }

  static float* grown(std::vector<float>& memory, Index floats) {
    if (static_cast<Index>(memory.size()) < floats) memory.resize(static_cast<std::size_t>(floats));
    return memory.data();
  }
  static void fetch(AheadBytes ahead) {
    for (Index at = 0; at < ahead.bytes; at += 64) __builtin_prefetch(ahead.data + at, 0, 2);
  }

  /// The listed rows, unpacked: cell = chunk * atoms + index.
  struct Codes {
    std::int32_t cells[64 * C::pairs];
    float coefficients[64 * C::pairs];
    std::uint16_t packed[64 * C::pairs];
  };
  static Codes& unpacked(const Kernels& k, const TileRows& rows) {
    thread_local Codes codes;
    for (int t = 0; t < rows.count; ++t) {
      const std::byte* row = rows.tile + rows.slots[t] * C::row_bytes;
      for (Index i = 0; i < C::pairs; ++i)
        codes.cells[t * C::pairs + i] =
            static_cast<std::int32_t>(i / C::atoms_per_chunk * C::atom_count + C::index(row, i));
      std::memcpy(codes.packed + t * C::pairs, row + C::pairs * 2, static_cast<std::size_t>(C::pairs * 2));
    }
    k.to_float(reinterpret_cast<const std::byte*>(codes.packed), DType::f16, rows.count * C::pairs, codes.coefficients);
    return codes;
  }

  /// Products of the queries with the atoms of these rows that are not known yet.
  static void learn(const Kernels& k, const Dictionary& d, const float* q, Index q_stride, Index rows, const Codes& codes,
                    int count, std::byte* known, float* products) {
    static constexpr auto in_order = [] {
      std::array<std::uint8_t, 64> slots{};
      for (std::uint8_t s = 0; s < 64; ++s) slots[s] = s;
      return slots;
    }();
    const Index row_lanes = round_up(rows, lanes);
    std::int32_t wanted[C::chunk_count][64 * C::atoms_per_chunk];
    Index found[C::chunk_count] = {};
    for (Index i = 0; i < count * C::pairs; ++i) {
      const std::int32_t cell = codes.cells[i];
      const Index chunk = i % C::pairs / C::atoms_per_chunk;
      if (known[cell] != std::byte{0}) continue;
      known[cell] = std::byte{1};
      wanted[chunk][found[chunk]++] = cell;
    }
    for (Index chunk = 0; chunk < C::chunk_count; ++chunk)
      for (Index at = 0; at < found[chunk]; at += 64) {
        const Index n = std::min<Index>(64, found[chunk] - at);
        thread_local std::vector<float> memory;
        float* dots = grown(memory, rows * 64 + 32 * d.width);
        auto* atoms = reinterpret_cast<std::byte*>(dots + rows * 64);
        for (Index j = 0; j < n; ++j)
          std::memcpy(atoms + j * d.atom_bytes(), d.atom(wanted[chunk][at + j] - chunk * C::atom_count),
                      static_cast<std::size_t>(d.atom_bytes()));
        k.dot(q + chunk * d.width, q_stride, rows, d.width,
              {atoms, d.atom_bytes(), in_order.data(), static_cast<int>(n), DType::f16}, {}, dots, 64);
        for (Index j = 0; j < n; ++j) {
          float* to = products + wanted[chunk][at + j] * row_lanes;
          for (Index i = 0; i < rows; ++i) to[i] = dots[i * 64 + j];
          std::fill_n(to + rows, row_lanes - rows, 0.0f);
        }
      }
  }

  struct Sums {
    Index row_lanes;
    float* factors;
    std::byte* known;
    float* weights;
    Sums(std::byte* memory, Index rows)
        : row_lanes(round_up(rows, lanes)),
          factors(reinterpret_cast<float*>(memory)),
          known(memory + round_up(row_lanes * 4, 64)),
          weights(reinterpret_cast<float*>(known + known_bytes)) {}
  };

  static void rescale(const Sums& sums, const float* alpha, Index rows) {
    constexpr float least = 0x1p-60f;  // weights are at most so much larger than what they stand for
    bool apply = false;
    for (Index i = 0; i < rows; ++i) apply = apply || alpha[i] == 0 || sums.factors[i] * alpha[i] < least;
    for (Index i = 0; i < rows; ++i) sums.factors[i] *= alpha[i];
    if (!apply) return;
    for (Index n = 0; n < cells; ++n) {
      if (sums.known[n] == std::byte{0}) continue;
      float* weights = sums.weights + n * sums.row_lanes;
      for (Index i = 0; i < rows; ++i) weights[i] = sums.factors[i] == 0 ? 0.0f : weights[i] * sums.factors[i];
    }
    std::fill_n(sums.factors, rows, 1.0f);
  }

  /// The largest products of some rows with all atoms.
  class Search {
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

    std::byte* panel(std::size_t b) {
      auto* base = reinterpret_cast<std::byte*>(round_up(reinterpret_cast<Index>(panels_.data()), 1));
      return base + static_cast<Index>(b) * panel_bytes_;
    }
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
      static constexpr auto in_order = [] {
        std::array<std::uint8_t, 64> slots{};
        for (std::uint8_t s = 0; s < 64; ++s) slots[s] = s;
        return slots;
      }();
      k_->dot(scaled_.data() + first * stride_, stride_, n, d_.width,
              {d_.atom(blocks_[b].first), d_.atom_bytes(), in_order.data(), static_cast<int>(blocks_[b].count),
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
};

}  // namespace kvpare::cpu::fused
