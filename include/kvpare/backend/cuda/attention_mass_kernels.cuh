// The kernels of `attention_mass`.
//
// A *vector* is one row with one query head. Vectors of a kv head are numbered member by member of its group, rows
// padded to eight: eight vectors in a row belong to one member and make a *vector tile*. Keys of a head are numbered by
// their slots: 32 slots in a row are a *key tile*, a warp's own. Lane 4 g + t of a warp holds logits of keys g, g + 8,
// g + 16, g + 24 of its tile and of vectors 2 t, 2 t + 1 of a vector tile, however they were computed:
//
//   logits[m][2 u + v]      key g + 16 m + 8 u, vector 2 t + v
//
// A block takes a *job*, key tiles in a row of one kv head, with the vectors' queries in shared memory, as many at once
// as fit (a chunk). Two orders of the same loops:
//
//   sums per key (`mass`, `plain`)       key tiles outside, chunks inside: what a key adds up stays in registers until
//                                        all vectors have passed, then it is added to the output once, by the only
//                                        thread that ever does
//   sums per vector (`peaks`, `shares`)  a block per job and chunk; warps add up in shared memory, a partial sum per
//                                        job goes to scratch and is joined over the jobs in order
//
// Keys of one 16-bit type with aligned rows go through the tensor cores: a key tile lies in registers as the A operand,
// 16 bytes of a row per load, and is read from memory once for all vectors of a chunk; the order of channels within 32
// is that of the load, the same for the queries. Queries of another type are split into up to three parts of that type,
// with which products are as exact as in float. All other keys (float, odd widths, several types in one key tile) are
// multiplied as floats. A launch serves the key tiles of one kind and passes over the others.
#pragma once

#include <cmath>
#include <limits>

#include "collectives.cuh"
#include "elements.cuh"
#include "tuning.cuh"
#include "workspace.cuh"

namespace kvpare::cuda::detail {

inline constexpr float mass_infinity = std::numeric_limits<float>::infinity();
inline constexpr int key_tile = 32, vector_tile = 8;

enum class TileKind : std::uint8_t { floats, f16, bf16 };  // which launch a key tile belongs to

/// Raw rows of one format, as kernels read them.
struct MassFormat {
  const std::byte* keys = nullptr;
  Index page_bytes = 0, row_bytes = 0;
  DType type = DType::f32;
  TileKind kind = TileKind::floats;
  bool coded = false;  // the rows are decoded ones, in pages of their own
};

/// One kv head.
struct MassList {
  const Entry* entries = nullptr;
  const std::uint16_t* offsets = nullptr;
  const std::int32_t* decoded = nullptr;  // per entry: which decoded page; null where no keys are coded
  const MassFormat* formats = nullptr;
  const std::uint64_t* mask = nullptr;    // a word per entry, or null
  const std::int32_t* columns = nullptr;  // slot -> column, or null
  int slots = 0, page_tokens = 64;
};

/// Key tiles [first, end) of a kv head.
struct MassJob {
  int head = 0, first = 0, end = 0;
};

/// A partial sum of one vector. peaks: the largest logit in units of log2, -inf when no key is seen, and the sum of
/// 2^(logit - largest). shares: sum of p per part, and entries near the peak.
struct MassSum {
  float a = 0, b = 0;
  std::int32_t count = 0, unused = 0;
};

/// MassArguments without what only the host may follow.
template <class Logit, class EntryOf>
struct MassProblem {
  const MassList* lists = nullptr;  // [kv_heads]
  ConstTensor queries;
  const Position* row_positions = nullptr;
  const Index *row_list = nullptr, *row_count = nullptr;
  const float* row_weights = nullptr;
  const float *given_lse = nullptr, *extra = nullptr;
  const std::uint8_t *row_class = nullptr, *key_class = nullptr;
  float *lse2 = nullptr, *peak2 = nullptr;  // [kv_heads][most_vectors] of `peaks`, in units of log2; null: lse is given
  MassSum* sums = nullptr;                  // [launches][jobs][most_vectors]
  float *out = nullptr, *seen = nullptr;
  float* of_heads =
      nullptr;  // [kv_heads][parts][columns]: where sums of several kv heads go before they are added to `out`
  float *row_lse = nullptr, *row_peak = nullptr, *row_part_mass = nullptr;
  Index* row_near_peak = nullptr;
  Index columns = 0, out_heads = 1, window = 0, most_vectors = 0;
  float scale = 1, softcap = 0;      // scale: in units of log2 where there is no softcap
  float joined = 1, peak_share = 0;  // joined: 1 / how many query heads an output row is the mean of
  int kv_heads = 1, group = 1, parts = 1, width = 0;
  HeadGroups heads = HeadGroups::kv_head;
  bool take_max = false, per_head_weights = false;
  Logit logit;
  EntryOf entry;

  KVPARE_DEVICE int rows() const {
    if (row_list == nullptr) return static_cast<int>(queries.rows);
    const Index n = *row_count < 0 ? 0 : *row_count;
    return static_cast<int>(n < queries.rows ? n : queries.rows);
  }
  KVPARE_DEVICE int q_heads() const { return kv_heads * group; }
  KVPARE_DEVICE float weight(Index row, int q_head) const {
    if (row_weights == nullptr) return 1;
    return row_weights[per_head_weights ? row * q_heads() + q_head : row];
  }
};

/// Which row and query head a vector is, and with what weight; weight 0: none.
struct MassVector {
  Index row = 0;
  int q_head = 0;
  float weight = 0;

