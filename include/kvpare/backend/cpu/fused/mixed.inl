// Attention on tiles of mixed bits, once for every instruction set; on what loops.inl and the set's ints_*.inl
// supply, and
//
//   pick(table, at)      table[at[l]] in lane l; 64 floats
//
// Scores are made by place and picked from there; probabilities are picked into places first. Then the blocks of a
// tile share the probabilities' integers and the sums: a block's bits are but a power of two in the scales of its
// tokens.

// Scales and zeros by place. A zero becomes what the middle code stands for, where blocks have codes.
inline void read_mixed(const MixedTile& tile, float* scale, float* zeros) {
  const auto* scales = reinterpret_cast<const half*>(tile.scales);
  const auto* zeros_at = reinterpret_cast<const half*>(tile.zeros);
  for (Index t = 0; t < tile.shape.tokens; t += lanes) {
    const int bits = tile.bits[t / 16];
    const Vec s = load(scales + t);
    store(scale + t, s);
    store(zeros + t, fma(s, broadcast(bits > 0 ? static_cast<float>(1 << (bits - 1)) : 0.0f), load(zeros_at + t)));
  }
}

// Deltas by slot: [outliers][max_tokens]; and their channels, within the row.
inline void read_outliers(const MixedTile& tile, float* delta, std::uint8_t* channel) {
  using Sixteen = std::uint8_t __attribute__((vector_size(16)));
  const Index tokens = tile.shape.tokens;
  const Sixteen last = Sixteen{} + static_cast<std::uint8_t>(tile.shape.width - 1);
  for (Index x = 0; x < tile.outliers; ++x) {
    const auto* from = reinterpret_cast<const half*>(tile.deltas) + x * tokens;
    for (Index t = 0; t < tokens; t += lanes) store(delta + x * max_tokens + t, load(from + t));
    for (Index t = 0; t < tokens; t += 16) {
      Sixteen c;
      std::memcpy(&c, tile.channels + x * tokens + t, 16);
      c = c < last ? c : last;
      std::memcpy(channel + x * max_tokens + t, &c, 16);
    }
  }
}

// What outliers add to the scores of four rows, by slot: out[4][max_tokens].
inline void score_outliers(const MixedTile& tile, const float* delta, const std::uint8_t* channel, const float* four,
                           float* out) {
  for (Index t = 0; t < tile.shape.tokens; t += 4) {
    Four sum[4];
    KVPARE_UNROLL for (int l = 0; l < 4; ++l) sum[l] = Four{};
    for (Index x = 0; x < tile.outliers; ++x)
      KVPARE_UNROLL for (int l = 0; l < 4; ++l) {
        const Index at = x * max_tokens + t + l;
        sum[l] += load_four(four + 4 * Index{channel[at]}) * delta[at];
      }
    transpose(sum);
    KVPARE_UNROLL for (int i = 0; i < 4; ++i) store_four(out + i * max_tokens + t, sum[i]);
  }
}

template <int bits>
void score_blocks(Index rows, const MixedKeyCall& call, Index first, Index end, Index row, const float* scale,
                  const float* zeros, AheadLines& ahead, float* out) {
  constexpr bool wide = bits == 8 || !has_dots;
  KeyCall keys;
  keys.layout = call.tile.layout(bits);
  keys.codes = call.tile.codes[first];
  keys.out_stride = max_tokens;
  const Index tokens = (end - first) * 16;
  const KeyRange range{0, tokens, ~std::uint64_t{0}, 1, call.tile.shape.width, scale + first * 16, zeros + first * 16,
                       max_tokens};
  score_some<bits, false, wide>(rows, keys, range, call.queries[bits] + row, nullptr, ahead, out + first * 16);
}

