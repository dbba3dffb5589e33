// Snapshots that are not what they should be: damaged, of another cache, or whole and full of nonsense. Each is refused
// with a sentence, and the cache is as it was. So are pools without room, and streams that fail.
#include <gtest/gtest.h>

#include <cstdlib>
#include <functional>
#include <new>
#include <streambuf>

#include "support/scripted_cache.hpp"
#include "support/snapshot_bytes.hpp"

namespace {

std::size_t largest_allocation = 0;  // since it was last set to 0

void* noted_memory(std::size_t bytes, std::size_t alignment) {
  if (bytes > largest_allocation) largest_allocation = bytes;
  if (void* p = std::aligned_alloc(alignment, (bytes + alignment) / alignment * alignment)) return p;
  throw std::bad_alloc();
}

}  // namespace

// (noinline: g++ would see free() meet operator new and warn.)
[[gnu::noinline]] void* operator new(std::size_t bytes) { return noted_memory(bytes, 16); }
[[gnu::noinline]] void* operator new(std::size_t bytes, std::align_val_t a) {
  return noted_memory(bytes, static_cast<std::size_t>(a));
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

namespace kvpare::test {
namespace {

using HalfAndFloat = Formats<Pair<Raw<half>, Raw<float>>>;
using Cached = ScriptedCache<cpu::Backend, HalfAndFloat>;
const FormatNames names{{"half", "float"}};

cpu::Backend& backend() { return CpuRig<cpu::Isa::plain, 1>::backend(); }

Model small_model() {
  return {{{.q_heads = 4,
            .kv_heads = 2,
            .key_dim = 4,
            .value_dim = 3,
            .scale = 0.5f,
            .window = 70,
            .sink_logits = {1, 2, 3, 4}},
           {.q_heads = 1, .kv_heads = 1, .key_dim = 2, .value_dim = 2, .scale = 0.25f, .softcap = 3}}};
}

/// A cache with a sequence of gaps, tags, holes, several pages and running scores, and that sequence's bytes.
struct Scene {
  Cached c{backend(), small_model(), {.page_tokens = 16, .pool_bytes = 64 << 10}};
  SequenceId id = c.cache.create();
  SequenceImage image;
  std::string bytes;

  Scene() {
    c.cache.tag(id,
                {.begin = 2, .end = 9, .token_class = TokenClass::image, .image = 1, .grid_rows = 7, .grid_cols = 1});
    c.cache.tag(id, {.begin = 20, .end = 22, .is_protected = true});
    const AnyCompressor method = make_compressor("h2o(keep=44t)");
    c.append(id, range(0, 18)), c.append(id, range(25, 12));
    c.observe(id, method, range(0, 18)), c.observe(id, method, range(25, 12));
    const SequenceId fork = c.cache.fork(id);  // so that holes stay
    c.cache.compress(id, method);
    c.cache.release(fork);
    c.append(id, {100, 200});
    image = c.cache.image(id);
    bytes = c.saved(id);
  }

  SequenceImage::Page& page(std::size_t layer, std::size_t head, std::size_t p) {
    return image.layers[layer].heads[head].pages[p];
  }

  /// The image as it is now, in bytes whose checksums are right.
  std::string written() const { return snapshot_bytes(sections_of(c.cache.model(), names, image)); }
};

/// The sentence of a refusal. After it the cache is as it was: pool, sequences, the next id.
std::string refusal(Cached& c, SequenceId held, const std::function<std::optional<SequenceId>()>& act) {
  const PoolStats before = c.cache.pool().stats();
  const SequenceImage image = c.cache.image(held);
  const std::uint64_t epoch = c.cache.epoch(held);
  const SequenceId probe = c.cache.create();
  c.cache.release(probe);
  std::string said = "no error";
  try {
    if (!act()) said = "the pool is full";
  } catch (const InvalidArgument& e) {
    said = e.what();
  }
  EXPECT_EQ(c.cache.pool().stats(), before) << said;
  EXPECT_TRUE(c.cache.image(held) == image) << said;
  EXPECT_EQ(c.cache.epoch(held), epoch) << said;
  const SequenceId next = c.cache.create();
  EXPECT_EQ(next, probe + 1) << "a sequence was made: " << said;
  c.cache.release(next);
  return said;
}
std::string refusal_of(Scene& s, const std::string& bytes) {
  return refusal(s.c, s.id, [&] { return s.c.loaded(bytes); });
}

bool contains(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

// ---- damage

TEST(SnapshotRefusal, TheSceneItselfIsTaken) {
  Scene s;
  EXPECT_EQ(s.written(), s.bytes);
  const std::optional<SequenceId> copy = s.c.loaded(s.bytes);
  ASSERT_TRUE(copy);
  EXPECT_TRUE(s.c.cache.image(*copy) == s.image);
  EXPECT_GE(s.image.layers[0].heads[0].pages.size(), 2u);
  EXPECT_FALSE(s.image.layers[0].heads[0].running.empty());
  EXPECT_GE(s.image.layers[0].given.size(), 3u);
}

TEST(SnapshotRefusal, ForeignBytes) {
  Scene s;
  for (const std::string bytes : {"", "k", "kvpare", "kvpareSP\1\0\0\0", "GGUF and so on", "\0\0\0\0\0\0\0\0\0\0\0\0"})
    EXPECT_EQ(refusal_of(s, bytes), "snapshot: these are no bytes of a snapshot");
  EXPECT_EQ(refusal_of(s, "kvpareSQ"), "snapshot: the stream ends in the version");
  EXPECT_EQ(refusal_of(s, s.bytes.substr(0, 12)), "snapshot: the stream ends in the tag of a section");
  const auto sections = sections_of(s.bytes);
  for (const std::uint32_t version : {0u, 1u, 4u, 6u, 0xffffffffu})
    EXPECT_EQ(refusal_of(s, snapshot_bytes(sections, version)),
              message("snapshot: version ", version, ", this library reads 5"));
}

TEST(SnapshotRefusal, EveryTruncation) {
  Scene s;
  for (std::size_t n = 0; n < s.bytes.size(); ++n) {
    const std::string said = refusal_of(s, s.bytes.substr(0, n));
    ASSERT_TRUE(contains(said, "snapshot: the stream ends in") || contains(said, "no bytes of a snapshot"))
        << n << " bytes: " << said;
  }
}

TEST(SnapshotRefusal, EveryByteThatIsAnother) {
  Scene s;
  for (std::size_t at = 0; at < s.bytes.size(); ++at)
    for (const int flip : {0x01, 0x80, 0xff}) {
      std::string damaged = s.bytes;
      damaged[at] = static_cast<char>(damaged[at] ^ flip);
      const std::string said = refusal_of(s, damaged);
      ASSERT_TRUE(contains(said, "snapshot: ")) << "byte " << at << ": " << said;
    }
}

TEST(SnapshotRefusal, SectionsInAnotherOrder) {
  Scene s;
  const auto sections = sections_of(s.bytes);  // MODL TAGS LAYR LAYR END
  ASSERT_EQ(sections.size(), 5u);
  for (std::size_t a = 0; a < sections.size(); ++a)
    for (std::size_t b = 0; b < a; ++b) {
      if (sections[a].tag == sections[b].tag) continue;
      auto other = sections;
      std::swap(other[a], other[b]);
      EXPECT_EQ(refusal_of(s, snapshot_bytes(other)),
                message("snapshot: section '", sections[a].tag, "' where '", sections[b].tag, "' should be"));
    }
  for (std::size_t gone = 0; gone < sections.size(); ++gone) {
    auto fewer = sections, more = sections;
    fewer.erase(fewer.begin() + static_cast<std::ptrdiff_t>(gone));
    EXPECT_TRUE(contains(refusal_of(s, snapshot_bytes(fewer)), "snapshot: ")) << "without " << sections[gone].tag;
    if (gone + 1 == sections.size()) continue;
    more.insert(more.begin() + static_cast<std::ptrdiff_t>(gone), sections[gone]);
    const std::string said = refusal_of(s, snapshot_bytes(more));
    EXPECT_TRUE(contains(said, gone == 2 ? "snapshot: a page of format" : "should be")) << said;
  }
  auto swapped = sections;  // layers 0 and 1
  std::swap(swapped[2], swapped[3]);
  EXPECT_NE(refusal_of(s, snapshot_bytes(swapped)), "no error") << "layers of other shapes in another order";
}

TEST(SnapshotRefusal, SectionsThatAreTooLongOrTooShort) {
  Scene s;
  const auto sections = sections_of(s.bytes);
  for (std::size_t i = 0; i < sections.size(); ++i) {
    auto longer = sections;
    longer[i].content += '\0';
    EXPECT_EQ(refusal_of(s, snapshot_bytes(longer)),
              message("snapshot: section ", sections[i].tag, " has 1 bytes more than it should"));
    for (std::size_t n = 0; n < sections[i].content.size(); ++n) {
      auto shorter = sections;
      shorter[i].content.resize(n);
      const std::string said = refusal_of(s, snapshot_bytes(shorter));
      ASSERT_TRUE(contains(said, message("snapshot: section ", sections[i].tag))) << n << " bytes: " << said;
    }
  }
}

// ---- another cache

TEST(SnapshotRefusal, OfAnotherModel) {
  Scene s;
  const auto refused_by = [&](const std::function<void(Model&)>& change) {
    Model model = small_model();
    change(model);
    Cached other(backend(), model, {.page_tokens = 16, .pool_bytes = 64 << 10});
    const SequenceId held = other.cache.create();
    return refusal(other, held, [&] { return other.loaded(s.bytes); });
  };
  {
    Cached equal(backend(), small_model(), {.page_tokens = 16, .pool_bytes = 64 << 10});
    EXPECT_TRUE(equal.loaded(s.bytes));
  }
  EXPECT_EQ(refused_by([](Model& m) { m.layers.pop_back(); }), "snapshot: number of layers = 2, the cache's is 1");
  EXPECT_EQ(refused_by([](Model& m) { m.layers[1].q_heads = 2; }), "snapshot: layer 1: q_heads = 1, the cache's is 2");
  EXPECT_EQ(refused_by([](Model& m) { m.layers[0].kv_heads = 4; }),
            "snapshot: layer 0: kv_heads = 2, the cache's is 4");
  EXPECT_EQ(refused_by([](Model& m) { m.layers[0].key_dim = 5; }), "snapshot: layer 0: key_dim = 4, the cache's is 5");
  EXPECT_EQ(refused_by([](Model& m) { m.layers[1].value_dim = 3; }),
            "snapshot: layer 1: value_dim = 2, the cache's is 3");
  EXPECT_EQ(refused_by([](Model& m) { m.layers[0].window = 0; }), "snapshot: layer 0: window = 70, the cache's is 0");
  EXPECT_EQ(refused_by([](Model& m) { m.layers[1].scale = 1; }), "snapshot: layer 1: scale = 0.25, the cache's is 1");
  EXPECT_EQ(refused_by([](Model& m) { m.layers[1].softcap = 0; }), "snapshot: layer 1: softcap = 3, the cache's is 0");
  for (const std::vector<float>& sinks : {std::vector<float>{}, std::vector<float>{1, 2, 3, 5}})
    EXPECT_EQ(refused_by([&](Model& m) { m.layers[0].sink_logits = sinks; }),
              "snapshot: layer 0 has other sink logits than the cache");
}

TEST(SnapshotRefusal, OfAnotherPageSizeOrOtherFormats) {
  Scene s;
  Cached pages(backend(), small_model(), {.page_tokens = 32, .pool_bytes = 64 << 10});
  EXPECT_EQ(refusal(pages, pages.cache.create(), [&] { return pages.loaded(s.bytes); }),
            "snapshot: page_tokens = 16, the cache's is 32");
  const auto refused_by = [&](auto formats) {
    KvCache<cpu::Backend, decltype(formats)> cache(backend(), small_model(),
                                                   {.page_tokens = 16, .pool_bytes = 64 << 10});
    std::istringstream in(s.bytes);
    return error_of([&] { (void)load(in, cache); });
  };
  EXPECT_EQ(refused_by(Formats<Pair<Raw<half>, Raw<float>>, Pair<Raw<half>, Raw<half>>>{}),
            "snapshot: number of page formats = 1, the cache's is 2");
  EXPECT_EQ(refused_by(Formats<Pair<Raw<bfloat16>, Raw<float>>>{}),
            "snapshot: keys of format 0 = half, the cache's is bfloat16");
  EXPECT_EQ(refused_by(Formats<Pair<Raw<half>, Raw<half>>>{}),
            "snapshot: values of format 0 = float, the cache's is half");
}

// ---- checksums right, content nonsense

/// Both ways in refuse the image that `change` makes: by bytes, and at once.
void expect_nonsense(const char* sentence, const std::function<void(Scene&)>& change) {
  Scene s;
  change(s);
  ASSERT_NE(s.written(), s.bytes) << "nothing was changed";
  const std::string by_bytes = refusal_of(s, s.written());
  EXPECT_TRUE(contains(by_bytes, sentence)) << by_bytes << "\nwanted " << sentence;
  const std::string at_once = refusal(s.c, s.id, [&] { return s.c.cache.restore(s.image); });
  EXPECT_TRUE(contains(at_once, "restore: ") || contains(at_once, "tag: ")) << at_once;
}

/// Rows for one token more or less, so that only the mask is wrong.
void add_row(SequenceImage::Page& page, std::size_t key_row, std::size_t value_row) {
  page.keys.resize(page.keys.size() + key_row), page.values.resize(page.values.size() + value_row);
}

TEST(SnapshotNonsense, Pages) {
  expect_nonsense("format 1, must be below 1", [](Scene& s) { s.page(0, 0, 0).format = 1; });
  expect_nonsense("format 65535, must be below 1", [](Scene& s) { s.page(1, 0, 0).format = 65535; });
  expect_nonsense("live slots beyond the", [](Scene& s) {
    s.page(0, 1, 0).live = 0, s.page(0, 1, 0).keys.clear(), s.page(0, 1, 0).values.clear();
  });
  expect_nonsense("live slots beyond the", [](Scene& s) {
    SequenceImage::Page& page = s.image.layers[0].heads[0].pages.back();
    page.live |= std::uint64_t{1} << page.offsets.size();
    add_row(page, 8, 12);
  });
  expect_nonsense("live slots beyond the", [](Scene& s) {
    s.page(0, 0, 0).live |= std::uint64_t{1} << 63;
    add_row(s.page(0, 0, 0), 8, 12);
  });
  expect_nonsense("0 slots, must be within [1, 16]", [](Scene& s) { s.page(0, 0, 1).offsets.clear(); });
  expect_nonsense("17 slots, must be within [1, 16]", [](Scene& s) {
    s.page(0, 0, 0).offsets.resize(17);
    std::iota(s.page(0, 0, 0).offsets.begin(), s.page(0, 0, 0).offsets.end(), std::uint16_t{0});
  });
  expect_nonsense("slots, must be within [1, 16]", [](Scene& s) { s.page(0, 0, 0).offsets.resize(65535); });
}

TEST(SnapshotNonsense, Positions) {
  expect_nonsense("starts at position", [](Scene& s) { s.page(0, 0, 0).offsets[0] = 1; });
  expect_nonsense("positions do not ascend at slot 3",
                  [](Scene& s) { s.page(0, 0, 0).offsets[3] = s.page(0, 0, 0).offsets[2]; });
  expect_nonsense("positions do not ascend at slot 2",
                  [](Scene& s) { std::swap(s.page(1, 0, 0).offsets[1], s.page(1, 0, 0).offsets[2]); });
  expect_nonsense("starts at position -1", [](Scene& s) { s.page(0, 0, 0).first = -1; });
  expect_nonsense("starts at position", [](Scene& s) { s.page(0, 0, 1).first = s.page(0, 0, 0).first; });
  expect_nonsense("starts at position",
                  [](Scene& s) { s.page(0, 0, 1).first = s.page(0, 0, 0).first + s.page(0, 0, 0).offsets.back(); });
  expect_nonsense("which the layer was not given",
                  [](Scene& s) { s.image.layers[0].heads[1].pages.back().first = 2147483647; });
  expect_nonsense("holds position 201, which the layer was not given",
                  [](Scene& s) { ++s.image.layers[0].heads[1].pages.back().offsets.back(); });
  expect_nonsense("holds position 199, which the layer was not given",
                  [](Scene& s) { --s.image.layers[1].heads[0].pages.back().offsets.back(); });
  expect_nonsense("which the layer was not given", [](Scene& s) { s.image.layers[0].given.clear(); });
  expect_nonsense("which the layer was not given",
                  [](Scene& s) { s.image.layers[0].given.erase(s.image.layers[0].given.begin()); });
}

TEST(SnapshotNonsense, StatesAndAges) {
  expect_nonsense("state 1 is none of its format", [](Scene& s) { s.page(0, 0, 0).state = 1; });
  expect_nonsense("has 0 floats, format 0 takes 0", [](Scene& s) { s.image.layers[0].states.emplace_back(); });
  expect_nonsense("must be within [0, 1)", [](Scene& s) { s.image.layers[0].aging.format = 7; });
  expect_nonsense("have the form of format 0 already", [](Scene& s) { s.image.layers[1].aging.format = 0; });
}

TEST(SnapshotNonsense, WhatWasGiven) {
  using Spans = std::vector<std::pair<Position, Position>>;
  for (const Spans& spans : {Spans{{-1, 300}}, Spans{{5, 5}, {6, 300}}, Spans{{300, 0}}, Spans{{0, 100}, {100, 300}},
                             Spans{{0, 100}, {50, 300}}, Spans{{150, 300}, {0, 100}}, Spans{{0, 0}, {1, 300}},
                             Spans{{0, 300}, {-2147483647 - 1, 2147483647}}})
    expect_nonsense("spans must ascend and not touch", [&](Scene& s) { s.image.layers[1].given = spans; });
}

TEST(SnapshotNonsense, RunningScores) {
  expect_nonsense("running scores for", [](Scene& s) { s.image.layers[0].heads[1].running.resize(33); });
  expect_nonsense("running scores for",
                  [](Scene& s) { s.image.layers[0].scorer.clear(), s.image.layers[0].last_row = -1; });
  expect_nonsense("but no scorer has counted any", [](Scene& s) {
    s.image.layers[0].scorer.clear();
    for (auto& head : s.image.layers[0].heads) head.running.clear();
  });
  expect_nonsense("has a running score in slot", [](Scene& s) {
    const SequenceImage::Page& page = s.page(0, 0, 0);
    const auto hole = static_cast<std::size_t>(std::countr_one(page.live));
    ASSERT_LT(hole, page.offsets.size());
    s.image.layers[0].heads[0].running[hole] = -0.0f;
  });
  expect_nonsense("was compressed to 5 of 4 tokens",
                  [](Scene& s) { s.image.layers[0].compressed_to = 5, s.image.layers[0].compressed_from = 4; });
  expect_nonsense("last row = -2", [](Scene& s) { s.image.layers[1].last_row = -2; });
  expect_nonsense("running scores for 0 slots", [](Scene& s) { s.image.layers[1].heads[0].pages.clear(); });
}

TEST(SnapshotNonsense, Heads) {
  expect_nonsense("has 1 kv heads, must be 2", [](Scene& s) { s.image.layers[0].heads.pop_back(); });
  expect_nonsense("has 2 kv heads, must be 1", [](Scene& s) { s.image.layers[1].heads.resize(2); });
  expect_nonsense("has 0 kv heads, must be 1", [](Scene& s) { s.image.layers[1].heads.clear(); });
}

TEST(SnapshotNonsense, TagsOutOfRange) {
  expect_nonsense("span [-1, 9)", [](Scene& s) { s.image.tags[0].begin = -1; });
  expect_nonsense("span [9, 9)", [](Scene& s) { s.image.tags[0].begin = 9; });
  expect_nonsense("span [2, -5)", [](Scene& s) { s.image.tags[0].end = -5; });
  expect_nonsense("class 32, must be below 32", [](Scene& s) { s.image.tags[1].token_class = TokenClass(32); });
  expect_nonsense("class 255, must be below 32", [](Scene& s) { s.image.tags[1].token_class = TokenClass(255); });
  expect_nonsense("image = -2", [](Scene& s) { s.image.tags[0].image = -2; });
  expect_nonsense("grid of -1 rows", [](Scene& s) { s.image.tags[0].grid_rows = -1; });
  expect_nonsense("-9223372036854775808 columns",
                  [](Scene& s) { s.image.tags[0].grid_cols = std::numeric_limits<Index>::min(); });
  expect_nonsense("spans must ascend and not overlap", [](Scene& s) { std::swap(s.image.tags[0], s.image.tags[1]); });
  expect_nonsense("spans must ascend and not overlap", [](Scene& s) { s.image.tags[0].end = 21; });
  expect_nonsense("spans must ascend and not overlap", [](Scene& s) { s.image.tags.push_back(s.image.tags.back()); });

  Scene s;
  auto sections = sections_of(s.bytes);
  constexpr std::size_t is_protected = 4 + 9;  // of the first span
  ASSERT_EQ(sections[1].content[is_protected], 0);
  sections[1].content[is_protected] = 2;
  EXPECT_EQ(refusal_of(s, snapshot_bytes(sections)), "snapshot: protected = 2, must be 0 or 1");
}

/// What only an image can be wrong in.
TEST(SnapshotNonsense, Images) {
  const auto refused = [](const std::function<void(Scene&)>& change) {
    Scene s;
    change(s);
    return refusal(s.c, s.id, [&] { return s.c.cache.restore(s.image); });
  };
  EXPECT_EQ(refused([](Scene& s) { s.image.page_tokens = 64; }), "restore: page_tokens = 64, must be 16");
  EXPECT_EQ(refused([](Scene& s) { s.image.layers.pop_back(); }), "restore: 1 layers, must be 2");
  EXPECT_EQ(refused([](Scene& s) { s.image = {}; }), "restore: page_tokens = 0, must be 16");
  EXPECT_TRUE(contains(refused([](Scene& s) { s.page(0, 0, 0).keys.pop_back(); }), "bytes of keys"));
  EXPECT_TRUE(contains(refused([](Scene& s) { s.page(1, 0, 0).values.resize(4096); }), "4096 of values"));
}

/// Counts and lengths that announce more than there is: an error, and no memory to speak of.
TEST(SnapshotNonsense, AnnouncedLengths) {
  Scene s;
  const auto sections = sections_of(s.bytes);
  const auto with_number = [](std::string bytes, std::size_t at, std::uint64_t n, std::size_t size) {
    for (std::size_t i = 0; i < size; ++i, n >>= 8) bytes[at + i] = static_cast<char>(n & 255);
    return bytes;
  };
  const auto refused_small = [&](const std::string& bytes) {
    largest_allocation = 0;
    const std::string said = error_of([&] { (void)s.c.loaded(bytes); });
    EXPECT_LE(largest_allocation, 4u << 20) << said;
    EXPECT_TRUE(contains(said, "snapshot: ")) << said;
    return said;
  };
  // The length of a section, with and without a checksum that goes with it.
  std::size_t at = 12;
  for (const SnapshotSection& section : sections) {
    for (const std::uint64_t length : {std::uint64_t{1} << 63, ~std::uint64_t{0}, std::uint64_t{1} << 40,
                                       std::uint64_t{1} << 31, std::uint64_t{section.content.size() + 1}}) {
      const std::string damaged = with_number(s.bytes, at + 4, length, 8);
      const std::string said = refused_small(damaged);
      EXPECT_TRUE(contains(said, "the stream ends in") || contains(said, "is damaged")) << said;
      ByteWriter w;
      w.bytes = damaged.substr(0, at + 12 + section.content.size());
      w.number(crc32(std::string_view(w.bytes).substr(at)));
      refused_small(w.bytes + damaged.substr(at + section.content.size() + 16));
    }
    at += section.content.size() + 16;
  }

  // Every place in every section taken for a count, and made large; checksums are right.
  for (std::size_t i = 0; i < sections.size(); ++i)
    for (std::size_t place = 0; place + 4 <= sections[i].content.size(); ++place)
      for (const std::uint64_t n : {0x7fffffffu, 0xffffffffu, 0x00ffffffu}) {
        auto other = sections;
        other[i].content = with_number(other[i].content, place, n, 4);
        largest_allocation = 0;
        std::optional<SequenceId> taken;
        const std::string said = error_of([&] { taken = s.c.loaded(snapshot_bytes(other)); });
        ASSERT_LE(largest_allocation, 4u << 20) << sections[i].tag << " at " << place << ": " << said;
        if (taken) {  // numbers of a row, a score: anything goes
          ASSERT_EQ(s.c.saved(*taken), snapshot_bytes(other)) << sections[i].tag << " at " << place;
          s.c.cache.release(*taken);
        }
      }
  EXPECT_TRUE(s.c.cache.image(s.id) == s.image);
}

/// Every single byte of the content, checksums right: refused, or a sequence that works and is saved as it came.
TEST(SnapshotNonsense, EveryByteOfTheContent) {
  Scene s;
  const auto sections = sections_of(s.bytes);
  Index taken = 0, refused = 0;
  for (std::size_t i = 0; i < sections.size(); ++i)
    for (std::size_t place = 0; place < sections[i].content.size(); ++place)
      for (const int flip : {0x01, 0x02, 0x80, 0xff}) {
        auto other = sections;
        other[i].content[place] = static_cast<char>(other[i].content[place] ^ flip);
        const std::string bytes = snapshot_bytes(other);
        std::optional<SequenceId> id;
        const PoolStats before = s.c.cache.pool().stats();
        const std::string said = error_of([&] { id = s.c.loaded(bytes); });
        if (!id) {
          ++refused;
          ASSERT_NE(said, "no error") << sections[i].tag << " at " << place;
          ASSERT_EQ(s.c.cache.pool().stats(), before);
          continue;
        }
        ++taken;
        if (i > 0) {  // 0 may be -0 in a model
          ASSERT_EQ(s.c.saved(*id), bytes) << sections[i].tag << " at " << place;
        }
        (void)s.c.attend(*id, {0, 50, 300});
        for (Index l = 0; l < 2; ++l) {
          const Position next = static_cast<Position>(s.c.last(*id) + 1);
          if (next < 2147483000) s.c.append(*id, l, {next});
        }
        s.c.cache.compress(*id, make_compressor("key_norm(keep=20t)"));
        s.c.cache.truncate(*id, 30);
        s.c.cache.release(*id);
        ASSERT_EQ(s.c.cache.pool().stats().pages_in_use, before.pages_in_use);
      }
  EXPECT_GT(taken, 1000) << "rows and scores may be anything";
  EXPECT_GT(refused, 500);
  EXPECT_TRUE(s.c.cache.image(s.id) == s.image);
}

// ---- no room, and streams

TEST(SnapshotRoom, AFullPoolIsNoError) {
  Scene s;
  Index full = 0, taken = 0;
  for (Index pool_bytes = 16 << 10; pool_bytes <= 64 << 10; pool_bytes += 512) {
    Cached c(backend(), small_model(), {.page_tokens = 16, .pool_bytes = pool_bytes});
    const SequenceId held = c.cache.create();
    while (c.cache.pool().available(0) > 12 && c.cache.pool().available(1) > 12)
      c.append(held, {static_cast<Position>(c.last(held) + 1)});
    const PoolStats before = c.cache.pool().stats();
    const SequenceImage image = c.cache.image(held);
    std::vector<SequenceId> copies;
    while (const auto copy = c.loaded(s.bytes)) copies.push_back(*copy), ++taken;
    ++full;
    PoolStats after = c.cache.pool().stats();
    for (const SequenceId copy : copies) {
      EXPECT_TRUE(c.cache.image(copy) == s.image);
      c.cache.release(copy);
    }
    EXPECT_EQ(after.pages_in_use,
              before.pages_in_use + static_cast<Index>(copies.size()) * s.c.cache.stats(s.id).pages);
    after = c.cache.pool().stats();
    EXPECT_EQ(after.refusals, before.refusals + 1);
    EXPECT_EQ(after.pages_in_use, before.pages_in_use);
    EXPECT_EQ(after.bytes_in_use, before.bytes_in_use);
    EXPECT_EQ(after.chunk_bytes_in_use, before.chunk_bytes_in_use);
    EXPECT_TRUE(c.cache.image(held) == image);
    c.cache.release(held);
    EXPECT_TRUE(c.loaded(s.bytes)) << "now that there is room";
    ASSERT_FALSE(HasFailure()) << "pool of " << pool_bytes;
  }
  EXPECT_GT(full, 50);
  EXPECT_GT(taken, 50);
}

/// Takes some bytes, then no more; or takes all, and fails to write them out.
struct FailingOutput : std::streambuf {
  std::size_t room = 0;
  bool writes_out = true;
  std::streamsize xsputn(const char*, std::streamsize n) override {
    const auto taken = std::min(room, static_cast<std::size_t>(n));
    room -= taken;
    return static_cast<std::streamsize>(taken);
  }
  int overflow(int c) override { return room > 0 ? (--room, traits_type::not_eof(c)) : traits_type::eof(); }
  int sync() override { return writes_out ? 0 : -1; }
};

TEST(SnapshotStreams, OutputThatFails) {
  Scene s;
  for (std::size_t room = 0; room <= s.bytes.size(); ++room) {
    FailingOutput buffer;
    buffer.room = room;
    std::ostream out(&buffer);
    const std::string said = error_of([&] { save(out, s.c.cache, s.id); });
    ASSERT_EQ(said, room < s.bytes.size() ? "snapshot: the stream did not take all bytes" : "no error")
        << room << " bytes";
  }
  FailingOutput buffer;
  buffer.room = s.bytes.size(), buffer.writes_out = false;
  std::ostream out(&buffer);
  EXPECT_EQ(error_of([&] { save(out, s.c.cache, s.id); }), "snapshot: the stream did not take all bytes");
  std::ostringstream bad;
  bad.setstate(std::ios::badbit);
  EXPECT_EQ(error_of([&] { save(bad, s.c.cache, s.id); }), "snapshot: the stream did not take all bytes");
  EXPECT_TRUE(s.c.cache.image(s.id) == s.image);
  EXPECT_EQ(error_of([&] { (void)s.c.saved(77); }), "sequence 77 does not exist (never created, or released)");
}

TEST(SnapshotStreams, InputThatFails) {
  Scene s;
  EXPECT_EQ(refusal(s.c, s.id,
                    [&] {
                      std::istringstream in(s.bytes);
                      in.setstate(std::ios::badbit);
                      return load(in, s.c.cache);
                    }),
            "snapshot: these are no bytes of a snapshot");
  for (const std::size_t n : {std::size_t{0}, std::size_t{40}, s.bytes.size() / 2, s.bytes.size() - 1})
    EXPECT_EQ(refusal(s.c, s.id,
                      [&]() -> std::optional<SequenceId> {
                        std::istringstream in(s.bytes.substr(0, n));
                        in.exceptions(std::ios::failbit | std::ios::badbit);  // the stream's own error comes through
                        try {
                          return load(in, s.c.cache);
                        } catch (const std::ios::failure&) {
                          throw InvalidArgument("the stream's");
                        }
                      }),
              "the stream's");
}

}  // namespace
}  // namespace kvpare::test