  template <class Problem>
  KVPARE_DEVICE MassVector(const Problem& p, int head, int vector, int rows) {
    const int padded = (rows + vector_tile - 1) / vector_tile * vector_tile;
    if (padded == 0 || vector >= padded * p.group) return;
    const int at = vector % padded;
    if (at >= rows) return;
    row = p.row_list != nullptr ? p.row_list[at] : at;
    q_head = head * p.group + vector / padded;
    weight = p.weight(row, q_head);
  }
  /// Where its numbers stand in arrays of [rows, q_heads].
  template <class Problem>
  KVPARE_DEVICE Index at(const Problem& p) const {
    return row * p.q_heads() + q_head;
  }
};

/// Which positions are seen by a vector; by none: low > high.
struct MassSight {
  Position low = std::numeric_limits<Position>::max(), high = std::numeric_limits<Position>::min();
};
/// Of a vector tile: what any of its vectors sees, and what all of them do.
struct alignas(16) TileSight {
  MassSight any;
  MassSight all;
};
struct alignas(8) ScaleShift {
  float scale, shift;  // p = 2^(scale * dot - shift); a shift of +inf: adds nothing
};
struct alignas(16) ScaleShiftPair {
  ScaleShift of[2];
};
struct alignas(8) FloatPair {
  float of[2];
};
struct alignas(16) SightPair {
  MassSight of[2];
};
struct alignas(8) IntPair {
  int of[2];
};
struct alignas(8) HalfQuad {
  std::uint16_t of[4];
};
struct alignas(16) FloatQuad {
  float of[4];
};

/// Shared memory of a block, in bytes from its start.
struct MassShared {
  int vectors = 0;                       // of a chunk
  int query_parts = 1, query_pitch = 0;  // bytes from one vector's query to the next
  int channels = 0;                      // of a query that are there at once
  Index queries = 0, scale_shift = 0, weights = 0, sights = 0, rows = 0, peaks = 0, tiles = 0, tile_weights = 0,
        sums = 0, bytes = 0;

  void lay_out(bool per_vector, int warps) {
    Index at = Index{query_parts} * vectors * query_pitch;
    const auto take = [&](Index size) {
      const Index begin = at;
      at = round_up(at + size, 16);
      return begin;
    };
    queries = take(Index{8} * vectors);
    scale_shift = take(Index{8} * vectors), weights = take(Index{4} * vectors), sights = take(Index{8} * vectors);
    rows = take(Index{4} * vectors), peaks = take(Index{8} * vectors);
    tiles = take(Index{16} * vectors / vector_tile), tile_weights = take(Index{4} * vectors / vector_tile);
    sums = take(per_vector ? static_cast<Index>(sizeof(MassSum)) * vectors * warps : 0);
    bytes = at;
  }
};

/// The key tile of a warp. A lane knows one key wholly: number g + 8 t.
struct KeyTile {
  const std::byte* row = nullptr;  // null: dead, masked or beyond the list
  Position position = 0;
  int column = 0;
  DType type = DType::f32;
  std::uint32_t live = 0;  // a bit per lane: the key it knows takes part
  TileKind kind = TileKind::floats;
  Position at[4] = {};  // of keys g, g + 8, …
  Position first = 0, last = 0;

  template <class Block>
  KVPARE_DEVICE void find(Block& b, const MassList& list, int tile) {
    const int slot = tile * key_tile + (b.lane() >> 2) + 8 * (b.lane() & 3);
    TileKind own = TileKind::floats;
    if (slot < list.slots) {
      const int e = slot / list.page_tokens, s = slot - e * list.page_tokens;
      const Entry& entry = list.entries[e];
      const std::uint64_t word = list.mask != nullptr ? entry.live & list.mask[e] : entry.live;
      if ((word >> s & 1u) != 0) {
        const MassFormat& f = list.formats[entry.format];
        const Index page = f.coded ? list.decoded[e] : static_cast<Index>(entry.page);
        row = f.keys + page * f.page_bytes + s * f.row_bytes;
        type = f.type, own = f.kind;
        position =
            entry.first +
            (entry.offsets == 0 ? s : list.offsets[static_cast<Index>(entry.offsets - 1) * list.page_tokens + s]);
        column = list.columns != nullptr ? list.columns[slot] : slot;
      }
    }
    live = b.ballot(row != nullptr);
    if (live == 0) return;
    const bool others_than_f16 = b.ballot(row != nullptr && own != TileKind::f16) != 0;
    const bool others_than_bf16 = b.ballot(row != nullptr && own != TileKind::bf16) != 0;
    kind = !others_than_f16 ? TileKind::f16 : !others_than_bf16 ? TileKind::bf16 : TileKind::floats;
    first = row != nullptr ? position : std::numeric_limits<Position>::max();
    last = row != nullptr ? position : std::numeric_limits<Position>::min();
    for (int step = 16; step > 0; step /= 2) {
      const Position f = b.shuffle_xor(first, step), l = b.shuffle_xor(last, step);
      first = f < first ? f : first, last = l > last ? l : last;
    }
    for (int j = 0; j < 4; ++j) at[j] = b.shuffle(position, (b.lane() & ~3) + j);
  }
  /// Does key g + 8 j take part?
  template <class Block>
  KVPARE_DEVICE bool has(const Block& b, int j) const {
    return (live >> ((b.lane() & ~3) + j) & 1u) != 0;
  }
};

/// Logits by tensor cores: keys of type T, up to 16 * steps channels, in registers; zeros beyond the width.
template <class T, int steps>
struct MmaDot {
  static constexpr TileKind kind = std::is_same_v<T, F16> ? TileKind::f16 : TileKind::bf16;
  static constexpr DType type = std::is_same_v<T, F16> ? DType::f16 : DType::bf16;
  static constexpr int vector_tiles = 1;    // at once
  static constexpr bool whole_rows = true;  // all channels lie in shared memory
  static constexpr int least_blocks = steps <= 8 ? 2 : 1;

  static constexpr int pitch(int) {
    return 32 * steps + 64;
  }  // an odd multiple of 64: eight lanes read eight banks of 16
  static constexpr int channels(int width) { return width; }
  static constexpr int query_parts(DType queries) {
    if (queries == type) return 1;
    if (queries == DType::f32) return kind == TileKind::f16 ? 2 : 3;
    return kind == TileKind::f16 ? 1 : 2;
  }

  std::uint32_t keys[2][steps][4];

  template <class Block, class Problem>
  KVPARE_DEVICE void load(Block& b, const Problem& p, const KeyTile& tile) {
    const int t = b.lane() & 3, units = p.width / 8;
    KVPARE_DEVICE_UNROLL
    for (int j = 0; j < 4; ++j) {
      // A key that takes no part is given the row of one that does: nobody reads its logits.
      const int lane = tile.has(b, j) ? (b.lane() & ~3) + j : lowest_bit(tile.live);
      const auto* row = reinterpret_cast<const Words*>(b.shuffle(reinterpret_cast<std::uintptr_t>(tile.row), lane));
      KVPARE_DEVICE_UNROLL
      for (int s = 0; s < steps / 2; ++s) {
        const bool within = 4 * s + t < units;
        const Words x = b.load(row + (within ? 4 * s + t : 0));
        const std::uint32_t kept = within ? ~0u : 0u;  // the & brings words where fragments want them, before any loop
        keys[j / 2][2 * s][j % 2] = x.w[0] & kept, keys[j / 2][2 * s][2 + j % 2] = x.w[1] & kept;
        keys[j / 2][2 * s + 1][j % 2] = x.w[2] & kept, keys[j / 2][2 * s + 1][2 + j % 2] = x.w[3] & kept;
      }
    }
  }