template <bool unused = false>
void score_mixed(const MixedKeyCall& call) {
  constexpr Index at_once = 28;
  const MixedTile& tile = call.tile;
  const Index blocks = tile.shape.tokens / 16;
  alignas(64) float scale[max_tokens], zeros[max_tokens], added[at_once * max_tokens], scores[most_rows * max_tokens];
  alignas(64) float delta[16 * max_tokens];
  std::uint8_t channel[16 * max_tokens];
  read_mixed(tile, scale, zeros);
  read_outliers(tile, delta, channel);
  std::uint8_t slots[max_tokens] = {};
  if (!tile.gapless) std::memcpy(slots, tile.slots, static_cast<std::size_t>(tile.count));
  AheadLines ahead(call.ahead, blocks * (tile.shape.width / 16) / 2 * ceil_div(call.rows, most_rows));
  for (Index start = 0; start < call.rows; start += at_once) {
    const Index end = start + at_once < call.rows ? start + at_once : call.rows;
    if (tile.outliers > 0)
      for (Index i = start; i < end; i += 4)
        score_outliers(tile, delta, channel, call.fours + i * tile.shape.width, added + (i - start) * max_tokens);
    for (Index i = start, n; i < end; i += n) {
      n = rows_at_once(end - i);
      for (Index b = 0, next; b < blocks; b = next) {
        for (next = b + 1; next < blocks && tile.bits[next] == tile.bits[b] && tile.used[next] == tile.used[b];) ++next;
        if (!tile.used[b]) continue;
        switch (tile.bits[b]) {
          case 1: score_blocks<1>(n, call, b, next, i, scale, zeros, ahead, scores); break;
          case 2: score_blocks<2>(n, call, b, next, i, scale, zeros, ahead, scores); break;
          case 3: score_blocks<3>(n, call, b, next, i, scale, zeros, ahead, scores); break;
          case 4: score_blocks<4>(n, call, b, next, i, scale, zeros, ahead, scores); break;
          case 5: score_blocks<5>(n, call, b, next, i, scale, zeros, ahead, scores); break;
          case 8: score_blocks<8>(n, call, b, next, i, scale, zeros, ahead, scores); break;
          default:
            for (Index j = 0; j < n; ++j)
              for (Index t = b * 16; t < next * 16; t += lanes)
                store(scores + j * max_tokens + t, mul(broadcast(call.queries[1][i + j].sum[0]), load(zeros + t)));
        }
      }
      for (Index j = 0; j < n; ++j) {
        float* out = call.out + (i + j) * call.out_stride;
        for (int t = 0; t < tile.count; t += lanes) {
          Vec v = pick(scores + j * max_tokens, tile.places + t);
          if (tile.outliers > 0) {
            const float* more = added + (i + j - start) * max_tokens;
            v = add(v, tile.gapless ? load(more + t) : pick(more, slots + t));
          }
          if (tile.count - t >= lanes) store(out + t, v);
          else store_part(out + t, v, tile.count - t);
        }
      }
    }
  }
  ahead.rest();
}

// ---- values ----

// Scales are taken times this: products with the smallest probabilities stay normal numbers, which are a lot faster.
inline constexpr float p_unit = 0x1p40f;

struct MixedValueRun {
  const MixedTile& tile;
  const ValueRow* p;
  const float* alpha;
  const float *factor, *add;
  const float* outliers;  // [R / 4][max_width][4], or null
  float* acc;
  Index acc_stride;
  AheadLines* ahead;
};

// Every fourth number of 64, from `first` on.
#if KVPARE_MANY_REGISTERS
KVPARE_INLINE Vec every_fourth(const float* from, int first) {
  alignas(16) static constexpr std::uint8_t at[4][16] = {{0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60},
                                                         {1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 53, 57, 61},
                                                         {2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46, 50, 54, 58, 62},
                                                         {3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47, 51, 55, 59, 63}};
  return pick(from, at[first]);
}
// p * delta, summed by channel, of four rows side by side: a channel is one addition for all of them.
template <int R>
void outlier_fours(const MixedTile& tile, const float* delta, const std::uint8_t* channel, const float* p, Index p_stride,
                   float* sums) {
  for (int first = 0; first < R; first += 4, sums += 4 * max_width) {
    alignas(64) float fours[4 * max_tokens];
    fours_of(p + first * p_stride, p_stride, R - first < 4 ? R - first : 4, tile.count, fours);
    for (Index c = 0; c < 4 * tile.shape.width; c += lanes) store(sums + c, zero());
    add_listed_fours(fours, nullptr, tile.count, tile.outliers, max_tokens, delta, channel, sums);
  }
}
#endif

template <bool wide, int R, int W>
struct MixedLoop {
  static constexpr bool by_fours = KVPARE_MANY_REGISTERS && R >= 4;

