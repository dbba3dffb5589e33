// Each promise of PagePool, one test each.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <kvpare/cache/page_pool.hpp>
#include <limits>
#include <new>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

namespace {
std::atomic<long> host_allocations{0};
}

// This program counts its host allocations: the pool promises to make none after its constructor.
// (noinline: g++ would see free() meet operator new and warn.)
[[gnu::noinline]] void* operator new(std::size_t bytes) {
  ++host_allocations;
  if (void* p = std::malloc(bytes == 0 ? 1 : bytes)) return p;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }

namespace kvpare {
namespace {

using Reserve = PagePool::Reserve;
using Sizes = std::vector<Index>;

static_assert(!std::is_copy_constructible_v<PagePool> && !std::is_move_constructible_v<PagePool>);
static_assert(PagePool::max_budget_bytes == Index{256} << 30);

// An address nobody can read: a pool that touched its memory would crash.
std::byte* const unreadable = reinterpret_cast<std::byte*>(std::uintptr_t{1} << 40);

// Four pages of 1024 bytes in a chunk, or three of 1344 (4032 of 4096 bytes, 1.6 % wasted), or one of 4096.
const Sizes three_sizes{1024, 1344, 4096};
constexpr Index chunk = 4096;

std::vector<PageId> take(PagePool& pool, int format, Index count, Reserve reserve = Reserve::leave) {
  std::vector<PageId> pages(static_cast<std::size_t>(count), PagePool::no_page);
  EXPECT_TRUE(pool.allocate(format, pages, reserve));
  return pages;
}

bool refused(PagePool& pool, int format, Index count, Reserve reserve = Reserve::leave) {
  std::vector<PageId> pages(static_cast<std::size_t>(count));
  return !pool.allocate(format, pages, reserve);
}

PageId chunk_of(PageId page) { return page / (chunk / 64); }

template <class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const InvalidArgument& e) {
    return e.what();
  }
  return "no error";
}

#define EXPECT_ERROR(words, ...) \
  EXPECT_NE(error_of([&] { __VA_ARGS__; }).find(words), std::string::npos) << error_of([&] { __VA_ARGS__; })

// ---- the chunk ----

TEST(PagePoolChunk, OneSizeNeedsOnePage) {
  for (Index bytes : {1, 63, 64, 65, 1000, 4096, 33333})
    EXPECT_EQ(PagePool::chunk_bytes_for(Sizes{bytes}), round_up(bytes, 64)) << bytes;
}

TEST(PagePoolChunk, SizesOfTheTestsGiveTheChunkAssumed) { EXPECT_EQ(PagePool::chunk_bytes_for(three_sizes), chunk); }

TEST(PagePoolChunk, ThreePercentIsAllowedAndNoMore) {
  EXPECT_EQ(PagePool::chunk_bytes_for(Sizes{64, 97 * 64, 100 * 64}), 100 * 64);  // 3 of 100
  EXPECT_GT(PagePool::chunk_bytes_for(Sizes{64, 96 * 64, 99 * 64}), 99 * 64);    // 3 of 99
}

// Against trial of every multiple of 64, for many sets of sizes.
TEST(PagePoolChunk, IsTheSmallestThatWastesAtMostThreePercent) {
  std::uint64_t seed = 1;
  auto next = [&seed](Index below) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return static_cast<Index>(seed >> 33) % below;
  };
  for (int set = 0; set < 2000; ++set) {
    Sizes sizes(static_cast<std::size_t>(1 + next(8)));
    const Index largest = Index{64} << next(11);
    for (Index& s : sizes) s = 1 + next(largest);
    auto fits = [&sizes](Index bytes) {
      return std::ranges::all_of(sizes, [bytes](Index s) {
        const Index page = (s + 63) / 64 * 64;
        return page <= bytes && static_cast<double>(bytes % page) <= 0.03 * static_cast<double>(bytes) + 1e-9;
      });
    };
    Index smallest = 64;
    while (!fits(smallest)) smallest += 64;
    ASSERT_EQ(PagePool::chunk_bytes_for(sizes), smallest) << ::testing::PrintToString(sizes);
    ASSERT_LE(smallest, 34 * round_up(std::ranges::max(sizes), 64));
  }
}

