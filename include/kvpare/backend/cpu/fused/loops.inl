// Attention on codes, once for every instruction set (see region.hpp and sets.hpp). The layout is that of layout.hpp.
//
// Beside the vectors of floats of ../vector_*.inl the loops are written on what the set's ints_*.inl supplies:
//
//   Ints                                   as many bytes as Vec has
//   load_ints, store_ints, each_int, each_byte, each_lane(16 bytes in every 16-byte lane)
//   bits_and, bits_or, bits_xor, add_ints, sub_bytes, times_256
//   add_bytes, average_bytes(a, b)         the latter unsigned and rounded up: (a + b + 1) / 2
//   bits_and_or(a, b, c)                   (a & b) | c
//   shift16<n>(x)                          16-bit lanes, to the left, or to the right where n < 0
//   shift_left32(x, n), shift_right32
//   look_up(table, at)                     bytes; in 0 … 15
//   FloatTable, float_table(p), look_up_floats<bits>(table, at)   16 floats, by the lowest four bits of each lane; below 4
//                                          bits the table repeats itself, and no higher ones count
//   shift_down<n>(x)                       32-bit lanes
//   pick_floats(p, at)                     p[at] in each lane
//   widen_bytes(p)                         unsigned, to 32 bits
//   to_floats, nearest_ints, absolute
//   divide_or_zero(a, b)                   0 where b is 0
//   only(bits, v), store_listed, load_listed   lanes by a mask
//   load_small<e5m2>(p, step, a, b)        floats of 8 bits, up to a factor: e4m3_unit
//   pick(table, at)                        table[at[l]] in lane l; a table of 64 floats, at below 64
//   has_dots                               whether bytes are multiplied and added by one instruction:
//     dot_key(sum, codes, q)               sum + four unsigned codes times four signed bytes, in each 32-bit lane
//     dot_value(sum, codes, p)             sum + four signed codes times four unsigned bytes
//   and otherwise, by products of 16 bits:
//     dot_pairs(sum, codes, even, odd)
//   split_unsigned<wide>, split_signed     four vectors of integers into the two planes that the dot products take
//   KeyCodes key_codes(x), ValueCodes value_codes(x)   bytes as those take them

// ---- reading and preparing -----------------------------------------------------------------------------------------

// Prefetches a stretch of memory, evenly over the steps of a loop.
class AheadLines {
 public:
  AheadLines(AheadBytes bytes, Index steps)
      : at_(bytes.data), end_(bytes.data + bytes.bytes),
        each_(steps > 0 ? static_cast<int>(ceil_div(ceil_div(bytes.bytes, 64), steps)) : 0) {}

  KVPARE_INLINE void step() {
    for (int i = 0; i < each_; ++i, at_ += 64) {
      if (at_ >= end_) return;
      __builtin_prefetch(at_, 0, 3);
    }
  }
  void rest() {
    for (; at_ < end_; at_ += 64) __builtin_prefetch(at_, 0, 3);
  }

 private:
  const std::byte* at_;
  const std::byte* end_;
  int each_;
};

// n numbers of a stored type, n a multiple of 16.
inline void read_numbers(const std::byte* from, ScaleType type, const Values& values, Index n, float* to) {
  const Vec factor = broadcast(values.factor);
  switch (type) {
    case ScaleType::f16:
      for (Index i = 0; i < n; i += lanes) store(to + i, mul(load(reinterpret_cast<const half*>(from) + i), factor));
      return;
    case ScaleType::f32:
      for (Index i = 0; i < n; i += lanes) store(to + i, mul(load(reinterpret_cast<const float*>(from) + i), factor));
      return;
    case ScaleType::one:
      for (Index i = 0; i < n; i += lanes) store(to + i, factor);
      return;
    default:
      for (Index i = 0; i < n; ++i) to[i] = values.scales[std::to_integer<int>(from[i])] * values.factor;
  }
}

// Scales, and what is added to scale * unit * (signed level), of n groups from the first on.
inline void read_groups(const Layout& layout, const Values& values, const std::byte* tile, Index first, Index n,
                        float* scale, float* zero) {
  const std::byte* scales = tile + layout.code_bytes();
  read_numbers(scales + first * layout.scale_bytes(), layout.scale, values, n, scale);
  if (zero == nullptr) return;
  const std::byte* zeros = scales + layout.groups() * layout.scale_bytes() + first * layout.zero_bytes();
  const Vec shift = broadcast(values.shift);
  if (layout.zero == ZeroType::minimum) {
    read_numbers(zeros, layout.scale, values, n, zero);
    for (Index i = 0; i < n; i += lanes) store(zero + i, fma(load(scale + i), shift, load(zero + i)));
  } else if (layout.zero == ZeroType::integer) {
    for (Index i = 0; i < n; ++i) {
      std::int16_t z = 0;
      std::memcpy(&z, zeros + 2 * i, 2);
      zero[i] = scale[i] * (static_cast<float>(z) + values.shift);
    }
  } else {
    for (Index i = 0; i < n; i += lanes) store(zero + i, mul(load(scale + i), shift));
  }
}

inline bool has_zeros(const Layout& layout, const Values& values) {
  return layout.zero != ZeroType::none || values.shift != 0;
}

// Bits `mask << from` of every byte, at bit `to`.
template <int from, int to, int mask>
KVPARE_INLINE Ints field(Ints x) {
  return bits_and(shift16<to - from>(x), each_byte(mask << to));
}

// The codes of quad j of a unit: its lowest bit is bit `to` of the byte, 0 … 8 - bits.
template <int bits, int to, int j>
KVPARE_INLINE Ints codes_of(const Ints (&x)[Units{bits}.vectors()]) {
  constexpr int low = Units{bits}.low_bits(), per = 8 / low, mask = (1 << low) - 1;
  if constexpr (bits == 8) {
    return x[0];
  } else {
    const Ints lower = field<low * (j % per), to, mask>(x[j / per]);
    if constexpr (low == bits) return lower;
    else return bits_or(lower, field<j, to + low, 1>(x[Units{bits}.vectors() - 1]));
  }
}

// Ternary quads, five to a vector of 64 bytes, then one to 16 bytes, to codes of 2 bits, four quads to a vector: code + 1,
// xored with `flip`. Of both a whole number of vectors.
template <int fives, int ones>
KVPARE_INLINE void unpack_quads(const std::byte* from, Ints flip, std::byte* to) {
  static_assert((5 * fives + ones) % 4 == 0, "four quads to a vector");
  constexpr int bytes = static_cast<int>(sizeof(Ints));
  const Ints top = each_byte(0xc0), half = each_byte(0x80);
  for (int part = 0; part < 64 / bytes; ++part) {
    Ints x{}, four{};
    KVPARE_UNROLL for (int n = 0; n < 5 * fives + ones; ++n) {
      if (n >= 5 * fives) {
        x = widen_bytes(reinterpret_cast<const std::uint8_t*>(from) + 64 * fives + 16 * (n - 5 * fives) + part * lanes);
        x = bits_or(x, shift_left32(x, 8));
        x = bits_or(x, shift_left32(x, 16));
        KVPARE_UNROLL for (int step = 1; step < 4; ++step) {
          const Ints next = add_bytes(add_bytes(x, x), add_bytes(x, each_byte(TernaryBytes::added(step))));
          const Ints from_here = each_int(static_cast<std::int32_t>(~std::uint32_t{0} << 8 * step));
          x = bits_and_or(next, from_here, bits_and(x, bits_xor(from_here, each_int(-1))));
        }
      } else if (n % 5 == 0) {
        x = load_ints(from + 64 * (n / 5) + part * bytes);
      } else {
        x = add_bytes(add_bytes(x, x), x);
        if (TernaryBytes::added(n % 5) != 0) x = add_bytes(x, each_byte(TernaryBytes::added(n % 5)));
      }
      const Ints code = average_bytes(x, bits_or(shift16<-1>(x), half));  // its two highest bits
      four = n % 4 == 0 ? bits_and(code, top) : bits_and_or(code, top, shift16<-2>(four));
      if (n % 4 == 3) store_ints(to + n / 4 * 64 + part * bytes, bits_xor(four, flip));
    }
  }
}

