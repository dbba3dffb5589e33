// The kernels over a codec's tiles, and the tables of them. Bytes that must be moved, by what is asked for:
//
//   encode     rows * width * (element read) + codes, scales and zeros of these rows; folded codecs: and 8 bytes per
//              number, the transformed rows as floats
//   decode     codes, scales and zeros of these rows + rows * width * 4; folded codecs: and 8 bytes per number
//   repack     2 * tile_bytes
//   row moves  see RowPart and row_kernels.cuh: codes, scales and zeros are carried as they are
//
// Codecs in fragment order (FragmentTiles) are coded a group per thread from numbers staged in shared memory. All
// others (CanonicalTiles) run C::encode and C::decode, a row or a tile per thread: right, and slow.
#pragma once

#include <type_traits>

#include "row_kernels.cuh"
#include "tile_layout.cuh"

namespace kvpare::cuda {

namespace detail {

/// Calls `f(jobs, memory)` for stretches of jobs whose floats fit one lot of scratch memory, or that are one job. The
/// next stretch gets the same memory: its kernels run after those of this one.
template <class Work, class Job, class Floats, class F>
void in_lots(Work& work, std::span<const Job> jobs, const Floats& floats_of, const F& f) {
  const auto end_of = [&](std::size_t begin, Index& floats) {
    std::size_t end = begin + 1;
    floats = floats_of(jobs[begin]);
    for (; end < jobs.size() && floats + floats_of(jobs[end]) <= work.lot_floats; ++end) floats += floats_of(jobs[end]);
    return end;
  };
  Index most = 0, floats = 0;
  for (std::size_t at = 0; at < jobs.size(); most = std::max(most, floats)) at = end_of(at, floats);
  float* memory = most > 0 ? work.template scratch<float>(most) : nullptr;
  for (std::size_t at = 0, end = 0; at < jobs.size(); at = end) {
    end = end_of(at, floats);
    f(jobs.subspan(at, end - at), memory);
  }
}

// ----------------------------------------------------------------------------------------------------
// Fragment order.

/// Codes, scales and zeros of a tile in fragment order, aligned to 16 bytes.
template <class C, Side side>
struct FragmentAccess {
  using Layout = FragmentLayout<C, side>;
  static constexpr bool along_channels = Layout::form.along == Along::channels, ternary = Layout::form.ternary;
  static constexpr int bits = Layout::bits, low_bits = Layout::low_bits, per_unit = Layout::per_unit;

  template <Index bytes>
  static KVPARE_DEVICE std::uint32_t number_at(const std::byte* p) {
    if constexpr (bytes == 4)
      return *reinterpret_cast<const std::uint32_t*>(p);
    else if constexpr (bytes == 2)
      return *reinterpret_cast<const std::uint16_t*>(p);
    else if constexpr (bytes == 1)
      return *reinterpret_cast<const std::uint8_t*>(p);
    else
      return 0;
  }
  template <Index bytes>
  static KVPARE_DEVICE void put_number(std::byte* p, std::uint32_t x) {
    if constexpr (bytes == 4)
      *reinterpret_cast<std::uint32_t*>(p) = x;
    else if constexpr (bytes == 2)
      *reinterpret_cast<std::uint16_t*>(p) = static_cast<std::uint16_t>(x);
    else if constexpr (bytes == 1)
      *reinterpret_cast<std::uint8_t*>(p) = static_cast<std::uint8_t>(x);
  }

  static KVPARE_DEVICE GroupBits group(TileShape s, const std::byte* tile, Index g) {
    return {number_at<Layout::scale_bytes>(tile + Layout::scales_at(s) + g * Layout::scale_bytes),
            number_at<Layout::zero_bytes>(tile + Layout::zeros_at(s) + g * Layout::zero_bytes)};
  }
  static KVPARE_DEVICE void put_group(TileShape s, std::byte* tile, Index g, GroupBits x) {
    put_number<Layout::scale_bytes>(tile + Layout::scales_at(s) + g * Layout::scale_bytes, x.scale);
    put_number<Layout::zero_bytes>(tile + Layout::zeros_at(s) + g * Layout::zero_bytes, x.zero);
  }

