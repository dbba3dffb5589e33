// The loops behind the table of kernels.hpp, once for every instruction set (see there how it is included).
//
// They are written on what the set's vector file supplies:
//
//   Vec, lanes                                a vector of floats and its length
//   dot_rows, sum_rows, sum_vectors,          how much of a product is kept in registers: query rows at a time, vectors
//   panel_rows, panel_vectors                 of channels (sum) or of tokens (panel) at a time
//   InPanel<T>                                what an element T becomes in a packed panel
//   zero, broadcast, add, sub, mul, fma(a, b, c) = a * b + c
//   max(a, b)                                 b where either is NaN
//   load(p), store(p, v)                      from and to float, half or bfloat16
//   load_part(p, n), store_part(p, v, n)      the first n lanes, 0 < n < lanes; nothing behind them is touched
//   load_part(float p, n, rest)               the other lanes become `rest`
//   sum_of(v), max_of_lanes(v)                over the lanes
//   sum_four(a, b, c, d, out)                 out[0..3] = their four sums
//   nearest(x)                                to an integer, |x| < 2^22
//   times_power(p, n, x)                      p * 2^n; 0 where x < -126, NaN where x is

KVPARE_INLINE void prefetch(const std::byte* p) { __builtin_prefetch(p); }

inline constexpr Index line_bytes = 64;

template <class T>
KVPARE_INLINE const T* row_at(const RowSet& set, int t) {
  return reinterpret_cast<const T*>(set.row(t));
}

// ---- q·k over rows as they lie -------------------------------------------------------------------------------------
//
// Four tokens by R query rows at a time: every vector of keys is loaded and widened once for R rows, every vector of
// q once for four tokens, and the four sums of a row leave the lanes together.

template <class T, int R, bool Ahead>
KVPARE_INLINE void dot_block(const float* q, Index q_stride, Index width, const T* const (&key)[4],
                             const std::byte* const (&ahead)[4], float* out, Index out_stride, int tokens) {
  Vec sum[R][4];
  KVPARE_UNROLL for (int i = 0; i < R; ++i)
    KVPARE_UNROLL for (int t = 0; t < 4; ++t) sum[i][t] = zero();

  Index c = 0;
  for (; c + lanes <= width; c += lanes) {
    if constexpr (Ahead) {
      if (c * Index(sizeof(T)) % line_bytes == 0)
        KVPARE_UNROLL for (int t = 0; t < 4; ++t) prefetch(ahead[t] + c * Index(sizeof(T)));
    }
    Vec k[4];
    KVPARE_UNROLL for (int t = 0; t < 4; ++t) k[t] = load(key[t] + c);
    KVPARE_UNROLL for (int i = 0; i < R; ++i) {
      const Vec x = load(q + i * q_stride + c);
      KVPARE_UNROLL for (int t = 0; t < 4; ++t) sum[i][t] = fma(x, k[t], sum[i][t]);
    }
  }
  if (c < width) {
    const int n = static_cast<int>(width - c);
    KVPARE_UNROLL for (int i = 0; i < R; ++i) {
      const Vec x = load_part(q + i * q_stride + c, n);
      KVPARE_UNROLL for (int t = 0; t < 4; ++t) sum[i][t] = fma(x, load_part(key[t] + c, n), sum[i][t]);
    }
  }

  KVPARE_UNROLL for (int i = 0; i < R; ++i) {
    if (tokens == 4) {
      sum_four(sum[i][0], sum[i][1], sum[i][2], sum[i][3], out + i * out_stride);
    } else {
      float four[4];
      sum_four(sum[i][0], sum[i][1], sum[i][2], sum[i][3], four);
      for (int t = 0; t < tokens; ++t) out[i * out_stride + t] = four[t];
    }
  }
}

inline void prefetch_rows(const RowSet& next, int from, int to, Index bytes) {
  for (int t = from; t < to; ++t)
    for (Index b = 0; b < bytes; b += line_bytes) prefetch(next.row(t) + b);
}