// The first `units` units, or some more, of a ternary tile as codes of 2 bits.
template <bool unused = false>
void unpack_ternary_units(const Layout& layout, const std::byte* tile, Index units, std::byte* to) {
  const Ints flip = each_byte(layout.flip * 0x55);
  const Index all = layout.quads() / 4;
  Index unit = 0;
  for (; unit + 5 <= all && unit < units; unit += 5, tile += 256, to += 320) unpack_quads<4, 0>(tile, flip, to);
  if (unit >= units) return;
  if (all - unit == 1) unpack_quads<0, 4>(tile, flip, to);
  if (all - unit == 2) unpack_quads<1, 3>(tile, flip, to);
  if (all - unit == 3) unpack_quads<2, 2>(tile, flip, to);
  if (all - unit == 4) unpack_quads<3, 1>(tile, flip, to);
}

// ---- keys ----------------------------------------------------------------------------------------------------------
//
// One or two blocks of `lanes` tokens by R query rows at a time. Every code is unpacked once for the R rows.

// How many query rows are run at once.
#if KVPARE_MANY_REGISTERS
inline constexpr int most_rows = 7;
inline constexpr int key_sums = 14, value_sums = 8;  // sums at most where two vectors of codes are run side by side
#else
inline constexpr int most_rows = 4;
inline constexpr int key_sums = 4, value_sums = 4;
#endif
inline Index rows_at_once(Index rows) {
  if (most_rows == 7 && (rows % 7 == 0 || (rows > 8 && rows % 4 != 0))) return 7;
  return rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
}

// Where the scores of one call come from and go.
struct KeyRun {
  const std::byte* codes[2];      // of the two blocks of tokens
  Index blocks, units;            // float blocks of a row, units of each
  const float* scale[2];          // of the tokens, [blocks][scale_stride]
  const float* zero[2];           // likewise, or null
  Index scale_stride;
  const std::int8_t* table;
  AheadLines* ahead;
};

template <int bits, bool table, bool wide, int R>
struct KeyLoop {
  static constexpr Units unit{bits};
  static constexpr int vectors = unit.vectors(), planes = has_dots && wide ? 2 : 1;
  static constexpr int S = planes * R > key_sums ? 1 : 2;  // blocks of tokens
  using Sums = Ints[S][R][planes];

  template <int j>
  static KVPARE_INLINE void quads(const Ints (&x)[S][vectors], const std::uint32_t* q, Ints levels, Sums& sum) {
    constexpr Index row = sizeof(QueryRow) / 4, plane = max_width / 4;
    KeyCodes codes[S];
    KVPARE_UNROLL for (int s = 0; s < S; ++s) {
      Ints code = codes_of<bits, 0, j>(x[s]);
      if constexpr (table) code = look_up(levels, code);
      codes[s] = key_codes(code);
    }
    KVPARE_UNROLL for (int i = 0; i < R; ++i) {
      const Ints q0 = each_int(static_cast<std::int32_t>(q[i * row + j]));
      if constexpr (!has_dots) {
        const Ints q1 = each_int(static_cast<std::int32_t>(q[i * row + plane + j]));
        KVPARE_UNROLL for (int s = 0; s < S; ++s) sum[s][i][0] = dot_pairs(sum[s][i][0], codes[s], q0, q1);
      } else {
        KVPARE_UNROLL for (int s = 0; s < S; ++s) sum[s][i][0] = dot_key(sum[s][i][0], codes[s], q0);
        if constexpr (planes == 2) {
          const Ints q1 = each_int(static_cast<std::int32_t>(q[i * row + plane + j]));
          KVPARE_UNROLL for (int s = 0; s < S; ++s) sum[s][i][1] = dot_key(sum[s][i][1], codes[s], q1);
        }
      }
    }
    if constexpr (j + 1 < unit.quads()) quads<j + 1>(x, q, levels, sum);
  }

  static void run(const KeyRun& run, const QueryRow* q, const float* bias, Vec (&f)[S][R]) {
    KVPARE_UNROLL for (int i = 0; i < R; ++i)
      KVPARE_UNROLL for (int s = 0; s < S; ++s) f[s][i] = bias == nullptr ? zero() : broadcast(bias[i]);
    Ints levels{};
    if constexpr (table) levels = bits_xor(each_lane(run.table), each_byte(128));
    const std::byte* at[S];
    KVPARE_UNROLL for (int s = 0; s < S; ++s) at[s] = run.codes[s];
    const std::uint32_t* quad = q->q[0];
    for (Index block = 0; block < run.blocks; ++block) {
      Sums sum;
      KVPARE_UNROLL for (int i = 0; i < R; ++i)
        KVPARE_UNROLL for (int s = 0; s < S; ++s) {
          sum[s][i][0] = each_int(0);
          sum[s][i][planes - 1] = each_int(q[i].start[block]);
        }
      for (Index u = 0; u < run.units; ++u) {
        run.ahead->step();
        Ints x[S][vectors];
        KVPARE_UNROLL for (int s = 0; s < S; ++s) {
          KVPARE_UNROLL for (int v = 0; v < vectors; ++v) x[s][v] = load_ints(at[s] + 64 * v);
          at[s] += unit.bytes();
        }
        quads<0>(x, quad, levels, sum);
        quad += unit.quads();
      }
      KVPARE_UNROLL for (int s = 0; s < S; ++s) {
        const Vec scale = load(run.scale[s] + block * run.scale_stride);
        KVPARE_UNROLL for (int i = 0; i < R; ++i) {
          Ints all = sum[s][i][0];
          if constexpr (planes == 2) all = add_ints(times_256(all), sum[s][i][1]);
          f[s][i] = fma(to_floats(all), mul(scale, broadcast(q[i].scale[block])), f[s][i]);
        }
        if (run.zero[s] == nullptr) continue;
        const Vec z = load(run.zero[s] + block * run.scale_stride);
        KVPARE_UNROLL for (int i = 0; i < R; ++i) f[s][i] = fma(z, broadcast(q[i].sum[block]), f[s][i]);
      }
    }
  }
};

// Scores of R rows with the tokens [first, end) that are listed.
struct KeyRange {
  Index first, end;
  std::uint64_t listed;
  Index blocks, block_channels;
  const float* scale;  // [blocks][stride][tokens], or the same for all
  const float* zero;
  Index stride;
};

template <int bits, bool table, bool wide, int R>
void score_rows(const KeyCall& call, const KeyRange& range, const QueryRow* q, const float* bias, AheadLines& ahead,
                float* out) {
  constexpr std::uint64_t whole = (std::uint64_t{1} << lanes) - 1;
  Index need[max_tokens / lanes + 1];
  Index n = 0;
  for (Index t = range.first; t < range.end; t += lanes)
    if ((range.listed >> t & whole) != 0) need[n++] = t;
  need[n] = n > 0 ? need[n - 1] : 0;  // an odd one is done twice
  using Loop = KeyLoop<bits, table, wide, R>;
  for (Index b = 0; b < n; b += Loop::S) {
    KeyRun run;
    for (int s = 0; s < Loop::S; ++s) {
      const Index t = need[b + s];
      run.codes[s] = (call.codes != nullptr ? call.codes : call.keys.tile) + t / 16 * call.layout.block_bytes() + t % 16 * 4;
      run.scale[s] = range.scale + (range.stride > 0 ? t : 0);
      run.zero[s] = range.zero == nullptr ? nullptr : range.zero + t;
    }
    run.blocks = range.blocks, run.units = range.block_channels / Units{bits}.depth();
    run.scale_stride = range.stride, run.table = call.values.table, run.ahead = &ahead;
    Vec f[Loop::S][R];
    Loop::run(run, q, bias, f);
    for (int s = 0; s < Loop::S && b + s < n; ++s) {
      const Index t = need[b + s];
      const std::uint64_t here = range.listed >> t & whole;
      const int before = t == 0 ? 0 : __builtin_popcountll(range.listed << (64 - t));
      KVPARE_UNROLL for (int i = 0; i < R; ++i) {
        float* to = out + i * call.out_stride + before;
        if (here == whole) store(to, f[s][i]);
        else store_listed(to, f[s][i], here);
      }
    }
  }
}

