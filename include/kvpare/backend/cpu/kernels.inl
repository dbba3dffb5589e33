// The loops behind the table of kernels.hpp, once for every instruction set (see there how it is included).
//
// They are written on what the set's vector file supplies:
//
//   Vec, lanes                                a vector of floats and its length
//   dot_rows, sum_rows, sum_vectors,          how much of a product is kept in registers: query rows at a time, vectors
//   panel_rows, panel_vectors                 of channels (sum) or of tokens (panel) at a time
//   dot_unroll                                vectors of channels per turn of the dot loop
//   InPanel<T>                                what an element T becomes in a packed panel
//   zero, broadcast, add, sub, mul, fma(a, b, c) = a * b + c
//   max(a, b)                                 b where either is NaN
//   load(p), store(p, v)                      from and to float, half or bfloat16
//   load_part(p, n), store_part(p, v, n)      the first n lanes, 0 < n < lanes; nothing behind them is touched
//   load_part(float p, n, rest)               the other lanes become `rest`
//   sum_of(v), max_of_lanes(v)                over the lanes
//   sum_four(a, b, c, d, out), max_four       out[0..3] = their four sums (maxima)
//   nearest(x)                                to an integer, |x| < 2^22
//   times_power(p, n, x)                      p * 2^n; 0 where x < -126, NaN where x is
//   Tiles                                     as many bytes as a register has, in lanes of 16
//   load_tiles(p, step, offset)               lane l from p[l * step] + offset
//   interleave_low<bytes>(a, b), _high        in each lane: the first (last) half of a's elements with those of b

// The rows of a set, found once for all passes over them. The last one is repeated up to a multiple of four.
template <class T>
struct Pointers {
  const T* row[64];

  explicit Pointers(const RowSet& set) {
    for (int t = 0; t < set.count; ++t) row[t] = reinterpret_cast<const T*>(set.row(t));
    for (int t = set.count; t % 4 != 0; ++t) row[t] = row[t - 1];
  }
};

// Prefetches the rows of a set, evenly over `steps` calls of step().
//
// Two whole rows at a time, in rising order, every line by an instruction of its own: each instruction then moves by
// the same distance every time. The hardware's stride prefetcher follows instructions; one instruction that walks along
// a row makes it run on into what lies behind, and with every second row dead that doubles the traffic. Into the second
// level cache: more lines may be under way to it than to the first.
class Ahead {
 public:
  Ahead(const RowSet& rows, Index row_bytes, Index steps) : rows_(&rows), row_bytes_(row_bytes), steps_(steps) {}

  KVPARE_INLINE void step() {
    for (due_ += rows_->count; due_ >= 2 * steps_ && next_ + 2 <= rows_->count; due_ -= 2 * steps_) {
      const std::byte* a = rows_->row(next_);
      const std::byte* b = rows_->row(next_ + 1);
      next_ += 2;
      for (Index from = 0; from < row_bytes_; from += 4 * line) {
        four_lines(a, from);
        four_lines(b, from);
      }
    }
    asm volatile("" ::: "memory");  // the loop around this needs the registers: reload what is in here every time
  }
  void rest() {
    for (; next_ < rows_->count; ++next_)
      for (Index from = 0; from < row_bytes_; from += 4 * line) four_lines(rows_->row(next_), from);
  }

 private:
  static constexpr Index line = 64;

  KVPARE_INLINE void four_lines(const std::byte* row, Index from) {
    KVPARE_UNROLL for (Index at = 0; at < 4 * line; at += line)
      if (from + at < row_bytes_) __builtin_prefetch(row + from + at, 0, 2);
  }

  const RowSet* rows_;
  Index row_bytes_, steps_;
  Index due_ = 0;  // rows times steps
  int next_ = 0;
};

// ---- q·k over rows as they lie -------------------------------------------------------------------------------------
//
// Four tokens by R query rows at a time: every vector of keys is loaded and widened once for R rows, every vector of
// q once for four tokens, and the four sums of a row leave the lanes together.

template <class T, int R>
KVPARE_INLINE void dot_step(const float* q, Index q_stride, const T* const (&key)[4], Index c, Vec (&sum)[R][4]) {
  Vec k[4];
  KVPARE_UNROLL for (int t = 0; t < 4; ++t) k[t] = load(key[t] + c);
  KVPARE_UNROLL for (int i = 0; i < R; ++i) {
    const Vec x = load(q + i * q_stride + c);
    KVPARE_UNROLL for (int t = 0; t < 4; ++t) sum[i][t] = fma(x, k[t], sum[i][t]);
  }
}