TEST(PagePoolChunk, OrderAndRepeatsOfSizesDoNotMatter) {
  const Index bytes = PagePool::chunk_bytes_for(Sizes{4160, 1088, 16640, 8256});
  EXPECT_EQ(PagePool::chunk_bytes_for(Sizes{16640, 8256, 1088, 4160, 1088, 1030}), bytes);
}

TEST(PagePoolChunk, HugeSizesAreFoundAtOnce) {
  const Index gib = Index{1} << 30;
  const Sizes sizes{64, gib + 64, 3 * gib - 192, 7 * gib + 64 * 1001};
  const Index bytes = PagePool::chunk_bytes_for(sizes);
  for (Index s : sizes) EXPECT_LE(bytes % s * 100, bytes * 3);
}

// ---- addresses ----

TEST(PagePool, PageSizesAreRoundedUpToUnits) {
  PagePool pool(unreadable, 1 << 20, Sizes{1, 64, 65, 1000});
  EXPECT_EQ(pool.formats(), 4);
  EXPECT_EQ(pool.page_bytes(0), 64);
  EXPECT_EQ(pool.page_bytes(1), 64);
  EXPECT_EQ(pool.page_bytes(2), 128);
  EXPECT_EQ(pool.page_bytes(3), 1024);
}

TEST(PagePool, AddressesAreAlignedInsideAndDoNotOverlap) {
  const Index budget = 50 * chunk + 700;
  PagePool pool(unreadable, budget, three_sizes);
  struct Range {
    std::byte *begin, *end;
    bool operator<(const Range& other) const { return begin < other.begin; }
  };
  std::set<Range> ranges;
  for (int format = 0; pool.available(format) > 0; format = (format + 1) % 3) {
    const PageId page = take(pool, format, 1)[0];
    std::byte* begin = pool.address(page);
    EXPECT_EQ(begin, unreadable + Index{64} * page);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(begin) % 64, 0u);
    EXPECT_TRUE(ranges.insert({begin, begin + pool.page_bytes(format)}).second);
  }
  EXPECT_GT(std::ssize(ranges), 50);
  EXPECT_GE(ranges.begin()->begin, unreadable);
  EXPECT_LE(ranges.rbegin()->end, unreadable + budget);
  for (auto a = ranges.begin(), b = std::next(a); b != ranges.end(); ++a, ++b) EXPECT_LE(a->end, b->begin);
}

TEST(PagePool, LargestBudgetIsAddressedAndNeverGivesNoPage) {
  const Index page = Index{1} << 30;
  PagePool pool(unreadable, PagePool::max_budget_bytes, Sizes{page});
  EXPECT_EQ(pool.available(0), 255);  // the 256th would end at the last unit
  EXPECT_EQ(pool.stats().tail_bytes, page);
  const auto pages = take(pool, 0, 255);
  EXPECT_EQ(pages.back(), PageId{254} << 24);
  EXPECT_EQ(pool.address(pages.back()), unreadable + 254 * page);
  EXPECT_EQ(pool.release(pages), 255);

  PagePool odd(unreadable, PagePool::max_budget_bytes - 64, Sizes{page, page - 64});
  EXPECT_EQ(odd.available(1), 255);
}

// ---- the order in which pages are given ----

TEST(PagePool, PagesOfAFreshPoolAscend) {
  PagePool pool(unreadable, 3 * chunk, three_sizes);
  EXPECT_EQ(take(pool, 0, 6), (std::vector<PageId>{0, 16, 32, 48, 64, 80}));
  EXPECT_EQ(take(pool, 1, 2), (std::vector<PageId>{128, 149}));
}

TEST(PagePool, TakesFromTheFullestChunk) {
  PagePool pool(unreadable, 4 * chunk, three_sizes);
  const auto pages = take(pool, 0, 16);
  // In use by chunk afterwards: 1 2 3 2
  pool.release(std::vector<PageId>{pages[0], pages[1], pages[2], pages[4], pages[5], pages[8], pages[12], pages[13]});
  std::vector<PageId> from;
  for (const PageId page : take(pool, 0, 8)) from.push_back(chunk_of(page));
  // chunk 2 first; of 1 and 3, equally full, the one that came to it last; chunk 0 at the end
  EXPECT_EQ(from, (std::vector<PageId>{2, 3, 3, 1, 1, 0, 0, 0}));
}