template <int bits, bool table, bool wide>
void score_some(Index n, const KeyCall& call, const KeyRange& range, const QueryRow* q, const float* bias,
                AheadLines& ahead, float* out) {
#if KVPARE_MANY_REGISTERS
  if (n == 7) return score_rows<bits, table, wide, 7>(call, range, q, bias, ahead, out);
#endif
  if (n == 4) return score_rows<bits, table, wide, 4>(call, range, q, bias, ahead, out);
  if (n == 2) return score_rows<bits, table, wide, 2>(call, range, q, bias, ahead, out);
  score_rows<bits, table, wide, 1>(call, range, q, bias, ahead, out);
}

template <bool wide>
void pack_query(const std::int32_t* whole, Index width, QueryRow& to) {
  for (Index c = 0; c < width; c += 4 * lanes) {
    Ints x[4], high, low;
    KVPARE_UNROLL for (int v = 0; v < 4; ++v) x[v] = load_ints(whole + c + v * lanes);
    split_signed<wide>(x[0], x[1], x[2], x[3], high, low);
    store_ints(&to.q[0][c / 4], high);
    if constexpr (!has_dots || wide) store_ints(&to.q[1][c / 4], low);
  }
}

// q[width] as integers, `channels` of them with a scale of their own. Codes count from `centre`.
//
// A number that is not finite makes every score of its block NaN.
template <bool wide>
void make_query(const float* q, Index width, Index channels, float unit, int centre, QueryRow& to) {
  constexpr float largest = !has_dots || wide ? 32639.0f : 127.0f;
  alignas(64) std::int32_t whole[max_width + 4 * lanes];
  for (Index b = 0; b * channels < width; ++b) {
    const float* x = q + b * channels;
    std::int32_t* to_whole = whole + b * channels;
    Vec most = zero(), odd = zero(), sum = zero(), total = zero();
    Index c = 0;
    for (; c + lanes <= channels; c += lanes) {
      const Vec v = load(x + c);
      most = max(absolute(v), most), odd = fma(v, zero(), odd), sum = add(sum, v);
    }
    if (c < channels) {
      const Vec v = load_part(x + c, static_cast<int>(channels - c));
      most = max(absolute(v), most), odd = fma(v, zero(), odd), sum = add(sum, v);
    }
    const float top = max_of_lanes(most), bad = sum_of(odd);
    const bool counts = top >= 0x1p-100f && bad == 0;
    const Vec inverse = broadcast(counts ? largest / top : 0.0f);
    for (c = 0; c + lanes <= channels; c += lanes) {
      const Ints v = nearest_ints(mul(counts ? load(x + c) : zero(), inverse));
      store_ints(to_whole + c, v);
      total = add(total, to_floats(v));
    }
    if (c < channels) {
      const int part = static_cast<int>(channels - c);
      const Ints v = nearest_ints(mul(counts ? load_part(x + c, part) : zero(), inverse));
      store_ints(to_whole + c, v);  // what is behind is written next, or room
      total = add(total, to_floats(v));
    }
    to.scale[b] = (counts ? top / largest * unit : 0.0f) + bad;
    to.sum[b] = sum_of(sum);
    to.start[b] = -centre * static_cast<std::int32_t>(sum_of(total));  // exact: below 2^23
  }
  for (Index c = width; c < round_up(width, 4 * lanes); ++c) whole[c] = 0;
  pack_query<wide>(whole, width, to);
}

// Channels of a query that share a scale where keys have theirs per channel: the less, the smaller the error beside outliers.
inline Index entered_channels(Index width) { return width % 32 == 0 ? 32 : 16; }

template <int bits, bool table>
inline constexpr int key_centre = table ? 128 : 1 << (bits - 1);

template <int bits, bool table, bool wide>
void prepare(const Layout& layout, const Values& values, const float* q, Index q_stride, Index rows, std::byte* prepared) {
  const Index width = layout.shape.width;
  for (Index i = 0; i < rows; ++i) {
    if (layout.along == Along::channels) {
      make_query<wide>(q + i * q_stride, width, layout.group, values.unit, key_centre<bits, table>,
                       reinterpret_cast<QueryRow*>(prepared)[i]);
    } else {
      float* row = reinterpret_cast<float*>(prepared) + i * entering_floats;
      Vec odd = zero();
      for (Index c = 0; c < width; c += lanes) {
        const Vec v = load(q + i * q_stride + c);
        odd = fma(v, zero(), odd);
        store(row + c, v);
      }
      row[max_width] = sum_of(odd);  // 0, or NaN where a number is not finite
    }
  }
}

// J blocks of R query rows times the scales of their channels, as integers: their reductions are made together. J R <= 4.
template <bool wide, int channels, int J, int R>
KVPARE_INLINE void enter_blocks(const float* q, const float* scale, Index first, float unit, int centre,
                                std::int32_t (*whole)[max_width + 4 * lanes], QueryRow* to) {
  constexpr float largest = !has_dots || wide ? 32639.0f : 127.0f;
  constexpr int vectors = channels / lanes, blocks = J * R;
  Vec x[blocks][vectors], most[blocks], total[blocks];
  KVPARE_UNROLL for (int b = 0; b < blocks; ++b) {
    most[b] = total[b] = zero();
    const Index at = first + b % J * channels;
    const float* row = q + b / J * entering_floats;
    KVPARE_UNROLL for (int v = 0; v < vectors; ++v) {
      x[b][v] = mul(load(row + at + v * lanes), load(scale + at + v * lanes));
      most[b] = max(absolute(x[b][v]), most[b]);
    }
  }
  constexpr int last = blocks - 1;
  float top[4], sum[4];
  max_four(most[0], most[last > 0 ? 1 : 0], most[last > 1 ? 2 : 0], most[last], top);
  KVPARE_UNROLL for (int b = 0; b < blocks; ++b) {
    const bool counts = top[b] >= 0x1p-100f;
    const Vec inverse = broadcast(counts ? largest / top[b] : 0.0f);
    to[b / J].scale[first / channels + b % J] = counts ? top[b] * (unit / largest) : 0.0f;
    KVPARE_UNROLL for (int v = 0; v < vectors; ++v) {
      const Ints y = nearest_ints(mul(x[b][v], inverse));
      store_ints(whole[b / J] + first + b % J * channels + v * lanes, y);
      total[b] = add(total[b], to_floats(y));
    }
  }
  sum_four(total[0], total[last > 0 ? 1 : 0], total[last > 1 ? 2 : 0], total[last], sum);
  KVPARE_UNROLL for (int b = 0; b < blocks; ++b)
    to[b / J].start[first / channels + b % J] = -centre * static_cast<std::int32_t>(sum[b]);
}

// R query rows that meet a group of tokens: the scales of the channels go into them. `bias` becomes partial sums of q * zero.
template <bool wide, int channels, int R>
void enter(const float* q, const float* scale, const float* zero_at, Index width, float unit, int centre, QueryRow* to,
           Vec* bias) {
  alignas(64) std::int32_t whole[R][max_width + 4 * lanes];
  Index first = 0;
  for (; first + 4 * channels <= width; first += 4 * channels)
    for (int i = 0; i < R; ++i)
      enter_blocks<wide, channels, 4, 1>(q + i * entering_floats, scale, first, unit, centre, whole + i, to + i);
  for (; first + 2 * channels <= width; first += 2 * channels)
    enter_blocks<wide, channels, 2, R>(q, scale, first, unit, centre, whole, to);
  if (first < width) enter_blocks<wide, channels, 1, R>(q, scale, first, unit, centre, whole, to);
  for (int i = 0; i < R; ++i) {
    for (Index c = width; c < round_up(width, 4 * lanes); ++c) whole[i][c] = 0;
    pack_query<wide>(whole[i], width, to[i]);
    bias[i] = zero();
    if (zero_at != nullptr)
      for (Index c = 0; c < width; c += lanes)
        bias[i] = fma(load(q + i * entering_floats + c), load(zero_at + c), bias[i]);
  }
}