  /// Codes [c, c + per_unit) of token t: 16 bits, and above them their highest bits where these have a plane.
  static KVPARE_DEVICE unsigned unit(TileShape s, const std::byte* tile, Index t, Index c) {
    unsigned unit = *reinterpret_cast<const std::uint16_t*>(tile + Layout::unit_at(s, t, c));
    if constexpr (Layout::has_high)
      unit |= *reinterpret_cast<const std::uint8_t*>(tile + Layout::high_unit_at(s, t, c)) * 0x10000u;
    return unit;
  }
  static KVPARE_DEVICE std::uint8_t code(unsigned unit, int i) {
    unsigned code = unit >> i * low_bits & ((1u << low_bits) - 1u);
    if constexpr (Layout::has_high) code |= (unit >> (16 + Layout::high_bit(i)) & 1u) << low_bits;
    return static_cast<std::uint8_t>(code);
  }
  /// A code of a unit whose others are zeros.
  static KVPARE_DEVICE unsigned unit_of(unsigned code, int i) {
    if constexpr (Layout::has_high)
      return (code & ((1u << low_bits) - 1u)) << i * low_bits | (code >> low_bits) << (16 + Layout::high_bit(i));
    else
      return code << i * low_bits;
  }
  static KVPARE_DEVICE void put_unit(TileShape s, std::byte* tile, Index t, Index c, unsigned unit) {
    *reinterpret_cast<std::uint16_t*>(tile + Layout::unit_at(s, t, c)) = static_cast<std::uint16_t>(unit);
    if constexpr (Layout::has_high)
      *reinterpret_cast<std::uint8_t*>(tile + Layout::high_unit_at(s, t, c)) = static_cast<std::uint8_t>(unit >> 16);
  }
  static KVPARE_DEVICE void put_unit(TileShape s, std::byte* tile, Index t, Index c, const std::uint8_t* codes) {
    unsigned unit = 0;
    for (int i = 0; i < per_unit; ++i) unit |= unit_of(codes[i], i);
    put_unit(s, tile, t, c, unit);
  }

  /// Byte y of a ternary row whose codes are `code_of(channel)`.
  template <class CodeOf>
  static KVPARE_DEVICE void put_trits(TileShape s, std::byte* tile, Index t, Index y, const CodeOf& code_of) {
    unsigned digits = 0;
    for (int k = 0; k < 5; ++k)
      digits = digits * 3 + (k < Layout::trits_of(y) ? unsigned{code_of(Layout::trit_channel(y, k))} : 0u);
    tile[Layout::trit_byte_at(s, t, y)] = static_cast<std::byte>((digits * 256 + 242) / 243);
  }
  /// The code of channel c of token t.
  static KVPARE_DEVICE std::uint8_t code_at(TileShape s, const std::byte* tile, Index t, Index c) {
    if constexpr (ternary) {
      const Index run = c / 16, e = c % 16, y = e < 10 ? run * 2 + e / 5 : e < 15 ? 16 + run : 24 + run % 2;
      unsigned rest = static_cast<unsigned>(tile[Layout::trit_byte_at(s, t, y)]);
      for (Index k = e < 15 ? e % 5 : run / 2; k > 0; --k) rest = rest * 3 & 255u;
      return static_cast<std::uint8_t>(rest * 3 >> 8);
    } else {
      const int i = static_cast<int>(c % per_unit);
      return code(unit(s, tile, t, c - i), i);
    }
  }
  /// All codes of token t.
  static KVPARE_DEVICE void put_row(TileShape s, std::byte* tile, Index t, const std::uint8_t* codes) {
    if constexpr (ternary) {
      for (Index y = 0; y < Layout::trit_bytes; ++y) put_trits(s, tile, t, y, [&](Index c) { return codes[c]; });
    } else {
      for (Index c = 0; c < s.width; c += per_unit) put_unit(s, tile, t, c, codes + c);
    }
  }

  static KVPARE_DEVICE GroupBits quantize(const float* x, Index stride, Index n, const float* state,
                                          std::uint8_t* codes, Index code_stride) {
    if constexpr (requires { C::quantize_in_place(x, stride, n, state, codes, code_stride); })
      return C::quantize_in_place(x, stride, n, state, codes, code_stride);
    else
      return C::quantize(x, stride, n, state, codes, code_stride);
  }

