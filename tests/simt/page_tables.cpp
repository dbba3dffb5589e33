// Lists that stay on the device: what is sent after a change, and that the device then holds the list.
#include <gtest/gtest.h>

#include <kvpare/backend/cuda/workspace.cuh>
#include <kvpare/core/random.hpp>
#include <memory>

#include "simt/runtime.hpp"

namespace kvpare::test::simt {
namespace {

/// Reads the table back, as kernels see it.
struct ReadKernel {
  static constexpr int threads = 32;
  HeadPages list;
  std::byte* to;
  Index entry_bytes, offset_bytes;
  Index shared_bytes() const { return 0; }
  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    for (Index i = b.thread(); i < entry_bytes; i += threads)
      to[i] = reinterpret_cast<const std::byte*>(list.entries.data())[i];
    for (Index i = b.thread(); i < offset_bytes; i += threads)
      to[entry_bytes + i] = reinterpret_cast<const std::byte*>(list.offsets)[i];
  }
};

/// A list on the host, and how it is asked about.
struct Listed {
  static constexpr Index page_tokens = 16;
  std::vector<Entry> entries;
  std::vector<std::uint16_t> offsets;
  ListVersion version;
  std::vector<PageGeometry> formats{1};

  void append(Position p) {
    if (entries.empty() || entries.back().used == page_tokens) {
      Entry e;
      e.page = static_cast<PageId>(entries.size() + 7), e.first = p;
      entries.push_back(e);
    }
    put_token(entries.back(), p, page_tokens, offsets);
    version.changed();
  }
  HeadPages pages() const { return {entries, offsets.data(), formats, page_tokens, {}, &version}; }
  std::vector<std::byte> bytes() const {
    const auto e = std::as_bytes(std::span(entries)), o = std::as_bytes(std::span(offsets));
    std::vector<std::byte> all(e.begin(), e.end());
    all.insert(all.end(), o.begin(), o.end());
    return all;
  }
};

class PageTables : public ::testing::Test {
 protected:
  Runtime runtime;
  cuda::Workspace<Runtime> work{runtime};

  std::vector<std::byte> on_device(const Listed& list) {
    const Index e = std::ssize(list.entries) * 32, o = std::ssize(list.offsets) * 2;
    work.begin();
    auto* to = work.scratch<std::byte>(e + o + 1);
    work.launch(1, ReadKernel{work.put(list.pages()), to, e, o});
    std::vector<std::byte> read(static_cast<std::size_t>(e + o));
    runtime.wait(runtime.to_host(read.data(), to, e + o));
    return read;
  }
  /// Launches of asking about a list once more.
  Index launches(const Listed& list) {
    const Index before = runtime.counts.launches;
    (void)on_device(list);
    return runtime.counts.launches - before;
  }
};

TEST_F(PageTables, HoldEveryListThroughAllItsChanges) {
  std::vector<Listed> lists(5);
  for (std::uint64_t step = 0; step < 600; ++step) {
    Listed& list = lists[random_bits(1, step) % 5];
    const std::uint64_t what = random_bits(2, step) % 16;
    const Position last = list.entries.empty() ? -1 : list.entries.back().last;
    if (what < 12 || list.entries.empty()) {
      list.append(last + 1 + static_cast<Position>(what % 3));
    } else if (what == 12) {
      list.entries[random_bits(3, step) % list.entries.size()].live &= random_bits(4, step);
      list.version.changed();
    } else if (what == 13) {
      const Entry e = list.entries.back();
      list.entries.pop_back();
      if (e.offsets != 0) list.offsets.resize((e.offsets - 1) * Listed::page_tokens);
      list.version.changed();
    } else if (what == 14) {
      list = Listed(list);  // a copy is another list
    } else if (step % 7 == 0) {
      list = Listed();
    }
    if (step % 3 != 0) continue;  // several changes at once
    for (const Listed& l : lists) {
      ASSERT_EQ(on_device(l), l.bytes()) << step;
    }
  }
}

TEST_F(PageTables, SendOnlyWhatChanged) {
  Listed list;
  for (Position p = 0; p < 16 * 40; ++p) list.append(p);
  EXPECT_EQ(launches(list), 2) << "the table, and the kernel that reads it";
  EXPECT_EQ(launches(list), 1) << "nothing has changed";

  cuda::detail::PageTables tables;
  std::vector<cuda::detail::PageTables::Patch> patches;
  const auto sent = [&] {
    patches.clear();
    tables.update(runtime, list.version, list.entries, std::span<const std::uint16_t>(list.offsets), patches);
    Index bytes = 0;
    for (const auto& p : patches) bytes += std::ssize(p.from);
    return bytes;
  };
  EXPECT_EQ(sent(), 40 * 32);
  EXPECT_EQ(sent(), 0);
  list.append(16 * 40);
  EXPECT_EQ(sent(), 32) << "a new entry";
  list.append(16 * 40 + 1);
  EXPECT_EQ(sent(), 32) << "its live mask, its count, its last position";
  list.entries[3].live = 1, list.version.changed();
  EXPECT_EQ(sent(), 16) << "one live mask";
  list.append(16 * 40 + 5);
  EXPECT_EQ(sent(), 41 * 32 + 32) << "the first block of offsets needs a larger table";
  list.append(16 * 40 + 9);
  EXPECT_EQ(sent(), 32 + 16) << "the entry, and half a block of offsets";
  for (Position p = 1000; p < 1000 + 16 * 400; ++p) list.append(p);
  EXPECT_GT(sent(), 400 * 32) << "it no longer fits: all of it goes to a larger table";
  EXPECT_EQ(sent(), 0);
  tables.release(runtime);
}

TEST_F(PageTables, OfListsThatAreGoneAreUsedAgain) {
  const Index before = runtime.allocations();
  for (int round = 0; round < 3000; ++round) {
    Listed list;
    for (Position p = 0; p < 100; ++p) list.append(p);
    ASSERT_EQ(on_device(list), list.bytes());
  }
  EXPECT_LE(runtime.allocations() - before, 3) << "a slab of tables, scratch, and what is sent";
}

}  // namespace
}  // namespace kvpare::test::simt