KVPARE_INLINE void max_each(const Vec* v, Index n, float* out) {
  Index i = 0;
  for (; i + 4 <= n; i += 4) max_four(v[i], v[i + 1], v[i + 2], v[i + 3], out + i);
  if (i == n) return;
  float rest[4];
  max_four(v[i], v[i + 1 < n ? i + 1 : i], v[i + 2 < n ? i + 2 : i], v[i], rest);
  for (Index j = 0; i + j < n; ++j) out[i + j] = rest[j];
}
// The sums of n <= most_rows vectors.
KVPARE_INLINE void sum_each(const Vec* v, Index n, float* out) {
  Index i = 0;
  for (; i + 4 <= n; i += 4) sum_four(v[i], v[i + 1], v[i + 2], v[i + 3], out + i);
  if (i == n) return;
  float rest[4];
  sum_four(v[i], v[i + 1 < n ? i + 1 : i], v[i + 2 < n ? i + 2 : i], v[i], rest);
  for (Index j = 0; i + j < n; ++j) out[i + j] = rest[j];
}

template <int bits, bool table, bool wide>
void score(const KeyCall& call) {
  const Layout& layout = call.layout;
  const Index width = layout.shape.width, tokens = layout.shape.tokens;
  const std::uint64_t listed = listed_slots(call.keys);
  alignas(64) float scale[max_groups * max_tokens], zeros[max_groups * max_tokens];
  float* zero_at = has_zeros(layout, call.values) ? zeros : nullptr;
  const Index pairs = ceil_div(call.keys.count, 2 * lanes);
  const Index entries = layout.along == Along::tokens ? tokens / layout.group * call.rows : 0;
  AheadLines ahead(call.ahead, entries + pairs * (layout.depth() / Units{bits}.depth()) * ceil_div(call.rows, most_rows));
  if (layout.along == Along::channels) {
    read_groups(layout, call.values, call.keys.tile, 0, layout.groups(), scale, zero_at);
    const KeyRange range{0, tokens, listed, width / layout.group, layout.group, scale, zero_at, tokens};
    const QueryRow* q = reinterpret_cast<const QueryRow*>(call.prepared);
    for (Index i = 0, n; i < call.rows; i += n) {
      n = rows_at_once(call.rows - i);
      score_some<bits, table, wide>(n, call, range, q + i, nullptr, ahead, call.out + i * call.out_stride);
    }
  } else {
    alignas(64) float ones[lanes];
    store(ones, broadcast(1.0f));
    QueryRow q[most_rows];
    float bias[most_rows];
    const float* rows = reinterpret_cast<const float*>(call.prepared);
    for (Index first = 0; first < tokens; first += layout.group) {
      const std::uint64_t here = layout.group >= 64 ? listed : listed >> first & ((std::uint64_t{1} << layout.group) - 1);
      if (here == 0) continue;
      read_groups(layout, call.values, call.keys.tile, first / layout.group * width, width, scale, zero_at);
      const Index channels = entered_channels(width);
      const KeyRange range{first, first + layout.group, listed, width / channels, channels, ones, nullptr, 0};
      for (Index i = 0, n; i < call.rows; i += n) {
        n = rows_at_once(call.rows - i);
        Vec sums[most_rows];
        constexpr int centre = key_centre<bits, table>;
        for (Index r = 0; r < n;) {
          ahead.step();
          const float* row = rows + (i + r) * entering_floats;
          if (r + 2 <= n) {
            ahead.step();
            if (channels == 32) enter<wide, 32, 2>(row, scale, zero_at, width, call.values.unit, centre, q + r, sums + r);
            else enter<wide, 16, 2>(row, scale, zero_at, width, call.values.unit, centre, q + r, sums + r);
            r += 2;
          } else {
            if (channels == 32) enter<wide, 32, 1>(row, scale, zero_at, width, call.values.unit, centre, q + r, sums + r);
            else enter<wide, 16, 1>(row, scale, zero_at, width, call.values.unit, centre, q + r, sums + r);
            ++r;
          }
        }
        sum_each(sums, n, bias);
        for (Index r = 0; r < n; ++r) bias[r] += rows[(i + r) * entering_floats + max_width];
        score_some<bits, table, wide>(n, call, range, q, bias, ahead, call.out + i * call.out_stride);
      }
    }
  }
  ahead.rest();
}

// ---- values --------------------------------------------------------------------------------------------------------
//
// Probabilities become unsigned numbers of 16 or 8 bits (15 bits and a sign where bytes have no dot product), relative to
// the largest p * scale that the row meets in the tile. The token's scale goes into them first; zeros are added in float.

struct alignas(64) ValueRow {
  std::uint32_t p[2][max_tokens / 4];  // per quad of tokens
};

// What becomes of the sums of one group of channels: acc = alpha * acc + factor * channel_scale * sum + add * channel_zero.
struct ValueRun {
  const std::byte* codes;
  Index block_bytes;
  Index first, end;  // units
  const ValueRow* p;
  const std::uint32_t* negative;  // per quad of tokens: bytes of ones where the scale is negative
  const std::int8_t* table;
  const float* alpha;  // [R], or null
  const float* factor;
  const float* add;            // [R], or null
  const float* channel_scale;  // of the channels at hand, or null
  const float* channel_zero;
  float* acc;
  Index acc_stride;
  AheadLines* ahead;
};

template <int bits, Levels levels, bool wide, int R, int W>
struct ValueLoop {
  static constexpr Units unit{bits};
  static constexpr int vectors = unit.vectors(), planes = has_dots && wide ? 2 : 1;
  static constexpr bool flips = has_dots && (levels == Levels::flipped || levels == Levels::flipped_table);
  static constexpr bool looks_up = levels == Levels::table || levels == Levels::flipped_table;
  using Sums = Ints[R][W][planes];

  template <int j>
  static KVPARE_INLINE void quads(const Ints (&x)[W][vectors], const std::uint32_t* p, const std::uint32_t* negative,
                                  Ints table, Sums& sum) {
    ValueCodes c[W];
    KVPARE_UNROLL for (int w = 0; w < W; ++w) {
      Ints level;
      if constexpr (levels == Levels::plain) level = codes_of<bits, 8 - bits, j>(x[w]);
      else if constexpr (looks_up) level = look_up(table, codes_of<bits, 0, j>(x[w]));
      else level = sub_bytes(codes_of<bits, 0, j>(x[w]), each_byte(1 << (bits - 1)));
      if constexpr (flips) {
        const Ints flip = each_int(static_cast<std::int32_t>(negative[j]));
        level = sub_bytes(bits_xor(level, flip), flip);
      }
      c[w] = value_codes(level);
    }
    constexpr Index row = sizeof(ValueRow) / 4, plane = max_tokens / 4;
    KVPARE_UNROLL for (int i = 0; i < R; ++i) {
      const Ints p0 = each_int(static_cast<std::int32_t>(p[i * row + j]));
      if constexpr (!has_dots) {
        const Ints p1 = each_int(static_cast<std::int32_t>(p[i * row + plane + j]));
        KVPARE_UNROLL for (int w = 0; w < W; ++w) sum[i][w][0] = dot_pairs(sum[i][w][0], c[w], p0, p1);
      } else {
        KVPARE_UNROLL for (int w = 0; w < W; ++w) sum[i][w][0] = dot_value(sum[i][w][0], c[w], p0);
        if constexpr (planes == 2) {
          const Ints p1 = each_int(static_cast<std::int32_t>(p[i * row + plane + j]));
          KVPARE_UNROLL for (int w = 0; w < W; ++w) sum[i][w][1] = dot_value(sum[i][w][1], c[w], p1);
        }
      }
    }
    if constexpr (j + 1 < unit.quads()) quads<j + 1>(x, p, negative, table, sum);
  }