TEST(PagePool, FullestFirstLetsChunksEmpty) {
  constexpr Index chunks = 64;
  PagePool pool(unreadable, chunks * chunk, three_sizes);
  auto pages = take(pool, 0, 4 * chunks);
  for (Index c = 0; c < chunks; ++c)  // one page left in the first half, three in the second
    for (Index p = 0; p < (c < chunks / 2 ? 3 : 1); ++p) pool.release(pages[static_cast<std::size_t>(4 * c + p)]);
  EXPECT_EQ(pool.stats().chunks_in_use, chunks);
  take(pool, 0, chunks / 2);
  for (Index c = 0; c < chunks / 2; ++c) pool.release(pages[static_cast<std::size_t>(4 * c + 3)]);
  EXPECT_EQ(pool.stats().chunks_in_use, chunks / 2);  // all new pages went to the second half
}

TEST(PagePool, ThePageGivenBackLastComesFirst) {
  PagePool pool(unreadable, 2 * chunk, three_sizes);
  const auto pages = take(pool, 0, 3);
  pool.release(pages[0]);
  pool.release(pages[1]);
  EXPECT_EQ(take(pool, 0, 3), (std::vector<PageId>{pages[1], pages[0], 48}));
}

TEST(PagePool, EqualCallsGiveEqualIds) {
  auto run = [] {
    PagePool pool(unreadable, 16 * chunk, three_sizes);
    std::vector<PageId> held, given;
    for (int i = 0; i < 300; ++i) {
      const int format = i * i % 3;
      if (pool.available(format) >= 2) {
        for (const PageId page : take(pool, format, 2)) held.push_back(page), given.push_back(page);
      }
      if (i % 3 != 0 && !held.empty()) {
        const auto at = held.begin() + i * 7 % std::ssize(held);
        pool.release(*at);
        held.erase(at);
      }
    }
    return given;
  };
  EXPECT_EQ(run(), run());
}

// ---- chunks and sizes ----

TEST(PagePool, AChunkServesOneSizeAtATimeAndIsRecut) {
  PagePool pool(unreadable, 2 * chunk, three_sizes);
  const auto small = take(pool, 0, 5);  // two chunks, the second with room for 3
  EXPECT_EQ(pool.available(0), 3);
  EXPECT_EQ(pool.available(1), 0);
  EXPECT_EQ(pool.available(2), 0);
  EXPECT_TRUE(pool.release(small[4]));  // the last page of its chunk
  EXPECT_EQ(pool.available(0), 4);
  EXPECT_EQ(pool.available(1), 3);
  EXPECT_EQ(pool.available(2), 1);
  EXPECT_EQ(take(pool, 1, 3), (std::vector<PageId>{64, 85, 106}));
  EXPECT_TRUE(refused(pool, 0, 1));
  EXPECT_EQ(pool.release(small[0]), true);
  EXPECT_TRUE(refused(pool, 1, 1));  // a page is free, but of another size
  pool.release(std::span(small).subspan(1, 3));
  EXPECT_EQ(take(pool, 2, 1), (std::vector<PageId>{0}));
}

TEST(PagePool, PagesOfTheSizeBeforeAreNotInUseAfterARecut) {
  PagePool pool(unreadable, chunk, three_sizes);
  const auto before = take(pool, 0, 4);
  pool.release(before);
  take(pool, 1, 1);  // page 0 again; 16, 32 and 48 begin no page of this size
  EXPECT_EQ(pool.references(0), 1);
  for (PageId page : {16u, 32u, 48u, 21u, 42u}) {
    EXPECT_EQ(pool.references(page), 0);
    EXPECT_ERROR("is not in use", pool.release(page));
  }
}

TEST(PagePool, FormatsOfOneSizeShareChunks) {
  PagePool pool(unreadable, 64 * 8, Sizes{200, 256, 128});
  take(pool, 0, 1);
  take(pool, 1, 1);
  EXPECT_EQ(pool.stats().chunks_in_use, 2);  // chunks of 256: one page each
  PagePool two(unreadable, 4096 * 2, Sizes{1024, 1000, 4096});
  take(two, 0, 2);
  take(two, 1, 2);
  EXPECT_EQ(two.stats().chunks_in_use, 1);
}