  template <int bits>
  static KVPARE_INLINE void block(const std::byte* codes, Index channel, const std::uint32_t* p,
                                  typename ValueLoop<bits, Levels::plain, wide, R, W>::Sums& sum) {
    constexpr Units unit{bits};
    constexpr Index units = 16 / unit.depth();
    KVPARE_UNROLL for (Index u = 0; u < units; ++u) {
      Ints x[W][1];
      KVPARE_UNROLL for (int w = 0; w < W; ++w) {
        const Index c = channel + w * lanes;
        x[w][0] = load_ints(codes + (c / 16 * units + u) * unit.bytes() + c % 16 * 4);
      }
      ValueLoop<bits, Levels::plain, wide, R, W>::template quads<0>(x, p + u * unit.quads(), nullptr, Ints{}, sum);
    }
  }

  static void run(const MixedValueRun& run, Index channel) {
    constexpr int planes = has_dots && wide ? 2 : 1;
    Ints sum[R][W][planes];
    KVPARE_UNROLL for (int i = 0; i < R; ++i)
      KVPARE_UNROLL for (int w = 0; w < W; ++w)
        KVPARE_UNROLL for (int k = 0; k < planes; ++k) sum[i][w][k] = each_int(0);
    const MixedTile& tile = run.tile;
    for (Index b = 0; b * 16 < tile.shape.tokens; ++b) {
      if (!tile.used[b]) continue;
      run.ahead->step();
      const std::uint32_t* p = run.p->p[0] + 4 * b;
      if (tile.bits[b] == 2) block<2>(tile.codes[b], channel, p, sum);
      else if (tile.bits[b] == 4) block<4>(tile.codes[b], channel, p, sum);
      else if (tile.bits[b] == 8) block<8>(tile.codes[b], channel, p, sum);
    }
    KVPARE_UNROLL for (int i = 0; i < R; ++i) {
      const float alpha = run.alpha == nullptr ? 1.0f : run.alpha[i];
      KVPARE_UNROLL for (int w = 0; w < W; ++w) {
        float* acc = run.acc + i * run.acc_stride + channel + w * lanes;
        Ints all = sum[i][w][0];
        if constexpr (planes == 2) all = add_ints(times_256(all), sum[i][w][1]);
        Vec old = broadcast(run.add[i]);
#if KVPARE_MANY_REGISTERS
        if constexpr (by_fours)
          if (run.outliers != nullptr)
            old = add(old, every_fourth(run.outliers + (i / 4 * max_width + channel + w * lanes) * 4, i % 4));
#endif
        if (alpha != 0) old = fma(load(acc), broadcast(alpha), old);
        store(acc, fma(to_floats(all), broadcast(run.factor[i]), old));
      }
    }
  }
};