  static void run(const ValueRun& run, Index channel) {
    Sums sum;
    KVPARE_UNROLL for (int i = 0; i < R; ++i)
      KVPARE_UNROLL for (int w = 0; w < W; ++w)
        KVPARE_UNROLL for (int k = 0; k < planes; ++k) sum[i][w][k] = each_int(0);
    Ints table{};
    if constexpr (looks_up) table = each_lane(run.table);
    const std::byte* at[W];
    KVPARE_UNROLL for (int w = 0; w < W; ++w) {
      const Index c = channel + w * lanes;
      at[w] = run.codes + c / 16 * run.block_bytes + c % 16 * 4 + run.first * unit.bytes();
    }
    const std::uint32_t* p = run.p->p[0] + run.first * unit.quads();
    const std::uint32_t* negative = nullptr;
    if constexpr (flips) negative = run.negative + run.first * unit.quads();
    for (Index u = run.first; u < run.end; ++u) {
      run.ahead->step();
      Ints x[W][vectors];
      KVPARE_UNROLL for (int w = 0; w < W; ++w) {
        KVPARE_UNROLL for (int v = 0; v < vectors; ++v) x[w][v] = load_ints(at[w] + 64 * v);
        at[w] += unit.bytes();
      }
      quads<0>(x, p, negative, table, sum);
      p += unit.quads();
      if constexpr (flips) negative += unit.quads();
    }
    KVPARE_UNROLL for (int i = 0; i < R; ++i) {
      const float alpha = run.alpha == nullptr ? 1.0f : run.alpha[i];
      KVPARE_UNROLL for (int w = 0; w < W; ++w) {
        float* acc = run.acc + i * run.acc_stride + channel + w * lanes;
        Ints all = sum[i][w][0];
        if constexpr (planes == 2) all = add_ints(times_256(all), sum[i][w][1]);
        Vec old = zero();
        if (alpha != 0) old = mul(load(acc), broadcast(alpha));
        Vec factor = broadcast(run.factor[i]);
        if (run.channel_scale != nullptr) factor = mul(factor, load(run.channel_scale + channel + w * lanes));
        if (run.add != nullptr) {
          if (run.channel_zero != nullptr)
            old = fma(broadcast(run.add[i]), load(run.channel_zero + channel + w * lanes), old);
          else
            old = add(old, broadcast(run.add[i]));
        }
        store(acc, fma(to_floats(all), factor, old));
      }
    }
  }
};

template <int bits, Levels levels, bool wide, int R>
void value_channels(const ValueRun& run, Index first, Index end) {
  Index c = first;
  if constexpr ((has_dots && wide ? 2 : 1) * R <= value_sums)
    for (; c + 2 * lanes <= end; c += 2 * lanes) ValueLoop<bits, levels, wide, R, 2>::run(run, c);
  for (; c < end; c += lanes) ValueLoop<bits, levels, wide, R, 1>::run(run, c);
}

// p[tokens] times the token's factor (and `up`, where p has 8 bits), as numbers the loop takes.
template <bool wide>
KVPARE_INLINE void pack_row(const float* p, const float* factor, float up, Index tokens, ValueRow& to) {
  for (Index t = 0; t < tokens; t += 4 * lanes) {
    Ints x[4], high, low;
    KVPARE_UNROLL for (int v = 0; v < 4; ++v) {
      Vec y = mul(load(p + t + v * lanes), load(factor + t + v * lanes));
      if constexpr (has_dots && !wide) y = mul(y, broadcast(up));
      x[v] = nearest_ints(y);
    }
    split_unsigned<wide>(x[0], x[1], x[2], x[3], high, low);
    store_ints(&to.p[0][t / 4], high);
    if constexpr (!has_dots || wide) store_ints(&to.p[1][t / 4], low);
  }
}

// What all rows share: the tokens' scales, freed of what is not listed.
struct ValueTile {
  std::uint64_t listed;
  alignas(64) float scale[max_groups * max_tokens];  // [groups][max_tokens], along channels
  alignas(64) float zero[max_groups * max_tokens];
  alignas(64) float most[max_tokens];  // the largest |scale| of each token; NaN where one is not finite
  float largest[max_groups];           // the largest |scale| of each group; for probabilities of 8 bits
  alignas(64) std::uint32_t negative[max_groups][max_tokens / 4];
};

template <bool wide>
inline constexpr float largest_p = !has_dots ? 32767.0f : wide ? 65535.0f : 255.0f;

template <bool wide, bool flips>
void read_tile(const ValueCall& call, ValueTile& to, bool zeros) {
  const Layout& layout = call.layout;
  const Index tokens = layout.shape.tokens, groups = layout.row_groups();
  alignas(64) float scale[max_groups * max_tokens], zero_at[max_groups * max_tokens];
  read_groups(layout, call.values, call.tile.tile, 0, layout.groups(), scale, zeros ? zero_at : nullptr);
  for (Index t = 0; t < max_tokens; t += lanes) {
    Vec most = zero(), odd = zero();
    for (Index g = 0; g < groups; ++g) {
      const Vec s = t < tokens ? only(to.listed >> t, load(scale + g * tokens + t)) : zero();
      const Vec a = absolute(s);
      most = max(a, most), odd = fma(a, zero(), odd);
      store(to.scale + g * max_tokens + t, has_dots ? a : s);
      if (zeros) store(to.zero + g * max_tokens + t, t < tokens ? only(to.listed >> t, load(zero_at + g * tokens + t)) : zero());
    }
    store(to.most + t, add(most, odd));
  }
  if constexpr (has_dots && !wide)
    for (Index g = 0; g < groups; ++g) {
      Vec most = zero();
      for (Index t = 0; t < tokens; t += lanes) most = max(load(to.scale + g * max_tokens + t), most);
      to.largest[g] = max_of_lanes(most);
    }
  if constexpr (flips)
    for (Index g = 0; g < groups; ++g)
      for (Index t = 0; t < tokens; t += 4) {
        std::uint32_t bytes = 0;
        for (Index k = 0; k < 4; ++k)
          if (scale[g * tokens + t + k] < 0) bytes |= 0xffu << 8 * k;
        to.negative[g][t / 4] = bytes;
      }
}

// What accumulate_rows has to know of codes; all of it but `channels` is the same for any number of rows.
struct ValueForm {
  void (*channels)(const ValueRun& run, Index first, Index end);  // value_channels
  Index depth;  // tokens of a unit
  float unit;   // of the products' sums
  bool flips;
};
template <int bits, Levels levels, bool wide, int R>
constexpr ValueForm value_form() {
  return {value_channels<bits, levels, wide, R>, Units{bits}.depth(),
          levels == Levels::plain ? 1.0f / (1 << (8 - bits)) : 1.0f,
          levels == Levels::flipped || levels == Levels::flipped_table};
}