  /// Queries of one chunk, as T. Where they are of another type a warp per vector and a lane per eight channels.
  template <class Block, class Problem>
  static KVPARE_DEVICE void stage(Block& b, const Problem& p, const MassShared& shared, int) {
    const auto* rows = b.template shared<const std::byte*>(shared.queries);
    constexpr int row_units = 2 * steps;
    const int units = p.width / 8;
    if (p.queries.dtype == type) {
      KVPARE_DEVICE_ROLL
      for (int i = b.thread(); i < shared.vectors * row_units; i += b.threads()) {
        const int vector = i / row_units, unit = i % row_units;
        const auto* row = reinterpret_cast<const Words*>(rows[vector]);
        Words* to = b.template shared<Words>(Index{vector} * shared.query_pitch) + unit;
        if (row == nullptr || unit >= units) {
          *to = Words{};
        } else if (reinterpret_cast<std::uintptr_t>(row) % 16 == 0) {
          b.copy_async(to, row + unit);
        } else {
          const auto* from = reinterpret_cast<const std::uint16_t*>(row) + unit * 8;
          for (int j = 0; j < 4; ++j) to->w[j] = from[2 * j] | static_cast<std::uint32_t>(from[2 * j + 1]) << 16;
        }
      }
      b.commit_copies();
      b.template wait_copies<0>();
      return;
    }
    auto* scales = b.template shared<ScaleShift>(shared.scale_shift);
    KVPARE_DEVICE_ROLL
    for (int vector = b.warp(); vector < shared.vectors; vector += b.warps()) {
      const float back = split(b, p, shared, vector, rows[vector]);
      if (b.lane() == 0) scales[vector].scale *= back;
    }
  }

  template <class Block, class Problem>
  KVPARE_DEVICE void add(Block& b, const Problem&, const MassShared& shared, int vector_tile_at, int,
                         float (&logits)[vector_tiles][2][4]) const {
    const int g = b.lane() >> 2, t = b.lane() & 3;
    const Index part_bytes = Index{shared.vectors} * shared.query_pitch;
    const unsigned char* q =
        b.template shared<unsigned char>(Index{vector_tile_at * vector_tile + g} * shared.query_pitch + 16 * t);
    add_part(b, reinterpret_cast<const Words*>(q), logits[0]);
    KVPARE_DEVICE_ROLL
    for (int part = 1; part < shared.query_parts; ++part)
      add_part(b, reinterpret_cast<const Words*>(q + part * part_bytes), logits[0]);
  }

 private:
  /// One query as parts of type T that add up to it. Gives what a scale has to be multiplied by.
  template <class Block, class Problem>
  static KVPARE_DEVICE float split(Block& b, const Problem& p, const MassShared& shared, int vector,
                                   const std::byte* row) {
    const int units = p.width / 8, unit = b.lane();
    float x[8], largest = 0;
    for (int i = 0; i < 8; ++i) {
      x[i] = row != nullptr && unit < units ? number_at(b, row, p.queries.dtype, unit * 8 + i) : 0.0f;
      largest = fmaxf(largest, fabsf(x[i]));
    }
    float back = 1;
    if constexpr (kind == TileKind::f16) {  // a power of 2 brings the largest near 1, so that all parts are in range
      largest = warp_max(b, largest);
      int exponent = static_cast<int>(std::bit_cast<std::uint32_t>(largest) >> 23) - 127;
      if (exponent > 126 || exponent < -126) exponent = 0;
      const float to_one = std::bit_cast<float>(static_cast<std::uint32_t>(127 - exponent) << 23);
      back = std::bit_cast<float>(static_cast<std::uint32_t>(127 + exponent) << 23);
      for (int i = 0; i < 8; ++i) x[i] *= to_one;
    }
    for (int part = 0; part < shared.query_parts; ++part) {
      Words words;
      for (int i = 0; i < 4; ++i) {
        words.w[i] = Block::pack(x[2 * i], x[2 * i + 1], T{});
        const float low = Block::unpack_low(words.w[i], T{}), high = Block::unpack_high(words.w[i], T{});
        x[2 * i] = fabsf(low) <= std::numeric_limits<float>::max() ? x[2 * i] - low : 0.0f;
        x[2 * i + 1] = fabsf(high) <= std::numeric_limits<float>::max() ? x[2 * i + 1] - high : 0.0f;
      }
      if (unit < 2 * steps)
        b.template shared<Words>((Index{part} * shared.vectors + vector) * shared.query_pitch)[unit] = words;
    }
    return back;
  }

  template <class Block>
  KVPARE_DEVICE void add_part(Block& b, const Words* q, float (&logits)[2][4]) const {
    KVPARE_DEVICE_UNROLL
    for (int s = 0; s < steps / 2; ++s) {
      const Words x = q[4 * s];
      const std::uint32_t first[2] = {x.w[0], x.w[1]}, second[2] = {x.w[2], x.w[3]};
      KVPARE_DEVICE_UNROLL
      for (int m = 0; m < 2; ++m) {
        b.mma(logits[m], keys[m][2 * s], first, T{});
        b.mma(logits[m], keys[m][2 * s + 1], second, T{});
      }
    }
  }
};

/// Logits of any keys in floats: four vector tiles at once, so that a key's channels are loaded once for 8 products.
struct FloatDot {
  static constexpr TileKind kind = TileKind::floats;
  static constexpr int vector_tiles = 4;
  static constexpr bool whole_rows = false;
  static constexpr int least_blocks = 2;
  static constexpr int most_channels = 256;  // that lie in shared memory at once

  static constexpr int channels(int width) { return width < most_channels ? width : most_channels; }
  static constexpr int pitch(int width) { return static_cast<int>(round_up(channels(width) * 4, 64)) + 16; }
  static constexpr int query_parts(DType) { return 1; }