// ---- all or nothing ----

TEST(PagePool, AllocationIsAllOrNothing) {
  PagePool pool(unreadable, 3 * chunk + 64, three_sizes);
  take(pool, 0, 3);
  PoolStats before = pool.stats();
  std::vector<PageId> out(10, 77);
  EXPECT_FALSE(pool.allocate(0, out));  // 9 could be had
  EXPECT_EQ(out, std::vector<PageId>(10, 77));
  EXPECT_EQ(before.refusals, 0);
  before.refusals = 1;
  EXPECT_EQ(pool.stats(), before);
  EXPECT_EQ(pool.available(0), 9);
  take(pool, 0, 9);
  EXPECT_EQ(pool.available(0), 0);
}

TEST(PagePool, AnEmptyListIsAlwaysGranted) {
  PagePool pool(unreadable, chunk, three_sizes);
  take(pool, 2, 1);
  EXPECT_TRUE(pool.allocate(2, {}));
  pool.retain(std::span<const PageId>{});
  EXPECT_EQ(pool.release(std::span<const PageId>{}), 0);
  EXPECT_EQ(pool.stats().refusals, 0);
}

// ---- references ----

TEST(PagePool, APageGoesBackWithItsLastReference) {
  PagePool pool(unreadable, chunk, three_sizes);
  const PageId page = take(pool, 2, 1)[0];
  EXPECT_EQ(pool.references(page), 1);
  pool.retain(page);
  pool.retain(std::vector<PageId>{page, page});
  EXPECT_EQ(pool.references(page), 4);
  EXPECT_FALSE(pool.release(page));
  EXPECT_EQ(pool.release(std::vector<PageId>{page, page}), 0);
  EXPECT_EQ(pool.stats().pages_in_use, 1);  // shared or not
  EXPECT_TRUE(refused(pool, 2, 1));
  EXPECT_TRUE(pool.release(page));
  EXPECT_EQ(pool.references(page), 0);
  EXPECT_EQ(pool.stats().pages_in_use, 0);
}

TEST(PagePool, ReleasingAListCountsThePagesThatWentBack) {
  PagePool pool(unreadable, 2 * chunk, three_sizes);
  const auto pages = take(pool, 0, 5);
  pool.retain(pages[1]);
  pool.retain(pages[2]);
  // 0 goes back, 1 stays, 2 goes back as it is listed twice, and with 3 and 4 more
  EXPECT_EQ(pool.release(std::vector<PageId>{pages[2], pages[0], pages[1], pages[2], pages[4], pages[3]}), 4);
  EXPECT_EQ(pool.references(pages[1]), 1);
  EXPECT_EQ(pool.stats().pages_in_use, 1);
}

TEST(PagePool, AnAllocatedPageHasOneReferenceWhateverItHadBefore) {
  PagePool pool(unreadable, chunk, three_sizes);
  const PageId page = take(pool, 2, 1)[0];
  pool.retain(page);
  pool.release(std::vector<PageId>{page, page});
  EXPECT_EQ(take(pool, 2, 1)[0], page);
  EXPECT_EQ(pool.references(page), 1);
}

// ---- the caller's mistakes ----

TEST(PagePool, PagesNotInUseAreCaught) {
  PagePool pool(unreadable, 3 * chunk + 2048, three_sizes);
  const auto pages = take(pool, 0, 2);
  pool.release(pages[0]);
  const PageId wrong[] = {
      pages[0],  // released
      1,         // not the beginning of a page
      17,
      32,   // its chunk is cut, but the page was never given
      64,   // the chunk is not cut
      192,  // in the tail
      1u << 20, PagePool::no_page,
  };
  for (const PageId page : wrong) {
    const PoolStats before = pool.stats();
    const std::string says = "page " + std::to_string(page) + " is not in use";
    EXPECT_ERROR("release: " + says, pool.release(page));
    EXPECT_ERROR("retain: " + says, pool.retain(page));
    EXPECT_ERROR("release: " + says, pool.release(std::vector<PageId>{pages[1], page}));
    EXPECT_ERROR("retain: " + says, pool.retain(std::vector<PageId>{pages[1], page}));
    EXPECT_EQ(pool.references(page), 0);
    EXPECT_EQ(pool.references(pages[1]), 1);  // nothing has changed
    EXPECT_EQ(pool.stats(), before);
  }
}