  /// Channel c of token t.
  static KVPARE_DEVICE float number(TileShape s, const std::byte* tile, Index t, Index c, const float* state) {
    return value(group(s, tile, Layout::group_of(s, t, c)), state, code_at(s, tile, t, c));
  }
  static KVPARE_DEVICE float value(GroupBits x, const float* state, std::uint8_t code) {
    const float scaled = kvpare::detail::product(C::scale_of(x, state), C::level(code));
    if constexpr (Layout::zero_bytes > 0)
      return scaled + C::zero_of(x, state);
    else
      return scaled;
  }
};

/// Blocks [job][part]: `span` rows (groups along channels) or channels (along tokens) of a job each.
template <class C, Side side>
struct FragmentEncode {
  using At = FragmentAccess<C, side>;
  using Layout = typename At::Layout;
  static constexpr int threads = 128;
  static constexpr Index staged = 4096;  // numbers of a block
  TileShape shape;
  const EncodeJob* jobs;
  Index parts, span;

  FragmentEncode(TileShape s, const EncodeJob* list) : shape(s), jobs(list) {
    const Index all = At::along_channels ? s.tokens : s.width;
    if (At::along_channels)
      span = std::clamp<Index>(staged / s.width, 1, all);
    else
      span = std::min(std::max<Index>(staged / s.tokens / 16 * 16, 16), all);
    parts = ceil_div(all, span);
  }
  Index shared_bytes() const { return code_area() + codes_bytes(); }

  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    const EncodeJob job = jobs[b.block() / parts];
    const int begin = static_cast<int>(b.block() % parts * span);
    auto* numbers = b.template shared<float>(0);
    auto* codes = b.template shared<std::uint8_t>(code_area());
    if constexpr (At::along_channels)
      code_rows(b, job, begin, numbers, codes);
    else
      code_channels(b, job, begin, numbers, codes);
  }

 private:
  // Groups of a row lie one after the other, at strides that give the threads of a warp different banks.
  KVPARE_HD Index number_stride() const { return Layout::group(shape) | 1; }
  KVPARE_HD Index code_stride() const { return (ceil_div(Layout::group(shape), 4) | 1) * 4; }
  KVPARE_HD Index groups_of_span() const { return span * (shape.width / Layout::group(shape)); }
  KVPARE_HD Index code_area() const {
    return 4 * (At::along_channels ? groups_of_span() * number_stride() : shape.tokens * span);
  }
  KVPARE_HD Index codes_bytes() const {
    return At::along_channels ? groups_of_span() * code_stride() : shape.tokens * span;
  }

  template <class Block>
  KVPARE_DEVICE void code_rows(Block& b, const EncodeJob& job, int begin, float* numbers, std::uint8_t* codes) const {
    const int left = static_cast<int>(job.count) - begin, width = static_cast<int>(shape.width);
    if (left <= 0) return;
    const int rows = left < static_cast<int>(span) ? left : static_cast<int>(span);
    const int group = static_cast<int>(Layout::group(shape)), groups = width / group;
    const int number_stride = static_cast<int>(this->number_stride()),
              code_stride = static_cast<int>(this->code_stride());
    for_each_number(b, job.rows + begin * job.row_bytes, job.row_bytes, job.type, rows, width,
                    [&](int r, int c, float x) { numbers[(r * groups + c / group) * number_stride + c % group] = x; });
    b.sync();
    const Index slot = job.first + begin;
    for (int g = b.thread(); g < rows * groups; g += threads)
      At::put_group(shape, job.tile, slot * groups + g,
                    At::quantize(numbers + g * number_stride, 1, group, job.state, codes + g * code_stride, 1));
    b.sync();
    const int units = At::ternary ? static_cast<int>(Layout::trit_bytes) : width / At::per_unit;
    const bool whole = group % At::per_unit == 0;  // a unit is of one group
    for (int u = b.thread(); u < rows * units; u += threads) {
      const int r = u / units, c = u % units * At::per_unit;
      const auto place = [&](int channel) { return (r * groups + channel / group) * code_stride + channel % group; };
      if constexpr (At::ternary) {
        At::put_trits(shape, job.tile, slot + r, u % units,
                      [&](Index channel) { return codes[place(static_cast<int>(channel))]; });
      } else if (whole) {
        At::put_unit(shape, job.tile, slot + r, c, codes + place(c));
      } else {
        std::uint8_t own[At::per_unit];
        for (int i = 0; i < At::per_unit; ++i) own[i] = codes[place(c + i)];
        At::put_unit(shape, job.tile, slot + r, c, own);
      }
    }
  }

