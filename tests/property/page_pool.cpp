// PagePool against a naive model that searches for everything it wants to know, and from several threads.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <kvpare/cache/page_pool.hpp>
#include <kvpare/core/random.hpp>
#include <map>
#include <ostream>
#include <thread>
#include <vector>

namespace kvpare {
namespace {

using Reserve = PagePool::Reserve;

std::byte* const unreadable = reinterpret_cast<std::byte*>(std::uintptr_t{1} << 40);

// What the documentation of PagePool says, without a thought for cost. Its documented order predicts every id.
class Model {
 public:
  Model(Index budget, std::vector<Index> page_bytes) : page_bytes_(page_bytes), reserves_(page_bytes.size()) {
    for (Index& bytes : page_bytes_) bytes = (bytes + 63) / 64 * 64;
    chunk_bytes_ = PagePool::chunk_bytes_for(page_bytes);
    chunks_.resize(static_cast<std::size_t>(budget / chunk_bytes_));
    for (Index c = std::ssize(chunks_) - 1; c >= 0; --c) store_.push_back(c);
    books_.budget_bytes = budget;
    books_.tail_bytes = budget % chunk_bytes_;
    books_.chunk_bytes = chunk_bytes_;
    books_.chunks = std::ssize(chunks_);
  }

  int formats() const { return static_cast<int>(page_bytes_.size()); }
  const std::map<PageId, Index>& references() const { return references_; }

  Index available(int format, Reserve reserve) const {
    const Index bytes = page_bytes_[static_cast<std::size_t>(format)];
    Index pages = 0;
    for (const Chunk& c : chunks_)
      if (c.page_bytes == bytes) pages += chunk_bytes_ / bytes - c.used;
    const Index own = reserve == Reserve::use ? reserves_[static_cast<std::size_t>(format)].held : 0;
    return pages + (std::ssize(store_) - held() + own) * (chunk_bytes_ / bytes);
  }

  bool allocate(int format, Index count, Reserve reserve, std::vector<PageId>& out) {
    if (count > available(format, reserve)) {
      ++books_.refusals;
      return false;
    }
    for (Index i = 0; i < count; ++i) out.push_back(take(format));
    const PoolStats now = stats();
    books_.peak_bytes_in_use = std::max(books_.peak_bytes_in_use, now.bytes_in_use);
    books_.peak_chunk_bytes_in_use = std::max(books_.peak_chunk_bytes_in_use, now.chunk_bytes_in_use);
    return true;
  }

  bool retain(const std::vector<PageId>& pages) {
    for (const PageId page : pages)
      if (!references_.contains(page)) return false;
    for (const PageId page : pages) ++references_[page];
    return true;
  }

  // Pages that went back, or -1 for a caller's mistake.
  Index release(const std::vector<PageId>& pages) {
    for (const PageId page : pages)
      if (!references_.contains(page) || std::ranges::count(pages, page) > references_[page]) return -1;
    for (const PageId page : pages) --references_[page];
    Index returned = 0;
    for (const PageId page : pages) {
      if (!references_.contains(page) || references_[page] > 0) continue;
      references_.erase(page);
      give(page);
      ++returned;
    }
    return returned;
  }

  bool reserve(int format, Index count) {
    Held& own = reserves_[static_cast<std::size_t>(format)];
    if (held() - own.held + count > std::ssize(store_)) return false;
    own = {count, count};
    return true;
  }

  PoolStats stats() const {
    PoolStats s = books_;
    for (const Chunk& c : chunks_) {
      s.chunks_in_use += c.page_bytes != 0;
      s.pages_in_use += c.used;
      s.bytes_in_use += c.used * c.page_bytes;
    }
    s.chunk_bytes_in_use = s.chunks_in_use * chunk_bytes_;
    s.chunks_reserved = held();
    return s;
  }

 private:
  struct Chunk {
    Index page_bytes = 0;  // 0: in the store
    Index used = 0, touched = 0;
    long since = 0;  // when `used` last changed
    std::vector<PageId> returned;
  };
  struct Held {
    Index wanted = 0, held = 0;
  };