TEST(PagePool, TheWasteOfAChunkIsNoPage) {
  PagePool pool(unreadable, 2 * chunk, Sizes{1344, 4096});  // 3 * 21 of 64 units
  const auto pages = take(pool, 0, 6);
  EXPECT_EQ(pages.back(), 64u + 42u);
  for (const PageId waste : {63u, 127u}) {
    EXPECT_EQ(pool.references(waste), 0);
    EXPECT_ERROR("is not in use", pool.release(waste));
  }
}

TEST(PagePool, AListThatReleasesTooOftenIsCaughtAndChangesNothing) {
  PagePool pool(unreadable, chunk, three_sizes);
  const auto pages = take(pool, 0, 3);
  pool.retain(pages[1]);
  EXPECT_ERROR("is not in use", pool.release(std::vector<PageId>{pages[0], pages[1], pages[0]}));
  EXPECT_ERROR("is not in use", pool.release(std::vector<PageId>{pages[1], pages[0], pages[1], pages[1]}));
  EXPECT_EQ(pool.references(pages[0]), 1);
  EXPECT_EQ(pool.references(pages[1]), 2);
  EXPECT_EQ(pool.references(pages[2]), 1);
  EXPECT_EQ(pool.release(std::vector<PageId>{pages[1], pages[0], pages[2], pages[1]}), 3);
}

TEST(PagePool, WrongConstructionIsCaught) {
  auto make = [](std::byte* base, Index budget, const Sizes& sizes) { PagePool pool(base, budget, sizes); };
  const Index most = PagePool::max_budget_bytes;
  EXPECT_ERROR("base is null", make(nullptr, chunk, three_sizes));
  EXPECT_ERROR("base is 32 bytes past a multiple of 64", make(unreadable + 32, chunk, three_sizes));
  EXPECT_ERROR("page_bytes is empty", make(unreadable, chunk, {}));
  EXPECT_ERROR("page_bytes[1] = 0", make(unreadable, chunk, {64, 0}));
  EXPECT_ERROR("page_bytes[0] = -64", make(unreadable, chunk, {-64}));
  EXPECT_ERROR("page_bytes[0] = 9223372036854775807", make(unreadable, chunk, {std::numeric_limits<Index>::max()}));
  EXPECT_ERROR("budget_bytes = 4095, must be within [4096 (one chunk)", make(unreadable, chunk - 1, three_sizes));
  EXPECT_ERROR("budget_bytes = 0", make(unreadable, 0, three_sizes));
  EXPECT_ERROR("budget_bytes = -1", make(unreadable, -1, three_sizes));
  EXPECT_ERROR("budget_bytes = 274877906945", make(unreadable, most + 1, {Index{1} << 30}));
  EXPECT_ERROR("takes all ids", make(unreadable, most, {most}));
  EXPECT_ERROR("too far apart", make(unreadable, most, {64, most / 2}));
  EXPECT_ERROR("page_bytes is empty", PagePool::chunk_bytes_for({}));
  EXPECT_EQ(error_of([&] { make(unreadable, chunk, three_sizes); }), "no error");
}

TEST(PagePool, FormatsOutOfRangeAreCaught) {
  PagePool pool(unreadable, chunk, three_sizes);
  PageId page[1];
  for (int format : {-1, 3, 1000}) {
    const std::string says = "format = " + std::to_string(format) + ", must be within [0, 2]";
    EXPECT_ERROR("allocate: " + says, (void)pool.allocate(format, page));
    EXPECT_ERROR("available: " + says, pool.available(format));
    EXPECT_ERROR("page_bytes: " + says, pool.page_bytes(format));
    EXPECT_ERROR("reserve: " + says, (void)pool.reserve(format, 0));
  }
  EXPECT_ERROR("chunks = -1, must be at least 0", (void)pool.reserve(0, -1));
  EXPECT_EQ(pool.stats().refusals, 0);
}

// ---- the books ----