  template <class Block>
  KVPARE_DEVICE void code_channels(Block& b, const EncodeJob& job, int begin, float* numbers,
                                   std::uint8_t* codes) const {
    const int left = static_cast<int>(shape.width) - begin, count = static_cast<int>(job.count);
    if (left <= 0) return;
    const int width = left < static_cast<int>(span) ? left : static_cast<int>(span);
    const int tokens = static_cast<int>(shape.tokens), group = static_cast<int>(Layout::group(shape));
    for_each_number(b, job.rows + begin * size_of(job.type), job.row_bytes, job.type, count, width,
                    [&](int t, int c, float x) { numbers[t * width + c] = x; });
    b.sync();
    for (int i = b.thread(); i < tokens / group * width; i += threads) {
      const int first = i / width * group, c = i % width;
      const int present = count - first < 0 ? 0 : count - first < group ? count - first : group;
      std::uint8_t* own = codes + first * width + c;
      GroupBits bits;
      if (present > 0) bits = At::quantize(numbers + first * width + c, width, present, job.state, own, width);
      for (int t = present; t < group; ++t) own[t * width] = 0;
      At::put_group(shape, job.tile, Layout::group_of(shape, first, begin + c), bits);
    }
    b.sync();
    const int units = width / At::per_unit;
    for (int u = b.thread(); u < tokens * units; u += threads) {
      const int t = u / units, c = u % units * At::per_unit;
      At::put_unit(shape, job.tile, t, begin + c, codes + t * width + c);
    }
  }
};

/// A block per job; a thread takes 16 bits of codes at a time.
template <class C, Side side>
struct FragmentDecode {
  using At = FragmentAccess<C, side>;
  using Layout = typename At::Layout;
  static constexpr int threads = 128;
  TileShape shape;
  const DecodeJob* jobs;

  Index shared_bytes() const { return 64; }
  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    const DecodeJob job = jobs[b.block()];
    auto* slots = b.template shared<std::uint8_t>(0);
    const int rows = list_slots(b, job.slots, slots), width = static_cast<int>(shape.width);
    if constexpr (At::ternary) {
      for (int i = b.thread(); i < rows * width; i += threads)
        job.out[i / width * job.out_stride + i % width] =
            At::number(shape, job.tile, slots[i / width], i % width, job.state);
      return;
    }
    const int units = width / At::per_unit;
    const bool whole = At::along_channels && Layout::group(shape) % At::per_unit == 0;  // a unit is of one group
    const bool by_four = At::per_unit % 4 == 0 && aligned(job.out, 16) && job.out_stride % 4 == 0;
    for (int u = b.thread(); u < rows * units; u += threads) {
      const int row = u / units, c = u % units * At::per_unit, slot = slots[row];
      const unsigned unit = At::unit(shape, job.tile, slot, c);
      float x[At::per_unit];
      GroupBits bits = At::group(shape, job.tile, Layout::group_of(shape, slot, c));
      for (int i = 0; i < At::per_unit; ++i) {
        if (i > 0 && !whole) bits = At::group(shape, job.tile, Layout::group_of(shape, slot, c + i));
        x[i] = At::value(bits, job.state, At::code(unit, i));
      }
      float* to = job.out + row * job.out_stride + c;
      if (by_four) {
        for (int i = 0; i + 3 < At::per_unit; i += 4)
          *reinterpret_cast<Four*>(to + i) = {{x[i], x[i + 1], x[i + 2], x[i + 3]}};
      } else {
        for (int i = 0; i < At::per_unit; ++i) to[i] = x[i];
      }
    }
  }
};

/// A block per tile; a thread takes a row (groups along channels) or a channel's group of tokens at a time, its codes
/// and bits in shared memory. Canonical bytes may lie at any address.
template <class C, Side side, bool to_canonical>
struct FragmentRepack {
  using At = FragmentAccess<C, side>;
  using Layout = typename At::Layout;
  static constexpr int threads = 64;
  TileShape shape;
  const RepackJob* jobs;
  int working;  // threads