template <class T>
void dot_typed(const float* q, Index q_stride, Index rows, Index width, const RowSet& keys, const RowSet& next,
               float* out, Index out_stride) {
  const Index bytes = width * Index(sizeof(T));
  int t = 0;
  for (; t < keys.count && rows > 0; t += 4) {
    const int tokens = keys.count - t < 4 ? keys.count - t : 4;
    const T* key[4];
    const std::byte* ahead[4];
    for (int j = 0; j < 4; ++j) {
      key[j] = row_at<T>(keys, j < tokens ? t + j : t);
      ahead[j] = t + j < next.count ? next.row(t + j) : reinterpret_cast<const std::byte*>(key[j]);
    }
    float* to = out + t;
    const float* from = q;
    Index left = rows;
    if (left >= dot_rows) {
      dot_block<T, dot_rows, true>(from, q_stride, width, key, ahead, to, out_stride, tokens);
      from += dot_rows * q_stride, to += dot_rows * out_stride, left -= dot_rows;
    }
    for (; left >= dot_rows; left -= dot_rows, from += dot_rows * q_stride, to += dot_rows * out_stride)
      dot_block<T, dot_rows, false>(from, q_stride, width, key, ahead, to, out_stride, tokens);
    if constexpr (dot_rows > 3)
      if (left == 3) dot_block<T, 3, true>(from, q_stride, width, key, ahead, to, out_stride, tokens);
    if constexpr (dot_rows > 2)
      if (left == 2) dot_block<T, 2, true>(from, q_stride, width, key, ahead, to, out_stride, tokens);
    if (left == 1) dot_block<T, 1, true>(from, q_stride, width, key, ahead, to, out_stride, tokens);
  }
  prefetch_rows(next, t, next.count, bytes);
}

inline void dot(const float* q, Index q_stride, Index rows, Index width, const RowSet& keys, const RowSet& next,
                float* out, Index out_stride) {
  switch (keys.dtype) {
    case DType::f16: return dot_typed<half>(q, q_stride, rows, width, keys, next, out, out_stride);
    case DType::bf16: return dot_typed<bfloat16>(q, q_stride, rows, width, keys, next, out, out_stride);
    default: return dot_typed<float>(q, q_stride, rows, width, keys, next, out, out_stride);
  }
}

// ---- acc = alpha·acc + p·v -----------------------------------------------------------------------------------------
//
// R rows by W vectors of channels stay in registers over all tokens of the page.

template <class T, int R, int W, bool Part>
KVPARE_INLINE void sum_block(const float* p, Index p_stride, const float* alpha, const RowSet& values,
                             const RowSet& next, Index c, int part, float* acc, Index acc_stride) {
  Vec sum[R][W];
  KVPARE_UNROLL for (int i = 0; i < R; ++i) {
    const float factor = alpha == nullptr ? 1.0f : alpha[i];
    KVPARE_UNROLL for (int w = 0; w < W; ++w) {
      const float* at = acc + i * acc_stride + c + w * lanes;
      sum[i][w] = zero();
      if (factor != 0) {
        if constexpr (Part) sum[i][w] = load_part(at, part);
        else sum[i][w] = load(at);
        sum[i][w] = mul(sum[i][w], broadcast(factor));
      }
    }
  }
  for (int t = 0; t < values.count; ++t) {
    const T* row = row_at<T>(values, t) + c;
    const std::byte* ahead = t < next.count ? next.row(t) + c * Index(sizeof(T)) : reinterpret_cast<const std::byte*>(row);
    for (Index b = 0; b < W * lanes * Index(sizeof(T)); b += line_bytes) prefetch(ahead + b);
    Vec v[W];
    KVPARE_UNROLL for (int w = 0; w < W; ++w) {
      if constexpr (Part) v[w] = load_part(row, part);
      else v[w] = load(row + w * lanes);
    }
    KVPARE_UNROLL for (int i = 0; i < R; ++i) {
      const Vec x = broadcast(p[i * p_stride + t]);
      KVPARE_UNROLL for (int w = 0; w < W; ++w) sum[i][w] = fma(x, v[w], sum[i][w]);
    }
  }
  KVPARE_UNROLL for (int i = 0; i < R; ++i)
    KVPARE_UNROLL for (int w = 0; w < W; ++w) {
      float* at = acc + i * acc_stride + c + w * lanes;
      if constexpr (Part) store_part(at, sum[i][w], part);
      else store(at, sum[i][w]);
    }
}