  const std::byte* keys[4];
  DType types[4];
  bool wide;  // rows allow loads of four channels

  template <class Block, class Problem>
  KVPARE_DEVICE void load(Block& b, const Problem& p, const KeyTile& tile) {
    bool aligned = p.width % 4 == 0;
    KVPARE_DEVICE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int lane = (b.lane() & ~3) + j;
      keys[j] = reinterpret_cast<const std::byte*>(b.shuffle(reinterpret_cast<std::uintptr_t>(tile.row), lane));
      types[j] = static_cast<DType>(b.shuffle(static_cast<int>(tile.type), lane));
      aligned = aligned && reinterpret_cast<std::uintptr_t>(keys[j]) % (4 * size_of(types[j])) == 0;
    }
    wide = b.ballot(!aligned) == 0;
  }

  template <class Block, class Problem>
  static KVPARE_DEVICE void stage(Block& b, const Problem& p, const MassShared& shared, int first_channel) {
    const auto* rows = b.template shared<const std::byte*>(shared.queries);
    const int padded = (shared.channels + 3) / 4 * 4;
    for (int i = b.thread(); i < shared.vectors * padded; i += b.threads()) {
      const int vector = i / padded, c = i % padded;
      b.template shared<float>(Index{vector} * shared.query_pitch)[c] =
          rows[vector] != nullptr && first_channel + c < p.width
              ? number_at(b, rows[vector], p.queries.dtype, first_channel + c)
              : 0.0f;
    }
  }

  template <class Block>
  KVPARE_DEVICE FloatQuad channels_of(const Block& b, int j, int first, int width) const {
    FloatQuad x = {};
    if (keys[j] == nullptr) return x;
    if (!wide) {
      for (int i = 0; i < 4; ++i)
        if (first + i < width) x.of[i] = number_at(b, keys[j], types[j], first + i);
    } else if (types[j] == DType::f32) {
      x = b.load(reinterpret_cast<const FloatQuad*>(keys[j] + first * 4));
    } else {
      const HalfQuad h = b.load(reinterpret_cast<const HalfQuad*>(keys[j] + first * 2));
      for (int i = 0; i < 4; ++i)
        x.of[i] = types[j] == DType::f16 ? kvpare::detail::half_to_float(h.of[i])
                                         : kvpare::detail::bfloat16_to_float(h.of[i]);
    }
    return x;
  }

  template <class Block, class Problem>
  KVPARE_DEVICE void add(Block& b, const Problem& p, const MassShared& shared, int vector_tile_at, int first_channel,
                         float (&logits)[vector_tiles][2][4]) const {
    const int t = b.lane() & 3;
    const int end = first_channel + shared.channels < p.width ? first_channel + shared.channels : p.width;
    const float* q = b.template shared<float>(Index{vector_tile_at * vector_tile + 2 * t} * shared.query_pitch);
    const int pitch = shared.query_pitch / 4;
    KVPARE_DEVICE_ROLL
    for (int c = first_channel; c < end; c += 4) {
      FloatQuad k[4];
      KVPARE_DEVICE_UNROLL
      for (int j = 0; j < 4; ++j) k[j] = channels_of(b, j, c, p.width);
      KVPARE_DEVICE_UNROLL
      for (int n = 0; n < vector_tiles; ++n) {
        KVPARE_DEVICE_UNROLL
        for (int v = 0; v < 2; ++v) {
          const FloatQuad x =
              *reinterpret_cast<const FloatQuad*>(q + (n * vector_tile + v) * pitch + (c - first_channel));
          KVPARE_DEVICE_UNROLL
          for (int j = 0; j < 4; ++j) {
            float& sum = logits[n][j / 2][(j % 2) * 2 + v];
            KVPARE_DEVICE_UNROLL
            for (int i = 0; i < 4; ++i) sum += k[j].of[i] * x.of[i];
          }
        }
      }
    }
  }
};

enum class MassPass : std::uint8_t {
  peaks,   // largest logit and sum of each vector
  shares,  // what of p each part gets, and entries near the peak
  mass,    // sums or maxima per key, all options
  plain,   // sums per key of one part with plain logits and entries, no softcap: what most scorers ask for
};

template <MassPass pass, class Dot, class Logit, class EntryOf>
struct MassKernel {
  static constexpr int threads = mass_tuning.threads;
  static constexpr int warps = threads / 32;
  // Two blocks leave 128 registers a thread: enough for the passes that most scorers ask for, not for all options.
  static constexpr int least_blocks = pass == MassPass::peaks || pass == MassPass::plain ? Dot::least_blocks : 1;
  static constexpr bool per_vector = pass == MassPass::peaks || pass == MassPass::shares;
  static constexpr bool plain_logit = requires { Logit::plain; };
  static constexpr bool plain_entry = requires { EntryOf::plain; };
  static constexpr int tiles_at_once = Dot::vector_tiles;
  static constexpr float lowest = -std::numeric_limits<float>::max();

  MassProblem<Logit, EntryOf> p;
  MassShared shared;
  const MassJob* jobs = nullptr;
  int chunks = 1;           // of most_vectors; blocks per job where sums are per vector
  MassSum* sums = nullptr;  // of this launch

  Index shared_bytes() const { return shared.bytes; }

  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    const int job_at = static_cast<int>(per_vector ? b.block() / chunks : b.block());
    const MassJob job = jobs[job_at];
    const MassList& list = p.lists[job.head];
    const int rows = p.rows(), member_tiles = (rows + vector_tile - 1) / vector_tile;
    const int vectors = member_tiles * vector_tile * p.group;
    const int first_chunk = static_cast<int>(per_vector ? b.block() % chunks : 0);
    const int end_chunk = per_vector ? first_chunk + 1 : (vectors + shared.vectors - 1) / shared.vectors;
    if (first_chunk * shared.vectors >= vectors) return;
    const bool stays = end_chunk - first_chunk == 1 && shared.channels >= p.width;

    MassSum* own_sums = b.template shared<MassSum>(shared.sums) + b.warp() * shared.vectors;
    if constexpr (per_vector)
      for (int v = b.lane(); v < shared.vectors; v += 32)
        own_sums[v] = {pass == MassPass::peaks ? -mass_infinity : 0.0f, 0, 0, 0};