  FragmentRepack(TileShape s, const RepackJob* list) : shape(s), jobs(list) {
    working = static_cast<int>(std::clamp<Index>((Index{48} << 10) / bytes_of_thread(), 1, threads));
  }
  Index shared_bytes() const { return working * bytes_of_thread(); }

  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    const RepackJob job = jobs[b.block()];
    if (b.thread() >= working) return;
    auto* bits = b.template shared<GroupBits>(b.thread() * bytes_of_thread());
    auto* codes = reinterpret_cast<std::uint8_t*>(bits + groups_of_thread());
    const Index group = Layout::group(shape), items = At::along_channels ? shape.tokens : Layout::groups(shape);
    for (Index i = b.thread(); i < items; i += working) {
      if constexpr (At::along_channels)
        repack_row(job, i, shape.width / group, bits, codes);
      else
        repack_run(job, i, group, codes);
    }
  }

 private:
  KVPARE_HD Index groups_of_thread() const { return At::along_channels ? shape.width / Layout::group(shape) : 0; }
  KVPARE_HD Index bytes_of_thread() const {
    return round_up(groups_of_thread() * 8 + (At::along_channels ? shape.width : Layout::group(shape)), 4);
  }

  KVPARE_DEVICE void repack_row(const RepackJob& job, Index t, Index groups, GroupBits* bits,
                                std::uint8_t* codes) const {
    if constexpr (to_canonical) {
      for (Index c = 0; c < shape.width; ++c) codes[c] = At::code_at(shape, job.tile, t, c);
      for (Index g = 0; g < groups; ++g) bits[g] = At::group(shape, job.tile, t * groups + g);
      C::write_row(shape, job.canonical, t, codes, bits);
    } else {
      C::read_row(shape, job.canonical, t, codes, bits);
      At::put_row(shape, job.tile, t, codes);
      for (Index g = 0; g < groups; ++g) At::put_group(shape, job.tile, t * groups + g, bits[g]);
    }
  }
  /// A run is a channel's group of tokens, so units of fragment order hold codes of several: here runs of one unit's
  /// channels go together, or threads would write parts of the same bytes.
  KVPARE_DEVICE void repack_run(const RepackJob& job, Index place, Index group, std::uint8_t* codes) const {
    const Index first = place / shape.width * group, c = place % shape.width;
    if constexpr (to_canonical) {
      for (Index t = 0; t < group; ++t)
        codes[t] = At::code_at(shape, job.tile, first + t, c);
      C::write_run(shape, job.canonical, place, codes, At::group(shape, job.tile, place));
    } else {
      if (c % At::per_unit != 0) return;
      for (int k = 0; k < At::per_unit; ++k) {
        At::put_group(shape, job.tile, place + k, C::read_run(shape, job.canonical, place + k, codes));
        for (Index t = 0; t < group; ++t)
          At::put_unit(shape, job.tile, first + t, c,
                       (k == 0 ? 0u : At::unit(shape, job.tile, first + t, c)) | At::unit_of(codes[t], k));
      }
    }
  }
};

/// A codec whose tiles lie in fragment order.
template <class C, Side side>
struct FragmentTiles {
  using At = FragmentAccess<C, side>;
  using Layout = typename At::Layout;

  static Index tile_bytes(TileShape s) { return C::tile_bytes(s); }
  template <class Work>
  static void encode(Work& work, TileShape s, std::span<const EncodeJob> jobs) {
    if (jobs.empty()) return;
    const FragmentEncode<C, side> kernel(s, work.put(jobs));
    work.launch(std::ssize(jobs) * kernel.parts, kernel);
  }
  template <class Work>
  static void decode(Work& work, TileShape s, const DecodeJob* jobs, Index count) {
    work.launch(count, FragmentDecode<C, side>{s, jobs});
  }
  static RowParts row_parts(TileShape s) {
    const Index groups = s.width / Layout::group(s);
    return {RowPart{0, Layout::row_bytes(s), Layout::row_bytes(s), side == Side::values},
            RowPart{Layout::high_at(s), Layout::high_row_bytes(s), Layout::high_row_bytes(s), side == Side::values},
            RowPart{Layout::scales_at(s), groups * Layout::scale_bytes, groups * Layout::scale_bytes},
            RowPart{Layout::zeros_at(s), groups * Layout::zero_bytes, groups * Layout::zero_bytes}};
  }
  template <class Work>
  static void to_canonical(Work& work, TileShape s, std::span<const RepackJob> jobs) {
    work.launch(std::ssize(jobs), FragmentRepack<C, side, true>(s, work.put(jobs)));
  }
  template <class Work>
  static void from_canonical(Work& work, TileShape s, std::span<const RepackJob> jobs) {
    work.launch(std::ssize(jobs), FragmentRepack<C, side, false>(s, work.put(jobs)));
  }
};

