// Lists of single numbers beside codes, and keys that are turned before they meet a query: for every instruction set, as
// loops.inl, which includes this. Blocks of keys are floats [channels][16 tokens] here.

// ---- four rows side by side ----------------------------------------------------------------------------------------

#if KVPARE_MANY_REGISTERS
// Four rows of p side by side: out [count rounded up to 16][4]. Of fewer rows the last one counts for the others.
KVPARE_INLINE void fours_of(const float* p, Index p_stride, int rows, Index count, float* out) {
  const Ints low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const Ints high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  const Ints first = _mm512_setr_epi32(0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23);
  const Ints second = _mm512_setr_epi32(8, 9, 24, 25, 10, 11, 26, 27, 12, 13, 28, 29, 14, 15, 30, 31);
  for (Index t = 0; t < count; t += 16, out += 64) {
    Vec x[4];
    KVPARE_UNROLL for (int i = 0; i < 4; ++i) {
      const float* from = p + (i < rows ? i : rows - 1) * p_stride + t;
      x[i] = count - t >= 16 ? load(from) : load_part(from, static_cast<int>(count - t));
    }
    const Vec a = _mm512_permutex2var_ps(x[0], low, x[1]), b = _mm512_permutex2var_ps(x[2], low, x[3]);
    const Vec c = _mm512_permutex2var_ps(x[0], high, x[1]), d = _mm512_permutex2var_ps(x[2], high, x[3]);
    store(out, _mm512_permutex2var_ps(a, first, b)), store(out + 16, _mm512_permutex2var_ps(a, second, b));
    store(out + 32, _mm512_permutex2var_ps(c, first, d)), store(out + 48, _mm512_permutex2var_ps(c, second, d));
  }
}
// sums[channel] += four * delta of the tokens listed: lists are [n][stride], by slot; `slots` null: token t is in slot t.
KVPARE_INLINE void add_listed_fours(const float* fours, const std::uint8_t* slots, int count, Index n, Index stride,
                                    const float* deltas, const std::uint8_t* channels, float* sums) {
  for (int t = 0; t < count; ++t)  // a token's channels differ: one need not wait for the other
    for (Index k = 0, at = slots != nullptr ? slots[t] : t; k < n; ++k, at += stride) {
      float* to = sums + 4 * Index{channels[at]};
      store_four(to, load_four(to) + load_four(fours + 4 * t) * deltas[at]);
    }
}
// And back: 16 of them, row by row.
KVPARE_INLINE void rows_of_fours(const float* fours, Vec (&rows)[4]) {
  const Ints even = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
  const Ints odd = _mm512_setr_epi32(2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31);
  const Vec a = load(fours), b = load(fours + 16), c = load(fours + 32), d = load(fours + 48);
  const Vec ab = _mm512_permutex2var_ps(a, even, b), cd = _mm512_permutex2var_ps(c, even, d);
  const Vec ef = _mm512_permutex2var_ps(a, odd, b), gh = _mm512_permutex2var_ps(c, odd, d);
  rows[0] = _mm512_shuffle_f32x4(ab, cd, 0x44), rows[1] = _mm512_shuffle_f32x4(ab, cd, 0xee);
  rows[2] = _mm512_shuffle_f32x4(ef, gh, 0x44), rows[3] = _mm512_shuffle_f32x4(ef, gh, 0xee);
}
#endif

// ---- numbers beside codes ------------------------------------------------------------------------------------------

// The deltas of a tile, [slots][tokens] halves, as floats.
inline void read_deltas(const ListedNumbers& list, float* to) {
  const Index n = list.slots * list.tokens;
  for (Index i = 0; i < n; i += lanes) store(to + i, load(reinterpret_cast<const half*>(list.deltas) + i));
}