TEST(PagePool, StatsAreExact) {
  PagePool pool(unreadable, 5 * chunk + 100, three_sizes);
  const Index bookkeeping = pool.stats().bookkeeping_bytes;
  EXPECT_EQ(pool.stats(), (PoolStats{.budget_bytes = 5 * chunk + 100,
                                     .tail_bytes = 100,
                                     .chunk_bytes = chunk,
                                     .chunks = 5,
                                     .bookkeeping_bytes = bookkeeping}));
  EXPECT_GE(bookkeeping, static_cast<Index>(sizeof(PagePool)) + 5 * 24 + 5 * 4 * 4);
  EXPECT_LE(bookkeeping, 2048);

  const auto small = take(pool, 0, 5), middle = take(pool, 1, 1), large = take(pool, 2, 1);
  pool.retain(large);
  EXPECT_TRUE(refused(pool, 2, 2));
  EXPECT_TRUE(pool.reserve(1, 1));
  PoolStats expected{.budget_bytes = 5 * chunk + 100,
                     .tail_bytes = 100,
                     .chunk_bytes = chunk,
                     .chunks = 5,
                     .chunks_in_use = 4,
                     .chunks_reserved = 1,
                     .pages_in_use = 7,
                     .bytes_in_use = 5 * 1024 + 1344 + 4096,
                     .chunk_bytes_in_use = 4 * chunk,
                     .peak_bytes_in_use = 5 * 1024 + 1344 + 4096,
                     .peak_chunk_bytes_in_use = 4 * chunk,
                     .refusals = 1,
                     .bookkeeping_bytes = bookkeeping};
  EXPECT_EQ(pool.stats(), expected);

  pool.release(small);
  expected.chunks_in_use = 2, expected.chunk_bytes_in_use = 2 * chunk;
  expected.pages_in_use = 2, expected.bytes_in_use = 1344 + 4096;
  EXPECT_EQ(pool.stats(), expected);  // the peaks stay

  pool.release(middle);
  pool.release(large);
  pool.release(large);
  expected.chunks_in_use = 0, expected.chunk_bytes_in_use = 0, expected.pages_in_use = 0, expected.bytes_in_use = 0;
  EXPECT_EQ(pool.stats(), expected);
}

TEST(PagePool, AllocatesNoHostMemoryAfterTheConstructor) {
  PagePool pool(unreadable, 100 * chunk, three_sizes);
  std::vector<PageId> pages(50);
  const long before = host_allocations;
  for (int round = 0; round < 20; ++round) {
    const int format = round % 3;
    EXPECT_TRUE(pool.reserve(format, round % 2));
    EXPECT_TRUE(pool.allocate(format, pages, Reserve::use));
    pool.retain(pages);
    pool.release(pages);
    EXPECT_EQ(pool.references(pages[7]), 1);
    EXPECT_EQ(pool.release(pages), 50);
    EXPECT_EQ(pool.available(2), 100 - pool.stats().chunks_reserved);
  }
  const long after = host_allocations;
  EXPECT_EQ(after, before);
  ::operator delete(::operator new(1));
  EXPECT_EQ(host_allocations, after + 1);  // the counter counts
}

// ---- the reserve ----

TEST(PagePoolReserve, OnlyItsFormatMayUseItAndOnlyWhenAsked) {
  PagePool pool(unreadable, 3 * chunk, three_sizes);
  EXPECT_TRUE(pool.reserve(1, 1));
  EXPECT_EQ(pool.stats().chunks_reserved, 1);
  EXPECT_EQ(pool.available(0), 8);
  EXPECT_EQ(pool.available(0, Reserve::use), 8);
  EXPECT_EQ(pool.available(1), 6);
  EXPECT_EQ(pool.available(1, Reserve::use), 9);
  take(pool, 0, 8);
  EXPECT_TRUE(refused(pool, 0, 1));
  EXPECT_TRUE(refused(pool, 0, 1, Reserve::use));
  EXPECT_TRUE(refused(pool, 1, 1));
  take(pool, 1, 1, Reserve::use);
  EXPECT_EQ(pool.stats().chunks_reserved, 0);
  EXPECT_EQ(pool.available(1), 2);  // a chunk once taken is like any other
  take(pool, 1, 2);
  EXPECT_TRUE(refused(pool, 1, 1, Reserve::use));
}