template <class T, int R>
void sum_rows_of(const float* p, Index p_stride, const float* alpha, Index width, const RowSet& values,
                 const RowSet& next, float* acc, Index acc_stride) {
  Index c = 0;
  for (; c + sum_vectors * lanes <= width; c += sum_vectors * lanes)
    sum_block<T, R, sum_vectors, false>(p, p_stride, alpha, values, next, c, 0, acc, acc_stride);
  for (; c + lanes <= width; c += lanes) sum_block<T, R, 1, false>(p, p_stride, alpha, values, next, c, 0, acc, acc_stride);
  if (c < width)
    sum_block<T, R, 1, true>(p, p_stride, alpha, values, next, c, static_cast<int>(width - c), acc, acc_stride);
}

template <class T>
void accumulate_typed(const float* p, Index p_stride, const float* alpha, Index rows, Index width,
                      const RowSet& values, const RowSet& next, float* acc, Index acc_stride) {
  Index i = 0;
  for (; i + sum_rows <= rows; i += sum_rows)
    sum_rows_of<T, sum_rows>(p + i * p_stride, p_stride, alpha == nullptr ? nullptr : alpha + i, width, values, next,
                             acc + i * acc_stride, acc_stride);
  const Index left = rows - i;
  p += i * p_stride, acc += i * acc_stride;
  if (alpha != nullptr) alpha += i;
  if constexpr (sum_rows > 3)
    if (left == 3) sum_rows_of<T, 3>(p, p_stride, alpha, width, values, next, acc, acc_stride);
  if constexpr (sum_rows > 2)
    if (left == 2) sum_rows_of<T, 2>(p, p_stride, alpha, width, values, next, acc, acc_stride);
  if (left == 1) sum_rows_of<T, 1>(p, p_stride, alpha, width, values, next, acc, acc_stride);
  prefetch_rows(next, rows > 0 ? values.count : 0, next.count, width * Index(sizeof(T)));
}

inline void accumulate(const float* p, Index p_stride, const float* alpha, Index rows, Index width,
                       const RowSet& values, const RowSet& next, float* acc, Index acc_stride) {
  switch (values.dtype) {
    case DType::f16: return accumulate_typed<half>(p, p_stride, alpha, rows, width, values, next, acc, acc_stride);
    case DType::bf16: return accumulate_typed<bfloat16>(p, p_stride, alpha, rows, width, values, next, acc, acc_stride);
    default: return accumulate_typed<float>(p, p_stride, alpha, rows, width, values, next, acc, acc_stride);
  }
}

// ---- softmax and rows of floats ------------------------------------------------------------------------------------

inline float max_of(const float* x, Index n) {
  const float none = -std::numeric_limits<float>::infinity();
  Vec most[4];
  KVPARE_UNROLL for (int j = 0; j < 4; ++j) most[j] = broadcast(none);
  Index t = 0;
  for (; t + 4 * lanes <= n; t += 4 * lanes)
    KVPARE_UNROLL for (int j = 0; j < 4; ++j) most[j] = max(load(x + t + j * lanes), most[j]);
  for (; t + lanes <= n; t += lanes) most[0] = max(load(x + t), most[0]);
  if (t < n) most[1] = max(load_part(x + t, static_cast<int>(n - t), none), most[1]);
  return max_of_lanes(max(max(most[0], most[1]), max(most[2], most[3])));
}