template <class T, int R>
void dot_rows_of(const float* q, Index q_stride, Index width, const T* const* keys, int count, Ahead& ahead, float* out,
                 Index out_stride) {
  float four[R][4];  // what a last block of fewer than four tokens gives
  for (int t = 0; t < count; t += 4) {
    ahead.step();
    Vec sum[R][4];
    KVPARE_UNROLL for (int i = 0; i < R; ++i)
      KVPARE_UNROLL for (int j = 0; j < 4; ++j) sum[i][j] = zero();
    const T* const key[4] = {keys[t], keys[t + 1], keys[t + 2], keys[t + 3]};

    Index c = 0;
    for (; c + dot_unroll * lanes <= width; c += dot_unroll * lanes)
      KVPARE_UNROLL for (int u = 0; u < dot_unroll; ++u) dot_step<T, R>(q, q_stride, key, c + u * lanes, sum);
    for (; c + lanes <= width; c += lanes) dot_step<T, R>(q, q_stride, key, c, sum);
    if (c < width) {
      const int n = static_cast<int>(width - c);
      KVPARE_UNROLL for (int i = 0; i < R; ++i) {
        const Vec x = load_part(q + i * q_stride + c, n);
        KVPARE_UNROLL for (int j = 0; j < 4; ++j) sum[i][j] = fma(x, load_part(key[j] + c, n), sum[i][j]);
      }
    }

    const bool whole = t + 4 <= count;
    float* to = whole ? out + t : four[0];
    const Index stride = whole ? out_stride : 4;
    KVPARE_UNROLL for (int i = 0; i < R; ++i) sum_four(sum[i][0], sum[i][1], sum[i][2], sum[i][3], to + i * stride);
  }
  for (int i = 0; i < R; ++i)
    for (int t = count / 4 * 4; t < count; ++t) out[i * out_stride + t] = four[i][t % 4];
}

// n <= R rows.
template <class T, int R>
void dot_few(Index n, const float* q, Index q_stride, Index width, const T* const* keys, int count, Ahead& ahead,
             float* out, Index out_stride) {
  if constexpr (R > 1)
    if (n < R) return dot_few<T, R - 1>(n, q, q_stride, width, keys, count, ahead, out, out_stride);
  dot_rows_of<T, R>(q, q_stride, width, keys, count, ahead, out, out_stride);
}