TEST(PagePoolReserve, IsTheLastToBeUsed) {
  PagePool pool(unreadable, 3 * chunk, three_sizes);
  EXPECT_TRUE(pool.reserve(2, 1));
  take(pool, 2, 2, Reserve::use);
  EXPECT_EQ(pool.stats().chunks_reserved, 1);
  take(pool, 2, 1, Reserve::use);
  EXPECT_EQ(pool.stats().chunks_reserved, 0);
}

TEST(PagePoolReserve, GetsBackWhatWasTakenBeforeAnyoneElseGetsAChunk) {
  PagePool pool(unreadable, 4 * chunk, three_sizes);
  EXPECT_TRUE(pool.reserve(2, 1));
  EXPECT_TRUE(pool.reserve(0, 1));
  const auto raw = take(pool, 1, 6);  // two chunks
  take(pool, 2, 1, Reserve::use);
  take(pool, 0, 4, Reserve::use);
  EXPECT_EQ(pool.stats().chunks_reserved, 0);
  EXPECT_EQ(pool.stats().chunks_in_use, 4);

  pool.release(std::span(raw).first(3));  // a chunk comes back: to format 0, the lowest that lacks one
  EXPECT_EQ(pool.stats().chunks_reserved, 1);
  EXPECT_EQ(pool.available(1), 0);
  EXPECT_EQ(pool.available(2, Reserve::use), 0);
  EXPECT_EQ(pool.available(0, Reserve::use), 4);

  pool.release(std::span(raw).last(3));  // the next one to format 2
  EXPECT_EQ(pool.stats().chunks_reserved, 2);
  EXPECT_EQ(pool.available(1), 0);
  EXPECT_EQ(pool.available(2, Reserve::use), 1);
}

TEST(PagePoolReserve, CannotBeMoreThanTheStoreHas) {
  PagePool pool(unreadable, 4 * chunk, three_sizes);
  take(pool, 2, 1);
  EXPECT_TRUE(pool.reserve(0, 2));
  EXPECT_FALSE(pool.reserve(1, 2));
  EXPECT_EQ(pool.stats().chunks_reserved, 2);
  EXPECT_TRUE(pool.reserve(1, 1));
  EXPECT_FALSE(pool.reserve(0, 3));
  EXPECT_TRUE(pool.reserve(0, 2));  // what it has
  EXPECT_EQ(pool.available(2), 0);
  EXPECT_EQ(pool.stats().refusals, 0);  // counts allocations
  EXPECT_TRUE(pool.reserve(0, 0));      // given up at once
  EXPECT_EQ(pool.available(2), 2);
  EXPECT_EQ(pool.stats().chunks_reserved, 1);
}

TEST(PagePoolReserve, AReserveGivenUpIsOwedNothing) {
  PagePool pool(unreadable, 2 * chunk, three_sizes);
  EXPECT_TRUE(pool.reserve(2, 1));
  const auto pages = take(pool, 2, 2, Reserve::use);
  EXPECT_TRUE(pool.reserve(2, 0));
  pool.release(pages);
  EXPECT_EQ(pool.stats().chunks_reserved, 0);
  EXPECT_EQ(pool.available(0), 8);
}

// What the reserve is for: every page of a full pool changes to a smaller format, a chunk's worth at a time.
TEST(PagePoolReserve, AFullPoolChangesItsFormat) {
  PagePool pool(unreadable, 9 * chunk, three_sizes);
  EXPECT_TRUE(pool.reserve(0, 1));
  const auto raw = take(pool, 2, 8);
  EXPECT_TRUE(refused(pool, 2, 1));
  EXPECT_TRUE(refused(pool, 0, 1));
  std::vector<PageId> codes;
  for (const PageId page : raw) {
    codes.push_back(take(pool, 0, 1, Reserve::use)[0]);
    EXPECT_TRUE(pool.release(page));
  }
  EXPECT_EQ(pool.stats().chunks_in_use, 2);
  EXPECT_EQ(pool.stats().chunks_reserved, 1);
  EXPECT_EQ(pool.available(2), 6);
}

}  // namespace
}  // namespace kvpare