    for (int base = job.first; base < job.end; base += warps) {
      KeyTile tile;
      if (base + b.warp() < job.end) tile.find(b, list, base + b.warp());
      const bool works = tile.live != 0 && tile.kind == Dot::kind;
      Dot dot;
      if (works) dot.load(b, p, tile);
      PerKey keys;
      if constexpr (!per_vector || pass == MassPass::shares)
        if (works) keys.start(b, p, tile);

      for (int chunk = first_chunk; chunk < end_chunk; ++chunk) {
        float logits[tiles_at_once][2][4];
        for (int channel = 0; channel < p.width; channel += shared.channels) {
          if (!stays || base == job.first) {
            b.sync();
            stage(b, job.head, chunk * shared.vectors, rows, channel);
            b.sync();
          }
          if (!works) continue;
          const int filled =
              vectors - chunk * shared.vectors < shared.vectors ? vectors - chunk * shared.vectors : shared.vectors;
          KVPARE_DEVICE_ROLL
          for (int n = 0; n < filled / vector_tile; n += tiles_at_once) {
            TileSight sights[tiles_at_once];
            bool sees[tiles_at_once], any = false;
            KVPARE_DEVICE_UNROLL
            for (int i = 0; i < tiles_at_once; ++i) {
              sights[i] = b.template shared<TileSight>(shared.tiles)[n + i];
              sees[i] = tile.first <= sights[i].any.high && tile.last >= sights[i].any.low;
              any = any || sees[i];
            }
            if (!any) continue;
            if (!Dot::whole_rows ? channel == 0 : true) {
              KVPARE_DEVICE_UNROLL
              for (int i = 0; i < tiles_at_once; ++i) {
                KVPARE_DEVICE_UNROLL
                for (int m = 0; m < 2; ++m) logits[i][m][0] = logits[i][m][1] = logits[i][m][2] = logits[i][m][3] = 0;
              }
            }
            dot.add(b, p, shared, n, channel, logits);
            if (!Dot::whole_rows && channel + shared.channels < p.width) continue;
            KVPARE_DEVICE_UNROLL
            for (int i = 0; i < tiles_at_once; ++i) {
              if (!sees[i]) continue;
              if constexpr (pass == MassPass::peaks)
                add_peaks(b, tile, n + i, logits[i], own_sums);
              else if constexpr (pass == MassPass::shares)
                add_shares(b, tile, keys, n + i, logits[i], own_sums);
              else if constexpr (pass == MassPass::plain)
                add_plain(b, tile, keys, sights[i], n + i, logits[i]);
              else
                add_mass(b, job.head, tile, keys, (chunk * shared.vectors / vector_tile + n + i) / member_tiles, n + i,
                         logits[i]);
            }
          }
        }
      }
      if constexpr (!per_vector)
        if (works) finish(b, job.head, tile, keys);
    }