  Index held() const {
    Index sum = 0;
    for (const Held& h : reserves_) sum += h.held;
    return sum;
  }

  PageId take(int format) {
    const Index bytes = page_bytes_[static_cast<std::size_t>(format)];
    Chunk* best = nullptr;
    for (Chunk& c : chunks_) {
      if (c.page_bytes != bytes || c.used == chunk_bytes_ / bytes) continue;
      if (best == nullptr || std::pair(c.used, c.since) > std::pair(best->used, best->since)) best = &c;
    }
    if (best == nullptr) {
      if (held() == std::ssize(store_)) --reserves_[static_cast<std::size_t>(format)].held;
      best = &chunks_[static_cast<std::size_t>(store_.back())];
      store_.pop_back();
      *best = Chunk{.page_bytes = bytes, .returned = {}};
    }
    ++best->used;
    best->since = ++time_;
    PageId page;
    if (best->returned.empty()) {
      page = static_cast<PageId>(((best - chunks_.data()) * chunk_bytes_ + best->touched++ * bytes) / 64);
    } else {
      page = best->returned.back();
      best->returned.pop_back();
    }
    references_[page] = 1;
    return page;
  }

  void give(PageId page) {
    const Index at = Index{page} * 64 / chunk_bytes_;
    Chunk& c = chunks_[static_cast<std::size_t>(at)];
    --c.used;
    c.since = ++time_;
    c.returned.push_back(page);
    if (c.used > 0) return;
    c = Chunk{};
    store_.push_back(at);
    const auto lacking = std::ranges::find_if(reserves_, [](const Held& h) { return h.held < h.wanted; });
    if (lacking != reserves_.end()) ++lacking->held;
  }