template <bool wide, int R>
void accumulate_rows(const ValueForm& form, const ValueCall& call, const ValueTile& tile, bool zeros, const float* p,
                     const float* alpha, AheadLines& ahead, float* acc) {
  const Layout& layout = call.layout;
  const Index tokens = layout.shape.tokens, width = layout.shape.width;
  // Each row's largest p * scale becomes largest_p. Where that has 8 bits only, each group's does, by the tighter of two
  // bounds.
  const bool full = tile.listed == ~std::uint64_t{0};
  alignas(64) float x[R][max_tokens], all[R][max_tokens];
  float top[R], peak[R], bad[R];
  Vec tops[R], bads[R], peaks[R];
  KVPARE_UNROLL for (int i = 0; i < R; ++i) {
    const float* row = p + i * call.p_stride;
    Vec most = zero(), odd = zero(), largest = zero();
    KVPARE_UNROLL for (Index t = 0; t < max_tokens; t += lanes) {
      Vec v;
      if (full) {
        v = load(row + t);
      } else {
        const std::uint64_t here = tile.listed >> t & ((std::uint64_t{1} << lanes) - 1);
        v = here == 0 ? zero() : load_listed(row + (t == 0 ? 0 : __builtin_popcountll(tile.listed << (64 - t))), here);
      }
      const Vec y = layout.along == Along::channels ? mul(v, load(tile.most + t)) : v;
      store(all[i] + t, v);
      most = max(y, most), odd = fma(y, zero(), odd);
      if constexpr (has_dots && !wide) largest = max(v, largest);
    }
    tops[i] = most, bads[i] = odd, peaks[i] = largest;
  }
  max_each(tops, R, top), sum_each(bads, R, bad);
  if constexpr (has_dots && !wide) max_each(peaks, R, peak);
  float back[R];
  KVPARE_UNROLL for (int i = 0; i < R; ++i) {
    const bool counts = top[i] >= 0x1p-100f && bad[i] == 0;
    const Vec up = broadcast(counts ? largest_p<wide> / top[i] : 0.0f);
    KVPARE_UNROLL for (Index t = 0; t < max_tokens; t += lanes)
      store(x[i] + t, counts ? mul(load(all[i] + t), up) : zero());
    back[i] = ((counts ? top[i] / largest_p<wide> * call.values.unit : 0.0f) + bad[i]) * form.unit;
  }

  ValueRow rows[R];
  float factor[R], extra[R];
  ValueRun run{};
  run.codes = call.codes != nullptr ? call.codes : call.tile.tile, run.block_bytes = layout.block_bytes();
  run.p = rows, run.table = call.values.table, run.alpha = alpha, run.factor = factor;
  run.acc = acc, run.acc_stride = call.acc_stride, run.ahead = &ahead;
  if (layout.along == Along::channels) {
    run.first = 0, run.end = tokens / form.depth;
    run.add = zeros ? extra : nullptr;
    for (Index g = 0; g < layout.row_groups(); ++g) {
      KVPARE_UNROLL for (int i = 0; i < R; ++i) {
        float up = 1;
        if constexpr (has_dots && !wide) {
          const float bound = peak[i] * tile.largest[g];
          if (bound > 0 && bound < top[i]) up = top[i] / bound;
        }
        pack_row<wide>(x[i], tile.scale + g * max_tokens, up, tokens, rows[i]);
        factor[i] = back[i] / up;
      }
      if (zeros) {
        Vec sum[R];
        KVPARE_UNROLL for (int i = 0; i < R; ++i) sum[i] = zero();
        for (Index t = 0; t < tokens; t += lanes) {
          const Vec z = load(tile.zero + g * max_tokens + t);
          KVPARE_UNROLL for (int i = 0; i < R; ++i) sum[i] = fma(load(all[i] + t), z, sum[i]);
        }
        sum_each(sum, R, extra);
      }
      run.negative = form.flips ? tile.negative[g] : nullptr;
      form.channels(run, g * layout.group, (g + 1) * layout.group);
    }
  } else {
    alignas(64) float ones[max_tokens];
    for (Index t = 0; t < max_tokens; t += lanes) store(ones + t, broadcast(1.0f));
    for (int i = 0; i < R; ++i) {
      pack_row<wide>(x[i], ones, 1.0f, tokens, rows[i]);
      factor[i] = back[i];
    }
    alignas(64) float scale[max_width], zero_at[max_width];
    run.add = zeros ? extra : nullptr;
    run.channel_scale = scale, run.channel_zero = zeros ? zero_at : nullptr;
    for (Index first = 0; first < tokens; first += layout.group) {
      read_groups(layout, call.values, call.tile.tile, first / layout.group * width, width, scale, zeros ? zero_at : nullptr);
      run.first = first / form.depth, run.end = (first + layout.group) / form.depth;
      if (zeros)
        for (int i = 0; i < R; ++i) {
          Vec sum = zero();
          for (Index t = first; t < first + layout.group; t += lanes) sum = add(sum, load(all[i] + t));
          extra[i] = sum_of(sum);
        }
      form.channels(run, 0, width);
      run.alpha = nullptr;
    }
  }
}

template <int bits, Levels levels, bool wide>
void accumulate_codes(const ValueCall& call) {
  constexpr bool flips = has_dots && (levels == Levels::flipped || levels == Levels::flipped_table);
  const Layout& layout = call.layout;
  const bool zeros = has_zeros(layout, call.values);
  ValueTile tile;
  tile.listed = listed_slots(call.tile);
  if (layout.along == Along::channels) read_tile<wide, flips>(call, tile, zeros);
  AheadLines ahead(call.ahead, layout.code_bytes() / Units{bits}.bytes() / 2 * (64 / (4 * lanes)) * ceil_div(call.rows, most_rows));
  for (Index i = 0, n; i < call.rows; i += n) {
    n = rows_at_once(call.rows - i);
    const float* p = call.p + i * call.p_stride;
    const float* alpha = call.alpha == nullptr ? nullptr : call.alpha + i;
    float* acc = call.acc + i * call.acc_stride;
#if KVPARE_MANY_REGISTERS
    if (n == 7) {
      accumulate_rows<wide, 7>(value_form<bits, levels, wide, 7>(), call, tile, zeros, p, alpha, ahead, acc);
      continue;
    }
#endif
    if (n == 4) accumulate_rows<wide, 4>(value_form<bits, levels, wide, 4>(), call, tile, zeros, p, alpha, ahead, acc);
    else if (n == 2) accumulate_rows<wide, 2>(value_form<bits, levels, wide, 2>(), call, tile, zeros, p, alpha, ahead, acc);
    else accumulate_rows<wide, 1>(value_form<bits, levels, wide, 1>(), call, tile, zeros, p, alpha, ahead, acc);
  }
  ahead.rest();
}

// ---- floats of 8 bits ----------------------------------------------------------------------------------------------
//
// Keys: [tokens / 16][channels][16 tokens], so that tokens are lanes. Values: rows as they are. Sums are made in float.

template <bool e5m2, int R>
struct SmallKeyLoop {
  static constexpr int S = 2;

  static KVPARE_INLINE void run(const std::byte* const (&block)[S], const float* q, Index width, AheadLines& ahead,
                                Vec (&f)[S][R]) {
    KVPARE_UNROLL for (int s = 0; s < S; ++s)
      KVPARE_UNROLL for (int i = 0; i < R; ++i) f[s][i] = zero();
    for (Index c = 0; c < width; c += 2) {
      if (c % 8 == 0) ahead.step();
      Vec k[S][2];
      KVPARE_UNROLL for (int s = 0; s < S; ++s) load_small<e5m2>(block[s] + c * 16, 16, k[s][0], k[s][1]);
      KVPARE_UNROLL for (int i = 0; i < R; ++i)
        KVPARE_UNROLL for (int j = 0; j < 2; ++j) {
          const Vec x = broadcast(q[i * max_width + c + j]);
          KVPARE_UNROLL for (int s = 0; s < S; ++s) f[s][i] = fma(x, k[s][j], f[s][i]);
        }
    }
  }
};

template <bool e5m2, int R>
void score_small_rows(const KeyCall& call, std::uint64_t listed, const float* q, AheadLines& ahead, float* out) {
  constexpr std::uint64_t whole = (std::uint64_t{1} << lanes) - 1;
  using Loop = SmallKeyLoop<e5m2, R>;
  const Index width = call.layout.shape.width;
  Index need[max_tokens / lanes + 1];
  Index n = 0;
  for (Index t = 0; t < call.layout.shape.tokens; t += lanes)
    if ((listed >> t & whole) != 0) need[n++] = t;
  need[n] = n > 0 ? need[n - 1] : 0;
  for (Index b = 0; b < n; b += Loop::S) {
    const std::byte* block[Loop::S];
    for (int s = 0; s < Loop::S; ++s) block[s] = call.keys.tile + need[b + s] / 16 * 16 * width + need[b + s] % 16;
    Vec f[Loop::S][R];
    Loop::run(block, q, width, ahead, f);
    for (int s = 0; s < Loop::S && b + s < n; ++s) {
      const Index t = need[b + s];
      const std::uint64_t here = listed >> t & whole;
      const int before = t == 0 ? 0 : __builtin_popcountll(listed << (64 - t));
      KVPARE_UNROLL for (int i = 0; i < R; ++i) {
        float* to = out + i * call.out_stride + before;
        if (here == whole) store(to, f[s][i]);
        else store_listed(to, f[s][i], here);
      }
    }
  }
}

// prepared: floats [rows][max_width], the scale included.
template <bool e5m2>
void score_small(const KeyCall& call) {
  const std::uint64_t listed = listed_slots(call.keys);
  const float* q = reinterpret_cast<const float*>(call.prepared);
  AheadLines ahead(call.ahead, ceil_div(call.keys.count, 2 * lanes) * (call.layout.shape.width / 8) *
                                   ceil_div(call.rows, most_rows));
  for (Index i = 0, n; i < call.rows; i += n, q += n * max_width) {
    n = rows_at_once(call.rows - i);
    float* out = call.out + i * call.out_stride;
#if KVPARE_MANY_REGISTERS
    if (n == 7) {
      score_small_rows<e5m2, 7>(call, listed, q, ahead, out);
      continue;
    }
#endif
    if (n == 4) score_small_rows<e5m2, 4>(call, listed, q, ahead, out);
    else if (n == 2) score_small_rows<e5m2, 2>(call, listed, q, ahead, out);
    else score_small_rows<e5m2, 1>(call, listed, q, ahead, out);
  }
  ahead.rest();
}

