// The backend trait: where memory lives and how work is computed. Policies are written on these verbs alone.
//
// | expression                        | promises                                                                         |
// |-----------------------------------|----------------------------------------------------------------------------------|
// | `be.allocate(bytes)`              | 64-byte aligned backend memory, or null when there is none                       |
// | `be.release(memory)`              | gives it back once the work queued so far is done; null is allowed               |
// | `be.to_backend(to, from, bytes)`  | queued copy from host memory, which may be reused at once                        |
// | `be.to_host(to, from, bytes)`     | queued copy; `to` is valid once the ticket it returns has been waited for        |
// | `be.wait(ticket)`                 | blocks until that copy and all before it are done                                |
// | `be.each(n, f)`                   | runs the KVPARE_HD functor f(Index) for 0..n-1, in any order; its type is neither |
// |                                   | local to a function nor private, which kernels cannot be made of                  |
// | `be.reduce(rows, out)`            | a RowSummary per MaskedRow, in a fixed order of summation                        |
// | `be.sort_rows(rows)`              | rows descending, ties to the lower column, NaN last                              |
// | `be.select_top(rows)`             | exact top-k per row, ties to the lower column, NaN last                          |
// | `be.attention_mass(arguments)`    | see MassArguments                                                                |
// | `be.statistics(rows)`             | min, max, sum, sum of squares of K or V per channel or per slot                  |
// | `be.gather(rows)`                 | K or V of chosen tokens as dense floats                                          |
// | `be.product(arguments)`           | batched dense products                                                           |
// | `be.append(arguments)`            | writes rows into pages, converting the element type                              |
// | `be.compact(lists)`               | moves rows between pages of one format, per list in order                        |
// | `be.encode(lists)`                | rows of some pages in the form of another page, see EncodeList                   |
// | `be.repack(tiles, to)`            | tiles in their codec's canonical bytes, or back into pages                       |
// | `be.template codec<C, side>(s)`   | a handle of codec C for tiles of shape s, null when there are none: what a       |
// |                                   | PageGeometry carries. Lives as long as the backend                               |
// | `be.template pair<P>(keys, values)` | a handle of a format P = Pair<K, V> for these tiles, or null where the backend needs none: |
// |                                   | for attention that is compiled for both sides at once. Lives as long as the backend |
// | `be.support(geometry)`            | how well it attends to pages of that format: fused or generic                    |
// | `be.attend(shape, batch, kind)`   | paged attention of a batch, see AttendSequence                                   |
//
// | `B::on_host`                      | optional `bool`: `each` and the codecs run on the host, any codec goes            |
//
// Verbs are queued in order on one stream of work; none waits, none throws after the work has begun.
#pragma once

#include <concepts>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "../codec/raw.hpp"
#include "arguments.hpp"

namespace kvpare {

namespace detail {
struct NoOperation {
  KVPARE_HD void operator()(Index) const {}
};

template <class T>
struct Fill {
  T* to;
  T value;
  KVPARE_HD void operator()(Index i) const { to[i] = value; }
};
}  // namespace detail

/// Does a backend run what cannot run on a device?
template <class B>
constexpr bool is_on_host() {
  if constexpr (requires { B::on_host; })
    return B::on_host;
  else
    return false;
}

template <class B>
concept Backend = requires(B& be, Index n, void* memory, const void* source, std::span<const MaskedRow> rows,
                           RowSummary* summaries, std::span<const SortRow> sorts, std::span<const TopRow> tops,
                           const MassArguments<>& mass, std::span<const StatisticsRow> statistics,
                           std::span<const GatherRow> gathers, const ProductArguments& product,
                           const AppendArguments& append, std::span<const CompactList> lists,
                           std::span<const EncodeList> encodes, std::span<const RepackTile> tiles, TileShape tile,
                           const PageGeometry& geometry, const LayerShape& shape,
                           std::span<const AttendSequence> batch) {
  typename B::Ticket;
  { B::name } -> std::convertible_to<std::string_view>;
  { be.allocate(n) } -> std::same_as<void*>;
  { be.release(memory) } -> std::same_as<void>;
  { be.to_backend(memory, source, n) } -> std::same_as<void>;
  { be.to_host(memory, source, n) } -> std::same_as<typename B::Ticket>;
  { be.wait(std::declval<typename B::Ticket>()) } -> std::same_as<void>;
  { be.each(n, detail::NoOperation{}) } -> std::same_as<void>;
  { be.reduce(rows, summaries) } -> std::same_as<void>;
  { be.sort_rows(sorts) } -> std::same_as<void>;
  { be.select_top(tops) } -> std::same_as<void>;
  { be.attention_mass(mass) } -> std::same_as<void>;
  { be.statistics(statistics) } -> std::same_as<void>;
  { be.gather(gathers) } -> std::same_as<void>;
  { be.product(product) } -> std::same_as<void>;
  { be.append(append) } -> std::same_as<void>;
  { be.compact(lists) } -> std::same_as<void>;
  { be.encode(encodes) } -> std::same_as<void>;
  { be.repack(tiles, RepackTo::canonical) } -> std::same_as<void>;
  { be.template codec<Raw<half>, Side::keys>(tile) } -> std::same_as<const void*>;
  { be.template pair<Pair<Raw<half>, Raw<half>>>(tile, tile) } -> std::same_as<const void*>;
  { be.support(geometry) } -> std::same_as<Support>;
  { be.attend(shape, batch, MassKind::none) } -> std::same_as<void>;
};

/// Backend memory for `size` elements, given back at the end of its life. Never dereferenced outside a verb.
template <Backend B, class T>
class Buffer {
 public:
  Buffer() = default;
  /// Throws InvalidArgument when the backend has no memory left.
  Buffer(B& be, Index size) : be_(&be), size_(size) {
    if (size == 0) return;
    data_ = static_cast<T*>(be.allocate(size * static_cast<Index>(sizeof(T))));
    require(data_ != nullptr, B::name, " backend: no memory for ", size * static_cast<Index>(sizeof(T)), " bytes");
  }
  /// A queued copy of a host array.
  Buffer(B& be, std::span<const std::remove_const_t<T>> from) : Buffer(be, static_cast<Index>(from.size())) {
    if (size_ > 0) be.to_backend(const_cast<std::remove_const_t<T>*>(data_), from.data(), bytes());
  }
  Buffer(Buffer&& other) noexcept
      : be_(other.be_), data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(be_, other.be_), std::swap(data_, other.data_), std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer() {
    if (data_ != nullptr) be_->release(const_cast<std::remove_const_t<T>*>(data_));
  }

  T* data() const { return data_; }
  Index size() const { return size_; }
  Index bytes() const { return size_ * static_cast<Index>(sizeof(T)); }

  /// Queued copy of the whole buffer; read `to` after the ticket has been waited for.
  auto to_host(std::vector<T>& to) const {
    to.resize(static_cast<std::size_t>(size_));
    return be_->to_host(to.data(), data_, bytes());
  }

 private:
  B* be_ = nullptr;
  T* data_ = nullptr;
  Index size_ = 0;
};

/// Sets every element; one launch.
template <Backend B, class T>
void fill(B& be, T* to, Index size, T value) {
  be.each(size, detail::Fill<T>{to, value});
}

}  // namespace kvpare