  std::vector<Index> page_bytes_;
  Index chunk_bytes_ = 0;
  std::vector<Chunk> chunks_;
  std::vector<Index> store_;  // a stack
  std::vector<Held> reserves_;
  std::map<PageId, Index> references_;
  PoolStats books_;
  long time_ = 0;
};

template <class F>
bool throws(F&& f) {
  try {
    f();
  } catch (const InvalidArgument&) {
    return true;
  }
  return false;
}

struct Setting {
  std::vector<Index> page_bytes;
  Index budget_bytes;
  friend void PrintTo(const Setting& s, std::ostream* out) {
    *out << ::testing::PrintToString(s.page_bytes) << " in " << s.budget_bytes;
  }
};

class PagePoolModel : public ::testing::TestWithParam<Setting> {};

TEST_P(PagePoolModel, AgreesAfterRandomOperations) {
  const auto& [page_bytes, budget] = GetParam();
  PagePool pool(unreadable, budget, page_bytes);
  Model model(budget, page_bytes);
  const Index bookkeeping = pool.stats().bookkeeping_bytes;
  const Index units = budget / 64;

  std::uint64_t draws = 0;
  auto below = [&draws](Index n) {
    return static_cast<Index>(random_bits(7, ++draws) % static_cast<std::uint64_t>(n));
  };
  std::vector<PageId> held;  // one place per reference
  auto remove = [&held](PageId page) { held.erase(std::ranges::find(held, page)); };

  constexpr int operations = 50'000;
  Index mistakes = 0, recut = 0, shared = 0, from_reserve = 0;
  std::map<Index, Index> last_cut;  // chunk -> page size seen there last
  for (int op = 0; op < operations; ++op) {
    SCOPED_TRACE(op);
    const int format = static_cast<int>(below(model.formats()));
    const bool filling = op / 500 % 2 == 1;  // empty, fill up, empty, …, fill up
    const Index kind = below(100);
    if (kind < (filling ? 45 : 15)) {
      const Index count = below(10) == 0 ? below(40) : below(6);
      const Reserve reserve = below(2) == 0 ? Reserve::use : Reserve::leave;
      const Index reserved = pool.stats().chunks_reserved;
      std::vector<PageId> expected, got(static_cast<std::size_t>(count), PagePool::no_page);
      const bool granted = model.allocate(format, count, reserve, expected);
      ASSERT_EQ(pool.allocate(format, got, reserve), granted);
      if (!granted) expected.assign(got.size(), PagePool::no_page);
      ASSERT_EQ(got, expected);
      if (!granted) continue;
      held.insert(held.end(), got.begin(), got.end());
      from_reserve += pool.stats().chunks_reserved < reserved;
      for (const PageId page : got) {
        Index& size = last_cut[Index{page} * 64 / pool.stats().chunk_bytes];
        recut += size != 0 && size != pool.page_bytes(format);
        size = pool.page_bytes(format);
      }
    } else if (kind < 55) {
      std::vector<PageId> pages;
      for (Index n = below(4); n > 0 && !held.empty(); --n)
        pages.push_back(held[static_cast<std::size_t>(below(std::ssize(held)))]);
      ASSERT_TRUE(model.retain(pages));
      pool.retain(pages);
      held.insert(held.end(), pages.begin(), pages.end());
      shared += std::ssize(pages);
    } else if (kind < 90) {
      std::vector<PageId> pages;
      for (Index n = below(filling ? 5 : 12); n > 0 && !held.empty(); --n) {
        pages.push_back(held[static_cast<std::size_t>(below(std::ssize(held)))]);
        remove(pages.back());
      }
      ASSERT_EQ(pool.release(pages), model.release(pages));
    } else if (kind < 94) {  // often wrong: pages that may not be in use, more releases than references
      std::vector<PageId> pages;
      for (Index n = 1 + below(3); n > 0; --n)
        pages.push_back(below(2) == 0 || held.empty() ? static_cast<PageId>(below(units))
                                                      : held[static_cast<std::size_t>(below(std::ssize(held)))]);
      if (below(2) == 0) {
        const bool wrong = !model.retain(pages);
        ASSERT_EQ(throws([&] { pool.retain(pages); }), wrong);
        mistakes += wrong;
        if (!wrong) held.insert(held.end(), pages.begin(), pages.end());
      } else {
        const Index returned = model.release(pages);
        Index got = -1;
        ASSERT_EQ(throws([&] { got = pool.release(pages); }), returned < 0);
        ASSERT_EQ(got, returned);
        mistakes += returned < 0;
        if (returned >= 0) std::ranges::for_each(pages, remove);
      }
    } else if (kind < 96) {
      const Index count = below(4);
      ASSERT_EQ(pool.reserve(format, count), model.reserve(format, count));
    } else {
      const PageId page = static_cast<PageId>(below(units));
      const auto in_use = model.references().find(page);
      ASSERT_EQ(pool.references(page), in_use == model.references().end() ? 0 : in_use->second);
    }

    if (op % 16 != 0) continue;
    PoolStats expected = model.stats();
    expected.bookkeeping_bytes = bookkeeping;
    ASSERT_EQ(pool.stats(), expected);
    for (int f = 0; f < model.formats(); ++f)
      for (const Reserve reserve : {Reserve::leave, Reserve::use})
        ASSERT_EQ(pool.available(f, reserve), model.available(f, reserve));
    if (op % 256 != 0) continue;
    for (const auto& [page, count] : model.references()) ASSERT_EQ(pool.references(page), count);
  }
  // The run went where it should.
  EXPECT_GT(pool.stats().refusals, operations / 100);
  EXPECT_GT(mistakes, operations / 200);
  EXPECT_GT(shared, operations / 100);
  if (std::ranges::max(page_bytes) != std::ranges::min(page_bytes)) {
    EXPECT_GT(recut, operations / 100);
  }
  EXPECT_GT(from_reserve, operations / 1000);

  EXPECT_GT(std::ssize(held), 0);
  pool.release(held);
  EXPECT_EQ(pool.stats().chunks_in_use, 0);
  EXPECT_EQ(pool.stats().bytes_in_use, 0);
}

INSTANTIATE_TEST_SUITE_P(Settings, PagePoolModel,
                         ::testing::Values(Setting{{1024, 1344, 4096}, 24 * 4096 + 1000},
                                           Setting{{4096, 2560, 1536, 1280, 4096}, 40 * 4096 * 5},
                                           Setting{{8192, 64, 1000}, 12 * 8192},  // up to 128 pages in a chunk
                                           Setting{{640}, 640 * 100}));           // every page a chunk

// Each thread marks the units of pages it gets; a unit marked twice, or an end that is not empty, is a lost update.
TEST(PagePoolThreads, NoPageIsInTwoHands) {
  const std::vector<Index> page_bytes{1024, 1344, 4096};
  constexpr Index budget = 64 * 4096;
  constexpr int threads = 4, rounds = 4000;
  PagePool pool(unreadable, budget, page_bytes);
  ASSERT_TRUE(pool.reserve(1, 2));
  std::vector<std::atomic<int>> owner(budget / 64);
  std::atomic<Index> clashes{0}, refusals{0}, went_back{0}, given{0};

  auto work = [&](int self) {
    struct Lot {
      int format;
      std::vector<PageId> pages;
    };
    std::vector<Lot> lots;
    std::uint64_t draws = 0;
    auto below = [&](Index n) {
      return static_cast<Index>(random_bits(11, self, ++draws) % static_cast<std::uint64_t>(n));
    };
    auto mark = [&](const Lot& lot, int from, int to) {
      for (const PageId page : lot.pages)
        for (Index u = 0; u < pool.page_bytes(lot.format) / 64; ++u)
          if (owner[page + static_cast<std::size_t>(u)].exchange(to, std::memory_order_relaxed) != from) ++clashes;
    };
    auto drop = [&](std::size_t at) {
      mark(lots[at], self, 0);
      went_back += pool.release(lots[at].pages);
      lots[at] = lots.back();
      lots.pop_back();
    };
    for (int round = 0; round < rounds; ++round) {
      if (below(20) < 11) {
        Lot lot{static_cast<int>(below(3)), std::vector<PageId>(static_cast<std::size_t>(below(12)))};
        if (!pool.allocate(lot.format, lot.pages, below(2) == 0 ? Reserve::use : Reserve::leave)) {
          ++refusals;
          continue;
        }
        given += std::ssize(lot.pages);
        mark(lot, 0, self);
        pool.retain(lot.pages);
        if (pool.release(lot.pages) != 0) ++clashes;
        lots.push_back(lot);
      } else if (!lots.empty()) {
        drop(static_cast<std::size_t>(below(std::ssize(lots))));
      }
      if (below(50) == 0) {
        const PoolStats s = pool.stats();
        if (s.bytes_in_use > s.chunk_bytes_in_use || s.chunks_in_use + s.chunks_reserved > s.chunks) ++clashes;
        if (pool.available(0) < 0) ++clashes;
      }
    }
    while (!lots.empty()) drop(0);
  };
  {
    std::vector<std::jthread> running;
    for (int t = 1; t <= threads; ++t) running.emplace_back(work, t);
  }
  EXPECT_EQ(clashes, 0);
  EXPECT_EQ(given, went_back);
  EXPECT_GT(given, rounds);
  EXPECT_GT(refusals, 0);
  EXPECT_EQ(pool.stats().refusals, refusals);
  EXPECT_EQ(pool.stats().pages_in_use, 0);
  EXPECT_EQ(pool.stats().chunks_in_use, 0);
  EXPECT_EQ(pool.stats().chunks_reserved, 2);
}

// Forks share a prefix: every page goes back exactly once, whoever lets go last.
TEST(PagePoolThreads, SharedPagesGoBackOnce) {
  const std::vector<Index> page_bytes{256, 1024};
  PagePool pool(unreadable, 64 * 1024, page_bytes);
  std::vector<PageId> prefix(200);
  ASSERT_TRUE(pool.allocate(0, prefix));
  std::atomic<Index> went_back{0};
  auto work = [&] {
    for (int round = 0; round < 200; ++round) {
      pool.retain(prefix);
      went_back += pool.release(prefix);
    }
    went_back += pool.release(prefix);
  };
  pool.retain(prefix);  // one reference for each thread
  { std::jthread one(work), two(work); }
  EXPECT_EQ(went_back, 200);
  EXPECT_EQ(pool.stats().pages_in_use, 0);
}

}  // namespace
}  // namespace kvpare
