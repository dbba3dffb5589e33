// The page formats that the example programs can hold tokens in: one list, for all of them.
#pragma once

#include <algorithm>
#include <iomanip>
#include <kvpare/any_backend.hpp>
#include <kvpare/codec/kv_quant.hpp>
#include <kvpare/codec/qaq.hpp>
#include <kvpare/codec/sparse.hpp>
#include <kvpare/codec/thin.hpp>
#include <kvpare/codec/unrotated.hpp>
#include <kvpare/codec/vid_kv.hpp>
#include <ostream>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

namespace example {

namespace detail {
using namespace kvpare;  // NOLINT: a list of its names

template <class C>
using Both = Pair<C, C>;
template <int bits, Index group>
using KiviPair = Pair<KiviKeys<bits, group>, KiviValues<bits, group>>;
template <int keys, int values>
using TunedPair = Pair<KvTunerToken<keys>, KvTunerToken<values>>;
template <int bits>
using MikvPair = Pair<MikvKeys<bits>, MikvGroup<bits>>;
template <int bits>
using ZipPair = Pair<ZipVlKeys<bits>, ZipVlValues<bits>>;

template <class T>
using OtherThan = std::conditional_t<std::is_same_v<T, kvpare::half>, float, kvpare::half>;

template <int percent, Index group>
using VidPair = Pair<VidKvKeys<percent, group>, VidKvValues<group>>;
template <int capacity>
using QaqPair = Pair<Qaq<capacity, QaqSide::keys>, Qaq<capacity, QaqSide::values>>;
template <int nonzeros, Index atoms, Index online>
using CsrPair = Pair<Unrotated<CsrKeys<nonzeros, atoms, online>>, CsrValues<nonzeros, atoms, online>>;
template <int bits>
using KvQuantPair = Pair<KvQuantKeys<bits>, KvQuantValues<bits>>;

/// KIVI's keys change their form before its values do, so there are pages of both kinds.
template <class T, Index group>
using List =
    Formats<Both<Raw<T>>,                                                                       // as appended
            Both<Raw<OtherThan<T>>>,                                                            // in_form(form=half)
            KiviPair<8, group>, KiviPair<4, group>, KiviPair<3, group>, KiviPair<2, group>,     // kivi(bits=…)
            Pair<KiviKeys<8, group>, Raw<T>>, Pair<KiviKeys<4, group>, Raw<T>>,                 // on the way there
            Pair<KiviKeys<3, group>, Raw<T>>, Pair<KiviKeys<2, group>, Raw<T>>,                 //
            Both<KiviValues<8, group>>, Both<KiviValues<4, group>>, Both<KiviValues<2, group>>,  // per token, with a least
            Both<Int8>, Both<Int4>, Both<Int2>,                                                 // per token and head
            MikvPair<4>, MikvPair<3>, MikvPair<2>,                                              // mikv(low=int4), …
            ZipPair<4>, ZipPair<2>,                                                             // zip_cache
            TunedPair<8, 8>, TunedPair<8, 4>, TunedPair<8, 2>,                                  // kvtuner(mode=token)
            TunedPair<4, 8>, TunedPair<4, 4>, TunedPair<4, 2>,                                  //
            TunedPair<2, 8>, TunedPair<2, 4>, TunedPair<2, 2>,                                  //
            Both<Fp8E4M3>, Both<Q8_0>, Both<Q4_0>, Both<Ternary<>>,                             // in_form(form=…)
            Both<TurboQuant<4>>, Both<TurboQuant<3>>,                                           // hadamard_lloyd4, …
            Pair<Thin<Raw<T>, 40>, Raw<T>>, Pair<Thin<Raw<T>, 50>, Raw<T>>,                     // think(percent=…)
            Pair<Thin<KiviKeys<4, group>, 50, 8>, KiviValues<4, group>>,                        // beside kivi
            VidPair<50, group>, VidPair<75, group>,                                             // vid_kv(percent=…)
            Pair<VidKvKeys<50, group>, VidKvProtectedValues<group>>,                            // with protect
            Pair<VidKvKeys<50, group, OneBit::literal>, Ternary<TernaryFit::mean, Along::tokens, group>>,  // as printed
            QaqPair<4>, QaqPair<3>, QaqPair<2>,                                                 // qaq(capacity=…)
            CsrPair<4, 0, 256>, CsrPair<2, 0, 256>, Pair<CsrKeys<4, 0, 256>, CsrValues<4, 0, 256>>,  // csr(nonzeros=…)
            CsrPair<4, 1024, 0>, CsrPair<4, 1024, 256>,                                         // with --states
            KvQuantPair<4>, KvQuantPair<3>, KvQuantPair<2>,                                     // kv_quant(bits=…)
            Pair<KvQuantRotatedKeys<3>, KvQuantValues<3>>>;                                     // after RoPE
}  // namespace detail

/// For a cache whose pages hold T as appended; KIVI's scales are shared by `group` numbers, 32 or 8.
template <class T, kvpare::Index group>
using ModelFormats = detail::List<T, group>;

/// Cache options are `options` with a pool that has room beside `options.pool_bytes` for pages of every format, since pages of
/// one size share a chunk, and those that change their form are there twice for a while.
template <class Listed>
kvpare::CacheOptions with_room_for_forms(kvpare::CacheOptions options, const kvpare::Model& model) {
  std::vector<kvpare::Index> sizes;
  for (const kvpare::LayerShape& shape : model.layers)
    Listed::for_each([&](int, auto pair) {
      using P = decltype(pair);
      if (!P::fits(options.page_tokens, shape.key_dim, shape.value_dim)) return;
      const kvpare::Index size = kvpare::round_up(P::page_bytes(options.page_tokens, shape.key_dim, shape.value_dim),
                                                  kvpare::PagePool::unit_bytes);
      if (std::find(sizes.begin(), sizes.end(), size) == sizes.end()) sizes.push_back(size);
    });
  const kvpare::Index chunk = kvpare::PagePool::chunk_bytes_for(sizes);
  options.pool_bytes = (kvpare::ceil_div(options.pool_bytes, chunk) + 4 * std::ssize(sizes)) * chunk;
  return options;
}

/// The bytes of one sequence's cache: whole pages, and what codecs keep beside them.
struct Footprint {
  kvpare::Index bytes = 0;
  kvpare::Index live_tokens = 0;  // over layers and kv heads
  kvpare::Support support = kvpare::Support::fused;  // the least of the formats in use
};

template <class Cache>
Footprint footprint(const Cache& cache, kvpare::SequenceId sequence) {
  const kvpare::SequenceStats stats = cache.stats(sequence);
  Footprint found{stats.page_bytes + stats.state_bytes, stats.live_tokens};
  for (kvpare::Index l = 0; l < cache.layers(); ++l)
    for (const kvpare::HeadPages& list : cache.pages(sequence, l))
      for (const kvpare::Entry& entry : list.entries)
        found.support = std::min(found.support, cache.support(l, entry.format));
  return found;
}

/// Every format of a cache: what it takes, and how well this machine's backend runs it on the model's shapes.
template <class Cache>
void print_formats(std::ostream& out, const Cache& cache) {
  out << "formats, for pages of " << cache.page_tokens() << " tokens and heads of " << cache.model().layers[0].key_dim
      << " and " << cache.model().layers[0].value_dim << " channels: keys/values, bits per number, how attention runs\n";
  const kvpare::LayerShape& shape = cache.model().layers[0];
  for (int f = 0; f < static_cast<int>(std::ssize(cache.formats())); ++f) {
    const auto& format = cache.formats()[static_cast<std::size_t>(f)];
    kvpare::Support support = kvpare::Support::fused;
    for (kvpare::Index l = 0; l < cache.layers(); ++l) support = std::min(support, cache.support(l, f));
    std::ostringstream bits;
    if (support == kvpare::Support::unsupported)
      bits << '-';
    else
      bits << std::fixed << std::setprecision(2)
           << 8 * static_cast<double>(format.page_bytes(cache.page_tokens(), shape.key_dim, shape.value_dim)) /
                  static_cast<double>(cache.page_tokens() * (shape.key_dim + shape.value_dim));
    out << "  " << std::left << std::setw(48) << kvpare::print_setting(kvpare::Form(format.keys.name, format.values.name))
        << std::right << std::setw(6) << bits.str() << "  " << name_of(support)
        << (f == Cache::append_format ? ", as appended" : "") << '\n';
  }
}

}  // namespace example