// out[i][t] += sum over slots of q_i[channel] * delta, of the tokens that are looked at; q [rows][max_width], 0 beyond the width.
template <bool unused = false>
void add_listed_keys(const ListedNumbers& list, const TileRows& keys, const float* q, Index rows, float* out,
                            Index out_stride) {
  constexpr std::uint64_t whole = (std::uint64_t{1} << lanes) - 1;
  const std::uint64_t listed = listed_slots(keys);
  const half* deltas = reinterpret_cast<const half*>(list.deltas);
  const std::uint8_t* channels = reinterpret_cast<const std::uint8_t*>(list.channels);
  for (Index t = 0; t < list.tokens; t += lanes) {
    const std::uint64_t here = listed >> t & whole;
    if (here == 0) continue;
    const int before = t == 0 ? 0 : __builtin_popcountll(listed << (64 - t));
    for (Index k = 0; k < list.slots; k += 2) {
      const Ints at0 = widen_bytes(channels + k * list.tokens + t), at1 = widen_bytes(channels + (k + 1) * list.tokens + t);
      const Vec delta0 = load(deltas + k * list.tokens + t), delta1 = load(deltas + (k + 1) * list.tokens + t);
      for (Index i = 0; i < rows; ++i) {
        const float* row = q + i * max_width;
        float* to = out + i * out_stride + before;
        const Vec more = fma(pick_floats(row, at0), delta0, mul(pick_floats(row, at1), delta1));
        if (here == whole) store(to, add(load(to), more));
        else store_listed(to, add(load_listed(to, here), more), here);
      }
    }
  }
}

// acc[i][channel] += p_i * delta. A channel beyond the width, which nobody writes, counts for nothing.
inline void add_listed_values_of_one(const ListedNumbers& list, const TileRows& values, const float* deltas, const float* p,
                                     float* acc) {
  const Index width = values.shape.width;
  for (Index k = 0; k < list.slots; ++k) {
    const std::uint8_t* channels = reinterpret_cast<const std::uint8_t*>(list.channels) + k * list.tokens;
    for (int t = 0; t < values.count; ++t) {
      const Index slot = values.slots[t], c = channels[slot];
      if (c < width) acc[c] += p[t] * deltas[k * list.tokens + slot];
    }
  }
}

// The same of four rows, which lie side by side while the list is gone through; width a multiple of 4.
inline void add_listed_values_of_four(const ListedNumbers& list, const TileRows& values, const float* deltas, const float* p,
                                      Index p_stride, float* acc, Index acc_stride) {
  const Index width = values.shape.width;
  const std::uint8_t* channels = reinterpret_cast<const std::uint8_t*>(list.channels);
#if KVPARE_MANY_REGISTERS
  if (width % 16 == 0) {  // sums beyond the width may take anything: nobody reads them
    alignas(64) float fours[4 * max_tokens], sums[4 * max_width];
    fours_of(p, p_stride, 4, values.count, fours);
    for (Index c = 0; c < 4 * width; c += lanes) store(sums + c, zero());
    add_listed_fours(fours, values.slots, values.count, list.slots, list.tokens, deltas, channels, sums);
    for (Index c = 0; c < width; c += lanes) {
      Vec rows[4];
      rows_of_fours(sums + 4 * c, rows);
      KVPARE_UNROLL for (int i = 0; i < 4; ++i) {
        float* to = acc + i * acc_stride + c;
        store(to, add(load(to), rows[i]));
      }
    }
    return;
  }
#endif
  alignas(64) Four sums[max_width];
  for (Index c = 0; c < width; ++c) sums[c] = Four{};
  for (int t = 0; t < values.count; ++t) {
    const Four row = {p[t], p[p_stride + t], p[2 * p_stride + t], p[3 * p_stride + t]};
    for (Index at = values.slots[t]; at < list.slots * list.tokens; at += list.tokens)
      if (channels[at] < width) sums[channels[at]] += row * deltas[at];
  }
  for (Index c = 0; c < width; c += 4) {
    Four rows[4] = {sums[c], sums[c + 1], sums[c + 2], sums[c + 3]};
    transpose(rows);
    KVPARE_UNROLL for (int i = 0; i < 4; ++i) {
      float* to = acc + i * acc_stride + c;
      store_four(to, load_four(to) + rows[i]);
    }
  }
}

// Those of all rows.
template <bool unused = false>
void add_listed_values(const ListedNumbers& list, const TileRows& values, const float* p, Index p_stride, Index rows,
                       float* acc, Index acc_stride) {
  alignas(64) float deltas[max_listed * max_tokens];
  read_deltas(list, deltas);
  Index i = 0;
  for (; i + 4 <= rows; i += 4)
    add_listed_values_of_four(list, values, deltas, p + i * p_stride, p_stride, acc + i * acc_stride, acc_stride);
  for (; i < rows; ++i) add_listed_values_of_one(list, values, deltas, p + i * p_stride, acc + i * acc_stride);
}