    if constexpr (per_vector) {
      b.sync();
      const MassSum* of_warps = b.template shared<MassSum>(shared.sums);
      for (int v = b.thread(); v < shared.vectors && first_chunk * shared.vectors + v < vectors; v += threads) {
        MassSum sum = of_warps[v];
        for (int w = 1; w < warps; ++w) join(b, sum, of_warps[w * shared.vectors + v]);
        sums[job_at * p.most_vectors + first_chunk * shared.vectors + v] = sum;
      }
    }
  }

  template <class Block>
  static KVPARE_DEVICE void join(const Block&, MassSum& to, const MassSum& from) {
    if constexpr (pass == MassPass::peaks) {
      const float peak = fmaxf(to.a, from.a);
      if (peak == -mass_infinity) return;
      to.b = to.b * Block::exp2(to.a - peak) + from.b * Block::exp2(from.a - peak);
      to.a = peak;
    } else {
      to.a += from.a, to.b += from.b, to.count += from.count;
    }
  }

 private:
  /// What the keys of a lane add up.
  struct PerKey {
    float sum[2][4] = {};  // per part, of keys g + 8 j, over this lane's vectors
    float seen[4] = {};
    float seen_by_all = 0;
    float joined[2] = {};  // take_max: over members so far, of the key that the lane knows
    int member = 0;        // whose vectors are being added
    int column[4] = {};
    std::uint32_t classes = 0;  // a byte per key

    template <class Block, class Problem>
    KVPARE_DEVICE void start(Block& b, const Problem& problem, const KeyTile& tile) {
      if constexpr (pass != MassPass::plain) {
        const int own_class = problem.key_class != nullptr && tile.row != nullptr ? problem.key_class[tile.column] : 0;
        KVPARE_DEVICE_UNROLL
        for (int j = 0; j < 4; ++j) {
          column[j] = b.shuffle(tile.column, (b.lane() & ~3) + j);
          classes |= static_cast<std::uint32_t>(b.shuffle(own_class, (b.lane() & ~3) + j)) << 8 * j;
        }
      }
    }
  };

  /// Vectors of a chunk: their queries, and what else is asked of them for every key.
  template <class Block>
  KVPARE_DEVICE void stage(Block& b, int head, int first, int rows, int channel) const {
    auto* scale_shift = b.template shared<ScaleShift>(shared.scale_shift);
    auto* weights = b.template shared<float>(shared.weights);
    auto* sights = b.template shared<MassSight>(shared.sights);
    KVPARE_DEVICE_ROLL
    for (int i = b.thread(); i < shared.vectors; i += threads) {
      const MassVector v(p, head, first + i, rows);
      MassSight sight;
      float shift = mass_infinity;
      FloatPair peak = {{mass_infinity, mass_infinity}};
      if (v.weight != 0) {
        const Position position = p.row_positions[v.row];
        sight.high = position;
        sight.low = std::numeric_limits<Position>::min();
        if (p.window > 0) {
          const Index low = Index{position} - p.window + 1;
          if (low > sight.low) sight.low = static_cast<Position>(low);
        }
        if constexpr (pass != MassPass::peaks) {
          const Index at = head * p.most_vectors + first + i;
          float lse2 = mass_infinity;  // where only `seen` is asked for
          if (p.lse2 != nullptr)
            lse2 = p.lse2[at];
          else if (p.given_lse != nullptr)
            lse2 = p.given_lse[v.at(p)] * log2_e;
          shift = lse2 == -mass_infinity ? mass_infinity : lse2;
          if (pass == MassPass::shares && p.row_near_peak != nullptr)
            peak = {{p.peak2[at], p.peak_share * fmaxf(0.0f, Block::exp2(p.peak2[at] - shift))}};
        }
      }
      scale_shift[i] = {p.scale, shift};
      weights[i] = v.weight * (p.take_max ? 1.0f : p.joined);
      sights[i] = sight;
      b.template shared<int>(shared.rows)[i] = static_cast<int>(v.row);
      b.template shared<FloatPair>(shared.peaks)[i] = peak;
      b.template shared<const std::byte*>(shared.queries)[i] =
          v.weight != 0 ? static_cast<const std::byte*>(p.queries.at(v.row, v.q_head)) : nullptr;
    }
    b.sync();
    Dot::stage(b, p, shared, channel);
    KVPARE_DEVICE_ROLL
    for (int n = b.thread(); n < shared.vectors / vector_tile; n += threads) {
      TileSight of;
      of.all = {std::numeric_limits<Position>::min(), std::numeric_limits<Position>::max()};
      float weight = 0;
      for (int i = n * vector_tile; i < (n + 1) * vector_tile; ++i) {
        const MassSight s = sights[i];
        of.any = {s.low < of.any.low ? s.low : of.any.low, s.high > of.any.high ? s.high : of.any.high};
        of.all = {s.low > of.all.low ? s.low : of.all.low, s.high < of.all.high ? s.high : of.all.high};
        if (scale_shift[i].shift == mass_infinity) of.all = MassSight{};
        weight += weights[i];
      }
      b.template shared<TileSight>(shared.tiles)[n] = of;
      b.template shared<float>(shared.tile_weights)[n] = weight;
    }
  }

  /// This lane's two vectors of a vector tile.
  template <class Pair, class Block>
  KVPARE_DEVICE Pair pair_at(const Block& b, Index array, int n) const {
    return b.template shared<Pair>(array)[n * vector_tile / 2 + (b.lane() & 3)];
  }

  /// The logit in units of log2, from a dot product times the vector's scale.
  template <class Block>
  KVPARE_DEVICE float logit_of(const Block&, float s, int row, int column) const {
    if (p.softcap > 0) {
      const float e = Block::exp2(-2 * log2_e / p.softcap * fabsf(s));
      s = copysignf(p.softcap * log2_e * (1 - e) / (1 + e), s);
    }
    if constexpr (!plain_logit) s = log2_e * p.logit(s * ln_2, row, column);
    return s;
  }

  template <class Block>
  KVPARE_DEVICE void add_peaks(Block& b, const KeyTile& tile, int n, const float (&logits)[2][4],
                               MassSum* own_sums) const {
    const auto scales = pair_at<ScaleShiftPair>(b, shared.scale_shift, n);
    const auto sights = pair_at<SightPair>(b, shared.sights, n);
    const auto rows = pair_at<IntPair>(b, shared.rows, n);
    int column[4] = {};
    if constexpr (!plain_logit)
      for (int j = 0; j < 4; ++j) column[j] = b.shuffle(tile.column, (b.lane() & ~3) + j);
    KVPARE_DEVICE_UNROLL
    for (int v = 0; v < 2; ++v) {
      float s[4], peak = -mass_infinity;
      bool sees[4];
      KVPARE_DEVICE_UNROLL
      for (int j = 0; j < 4; ++j) {
        sees[j] = tile.has(b, j) && tile.at[j] <= sights.of[v].high && tile.at[j] >= sights.of[v].low;
        s[j] = -mass_infinity;
        if (!sees[j]) continue;
        s[j] = logit_of(b, logits[j / 2][(j % 2) * 2 + v] * scales.of[v].scale, rows.of[v], column[j]);
        peak = fmaxf(peak, fmaxf(s[j], lowest));
      }
      KVPARE_DEVICE_UNROLL
      for (int step = 4; step < 32; step *= 2) peak = fmaxf(peak, b.shuffle_xor(peak, step));
      MassSum& own = own_sums[n * vector_tile + (b.lane() & 3) * 2 + v];
      const MassSum before = own;
      const float highest = fmaxf(peak, before.a);
      float sum = 0;
      KVPARE_DEVICE_UNROLL
      for (int j = 0; j < 4; ++j) sum += sees[j] ? Block::exp2(s[j] - highest) : 0.0f;
      KVPARE_DEVICE_UNROLL
      for (int step = 4; step < 32; step *= 2) sum += b.shuffle_xor(sum, step);
      if (b.lane() < 4 && highest != -mass_infinity)
        own = {highest, before.b * Block::exp2(before.a - highest) + sum, 0, 0};
    }
    b.sync_warp();
  }

  template <class Block>
  KVPARE_DEVICE void add_shares(Block& b, const KeyTile& tile, const PerKey& keys, int n, const float (&logits)[2][4],
                                MassSum* own_sums) const {
    const auto scales = pair_at<ScaleShiftPair>(b, shared.scale_shift, n);
    const auto sights = pair_at<SightPair>(b, shared.sights, n);
    const auto rows = pair_at<IntPair>(b, shared.rows, n);
    KVPARE_DEVICE_UNROLL
    for (int v = 0; v < 2; ++v) {
      const FloatPair peak = b.template shared<FloatPair>(shared.peaks)[n * vector_tile + (b.lane() & 3) * 2 + v];
      MassSum sum;
      KVPARE_DEVICE_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (!tile.has(b, j) || tile.at[j] > sights.of[v].high || tile.at[j] < sights.of[v].low) continue;
        if (scales.of[v].shift == mass_infinity) continue;
        const float s = logit_of(b, logits[j / 2][(j % 2) * 2 + v] * scales.of[v].scale, rows.of[v], keys.column[j]);
        const float x = Block::exp2(s - scales.of[v].shift);
        // The peak itself counts by its logit: p was rounded on another way there.
        sum.count += x >= peak.of[1] || (s >= peak.of[0] && x == x && p.peak_share <= 1);
        (part_of(keys, rows.of[v], j) == 0 ? sum.a : sum.b) += x;
      }
      KVPARE_DEVICE_UNROLL
      for (int step = 4; step < 32; step *= 2) {
        sum.a += b.shuffle_xor(sum.a, step), sum.b += b.shuffle_xor(sum.b, step);
        sum.count += b.shuffle_xor(sum.count, step);
      }
      if (b.lane() < 4) join(b, own_sums[n * vector_tile + b.lane() * 2 + v], sum);
    }
  }

  KVPARE_DEVICE int part_of(const PerKey& keys, int row, int j) const {
    return p.key_class == nullptr || (keys.classes >> 8 * j & 0xffu) == p.row_class[row] ? 0 : 1;
  }

  template <class Block>
  KVPARE_DEVICE void add_plain(Block& b, const KeyTile& tile, PerKey& keys, const TileSight& of, int n,
                               const float (&logits)[2][4]) const {
    const auto scales = pair_at<ScaleShiftPair>(b, shared.scale_shift, n);
    const auto weights = pair_at<FloatPair>(b, shared.weights, n);
    // Keys that take no part add up as well: nobody reads their sums.
    if (tile.last <= of.all.high && tile.first >= of.all.low) {
      KVPARE_DEVICE_UNROLL
      for (int v = 0; v < 2; ++v) {
        KVPARE_DEVICE_UNROLL
        for (int j = 0; j < 4; ++j)
          keys.sum[0][j] +=
              weights.of[v] * Block::exp2(logits[j / 2][(j % 2) * 2 + v] * scales.of[v].scale - scales.of[v].shift);
      }
      keys.seen_by_all += b.template shared<float>(shared.tile_weights)[n];
      return;
    }
    const auto sights = pair_at<SightPair>(b, shared.sights, n);
    KVPARE_DEVICE_UNROLL
    for (int v = 0; v < 2; ++v) {
      const bool counts = scales.of[v].shift != mass_infinity;
      KVPARE_DEVICE_UNROLL
      for (int j = 0; j < 4; ++j) {
        const bool sees = tile.at[j] <= sights.of[v].high && tile.at[j] >= sights.of[v].low;
        const float x = Block::exp2(logits[j / 2][(j % 2) * 2 + v] * scales.of[v].scale - scales.of[v].shift);
        if (sees) keys.seen[j] += weights.of[v];
        if (sees && counts) keys.sum[0][j] += weights.of[v] * x;
      }
    }
  }

  template <class Block>
  KVPARE_DEVICE void add_mass(Block& b, int head, const KeyTile& tile, PerKey& keys, int member, int n,
                              const float (&logits)[2][4]) const {
    if (member != keys.member) {
      if (p.take_max || p.heads == HeadGroups::query_head) close_member(b, head, tile, keys);
      keys.member = member;
    }
    const auto scales = pair_at<ScaleShiftPair>(b, shared.scale_shift, n);
    const auto weights = pair_at<FloatPair>(b, shared.weights, n);
    const auto sights = pair_at<SightPair>(b, shared.sights, n);
    const auto rows = pair_at<IntPair>(b, shared.rows, n);
    KVPARE_DEVICE_UNROLL
    for (int v = 0; v < 2; ++v) {
      KVPARE_DEVICE_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (!tile.has(b, j) || tile.at[j] > sights.of[v].high || tile.at[j] < sights.of[v].low) continue;
        keys.seen[j] += weights.of[v];
        if (scales.of[v].shift == mass_infinity) continue;
        const float s = logit_of(b, logits[j / 2][(j % 2) * 2 + v] * scales.of[v].scale, rows.of[v], keys.column[j]);
        float x = Block::exp2(s - scales.of[v].shift);
        if constexpr (!plain_entry) x = p.entry(x, Index{rows.of[v]}, Index{keys.column[j]});
        x *= weights.of[v];
        const bool other = part_of(keys, rows.of[v], j) != 0;
        const float same = p.take_max ? fmaxf(keys.sum[0][j], x) : keys.sum[0][j] + x;
        const float different = p.take_max ? fmaxf(keys.sum[1][j], x) : keys.sum[1][j] + x;
        keys.sum[0][j] = other ? keys.sum[0][j] : same;
        keys.sum[1][j] = other ? different : keys.sum[1][j];
      }
    }
  }

  /// Of the key that this lane knows, over all vectors; `of` are sums of this lane's vectors only.
  template <class Block>
  KVPARE_DEVICE float over_vectors(Block& b, const float (&of)[4], bool take_max) const {
    float mine = 0;
    KVPARE_DEVICE_UNROLL
    for (int j = 0; j < 4; ++j) {
      float x = of[j];
      KVPARE_DEVICE_UNROLL
      for (int step = 1; step < 4; step *= 2) {
        const float y = b.shuffle_xor(x, step);
        x = take_max ? fmaxf(x, y) : x + y;
      }
      if ((b.lane() & 3) == j) mine = x;
    }
    return mine;
  }

  KVPARE_DEVICE void put(const KeyTile& tile, int head, int part, int row, float x) const {
    if (tile.row == nullptr || p.out == nullptr) return;
    if (p.of_heads != nullptr) {
      p.of_heads[(Index{head} * p.parts + part) * p.columns + tile.column] = x;
      return;
    }
    float& to = p.out[(part * p.out_heads + row) * p.columns + tile.column];
    to = p.take_max ? fmaxf(to, x) : to + x;
  }

  /// All vectors of a member have passed: its output row, or its part of the mean.
  template <class Block>
  KVPARE_DEVICE void close_member(Block& b, int head, const KeyTile& tile, PerKey& keys) const {
    for (int part = 0; part < p.parts; ++part) {
      const float mine =
          part == 0 ? over_vectors(b, keys.sum[0], p.take_max) : over_vectors(b, keys.sum[1], p.take_max);
      if (p.heads == HeadGroups::query_head)
        put(tile, head, part, head * p.group + keys.member, mine);
      else if (part == 0)
        keys.joined[0] += mine * p.joined;
      else
        keys.joined[1] += mine * p.joined;
    }
    KVPARE_DEVICE_UNROLL
    for (int part = 0; part < 2; ++part) {
      KVPARE_DEVICE_UNROLL
      for (int j = 0; j < 4; ++j) keys.sum[part][j] = 0;
    }
  }

  /// All vectors have passed.
  template <class Block>
  KVPARE_DEVICE void finish(Block& b, int head, const KeyTile& tile, PerKey& keys) const {
    const int row = p.heads == HeadGroups::kv_head ? head : 0;
    if constexpr (pass == MassPass::plain) {
      const float mine = over_vectors(b, keys.sum[0], false);
      put(tile, head, 0, row, mine);
    } else if (p.take_max || p.heads == HeadGroups::query_head) {
      close_member(b, head, tile, keys);
      if (p.heads != HeadGroups::query_head)
        for (int part = 0; part < p.parts; ++part)
          put(tile, head, part, row, part == 0 ? keys.joined[0] : keys.joined[1]);
    } else {
      for (int part = 0; part < p.parts; ++part) {
        const float mine = part == 0 ? over_vectors(b, keys.sum[0], false) : over_vectors(b, keys.sum[1], false);
        put(tile, head, part, row, mine);
      }
    }
    if (p.seen == nullptr) return;
    const float seen = over_vectors(b, keys.seen, false) + keys.seen_by_all;
    const float as_weights = p.take_max ? 1.0f : 1 / p.joined;
    if (tile.row != nullptr)
      p.seen[head * p.columns + tile.column] += seen * (as_weights / static_cast<float>(p.group));
  }
};

