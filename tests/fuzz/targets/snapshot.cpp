// Snapshots: a sequence that lived through what the input chooses goes into a stream; the input then damages some bytes and
// may mend the checksums, so that the damage is found by what the numbers mean or not at all.
//
// Undamaged, the sequence comes back with the same tokens, rows and bytes. Damaged, it is refused in words and the cache is
// as it was, or it is a sequence like any other.
//
// Input  byte 0: bit 0 = the rest is the stream itself · else choices, some bytes each
#include <kvpare/runtime/snapshot.hpp>
#include <optional>
#include <sstream>

#include "fuzz/byte_choices.hpp"
#include "fuzz/cache_walk.hpp"
#include "fuzz/target.hpp"

using namespace kvpare;
using namespace kvpare::test;

namespace {

/// Every section gets the checksum that its bytes ask for, as far as their lengths make sense.
void mend_checksums(std::string& bytes) {
  std::size_t at = 12;  // magic and version
  while (bytes.size() >= at + 16) {
    std::uint64_t length = 0;
    std::memcpy(&length, bytes.data() + at + 4, 8);
    if (length > bytes.size() - at - 16) return;
    detail::snapshot::Crc32 crc;
    crc.add(bytes.data() + at, static_cast<std::size_t>(12 + length));
    const std::uint32_t check = crc.value();
    at += static_cast<std::size_t>(12 + length);
    std::memcpy(bytes.data() + at, &check, 4);
    at += 4;
  }
}

void damage(std::string& bytes, ByteChoices& choices) {
  for (Index edits = choices.within(1, 4); edits > 0; --edits) {
    const std::size_t at = static_cast<std::size_t>(choices.below(std::ssize(bytes)));
    const auto value = static_cast<char>(choices.below(256));
    if (choices.chance(0.1))
      bytes.resize(at);
    else if (choices.chance(0.1))
      bytes.insert(at, 1, value);
    else
      bytes[at] = value;
    if (bytes.empty()) return;
  }
}

std::string bytes_of(const WalkedCache& c, SequenceId id) {
  std::ostringstream out;
  save(out, c.cache, id);
  return out.str();
}

std::optional<SequenceId> loaded(WalkedCache& c, const std::string& bytes) {
  std::istringstream in(bytes);
  return load(in, c.cache);
}

/// None with the reason when the bytes were refused. (g++ 12 at -O3 loses `id` in `try { id = loaded(c, bytes); }`.)
std::optional<SequenceId> loaded(WalkedCache& c, const std::string& bytes, std::string& refusal) {
  try {
    return loaded(c, bytes);
  } catch (const InvalidArgument& e) {
    refusal = e.what();
    return std::nullopt;
  }
}

/// What the bytes became, if anything, must hold what sequences hold and survive what sequences survive.
void try_out(WalkedCache& c, const std::string& bytes) {
  std::string refusal = "the pool is full";
  const std::optional<SequenceId> id = loaded(c, bytes, refusal);
  if (!id) {
    must(!refusal.empty(), "a refusal says nothing");
    must(c.cache.pool().stats().pages_in_use == 0, "a refused snapshot left pages behind");
    return;
  }
  c.adopt(*id);
  c.verify(*id);
  const std::string again = bytes_of(c, *id);
  const std::optional<SequenceId> twin = loaded(c, again);
  if (twin) {
    must(bytes_of(c, *twin) == again, "a snapshot of a snapshot differs");
    c.cache.release(*twin);
  }
  const AnyCompressor methods[] = {make_compressor("h2o(keep=20t)"), make_compressor("key_diff(keep=20t)"),
                                   make_compressor("snap_kv(keep=20t)")};
  for (const AnyCompressor& method : methods)
    for (Index l = 0; l < c.cache.layers(); ++l) {
      (void)error_of([&] { c.observe(*id, l, method, 100); });
      Index last = 0;
      for (Index h = 0; h < c.shape(l).kv_heads; ++h)
        if (const Positions kept = c.cache.kept(*id, l, h); !kept.empty()) last = std::max<Index>(last, kept.back());
      if (last > (1 << 30)) continue;
      c.model(*id, l).given.assign(1, last);
      const Positions next{static_cast<Position>(last + 1)};
      // It may have been given later tokens that it no longer holds, and what it scores may come from anywhere.
      (void)error_of([&] {
        const TensorBuffer<cpu::Backend> k(c.be, c.rows(1, c.shape(l).kv_heads, c.shape(l).key_dim), DType::f32),
            v(c.be, c.rows(1, c.shape(l).kv_heads, c.shape(l).value_dim), DType::f32),
            q(c.be, c.rows(1, c.shape(l).q_heads, c.shape(l).key_dim), DType::f32),
            out(c.be, oracle::Array3(1, c.shape(l).q_heads, c.shape(l).value_dim), DType::f32);
        (void)c.cache.append(*id, l, k.tensor(), v.tensor(), next);
        c.cache.decode(l, {{.sequence = *id, .queries = q.tensor(), .positions = next, .out = out.writable()}}, method);
      });
    }
  (void)error_of([&] { c.cache.compress(*id, methods[2]); });
  c.cache.truncate(*id, 5);
  c.cache.release(*id);
  c.held.erase(*id);
  must(c.cache.pool().stats().pages_in_use == 0, "pages are lost");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  throw_when_a_check_fails();
  static cpu::Backend backend({.threads = 1});
  const CacheOptions options{.page_tokens = 16, .pool_bytes = 2 << 20};
  WalkedCache there(backend, small_model(), options);
  if (size > 0 && (data[0] & 1) != 0) {
    try_out(there, std::string(reinterpret_cast<const char*>(data) + 1, size - 1));
    return 0;
  }

  ByteChoices choices(data, size);
  WalkedCache here(backend, small_model(), options, static_cast<std::uint64_t>(choices.below(256)));
  Walk<ByteChoices> walk(here, choices, {.most_sequences = 2});
  const Index steps = choices.within(1, 20);
  for (Index i = 0; i < steps; ++i) walk.step(i);
  if (here.held.empty()) return 0;
  const auto& [id, model] = *here.held.begin();
  std::string bytes = bytes_of(here, id);

  const std::optional<SequenceId> copy = loaded(there, bytes);
  must(copy.has_value(), "an empty pool of the same size has no room for a sequence");
  there.held[*copy] = model;
  there.verify_all();
  must(bytes_of(there, *copy) == bytes, "a snapshot of the copy differs");
  there.release(*copy);

  damage(bytes, choices);
  if (choices.chance(0.8)) mend_checksums(bytes);
  try_out(there, bytes);
  return 0;
}