// 2^r = 1 + c1 r + … + c6 r^6 on [-1/2, 1/2], the smallest relative error with 2^0 exactly 1: 2e-9, and 1e-7 rounded.
KVPARE_INLINE Vec exp2_of(Vec x) {
  const Vec n = nearest(x), r = sub(x, n);
  Vec p = broadcast(0x1.41fbbcp-13f);
  p = fma(p, r, broadcast(0x1.5f3e52p-10f));
  p = fma(p, r, broadcast(0x1.3b2d4cp-7f));
  p = fma(p, r, broadcast(0x1.c6aee8p-5f));
  p = fma(p, r, broadcast(0x1.ebfbdcp-3f));
  p = fma(p, r, broadcast(0x1.62e430p-1f));
  p = fma(p, r, broadcast(1.0f));
  return times_power(p, n, x);
}

inline float exp2_shift_sum(float* x, Index n, float shift) {
  const float none = -std::numeric_limits<float>::infinity();
  const Vec s = broadcast(shift);
  Vec sum[2] = {zero(), zero()};
  Index t = 0;
  for (; t + 2 * lanes <= n; t += 2 * lanes)
    KVPARE_UNROLL for (int j = 0; j < 2; ++j) {
      const Vec y = exp2_of(sub(load(x + t + j * lanes), s));
      sum[j] = add(sum[j], y);
      store(x + t + j * lanes, y);
    }
  for (; t < n; t += lanes) {
    if (t + lanes <= n) {
      const Vec y = exp2_of(sub(load(x + t), s));
      sum[0] = add(sum[0], y);
      store(x + t, y);
    } else {
      const int part = static_cast<int>(n - t);
      const Vec y = exp2_of(sub(load_part(x + t, part, none), s));
      sum[1] = add(sum[1], y);
      store_part(x + t, y, part);
    }
  }
  return sum_of(add(sum[0], sum[1]));
}

inline void running_softmax(float* x, Index x_stride, Index rows, Index n, float* peak, float* sum, float* alpha) {
  const float none = -std::numeric_limits<float>::infinity();
  for (Index i = 0; i < rows; ++i) {
    float* row = x + i * x_stride;
    const float seen = max_of(row, n);
    const float before = peak[i];
    float factor = 1;
    if (seen > before) {
      // One lane of the vector exponential: 0 for a start at -inf.
      float change[lanes] = {before - seen};
      store(change, exp2_of(load(change)));
      factor = change[0];
      peak[i] = seen;
    }
    alpha[i] = factor;
    sum[i] = sum[i] * factor + exp2_shift_sum(row, n, peak[i] == none ? 0.0f : peak[i]);
  }
}

inline void add_scaled(const float* x, Index n, float factor, float* out) {
  const Vec f = broadcast(factor);
  Index t = 0;
  for (; t + lanes <= n; t += lanes) store(out + t, fma(f, load(x + t), load(out + t)));
  if (t == n) return;
  const int part = static_cast<int>(n - t);
  store_part(out + t, fma(f, load_part(x + t, part), load_part(out + t, part)), part);
}

inline void max_scaled(const float* x, Index n, float factor, float* out) {
  const Vec f = broadcast(factor);
  Index t = 0;
  for (; t + lanes <= n; t += lanes) store(out + t, max(mul(f, load(x + t)), load(out + t)));
  if (t == n) return;
  const int part = static_cast<int>(n - t);
  store_part(out + t, max(mul(f, load_part(x + t, part)), load_part(out + t, part)), part);
}

inline void multiply(float* x, Index n, float factor) {
  const Vec f = broadcast(factor);
  Index t = 0;
  for (; t + lanes <= n; t += lanes) store(x + t, mul(f, load(x + t)));
  if (t == n) return;
  const int part = static_cast<int>(n - t);
  store_part(x + t, mul(f, load_part(x + t, part)), part);
}

