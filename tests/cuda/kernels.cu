// Every kernel of a list of page formats, compiled and not run: that they compile for an architecture, and what they take of a
// multiprocessor (budgets.cmake). KVPARE_FORMATS names the list.
#include <kvpare/cuda.cuh>

namespace kvpare::test {

using Half = Raw<half>;
template <class C>
using Both = Pair<C, C>;

// The lists of the compile matrix: families of codecs, and one pair of each family.
namespace formats {
using raw = Formats<Both<Half>, Both<Raw<bfloat16>>, Both<Raw<float>>>;
using integers = Formats<Both<Half>, Both<Int8>, Both<Int4>, Both<Int2>, Both<Int1>>;
using groups = Formats<Both<Half>, Pair<KiviKeys<2>, Half>, Pair<KiviKeys<2>, KiviValues<2>>, Pair<KiviKeys<4>, KiviValues<4>>,
                       Both<Symmetric<4, 32>>, Pair<KiviKeys<3>, Affine<3, 64>>>;
using floats = Formats<Both<Half>, Both<Fp8E4M3>, Both<MxFp4<>>, Both<NvFp4<>>>;
using folded = Formats<Both<Half>, Both<Rotated<Int4>>, Both<TurboQuant<4>>, Pair<MikvKeys<4>, MikvGroup<4>>>;
using tables = Formats<Both<Half>, Both<Iq4Nl>, Both<TurboQuant<3>>, Both<Lloyd<4>>, Both<Lloyd<2>>>;
using blocks = Formats<Both<Half>, Both<Q8_0>, Both<Q4_0>, Both<Ternary<>>, Both<Int3>>;
using one_of_each = Formats<Both<Half>, Both<Int4>, Pair<KiviKeys<2>, KiviValues<2>>, Both<Fp8E4M3>, Both<Rotated<Int4>>,
                            Both<Ternary<>>>;
}  // namespace formats

/// Whatever a cache on the device may launch.
void launch_all(cuda::Backend& be, const Model& model, ConstTensor rows, Tensor out) {
  KvCache<cuda::Backend, formats::KVPARE_FORMATS> cache(be, model, {.pool_bytes = 1 << 20});
  const SequenceId id = cache.create();
  const Position positions[] = {0};
  (void)cache.append(id, 0, rows, rows, positions);
  cache.attend(0, {{.sequence = id, .queries = rows, .positions = positions, .out = out}});
  (void)cache.commit({.sequence = id});
  const auto lists = cache.pages(id, 0);
  const GatherRow gather{lists[0]};
  be.gather(std::span(&gather, 1));
  const StatisticsRow statistics{lists[0]};
  be.statistics(std::span(&statistics, 1));
#if defined(KVPARE_WITH_POLICIES)
  const AnyCompressor method = make_compressor("full");
  cache.observe(id, 0, method, rows, positions);
  (void)cache.compress(id, method);
  (void)cache.decode(0, {{.sequence = id, .queries = rows, .positions = positions, .out = out}}, method);
#endif
}

}  // namespace kvpare::test