// ----------------------------------------------------------------------------------------------------
// Canonical order.

/// Rows of floats. A block per job and a thread per row where rows move, else a thread per job.
template <class C>
struct CanonicalEncode {
  static constexpr int threads = C::rows_move ? 64 : 32;
  TileShape shape;
  const EncodeJob* jobs;
  Index count;

  Index shared_bytes() const { return 0; }
  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    if constexpr (C::rows_move) {
      const EncodeJob job = jobs[b.block()];
      for (Index r = b.thread(); r < job.count; r += threads)
        C::encode(shape, reinterpret_cast<const float*>(job.rows + r * job.row_bytes), job.first + r, 1, job.state,
                  job.tile);
    } else {
      const Index i = b.block() * threads + b.thread();
      if (i >= count) return;
      const EncodeJob job = jobs[i];
      C::encode(shape, reinterpret_cast<const float*>(job.rows), job.first, job.count, job.state, job.tile);
    }
  }
};

/// A block per job and a thread per slot.
template <class C>
struct CanonicalDecode {
  static constexpr int threads = 64;
  TileShape shape;
  const DecodeJob* jobs;

  Index shared_bytes() const { return 0; }
  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    const DecodeJob job = jobs[b.block()];
    if ((job.slots >> b.thread() & 1) != 0)
      C::decode(shape, job.tile, b.thread(), job.state,
                job.out + count_bits(job.slots & low_bits(b.thread())) * job.out_stride);
  }
};

template <class C>
struct CanonicalTiles {
  static Index tile_bytes(TileShape s) { return C::tile_bytes(s); }

  /// Rows that are no floats, or no dense ones, become such first.
  template <class Work>
  static void encode(Work& work, TileShape s, std::span<const EncodeJob> jobs) {
    const auto floats = [&](const EncodeJob& job) {
      return job.type == DType::f32 && (C::rows_move || job.row_bytes == s.width * 4) ? 0 : job.count * s.width;
    };
    in_lots(work, jobs, floats, [&](std::span<const EncodeJob> some, float* memory) {
      std::vector<EncodeJob> dense(some.begin(), some.end());
      std::vector<ConvertJob> converts;
      for (EncodeJob& job : dense) {
        if (floats(job) == 0) continue;
        for (Index r = 0; r < job.count; r += 64)
          converts.push_back({job.rows + r * job.row_bytes, reinterpret_cast<std::byte*>(memory + r * s.width),
                              job.row_bytes, s.width * 4, low_bits(std::min<Index>(job.count - r, 64)), s.width,
                              job.type, DType::f32});
        job.rows = reinterpret_cast<const std::byte*>(memory), job.row_bytes = s.width * 4, job.type = DType::f32;
        memory += job.count * s.width;
      }
      convert(work, converts);
      const Index count = std::ssize(dense);
      work.launch(C::rows_move ? count : ceil_div(count, CanonicalEncode<C>::threads),
                  CanonicalEncode<C>{s, work.put(dense), count});
    });
  }
  template <class Work>
  static void decode(Work& work, TileShape s, const DecodeJob* jobs, Index count) {
    work.launch(count, CanonicalDecode<C>{s, jobs});
  }
  /// Rows of a codec that moves them are canonically one after the other.
  static RowParts row_parts(TileShape s) {
    const Index row = C::tile_bytes({1, s.width});
    return {RowPart{0, row, row}};
  }
  template <class Work>
  static void to_canonical(Work& work, TileShape s, std::span<const RepackJob> jobs) {
    std::vector<CopyJob> copies;
    for (const RepackJob& job : jobs) copies.push_back({job.tile, job.canonical, C::tile_bytes(s)});
    copy(work, copies);
  }
  template <class Work>
  static void from_canonical(Work& work, TileShape s, std::span<const RepackJob> jobs) {
    std::vector<CopyJob> copies;
    for (const RepackJob& job : jobs) copies.push_back({job.canonical, job.tile, C::tile_bytes(s)});
    copy(work, copies);
  }
};