/// Joins the partial sums of each vector, a warp per vector and kv head.
template <MassPass pass, class Logit, class EntryOf>
struct MassJoinKernel {
  static constexpr int threads = 256;
  MassProblem<Logit, EntryOf> p;
  const int* first_job = nullptr;  // [kv_heads + 1]
  int jobs = 0, launches = 0;

  Index blocks() const { return ceil_div(p.kv_heads * p.most_vectors, threads / 32); }
  Index shared_bytes() const { return 0; }

  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    const Index at = b.block() * (threads / 32) + b.warp();
    if (at >= p.kv_heads * p.most_vectors) return;
    const int head = static_cast<int>(at / p.most_vectors), vector = static_cast<int>(at % p.most_vectors);
    const MassVector v(p, head, vector, p.rows());
    if (v.weight == 0) return;

    const int first = first_job[head], count = first_job[head + 1] - first;
    MassSum sum = {pass == MassPass::peaks ? -mass_infinity : 0.0f, 0, 0, 0};
    using Pass = MassKernel<pass, FloatDot, Logit, EntryOf>;
    for (int i = b.lane(); i < count * launches; i += 32)
      Pass::join(b, sum, p.sums[(Index{i / count} * jobs + first + i % count) * p.most_vectors + vector]);
    for (int step = 16; step > 0; step /= 2) {
      MassSum other;
      other.a = b.shuffle_xor(sum.a, step), other.b = b.shuffle_xor(sum.b, step);
      other.count = b.shuffle_xor(sum.count, step);
      if ((b.lane() & step) == 0) Pass::join(b, sum, other);
    }
    if (b.lane() != 0) return;