// ---- codes as floats -----------------------------------------------------------------------------------------------

struct FloatBlock {
  Layout layout;
  const std::byte* tile;
  Index first;          // token
  const float* levels;  // [16], over and over again where there are fewer
  const float* scale;   // [groups][tokens], where scaled
  const float* zero;
  const float* gain;  // [width], where stretched
  const float* shift;
  float* out;           // [width][16]
};

template <int bits, bool scaled, bool stretched, int j>
KVPARE_INLINE void floats_of_quads(const FloatBlock& b, const Ints (&x)[Units{bits}.vectors()], const FloatTable& table,
                                   Index lane, Index channel, Vec scale, Vec zero_at) {
  constexpr bool whole = bits == 4 || bits == 2 || bits == 1;  // a code's bits lie together: the table sees to the others
  Ints codes = x[0];
  if constexpr (!whole) codes = codes_of<bits, 0, j>(x);
  float* to = b.out + (channel + 4 * j) * 16 + lane;
  const float *gain = b.gain + channel + 4 * j, *shift = b.shift + channel + 4 * j;
  const Vec v[4] = {look_up_floats<bits>(table, shift_down<whole ? bits * j : 0>(codes)),
                    look_up_floats<bits>(table, shift_down<(whole ? bits * j : 0) + 8>(codes)),
                    look_up_floats<bits>(table, shift_down<(whole ? bits * j : 0) + 16>(codes)),
                    look_up_floats<bits>(table, shift_down<(whole ? bits * j : 0) + 24>(codes))};
  KVPARE_UNROLL for (int k = 0; k < 4; ++k) {
    Vec y = v[k];
    if constexpr (scaled) y = fma(y, scale, zero_at);
    if constexpr (stretched) y = fma(y, broadcast(gain[k]), broadcast(shift[k]));
    store(to + k * 16, y);
  }
  if constexpr (j + 1 < Units{bits}.quads())
    floats_of_quads<bits, scaled, stretched, j + 1>(b, x, table, lane, channel, scale, zero_at);
}

// 16 keys with groups along channels.
template <int bits, bool scaled, bool stretched>
void keys_as_floats(const FloatBlock& b) {
  constexpr Units unit{bits};
  constexpr int vectors = unit.vectors();
  const FloatTable table = float_table(b.levels);
  const Index tokens = b.layout.shape.tokens, width = b.layout.shape.width;
  for (Index lane = 0; lane < 16; lane += lanes) {
    const std::byte* at = b.tile + b.first / 16 * b.layout.block_bytes() + lane * 4;
    for (Index c = 0; c < width; c += unit.depth(), at += unit.bytes()) {
      Ints x[vectors];
      KVPARE_UNROLL for (int v = 0; v < vectors; ++v) x[v] = load_ints(at + 64 * v);
      Vec scale = zero(), zero_at = zero();
      if constexpr (scaled) {
        const Index group = c / b.layout.group * tokens + b.first + lane;
        scale = load(b.scale + group), zero_at = load(b.zero + group);
      }
      floats_of_quads<bits, scaled, stretched, 0>(b, x, table, lane, c, scale, zero_at);
    }
  }
}

// Keys of one block of 16 slots as floats [channel][16], `gain` and `shift` by channel where they are given.
template <int bits>
void block_of_keys(const Layout& layout, const Values& values, const float* levels, const std::byte* tile, Index first,
                   const float* gain, const float* shift, float* out) {
  const FloatBlock block{layout, tile, first, levels, nullptr, nullptr, gain, shift, out};
  if (layout.scale == ScaleType::one && layout.zero == ZeroType::none && values.factor == 1) {
    if (gain != nullptr) return keys_as_floats<bits, false, true>(block);
    return keys_as_floats<bits, false, false>(block);
  }
  alignas(64) float scale[max_groups * max_tokens], zeros[max_groups * max_tokens];
  read_groups(layout, values, tile, 0, layout.groups(), scale, zeros);
  FloatBlock scaled = block;
  scaled.scale = scale, scaled.zero = zeros;
  if (gain != nullptr) return keys_as_floats<bits, true, true>(scaled);
  keys_as_floats<bits, true, false>(scaled);
}