// ----------------------------------------------------------------------------------------------------
// Folded codecs: rows transformed in shared memory, a thread per row; the codec within does the rest.

/// What both transforms have in common: rows at an odd stride, as many as fit 48 KiB.
template <class C>
struct FoldRows {
  static constexpr int threads = 64;
  TileShape shape;

  KVPARE_HD Index stride() const { return shape.width | 1; }
  KVPARE_HD Index rows() const {
    const Index fit = (Index{48} << 10) / (stride() * 4);
    return fit < threads ? fit : threads;
  }
  Index shared_bytes() const { return rows() * stride() * 4; }

  template <class Block>
  KVPARE_DEVICE void write(Block& b, const float* x, int count, float* out, Index out_stride) const {
    const int width = static_cast<int>(shape.width);
    for (int i = b.thread(); i < count * width; i += threads)
      out[i / width * out_stride + i % width] = x[i / width * stride() + i % width];
  }
};

/// A block per job: its rows as floats, transformed, dense.
template <class C>
struct FoldForward : FoldRows<C> {
  const EncodeJob* jobs;
  float* const* outs;

  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    const EncodeJob job = jobs[b.block()];
    float* out = outs[b.block()];
    auto* x = b.template shared<float>(0);
    const int all = static_cast<int>(job.count), most = static_cast<int>(this->rows()),
              width = static_cast<int>(this->shape.width);
    for (int begin = 0; begin < all; begin += most) {
      const int count = all - begin < most ? all - begin : most;
      for_each_number(b, job.rows + begin * job.row_bytes, job.row_bytes, job.type, count, width,
                      [&](int r, int c, float number) { x[r * this->stride() + c] = number; });
      b.sync();
      if (b.thread() < count) C::forward(this->shape.width, job.state, x + b.thread() * this->stride());
      b.sync();
      this->write(b, x, count, out + begin * this->shape.width, this->shape.width);
      b.sync();
    }
  }
};

/// A block per job: its rows, decoded by the codec within, transformed back in place.
template <class C>
struct FoldBackward : FoldRows<C> {
  const DecodeJob* jobs;

  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    const DecodeJob job = jobs[b.block()];
    auto* x = b.template shared<float>(0);
    const int all = count_bits(job.slots), most = static_cast<int>(this->rows()),
              width = static_cast<int>(this->shape.width);
    for (int begin = 0; begin < all; begin += most) {
      const int count = all - begin < most ? all - begin : most;
      float* rows = job.out + begin * job.out_stride;
      for_each_number(b, reinterpret_cast<const std::byte*>(rows), job.out_stride * 4, DType::f32, count, width,
                      [&](int r, int c, float number) { x[r * this->stride() + c] = number; });
      b.sync();
      if (b.thread() < count) C::backward(this->shape.width, job.state, x + b.thread() * this->stride());
      b.sync();
      this->write(b, x, count, rows, job.out_stride);
      b.sync();
    }
  }
};

/// Jobs of the codec within: their states follow the folded codec's own. `C` is a FoldedTiles.
template <class C>
struct InnerStates {
  static constexpr int threads = 64;
  Index width;
  const DecodeJob* from;
  DecodeJob* to;
  Index count;

  Index shared_bytes() const { return 0; }
  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    const Index i = b.block() * threads + b.thread();
    if (i >= count) return;
    DecodeJob job = from[i];
    job.state = C::inner(width, job.state);
    to[i] = job;
  }
};

/// `Tiles` are those of C::Inner.
template <FoldedCodec C, class Tiles>
struct FoldedTiles {
  static KVPARE_HD const float* inner(Index width, const float* state) {
    return state != nullptr && state_floats<typename C::Inner>(width) > 0 ? state + C::own_state_floats(width)
                                                                          : nullptr;
  }