template <bool e5m2, int R, int W>
void sum_small(const ValueCall& call, const float (*p)[max_tokens], const float* alpha, Index channel, AheadLines& ahead,
               float* acc) {
  Vec sum[R][2 * W];
  KVPARE_UNROLL for (int i = 0; i < R; ++i) {
    const float factor = alpha == nullptr ? 1.0f : alpha[i];
    KVPARE_UNROLL for (int w = 0; w < 2 * W; ++w) {
      sum[i][w] = zero();
      if (factor != 0) sum[i][w] = mul(load(acc + i * call.acc_stride + channel + w * lanes), broadcast(factor));
    }
  }
  const Index width = call.layout.shape.width;
  for (int t = 0; t < call.tile.count; ++t) {
    if (t % 2 == 0) ahead.step();
    const std::byte* row = call.tile.tile + call.tile.slots[t] * width + channel;
    Vec v[2 * W];
    KVPARE_UNROLL for (int w = 0; w < W; ++w) load_small<e5m2>(row + 2 * w * lanes, lanes, v[2 * w], v[2 * w + 1]);
    KVPARE_UNROLL for (int i = 0; i < R; ++i) {
      const Vec x = broadcast(p[i][t]);
      KVPARE_UNROLL for (int w = 0; w < 2 * W; ++w) sum[i][w] = fma(x, v[w], sum[i][w]);
    }
  }
  KVPARE_UNROLL for (int i = 0; i < R; ++i)
    KVPARE_UNROLL for (int w = 0; w < 2 * W; ++w) store(acc + i * call.acc_stride + channel + w * lanes, sum[i][w]);
}

template <bool e5m2, int R>
void accumulate_small_rows(const ValueCall& call, float factor, const float* p, const float* alpha, AheadLines& ahead,
                           float* acc) {
  alignas(64) float x[R][max_tokens];
  for (int i = 0; i < R; ++i)
    for (int t = 0; t < call.tile.count; ++t) x[i][t] = p[i * call.p_stride + t] * factor;
  Index c = 0;
  constexpr int W = 4 * R <= 2 * value_sums ? 2 : 1;
  for (; c + 2 * W * lanes <= call.layout.shape.width; c += 2 * W * lanes)
    sum_small<e5m2, R, W>(call, x, alpha, c, ahead, acc);
  for (; c < call.layout.shape.width; c += 2 * lanes) sum_small<e5m2, R, 1>(call, x, alpha, c, ahead, acc);
}

template <bool e5m2>
void accumulate_small(const ValueCall& call) {
  const float factor = call.values.factor * (e5m2 ? 1.0f : e4m3_unit);
  AheadLines ahead(call.ahead, ceil_div(call.layout.shape.width, 4 * lanes) * ceil_div(call.tile.count, 2) *
                                   ceil_div(call.rows, most_rows));
  for (Index i = 0, n; i < call.rows; i += n) {
    n = rows_at_once(call.rows - i);
    const float* p = call.p + i * call.p_stride;
    const float* alpha = call.alpha == nullptr ? nullptr : call.alpha + i;
    float* acc = call.acc + i * call.acc_stride;
#if KVPARE_MANY_REGISTERS
    if (n == 7) {
      accumulate_small_rows<e5m2, 7>(call, factor, p, alpha, ahead, acc);
      continue;
    }
#endif
    if (n == 4) accumulate_small_rows<e5m2, 4>(call, factor, p, alpha, ahead, acc);
    else if (n == 2) accumulate_small_rows<e5m2, 2>(call, factor, p, alpha, ahead, acc);
    else accumulate_small_rows<e5m2, 1>(call, factor, p, alpha, ahead, acc);
  }
  ahead.rest();
}

// ---- writing -------------------------------------------------------------------------------------------------------

// What a half that saturates makes of it is what a half makes of this.
KVPARE_INLINE Vec as_half_range(Vec x) { return max(min(x, broadcast(65504.0f)), broadcast(-65504.0f)); }
KVPARE_INLINE Vec whole_floats(Vec x) { return to_floats(whole_ints(x)); }

// How a row of floats becomes codes, for the commonest forms: the very codes and bits of codec/group.hpp.

// Rows of `width` numbers in groups, a multiple of `lanes`. False where a number is not finite or very large, or two are
// equally extreme, or the minimum is a zero: then nothing has been written that counts.
template <Rule rule, Rounding rounding>
bool quantize_row(int bits, bool exact, const float* x, Index width, Index group, std::uint8_t* codes, half* scales,
                  half* zeros) {
  const int half_range = 1 << (bits - 1);
  const float top_code = static_cast<float>((1 << bits) - 1);
  const int offset = rule == Rule::min_max ? 0 : half_range, lowest = rule == Rule::amax ? 1 : 0;
  alignas(64) float high[max_groups + lanes] = {}, low[max_groups + lanes] = {}, inverse[max_groups + lanes];
  const Index groups = width / group;
  // The extremes, four groups at a time.
  for (Index g = 0; g < groups; g += 4) {
    Vec most[4], least[4];
    KVPARE_UNROLL for (Index j = 0; j < 4; ++j) {
      const float* from = x + (g + j < groups ? g + j : g) * group;
      most[j] = least[j] = load(from);
      for (Index c = lanes; c < group; c += lanes) {
        const Vec v = load(from + c);
        most[j] = max(most[j], v), least[j] = min(least[j], v);
      }
      least[j] = negative(least[j]);
    }
    max_four(most[0], most[1], most[2], most[3], high + g);
    max_four(least[0], least[1], least[2], least[3], low + g);
  }
  // max and min drop NaN in one of their places only, so they are looked for by themselves.
  Vec odd = zero();
  for (Index c = 0; c < width; c += lanes) odd = fma(load(x + c), zero(), odd);
  if (sum_of(odd) != 0) return false;
  for (Index g = 0; g < groups; ++g) {
    if (!(high[g] <= 0x1p126f && low[g] <= 0x1p126f)) return false;
    if (rule == Rule::extreme && high[g] == low[g] && high[g] != 0) return false;
    if (rule == Rule::min_max && low[g] == 0) return false;  // which of two zeros is the minimum
  }
  for (Index g = 0; g < groups; g += lanes) {
    const Vec most = load(high + g), least = negative(load(low + g));
    Vec scale;
    if constexpr (rule == Rule::amax) {
      scale = divide(max(most, negative(least)), broadcast(static_cast<float>(half_range - 1)));
    } else if constexpr (rule == Rule::extreme) {
      const Vec extreme = pick_greater(most, negative(least), most, least);
      scale = mul(extreme, broadcast(-1.0f / static_cast<float>(half_range)));  // the quotient: a power of two
    } else {
      scale = divide(sub(most, least), broadcast(top_code));
    }
    scale = normal_or_zero(scale);
    half bits_of[lanes], zero_bits[lanes];
    store(bits_of, as_half_range(scale));
    store(inverse + g, divide_or_zero(broadcast(1.0f), exact ? scale : load(bits_of)));
    if constexpr (rule == Rule::min_max) {
      store(zero_bits, as_half_range(least));
      store(low + g, exact ? least : load(zero_bits));
    }
    for (Index l = 0; l < lanes && g + l < groups; ++l) {
      scales[g + l] = bits_of[l];
      if constexpr (rule == Rule::min_max) zeros[g + l] = zero_bits[l];
    }
  }
  for (Index g = 0; g < groups; ++g) {
    const Vec up = broadcast(inverse[g]), from = broadcast(low[g]);
    for (Index c = g * group; c < (g + 1) * group; c += lanes) {
      Vec v = load(x + c);
      if constexpr (rule == Rule::min_max) v = sub(v, from);
      v = mul(v, up);
      keep(v);  // two roundings: no fused product here
      if constexpr (rounding == Rounding::up) {
        v = add(v, broadcast(static_cast<float>(offset) + 0.5f));
        v = min(max(v, broadcast(static_cast<float>(lowest))), broadcast(top_code));
        store_bytes(codes + c, whole_ints(v));
      } else {
        v = min(max(v, broadcast(static_cast<float>(lowest - offset))), broadcast(top_code - static_cast<float>(offset)));
        Ints code;
        if constexpr (rounding == Rounding::even) {
          code = nearest_ints(v);
        } else {
          // Away from zero: half a step more, cut off. The largest float below a half must not become one.
          const Ints whole = whole_ints(v);
          const Vec rest = sub(v, to_floats(whole));
          const Vec step = whole_floats(add(rest, rest));  // -1, 0 or 1: rest is exact, and below 1
          code = add_ints(whole, whole_ints(step));
        }
        store_bytes(codes + c, add_ints(code, each_int(offset)));
      }
    }
  }
  return true;
}