template <class T>
void dot_typed(const float* q, Index q_stride, Index rows, Index width, const RowSet& keys, const RowSet& next,
               float* out, Index out_stride) {
  const Pointers<T> at(keys);
  Index blocks = ceil_div(rows, dot_rows);
  Ahead ahead(next, width * Index(sizeof(T)), ceil_div(keys.count, 4) * blocks);
  for (; blocks > 0; --blocks) {
    const Index n = ceil_div(rows, blocks);  // as even as can be
    dot_few<T, dot_rows>(n, q, q_stride, width, at.row, keys.count, ahead, out, out_stride);
    q += n * q_stride, out += n * out_stride, rows -= n;
  }
  ahead.rest();
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
// R rows by W vectors of channels stay in registers over all tokens of the page. `Part`: the last channels, fewer than
// a vector.

template <class T, int R, int W, bool Part>
KVPARE_INLINE void sum_step(const float* p, Index p_stride, const T* row, int part, Vec (&sum)[R][W]) {
  asm("" : "+r"(row));  // or g++ keeps an offset for every vector of the row in a register
  Vec v[W];
  KVPARE_UNROLL for (int w = 0; w < W; ++w) {
    if constexpr (Part) v[w] = load_part(row, part);
    else v[w] = load(row + w * lanes);
  }
  KVPARE_UNROLL for (int i = 0; i < R; ++i) {
    const Vec x = broadcast(p[i * p_stride]);
    KVPARE_UNROLL for (int w = 0; w < W; ++w) sum[i][w] = fma(x, v[w], sum[i][w]);
  }
}

template <class T, int R, int W, bool Part>
KVPARE_INLINE void sum_block(const float* p, Index p_stride, const float* alpha, const T* const* values, int count,
                             Ahead& ahead, Index c, int part, float* acc, Index acc_stride) {
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
  int t = 0;
  if constexpr (W > 1)
    for (; t + 4 <= count; t += 4) {
      ahead.step();
      KVPARE_UNROLL for (int j = 0; j < 4; ++j)
        sum_step<T, R, W, Part>(p + t + j, p_stride, values[t + j] + c, part, sum);
    }
  for (; t < count; ++t) sum_step<T, R, W, Part>(p + t, p_stride, values[t] + c, part, sum);
  KVPARE_UNROLL for (int i = 0; i < R; ++i)
    KVPARE_UNROLL for (int w = 0; w < W; ++w) {
      float* at = acc + i * acc_stride + c + w * lanes;
      if constexpr (Part) store_part(at, sum[i][w], part);
      else store(at, sum[i][w]);
    }
}

template <class T, int R>
void sum_rows_of(const float* p, Index p_stride, const float* alpha, Index width, const T* const* values, int count,
                 Ahead& ahead, float* acc, Index acc_stride) {
  Index c = 0;
  for (; c + sum_vectors * lanes <= width; c += sum_vectors * lanes)
    sum_block<T, R, sum_vectors, false>(p, p_stride, alpha, values, count, ahead, c, 0, acc, acc_stride);
  for (; c + lanes <= width; c += lanes)
    sum_block<T, R, 1, false>(p, p_stride, alpha, values, count, ahead, c, 0, acc, acc_stride);
  if (c < width)
    sum_block<T, R, 1, true>(p, p_stride, alpha, values, count, ahead, c, static_cast<int>(width - c), acc, acc_stride);
}

template <class T, int R>
void sum_few(Index n, const float* p, Index p_stride, const float* alpha, Index width, const T* const* values, int count,
             Ahead& ahead, float* acc, Index acc_stride) {
  if constexpr (R > 1)
    if (n < R) return sum_few<T, R - 1>(n, p, p_stride, alpha, width, values, count, ahead, acc, acc_stride);
  sum_rows_of<T, R>(p, p_stride, alpha, width, values, count, ahead, acc, acc_stride);
}

template <class T>
void accumulate_typed(const float* p, Index p_stride, const float* alpha, Index rows, Index width,
                      const RowSet& values, const RowSet& next, float* acc, Index acc_stride) {
  const Pointers<T> at(values);
  Index blocks = ceil_div(rows, sum_rows);
  Ahead ahead(next, width * Index(sizeof(T)), blocks * (width / (sum_vectors * lanes)) * (values.count / 4));
  for (; blocks > 0; --blocks) {
    const Index n = ceil_div(rows, blocks);
    sum_few<T, sum_rows>(n, p, p_stride, alpha, width, at.row, values.count, ahead, acc, acc_stride);
    p += n * p_stride, acc += n * acc_stride, rows -= n;
    if (alpha != nullptr) alpha += n;
  }
  ahead.rest();
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

// 2^r = 1 + c1 r + .. + c6 r^6 on [-1/2, 1/2], the smallest relative error with 2^0 exactly 1: 2e-9, and 1e-7 rounded.
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

// R <= 4 rows at a time: their reductions are made together, and no row waits for another.
template <int R>
void softmax_rows(float* x, Index x_stride, Index n, float* peak, float* sum, float* alpha) {
  const float none = -std::numeric_limits<float>::infinity();
  const int part = static_cast<int>(n % lanes);
  const Index whole = n - part;
  Vec most[R];
  KVPARE_UNROLL for (int i = 0; i < R; ++i) most[i] = broadcast(none);
  for (Index t = 0; t < whole; t += lanes)
    KVPARE_UNROLL for (int i = 0; i < R; ++i) most[i] = max(load(x + i * x_stride + t), most[i]);
  if (part > 0)
    KVPARE_UNROLL for (int i = 0; i < R; ++i) most[i] = max(load_part(x + i * x_stride + whole, part, none), most[i]);
  float seen[4], change[lanes] = {};
  max_four(most[0], most[R > 1 ? 1 : 0], most[R > 2 ? 2 : 0], most[R > 3 ? 3 : 0], seen);
  Vec shift[R], total[R];
  KVPARE_UNROLL for (int i = 0; i < R; ++i) {
    const float before = peak[i];
    if (seen[i] > before) change[i] = before - seen[i], peak[i] = seen[i];
    shift[i] = broadcast(peak[i] == none ? 0.0f : peak[i]);
    total[i] = zero();
  }
  store(change, exp2_of(load(change)));  // 0 for a start at -inf, exactly 1 where the peak stays
  for (Index t = 0; t < whole; t += lanes)
    KVPARE_UNROLL for (int i = 0; i < R; ++i) {
      float* at = x + i * x_stride + t;
      const Vec y = exp2_of(sub(load(at), shift[i]));
      total[i] = add(total[i], y);
      store(at, y);
    }
  if (part > 0)
    KVPARE_UNROLL for (int i = 0; i < R; ++i) {
      float* at = x + i * x_stride + whole;
      const Vec y = exp2_of(sub(load_part(at, part, none), shift[i]));
      total[i] = add(total[i], y);
      store_part(at, y, part);
    }
  float added[4];
  sum_four(total[0], total[R > 1 ? 1 : 0], total[R > 2 ? 2 : 0], total[R > 3 ? 3 : 0], added);
  KVPARE_UNROLL for (int i = 0; i < R; ++i) alpha[i] = change[i], sum[i] = sum[i] * change[i] + added[i];
}

inline void running_softmax(float* x, Index x_stride, Index rows, Index n, float* peak, float* sum, float* alpha) {
  Index i = 0;
  for (; i + 4 <= rows; i += 4) softmax_rows<4>(x + i * x_stride, x_stride, n, peak + i, sum + i, alpha + i);
  if (i + 2 <= rows) {
    softmax_rows<2>(x + i * x_stride, x_stride, n, peak + i, sum + i, alpha + i);
    i += 2;
  }
  if (i < rows) softmax_rows<1>(x + i * x_stride, x_stride, n, peak + i, sum + i, alpha + i);
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
// Panel: width × panel_tokens, so a vector holds one channel of `lanes` tokens and no sum ever crosses lanes. A block of
// panel_rows × panel_tokens sums stays in registers over all channels.

inline constexpr Index panel_tokens = panel_vectors * lanes;

// Square tiles of 16 bytes a side, one in each 16-byte lane of Tiles: rows of tokens in, rows of channels out.
// Interleaving the first half of the rows with the second, log2(side) times, is a transpose.
template <class T, int side>
KVPARE_INLINE void transpose(Tiles (&x)[side]) {
  KVPARE_UNROLL for (int step = 1; step < side; step *= 2) {
    Tiles y[side];
    KVPARE_UNROLL for (int j = 0; j < side / 2; ++j) {
      y[2 * j] = interleave_low<sizeof(T)>(x[j], x[j + side / 2]);
      y[2 * j + 1] = interleave_high<sizeof(T)>(x[j], x[j + side / 2]);
    }
    KVPARE_UNROLL for (int j = 0; j < side; ++j) x[j] = y[j];
  }
}

template <class T>
void pack_panel_typed(const std::byte* const* rows, Index count, Index width, InPanel<T>* panel) {
  constexpr int side = 16 / sizeof(T), tokens = sizeof(Tiles) / sizeof(T);
  for (Index t = 0; t < panel_tokens; t += tokens)
    for (Index c = 0; c < width; c += side) {
      const std::byte* const* from = rows + t;
      Index offset = c * Index(sizeof(T));
      const Index channels = width - c < side ? width - c : side;
      // At the edges the tiles are cut out first, with zeros around.
      std::byte cut[tokens][16];
      const std::byte* cuts[tokens];
      if (channels < side || count < t + tokens) {
        std::memset(cut, 0, sizeof cut);
        for (Index j = 0; j < tokens; ++j) {
          cuts[j] = cut[j];
          if (t + j < count) std::memcpy(cut[j], from[j] + offset, static_cast<std::size_t>(channels) * sizeof(T));
        }
        from = cuts, offset = 0;
      }
      Tiles x[side];
      KVPARE_UNROLL for (int j = 0; j < side; ++j) x[j] = load_tiles(from + j, side, offset);
      transpose<T, side>(x);
      KVPARE_UNROLL for (int j = 0; j < side; ++j) {
        if (j >= channels) continue;
        InPanel<T>* to = panel + (c + j) * panel_tokens + t;
        if constexpr (sizeof(InPanel<T>) == sizeof(T)) {
          std::memcpy(static_cast<void*>(to), &x[j], sizeof x[j]);
        } else {
          T line[tokens];
          std::memcpy(static_cast<void*>(line), &x[j], sizeof line);
          for (int l = 0; l < tokens; l += lanes) store(to + l, load(line + l));
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
  if constexpr (panel_rows > 4)
    for (; i + 4 <= rows; i += 4)
      panel_block<T, 4>(q + i * q_stride, q_stride, width, panel, out + i * out_stride, out_stride);
  for (; i + 2 <= rows; i += 2)
    panel_block<T, 2>(q + i * q_stride, q_stride, width, panel, out + i * out_stride, out_stride);
  if (i < rows)
    panel_block<T, 1>(q + i * q_stride, q_stride, width, panel, out + i * out_stride, out_stride);
}

inline void dot_panel(const float* q, Index q_stride, Index rows, Index width, const std::byte* panel, DType type,
                      float* out, Index out_stride) {
  switch (type) {
    case DType::f16:
      return dot_panel_typed(q, q_stride, rows, width, reinterpret_cast<const InPanel<half>*>(panel), out, out_stride);
    case DType::bf16:
      return dot_panel_typed(q, q_stride, rows, width, reinterpret_cast<const InPanel<bfloat16>*>(panel), out,
                             out_stride);
    default: return dot_panel_typed(q, q_stride, rows, width, reinterpret_cast<const float*>(panel), out, out_stride);
  }
}

template <Isa isa>
inline constexpr Kernels table = {
    .isa = isa,
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