  static Index tile_bytes(TileShape s) { return Tiles::tile_bytes(s); }
  template <class Work>
  static void encode(Work& work, TileShape s, std::span<const EncodeJob> jobs) {
    in_lots(
        work, jobs, [&](const EncodeJob& job) { return job.count * s.width; },
        [&](std::span<const EncodeJob> some, float* memory) {
          std::vector<EncodeJob> turned(some.begin(), some.end());
          std::vector<float*> outs;
          for (EncodeJob& job : turned) {
            outs.push_back(memory);
            job.rows = reinterpret_cast<const std::byte*>(memory), job.row_bytes = s.width * 4, job.type = DType::f32;
            job.state = inner(s.width, job.state);
            memory += job.count * s.width;
          }
          work.launch(std::ssize(turned), FoldForward<C>{{s}, work.put(some), work.put(outs)});
          Tiles::encode(work, s, std::span<const EncodeJob>(turned));
        });
  }
  template <class Work>
  static void decode(Work& work, TileShape s, const DecodeJob* jobs, Index count) {
    const DecodeJob* stored = jobs;
    if (state_floats<typename C::Inner>(s.width) > 0) {
      auto* copies = work.template scratch<DecodeJob>(count);
      work.launch(ceil_div(count, InnerStates<FoldedTiles>::threads),
                  InnerStates<FoldedTiles>{s.width, jobs, copies, count});
      stored = copies;
    }
    Tiles::decode(work, s, stored, count);
    work.launch(count, FoldBackward<C>{{s}, jobs});
  }
  static RowParts row_parts(TileShape s) { return Tiles::row_parts(s); }
  template <class Work>
  static void to_canonical(Work& work, TileShape s, std::span<const RepackJob> jobs) {
    Tiles::to_canonical(work, s, jobs);
  }
  template <class Work>
  static void from_canonical(Work& work, TileShape s, std::span<const RepackJob> jobs) {
    Tiles::from_canonical(work, s, jobs);
  }
};

template <Codec C, Side side, bool in_fragments>
struct TilesOf {
  using type = std::conditional_t<in_fragments, FragmentTiles<C, side>, CanonicalTiles<C>>;
};
template <FoldedCodec C, Side side, bool in_fragments>
struct TilesOf<C, side, in_fragments> {
  using type = FoldedTiles<C, typename TilesOf<typename C::Inner, side, in_fragments>::type>;
};

template <class Work, Codec C, Side side, bool in_fragments>
constexpr TileOps<Work> make_table() {
  using Tiles = typename TilesOf<C, side, in_fragments>::type;
  TileOps<Work> ops;
  ops.rows_move = C::rows_move;
  ops.tile_bytes = &Tiles::tile_bytes;
  ops.decode = &Tiles::template decode<Work>;
  ops.encode = &Tiles::template encode<Work>;
  if constexpr (C::rows_move) ops.row_parts = &Tiles::row_parts;
  ops.to_canonical = &Tiles::template to_canonical<Work>;
  ops.from_canonical = &Tiles::template from_canonical<Work>;
  return ops;
}
template <class Work, Codec C, Side side, bool in_fragments>
inline constexpr TileOps<Work> table_of = make_table<Work, C, side, in_fragments>();

template <class Work, Codec C, Side side>
const TileOps<Work>* side_ops(TileShape shape) {
  using Tiles = DeviceTiles<C, side>;
  if constexpr (has_fragment_order<typename Tiles::Stored>()) {
    if (Tiles::in_fragments(shape)) return &table_of<Work, C, side, true>;
  }
  return &table_of<Work, C, side, false>;
}

}  // namespace detail

/// The handle of a codec on one side; null when there is no such tile, or no kernel can call the codec.
template <class Work, Codec C, Side side>
const TileOps<Work>* tile_ops(TileShape shape) {
  if constexpr (host_only<C>()) {
    return nullptr;
  } else {
    return C::fits(shape) ? detail::side_ops<Work, C, side>(shape) : nullptr;
  }
}
template <class Work, Codec C>
const TileOps<Work>* tile_ops(Side side, TileShape shape) {
  return side == Side::keys ? tile_ops<Work, C, Side::keys>(shape) : tile_ops<Work, C, Side::values>(shape);
}

}  // namespace kvpare::cuda