// The codes of one token, one to a byte, into their places. Codes of other tokens stay.
template <int bits>
void place_key(const Layout& layout, std::byte* tile, Index slot, const std::uint8_t* codes) {
  constexpr Units unit{bits};
  constexpr int low = unit.low_bits(), per = 8 / low;
  constexpr std::uint32_t mask = 0x01010101u * ((1u << low) - 1u);
  std::byte* at = tile + slot / 16 * layout.block_bytes() + slot % 16 * 4;
  for (Index c = 0; c < layout.shape.width; c += unit.depth(), at += unit.bytes()) {
    std::uint32_t top = 0;
    for (int q = 0; q < unit.quads(); q += per) {
      std::uint32_t word = 0;
      KVPARE_UNROLL for (int j = 0; j < per; ++j) {
        std::uint32_t four;
        std::memcpy(&four, codes + c + 4 * (q + j), 4);
        word |= (four & mask) << (low * j);
        if constexpr (low != bits) top |= (four >> low & 0x01010101u) << (q + j);
      }
      std::memcpy(at + q / per * 64, &word, 4);
    }
    if constexpr (low != bits) std::memcpy(at + (unit.vectors() - 1) * 64, &top, 4);
  }
}

template <bool unused = false>
void place_row(const Layout& layout, std::byte* tile, Index slot, const std::uint8_t* codes) {
  const Units unit = layout.units;
  const int low = unit.low_bits(), per = 8 / low;
  if (layout.ternary) return layout.put_ternary_row(tile, slot, codes);
  if (layout.side == Side::keys) {
    switch (unit.bits) {
      case 1: return place_key<1>(layout, tile, slot, codes);
      case 2: return place_key<2>(layout, tile, slot, codes);
      case 3: return place_key<3>(layout, tile, slot, codes);
      case 4: return place_key<4>(layout, tile, slot, codes);
      case 5: return place_key<5>(layout, tile, slot, codes);
      default: return place_key<8>(layout, tile, slot, codes);
    }
  }
  const Index step = slot / unit.depth();
  const int quad = static_cast<int>(slot % unit.depth() / 4), byte = static_cast<int>(slot % 4) * 8;
  const Ints flip = each_int(layout.flip), mask = each_int((1 << low) - 1), one = each_int(1), none = each_int(-1);
  const int shift = byte + quad % per * low;
  const Ints keep = bits_xor(shift_left32(mask, shift), none);
  for (Index c = 0; c < layout.shape.width; c += lanes) {
    std::byte* at = tile + c / 16 * layout.block_bytes() + step * unit.bytes() + c % 16 * 4;
    const Ints code = bits_xor(widen_bytes(codes + c), flip);
    std::byte* lower = at + quad / per * 64;
    store_ints(lower, bits_or(bits_and(load_ints(lower), keep), shift_left32(bits_and(code, mask), shift)));
    if (low == unit.bits) continue;
    std::byte* upper = at + (unit.vectors() - 1) * 64;
    const Ints bit = bits_and(shift_right32(code, low), one);
    store_ints(upper, bits_or(bits_and(load_ints(upper), bits_xor(shift_left32(one, byte + quad), none)),
                              shift_left32(bit, byte + quad)));
  }
}

#include "listed.inl"
//
#include "mixed.inl"

// What tiles take from here, see loops.hpp.
struct Set {
  template <int bits, bool table, bool wide>
  static void prepare_query(const Layout& layout, const Values& values, const float* q, Index q_stride, Index rows,
                            std::byte* prepared) {
    prepare<bits, table, wide || !has_dots>(layout, values, q, q_stride, rows, prepared);
  }
  template <int bits, bool table, bool wide>
  static void score_keys(const KeyCall& call) {
    score<bits, table, wide || !has_dots>(call);
  }
  template <int bits, Levels levels, bool wide>
  static void accumulate_values(const ValueCall& call) {
    accumulate_codes<bits, levels, wide || !has_dots>(call);
  }
  template <bool unused = false>
  static void score_mixed_keys(const MixedKeyCall& call) {
    score_mixed<unused>(call);
  }
  template <bool wide>
  static void accumulate_mixed_values(const MixedValueCall& call) {
    accumulate_mixed<wide || !has_dots>(call);
  }
  template <bool e5m2>
  static constexpr float small_unit = e5m2 ? 1.0f : e4m3_unit;  // of what the loops over keys multiply
  template <bool e5m2>
  static void score_small_keys(const KeyCall& call) {
    score_small<e5m2>(call);
  }
  template <bool e5m2>
  static void accumulate_small_values(const ValueCall& call) {
    accumulate_small<e5m2>(call);
  }
  template <Rule rule, Rounding rounding>
  static bool quantize(int bits, bool exact, const float* x, Index width, Index group, std::uint8_t* codes,
                       half* scales, half* zeros) {
    return quantize_row<rule, rounding>(bits, exact, x, width, group, codes, scales, zeros);
  }
  template <bool unused = false>
  static void unpack_ternary(const Layout& layout, const std::byte* tile, Index units, std::byte* to) {
    unpack_ternary_units<unused>(layout, tile, units, to);
  }
  template <bool unused = false>
  static void score_listed(const ListedNumbers& list, const TileRows& keys, const float* q, Index rows, float* out,
                           Index out_stride) {
    add_listed_keys<unused>(list, keys, q, rows, out, out_stride);
  }
  template <bool unused = false>
  static void accumulate_listed(const ListedNumbers& list, const TileRows& values, const float* p, Index p_stride,
                                Index rows, float* acc, Index acc_stride) {
    add_listed_values<unused>(list, values, p, p_stride, rows, acc, acc_stride);
  }
  template <int bits>
  static void decode_keys(const Layout& layout, const Values& values, const float* levels, const std::byte* tile,
                          Index first, const float* gain, const float* shift, float* out) {
    block_of_keys<bits>(layout, values, levels, tile, first, gain, shift, out);
  }
  template <bool unused = false>
  static void add_listed(const ListedNumbers& list, Index first, Index width, const float* gain, float* block) {
    add_listed_block<unused>(list, first, width, gain, block);
  }
  template <bool unused = false>
  static void turn_offsets(TurnedQuery& q) {
    turn_tables<unused>(q);
  }
  template <bool unused = false>
  static void turn_block(const TurnedQuery& q, const Position* positions, float* cosines, float* sines) {
    turn_table<unused>(q, positions, cosines, sines);
  }
  template <bool unused = false>
  static void turn_rows(const TurnedQuery& q, Position position, const float* rows, Index n, float* to) {
    turn_query<unused>(q, position, rows, n, to);
  }
  template <bool unused = false>
  static void step_rows(const TurnedQuery& q, Index n, float* rows) {
    turn_rows_back<unused>(rows, n, round_up(q.pairs, 16), q.step_cosines, q.step_sines, rows);
  }
  template <bool unused = false>
  static void score_turned(const TurnedQuery& q, const float* block, const float* cosines, const float* sines,
                           const float* turned, const float* rest, Index rows, std::uint64_t listed, Index first,
                           float* out, Index out_stride) {
    score_turned_block<unused>(q, block, cosines, sines, turned, rest, rows, listed, first, out, out_stride);
  }
  static constexpr Index quantize_lanes = lanes;
  template <bool unused = false>
  static void place(const Layout& layout, std::byte* tile, Index slot, const std::uint8_t* codes) {
    place_row<unused>(layout, tile, slot, codes);
  }
};