    if constexpr (pass == MassPass::peaks) {
      const bool nothing = sum.a == -mass_infinity;
      float lse2 = -mass_infinity;
      if (p.given_lse != nullptr) {
        lse2 = p.given_lse[v.at(p)] * log2_e;
      } else {
        const float extra = p.extra != nullptr ? p.extra[v.at(p)] * log2_e : -mass_infinity;
        const float peak = fmaxf(sum.a, extra);
        const float total = sum.b * (nothing ? 0.0f : Block::exp2(sum.a - peak)) +
                            (extra == -mass_infinity ? 0.0f : Block::exp2(extra - peak));
        if (total != 0) lse2 = peak + log2f(total);
      }
      if (nothing) lse2 = -mass_infinity;
      p.lse2[at] = lse2;
      p.peak2[at] = sum.a;
      if (p.row_lse != nullptr) p.row_lse[v.at(p)] = lse2 * ln_2;
      // 0 where nothing is seen, and where all is NaN.
      if (p.row_peak != nullptr)
        p.row_peak[v.at(p)] = lse2 == -mass_infinity ? 0.0f : fmaxf(0.0f, Block::exp2(sum.a - lse2));
    } else {
      if (p.row_near_peak != nullptr) p.row_near_peak[v.at(p)] = sum.count;
      if (p.row_part_mass != nullptr)
        for (int part = 0; part < p.parts; ++part)
          p.row_part_mass[part * p.queries.rows * p.q_heads() + v.at(p)] = part == 0 ? sum.a : sum.b;
    }
  }
};

/// The rows that some query head gives a weight, ascending, and how many. One block.
struct MassRowsKernel {
  static constexpr int threads = 1024;
  const Index *row_list, *row_count;  // or null: all
  const float* weights;
  Index rows, heads;  // heads: weights per row
  Index *used, *used_count;

  Index shared_bytes() const { return threads / 32 * 4; }
  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    int* of_warp = b.template shared<int>(0);
    Index count = row_list != nullptr ? *row_count : rows, before = 0;
    if (count > rows) count = rows;
    for (Index base = 0; base < count; base += threads) {
      const Index i = base + b.thread();
      const Index row = i >= count ? 0 : row_list != nullptr ? row_list[i] : i;
      bool any = false;
      for (Index h = 0; h < heads && i < count && !any; ++h) any = weights[row * heads + h] != 0;
      const std::uint32_t bits = b.ballot(any);
      if (b.lane() == 0) of_warp[b.warp()] = count_bits(bits);
      b.sync();
      Index at = before + count_bits(bits & ((1u << b.lane()) - 1));
      for (int w = 0; w < threads / 32; ++w) {
        if (w < b.warp()) at += of_warp[w];
        before += of_warp[w];
      }
      if (any) used[at] = row;
      b.sync();
    }
    if (b.thread() == 0) *used_count = before;
  }
};

/// Sums per kv head of the heads of a layer, onto `out`.
struct MassLayerKernel {
  static constexpr int threads = 256;
  const float* of_heads;  // [heads][parts * columns]
  Index heads, size;      // size: parts * columns
  bool take_max;
  float* out;

  Index shared_bytes() const { return 0; }
  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    const Index i = b.block() * threads + b.thread();
    if (i >= size) return;
    float sum = 0;
    for (Index h = 0; h < heads; ++h) sum += of_heads[h * size + i];
    out[i] = take_max ? fmaxf(out[i], sum) : out[i] + sum;
  }
};
struct MassZeroKernel {
  static constexpr int threads = 256;
  float* to;
  Index size;

  Index shared_bytes() const { return 0; }
  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    const Index i = b.block() * threads + b.thread();
    if (i < size) to[i] = 0;
  }
};

}  // namespace kvpare::cuda::detail