// ---- conversions ---------------------------------------------------------------------------------------------------

template <class From, class To>
void convert(const From* from, Index n, To* to) {
  Index t = 0;
  for (; t + lanes <= n; t += lanes) store(to + t, load(from + t));
  if (t == n) return;
  const int part = static_cast<int>(n - t);
  store_part(to + t, load_part(from + t, part), part);
}

inline void to_float(const std::byte* from, DType type, Index n, float* to) {
  switch (type) {
    case DType::f16: return convert(reinterpret_cast<const half*>(from), n, to);
    case DType::bf16: return convert(reinterpret_cast<const bfloat16*>(from), n, to);
    default: return convert(reinterpret_cast<const float*>(from), n, to);
  }
}

inline void from_float(const float* from, Index n, DType type, std::byte* to) {
  switch (type) {
    case DType::f16: return convert(from, n, reinterpret_cast<half*>(to));
    case DType::bf16: return convert(from, n, reinterpret_cast<bfloat16*>(to));
    default: return convert(from, n, reinterpret_cast<float*>(to));
  }
}

// ---- packed panels -------------------------------------------------------------------------------------------------
//
// Panel: width × panel_tokens, so a vector holds one channel of `lanes` tokens and no sum ever crosses lanes.

inline constexpr Index panel_tokens = panel_vectors * lanes;

// Square tiles of 16 bytes a side: rows of tokens in, rows of channels out.
template <class T>
struct Tile {
  static constexpr int side = static_cast<int>(16 / sizeof(T));
  using Row = std::conditional_t<sizeof(T) == 2, std::uint16_t __attribute__((vector_size(16))),
                                 std::uint32_t __attribute__((vector_size(16)))>;
};