template <bool wide, int R>
void accumulate_mixed_rows(const MixedValueCall& call, const std::uint8_t* at, const float* scale, const float* zeros,
                           const float* delta, const std::uint8_t* channel, const float* p, const float* alpha,
                           AheadLines& ahead, float* acc) {
  const MixedTile& tile = call.tile;
  alignas(64) float x[R][max_tokens], row[max_tokens];
  float top[R], bad[R], factor[R], extra[R];
  Vec tops[R], bads[R], extras[R];
  KVPARE_UNROLL for (int i = 0; i < R; ++i) {
    const float* from = p + i * call.p_stride;
    if (tile.count < max_tokens) {
      for (Index t = 0; t < max_tokens; t += lanes) {
        const Index left = tile.count - t;
        store(row + t, left >= lanes ? load(from + t) : left > 0 ? load_part(from + t, static_cast<int>(left)) : zero());
      }
      from = row;
    }
    Vec most = zero(), odd = zero(), sum = zero();
    KVPARE_UNROLL for (Index t = 0; t < max_tokens; t += lanes) {
      const Vec v = pick(from, at + t);
      const Vec y = mul(v, load(scale + t));
      store(x[i] + t, y);
      most = max(y, most), odd = fma(y, zero(), odd), sum = fma(v, load(zeros + t), sum);
    }
    tops[i] = most, bads[i] = odd, extras[i] = sum;
  }
  max_each(tops, R, top), sum_each(bads, R, bad), sum_each(extras, R, extra);
  ValueRow rows[R];
  alignas(64) float up[max_tokens];
  KVPARE_UNROLL for (int i = 0; i < R; ++i) {
    const bool counts = top[i] >= 0x1p-100f * p_unit && bad[i] == 0;
    const Vec factor_up = broadcast(counts ? largest_p<wide> / top[i] : 0.0f);
    for (Index t = 0; t < max_tokens; t += lanes) store(up + t, factor_up);
    if (!counts)
      for (Index t = 0; t < max_tokens; t += lanes) store(x[i] + t, zero());
    pack_row<wide>(x[i], up, 1.0f, max_tokens, rows[i]);
    factor[i] = (counts ? top[i] / (largest_p<wide> * p_unit) : 0.0f) + bad[i];
  }
  alignas(64) float sums[MixedLoop<wide, R, 1>::by_fours ? (R + 3) / 4 * 4 * max_width : 1];
#if KVPARE_MANY_REGISTERS
  if constexpr (MixedLoop<wide, R, 1>::by_fours)
    if (tile.outliers > 0) outlier_fours<R>(tile, delta, channel, p, call.p_stride, sums);
#endif
  const MixedValueRun run{tile, rows, alpha, factor, extra, tile.outliers > 0 ? sums : nullptr, acc, call.acc_stride, &ahead};
  Index c = 0;
  if constexpr ((has_dots && wide ? 2 : 1) * R <= value_sums)
    for (; c + 2 * lanes <= tile.shape.width; c += 2 * lanes) MixedLoop<wide, R, 2>::run(run, c);
  for (; c < tile.shape.width; c += lanes) MixedLoop<wide, R, 1>::run(run, c);

  if constexpr (!MixedLoop<wide, R, 1>::by_fours)
    for (Index k = 0; k < tile.outliers; ++k)
      for (int t = 0; t < tile.count; ++t) {
        float* to = acc + channel[k * max_tokens + t];
        KVPARE_UNROLL for (int i = 0; i < R; ++i)
          to[i * call.acc_stride] += p[i * call.p_stride + t] * delta[k * max_tokens + t];
      }
}

template <bool wide>
void accumulate_mixed(const MixedValueCall& call) {
  const MixedTile& tile = call.tile;
  alignas(64) float scale[max_tokens] = {}, zeros[max_tokens] = {}, delta[16 * max_tokens];
  std::uint8_t channel[16 * max_tokens], at[max_tokens];
  read_mixed(tile, scale, zeros);
  read_outliers(tile, delta, channel);
  if (!tile.gapless)  // of the listed slots, one after the other
    for (Index k = 0; k < tile.outliers * max_tokens; k += max_tokens)
      for (int t = 0; t < tile.count; ++t)
        delta[k + t] = delta[k + tile.slots[t]], channel[k + t] = channel[k + tile.slots[t]];
  for (Index t = 0; t < tile.shape.tokens; t += lanes) {
    const int bits = tile.bits[t / 16];  // codes are taken at the top of a byte
    store(scale + t, mul(absolute(load(scale + t)), broadcast(bits > 0 ? p_unit / static_cast<float>(1 << (8 - bits)) : 0.0f)));
  }
  for (Index t = 0; t < max_tokens; ++t) at[t] = max_tokens - 1;  // p has no 64th one, or every place is written now
  for (int t = 0; t < tile.count; ++t) at[tile.places[t]] = static_cast<std::uint8_t>(t);
  AheadLines ahead(call.ahead, tile.shape.tokens / 16 * ceil_div(tile.shape.width, 2 * lanes) * ceil_div(call.rows, most_rows));
  for (Index i = 0, n; i < call.rows; i += n) {
    n = rows_at_once(call.rows - i);
    const float* p = call.p + i * call.p_stride;
    const float* alpha = call.alpha == nullptr ? nullptr : call.alpha + i;
    float* acc = call.acc + i * call.acc_stride;
#if KVPARE_MANY_REGISTERS
    if (n == 7) {
      accumulate_mixed_rows<wide, 7>(call, at, scale, zeros, delta, channel, p, alpha, ahead, acc);
      continue;
    }
#endif
    if (n == 4) accumulate_mixed_rows<wide, 4>(call, at, scale, zeros, delta, channel, p, alpha, ahead, acc);
    else if (n == 2) accumulate_mixed_rows<wide, 2>(call, at, scale, zeros, delta, channel, p, alpha, ahead, acc);
    else accumulate_mixed_rows<wide, 1>(call, at, scale, zeros, delta, channel, p, alpha, ahead, acc);
  }
  ahead.rest();
}