// The listed numbers of 16 keys, times the gains of their channels (null = 1), on top of the block.
template <bool unused = false>
void add_listed_block(const ListedNumbers& list, Index first, Index width, const float* gain, float* block) {
  alignas(64) float deltas[16];
  for (Index k = 0; k < list.slots; ++k) {
    const half* from = reinterpret_cast<const half*>(list.deltas) + k * list.tokens + first;
    const std::uint8_t* channels = reinterpret_cast<const std::uint8_t*>(list.channels) + k * list.tokens + first;
    for (int l = 0; l < 16; l += lanes) store(deltas + l, load(from + l));
    for (int l = 0; l < 16; ++l) {
      const Index c = channels[l];
      if (c < width) block[c * 16 + l] += deltas[l] * (gain != nullptr ? gain[c] : 1.0f);
    }
  }
}

// ---- keys that are turned -------------------------------------------------------------------------------------------

// Cosine and sine of 2 pi x, |x| <= 1/2: of half the angle by series, then of the whole. Off by less than 4e-7.
KVPARE_INLINE void turn_of(Vec x, Vec& cosine, Vec& sine) {
  const Vec h = mul(x, broadcast(3.14159265f)), y = mul(h, h);
  Vec c = broadcast(2.08767570e-9f), s = broadcast(-2.50521084e-8f);
  c = fma(c, y, broadcast(-2.75573192e-7f)), s = fma(s, y, broadcast(2.75573192e-6f));
  c = fma(c, y, broadcast(2.48015873e-5f)), s = fma(s, y, broadcast(-1.98412698e-4f));
  c = fma(c, y, broadcast(-1.38888889e-3f)), s = fma(s, y, broadcast(8.33333333e-3f));
  c = fma(c, y, broadcast(4.16666667e-2f)), s = fma(s, y, broadcast(-1.66666667e-1f));
  c = fma(c, y, broadcast(-0.5f)), s = fma(s, y, broadcast(1.0f));
  c = fma(c, y, broadcast(1.0f)), s = mul(s, h);
  const Vec twice = add(s, s);
  sine = mul(twice, c), cosine = sub(broadcast(1.0f), mul(twice, s));
}

// Of n angles, positions times phases modulo a whole turn; n a multiple of 16.
inline void turns_of(const std::int32_t* angles, Index n, float* cosines, float* sines) {
  const Vec unit = broadcast(0x1p-32f);
  for (Index i = 0; i < n; i += lanes) {
    Vec c, s;
    turn_of(mul(to_floats(load_ints(angles + i)), unit), c, s);
    store(cosines + i, c), store(sines + i, s);
  }
}

inline void step_angles(TurnedQuery& q) {
  alignas(64) std::int32_t angles[max_width / 2];
  for (Index i = 0; i < max_width / 2; ++i) angles[i] = static_cast<std::int32_t>(16 * q.phases[i] >> 32);
  turns_of(angles, max_width / 2, q.step_cosines, q.step_sines);
}

// Those of 16 positions in every pair: [pairs][16].
template <bool unused = false>
void turn_table(const TurnedQuery& q, const Position* positions, float* cosines, float* sines) {
  alignas(64) std::int32_t angles[16];
  for (Index i = 0; i < q.pairs; ++i) {
    for (int l = 0; l < 16; ++l)
      angles[l] = static_cast<std::int32_t>(
          static_cast<std::uint64_t>(static_cast<std::int64_t>(positions[l])) * q.phases[i] >> 32);
    turns_of(angles, 16, cosines + i * 16, sines + i * 16);
  }
}

// Of what every query needs: positions 0 … 15, and the step of 16.
template <bool unused = false>
void turn_tables(TurnedQuery& q) {
  Position offsets[16];
  for (int l = 0; l < 16; ++l) offsets[l] = l;
  turn_table<unused>(q, offsets, q.cosines, q.sines);
  step_angles(q);
}

// Rows of pairs, by angles of the pairs; `to` may be the rows.
template <bool unused = false>
void turn_rows_back(const float* rows, Index n, Index pairs, const float* cosines, const float* sines, float* to) {
  for (Index r = 0; r < n; ++r, rows += turned_floats, to += turned_floats)
    for (Index i = 0; i < pairs; i += lanes) {
      const Vec x = load(rows + i), y = load(rows + max_width / 2 + i), c = load(cosines + i), s = load(sines + i);
      store(to + i, fma(x, c, mul(y, s))), store(to + max_width / 2 + i, sub(mul(y, c), mul(x, s)));
    }
}