KVPARE_INLINE auto interleave_low(Tile<half>::Row a, Tile<half>::Row b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
KVPARE_INLINE auto interleave_high(Tile<half>::Row a, Tile<half>::Row b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}
KVPARE_INLINE auto interleave_low(Tile<float>::Row a, Tile<float>::Row b) {
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
}
KVPARE_INLINE auto interleave_high(Tile<float>::Row a, Tile<float>::Row b) {
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
}

// Interleaving the first half of the rows with the second, log2(side) times, is a transpose.
template <class T>
KVPARE_INLINE void transpose(typename Tile<T>::Row (&x)[Tile<T>::side]) {
  constexpr int side = Tile<T>::side;
  KVPARE_UNROLL for (int step = 1; step < side; step *= 2) {
    typename Tile<T>::Row y[side];
    KVPARE_UNROLL for (int j = 0; j < side / 2; ++j) {
      y[2 * j] = interleave_low(x[j], x[j + side / 2]);
      y[2 * j + 1] = interleave_high(x[j], x[j + side / 2]);
    }
    KVPARE_UNROLL for (int j = 0; j < side; ++j) x[j] = y[j];
  }
}

template <class T>
void pack_panel_typed(const std::byte* const* rows, Index count, Index width, InPanel<T>* panel) {
  constexpr int side = Tile<T>::side;
  for (Index t = 0; t < panel_tokens; t += side)
    for (Index c = 0; c < width; c += side) {
      const Index channels = width - c < side ? width - c : side;
      typename Tile<T>::Row x[side] = {};
      for (Index j = 0; j < side && t + j < count; ++j)
        std::memcpy(&x[j], rows[t + j] + c * Index(sizeof(T)), static_cast<std::size_t>(channels) * sizeof(T));
      transpose<T>(x);
      for (Index j = 0; j < channels; ++j) {
        InPanel<T>* to = panel + (c + j) * panel_tokens + t;
        if constexpr (sizeof(InPanel<T>) == sizeof(T)) {
          std::memcpy(static_cast<void*>(to), &x[j], sizeof x[j]);
        } else {
          T line[side];
          std::memcpy(static_cast<void*>(line), &x[j], sizeof line);
          convert(line, side, to);
        }
      }
    }
}

inline Index panel_bytes(Index width, DType type) {
  const Index element = type == DType::f32 ? 4 : Index(sizeof(InPanel<half>));
  return width * panel_tokens * element;
}

inline void pack_panel(const std::byte* const* rows, Index count, Index width, DType type, std::byte* panel) {
  switch (type) {
    case DType::f16: return pack_panel_typed<half>(rows, count, width, reinterpret_cast<InPanel<half>*>(panel));
    case DType::bf16: return pack_panel_typed<bfloat16>(rows, count, width, reinterpret_cast<InPanel<bfloat16>*>(panel));
    default: return pack_panel_typed<float>(rows, count, width, reinterpret_cast<float*>(panel));
  }
}

template <class T, int R>
KVPARE_INLINE void panel_block(const float* q, Index q_stride, Index width, const T* panel, float* out,
                               Index out_stride) {
  Vec sum[R][panel_vectors];
  KVPARE_UNROLL for (int i = 0; i < R; ++i)
    KVPARE_UNROLL for (int v = 0; v < panel_vectors; ++v) sum[i][v] = zero();
  for (Index c = 0; c < width; ++c) {
    Vec k[panel_vectors];
    KVPARE_UNROLL for (int v = 0; v < panel_vectors; ++v) k[v] = load(panel + c * panel_tokens + v * lanes);
    KVPARE_UNROLL for (int i = 0; i < R; ++i) {
      const Vec x = broadcast(q[i * q_stride + c]);
      KVPARE_UNROLL for (int v = 0; v < panel_vectors; ++v) sum[i][v] = fma(x, k[v], sum[i][v]);
    }
  }
  KVPARE_UNROLL for (int i = 0; i < R; ++i)
    KVPARE_UNROLL for (int v = 0; v < panel_vectors; ++v) store(out + i * out_stride + v * lanes, sum[i][v]);
}

template <class T>
void dot_panel_typed(const float* q, Index q_stride, Index rows, Index width, const T* panel, float* out,
                     Index out_stride) {
  Index i = 0;
  for (; i + panel_rows <= rows; i += panel_rows)
    panel_block<T, panel_rows>(q + i * q_stride, q_stride, width, panel, out + i * out_stride, out_stride);
  for (; i + 4 <= rows && panel_rows > 4; i += 4)
    panel_block<T, 4>(q + i * q_stride, q_stride, width, panel, out + i * out_stride, out_stride);
  for (; i < rows; ++i)
    panel_block<T, 1>(q + i * q_stride, q_stride, width, panel, out + i * out_stride, out_stride);
}

inline void dot_panel(const float* q, Index q_stride, Index rows, Index width, const std::byte* panel, DType type,
                      float* out, Index out_stride) {
  switch (type) {
    case DType::f16:
      return dot_panel_typed(q, q_stride, rows, width, reinterpret_cast<const InPanel<half>*>(panel), out, out_stride);
    case DType::bf16:
      return dot_panel_typed(q, q_stride, rows, width, reinterpret_cast<const InPanel<bfloat16>*>(panel), out, out_stride);
    default: return dot_panel_typed(q, q_stride, rows, width, reinterpret_cast<const float*>(panel), out, out_stride);
  }
}

inline constexpr Kernels table = {
    .dot = dot,
    .accumulate = accumulate,
    .running_softmax = running_softmax,
    .max_of = max_of,
    .exp2_shift_sum = exp2_shift_sum,
    .add_scaled = add_scaled,
    .max_scaled = max_scaled,
    .multiply = multiply,
    .to_float = to_float,
    .from_float = from_float,
    .panel_tokens = panel_tokens,
    .panel_bytes = panel_bytes,
    .pack_panel = pack_panel,
    .dot_panel = dot_panel,
};