// Rows of a query turned back by a position: of pairs first channels, second ones, then the rest.
template <bool unused = false>
void turn_query(const TurnedQuery& q, Position position, const float* rows, Index n, float* to) {
  alignas(64) std::int32_t angles[max_width / 2];
  alignas(64) float cosines[max_width / 2], sines[max_width / 2];
  const Index pairs = q.pairs, padded = round_up(pairs, 16);
  for (Index i = 0; i < padded; ++i)
    angles[i] = static_cast<std::int32_t>(static_cast<std::uint64_t>(static_cast<std::int64_t>(position)) * q.phases[i] >> 32);
  turns_of(angles, padded, cosines, sines);
  turn_rows_back<unused>(rows, n, padded, cosines, sines, to);
}

// Scores of R rows with a block of 16 keys, which turn by angles of their own: out [R][16].
template <int R>
void turned_scores(const TurnedQuery& q, const float* block, const float* cosines, const float* sines,
                   const float* turned, const float* rest, float* out) {
  constexpr Index seconds = max_width / 2;
  for (Index lane = 0; lane < 16; lane += lanes) {
    Vec a[R], b[R];
    KVPARE_UNROLL for (int i = 0; i < R; ++i) a[i] = b[i] = zero();
    for (Index pair = 0; pair < q.pairs; ++pair) {
      const float* at = block + pair * q.first_step * 16 + lane;
      Vec x = load(at), y = load(at + q.partner * 16), c = load(cosines + pair * 16 + lane), s = load(sines + pair * 16 + lane);
      if constexpr (lanes > 4) keep(x), keep(y), keep(c), keep(s);  // each is used twice: loading it again would take a port
      const Vec first = sub(mul(x, c), mul(y, s)), second = fma(x, s, mul(y, c));
      KVPARE_UNROLL for (int i = 0; i < R; ++i) {
        a[i] = fma(first, broadcast(turned[i * turned_floats + pair]), a[i]);
        b[i] = fma(second, broadcast(turned[i * turned_floats + seconds + pair]), b[i]);
      }
    }
    for (Index c = 2 * q.pairs; c < q.width; ++c) {
      const Vec x = load(block + c * 16 + lane);
      KVPARE_UNROLL for (int i = 0; i < R; ++i) a[i] = fma(x, broadcast(rest[i * turned_floats + max_width + c]), a[i]);
    }
    KVPARE_UNROLL for (int i = 0; i < R; ++i) store(out + i * 16 + lane, add(a[i], b[i]));
  }
}

// Scores [16] of all rows to where the listed ones of them go.
inline void place_scores(const float* scores, Index rows, std::uint64_t listed, Index first, float* out, Index out_stride) {
  constexpr std::uint64_t whole = (std::uint64_t{1} << lanes) - 1;
  for (Index lane = 0; lane < 16; lane += lanes) {
    const Index t = first + lane;
    const std::uint64_t here = listed >> t & whole;
    if (here == 0) continue;
    const int before = t == 0 ? 0 : __builtin_popcountll(listed << (64 - t));
    for (Index i = 0; i < rows; ++i) {
      float* to = out + i * out_stride + before;
      const Vec v = load(scores + i * 16 + lane);
      if (here == whole) store(to, v);
      else store_listed(to, v, here);
    }
  }
}

template <bool unused = false>
void score_turned_block(const TurnedQuery& q, const float* block, const float* cosines, const float* sines,
                               const float* turned, const float* rest, Index rows, std::uint64_t listed, Index first,
                               float* out, Index out_stride) {
  alignas(64) float scores[4 * 16];
  for (Index i = 0, n; i < rows; i += n) {
    n = rows - i >= 4 ? 4 : rows - i >= 2 ? 2 : 1;
    const float *t = turned + i * turned_floats, *r = rest + i * turned_floats;
    if (n == 4) turned_scores<4>(q, block, cosines, sines, t, r, scores);
    else if (n == 2) turned_scores<2>(q, block, cosines, sines, t, r, scores);
    else turned_scores<1>(q, block, cosines, sines, t, r, scores);
    place_scores(scores, n, listed, first, out + i * out_stride, out_stride);
  }
}
