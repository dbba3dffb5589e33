#include "context.hpp"

#include <algorithm>
#include <kvpare/runtime/snapshot.hpp>
#include <sstream>
#include <stdexcept>

namespace story {
namespace {

constexpr Index rows_per_attend = 64;  // the most that one call takes

/// Pages as appended, as many as one text can need, one more per head than its tokens fill; and room for other forms.
kvpare::CacheOptions cache_options(const Decoder& decoder, const ContextOptions& options) {
  const Shape& shape = decoder.shape();
  using Floats = kvpare::Pair<kvpare::Raw<float>, kvpare::Raw<float>>;
  const Index page_bytes = kvpare::round_up(Floats::page_bytes(options.page_tokens, shape.head_dim(), shape.head_dim()),
                                            kvpare::PagePool::unit_bytes);
  const Index pages = shape.layers * shape.kv_heads * (kvpare::ceil_div(options.most_tokens, options.page_tokens) + 1);
  return example::with_room_for_forms<Formats>({.page_tokens = options.page_tokens, .pool_bytes = pages * page_bytes},
                                               decoder.attention_shapes());
}

}  // namespace

const char* name_of(Acts acts) {
  switch (acts) {
    case Acts::never:
      return "never";
    case Acts::by_age:
      return "by age";
    case Acts::each_token:
      return "each token";
    case Acts::each_block:
      break;
  }
  return "each block";
}

Method make_method(kvpare::AnyCompressor compressor, Index block, AtDecode at_decode) {
  Method method{.compressor = std::move(compressor), .block = block};
  const kvpare::AnyPrecision& precision = method.compressor.precision;
  const auto* in_form = std::get_if<kvpare::InForm>(&precision.held);
  if (!kvpare::evicts(method.compressor))
    method.acts = precision.held_name() == kvpare::AsAppended::name  ? Acts::never
                  : (in_form != nullptr && in_form->guard > 0) ||  // looks at the keys there are
                          precision.held_name() == kvpare::Think::name ||  // and these at queries
                          precision.held_name() == kvpare::QualityAdaptive::name
                      ? Acts::each_block
                                                             : Acts::by_age;
  else
    method.acts = at_decode == AtDecode::each_token && kvpare::acts_at_decode(method.compressor) ? Acts::each_token
                                                                                                 : Acts::each_block;
  return method;
}

Context::Context(const Decoder& decoder, kvpare::cpu::Backend& backend, Method method, ContextOptions options)
    : decoder_(decoder), method_(std::move(method)), most_tokens_(options.most_tokens),
      cache_(backend, decoder.attention_shapes(), cache_options(decoder, options)) {
  for (const example::States& states : options.states) example::share_states(cache_, states);
  sequence_ = cache_.create();
  kvpare::require(method_.block >= 1, "block = ", method_.block, ", must be at least 1");
}

/// Where no block's end does it: what a precision says of old tokens goes from now on. The tokens so far stand for the prompt
/// from which codecs make their states.
void Context::take_aging() {
  kvpare::AnyCompressor ages = method_.compressor;
  ages.keep = kvpare::Keep::ratio(1), ages.selector.also = {}, ages.selector.only_positive = false;
  cache_.compress(sequence_, ages);
}

Context::Context(const Decoder& decoder, kvpare::cpu::Backend& backend, Method method, ContextOptions options,
                 const Image& image)
    : Context(decoder, backend, std::move(method), options) {
  if (image.tokens > most_tokens_) throw std::runtime_error("the cache has no room for the saved text");
  std::istringstream in(image.bytes);
  const std::optional<kvpare::SequenceId> loaded = kvpare::load(in, cache_);
  if (!loaded) throw std::runtime_error("the cache has no pages for the saved text");
  cache_.release(sequence_);
  sequence_ = *loaded;
  length_ = image.tokens;
}

Context::Image Context::image() {
  const kvpare::Reads reads = method_.compressor.scorer.reads();
  const bool keeps_queries =
      method_.acts == Acts::each_block && reads.rows != kvpare::Reads::Rows::none && !reads.streams;
  Image image{.tokens = keeps_queries ? length_ - length_ % static_cast<Position>(method_.block) : length_,
              .bytes = {}};
  const kvpare::SequenceId copy = cache_.fork(sequence_);
  cache_.truncate(copy, image.tokens);
  std::ostringstream out;
  kvpare::save(out, cache_, copy);
  cache_.release(copy);
  image.bytes = out.str();
  return image;
}

Matrix Context::read(std::span<const int> tokens, const Attention& watch) {
  if (length_ + std::ssize(tokens) > most_tokens_)
    throw std::runtime_error("the text has more than the " + std::to_string(most_tokens_) + " tokens that it was given room for");
  Matrix hidden(std::ssize(tokens), decoder_.shape().width);
  for (Index done = 0; done < hidden.rows();) {
    const bool one_by_one = method_.acts == Acts::each_token || method_.acts == Acts::by_age;
    // Within a page, so that what is counted after a part was in use all along.
    const Index left_of_page = cache_.page_tokens() - length_ % cache_.page_tokens();
    Index rows = std::min({hidden.rows() - done, one_by_one ? 1 : rows_per_attend, left_of_page});
    bool block_ends = false;
    if (method_.acts == Acts::each_block) {
      const Index left_of_block = method_.block - length_ % method_.block;
      rows = std::min(rows, left_of_block);
      block_ends = rows == left_of_block;
    }
    hidden.middleRows(done, rows) =
        read_part(tokens.subspan(static_cast<std::size_t>(done), static_cast<std::size_t>(rows)), block_ends, watch);
    done += rows;
  }
  return hidden;
}

Matrix Context::read_part(std::span<const int> tokens, bool block_ends, const Attention& watch) {
  const Index rows = std::ssize(tokens), heads = decoder_.shape().layers * decoder_.shape().kv_heads;
  const double live_before = static_cast<double>(stats().live_tokens) / static_cast<double>(heads);
  const Matrix hidden = decoder_.forward(tokens, length_, [&](const LayerRows& layer_rows) {
    if (watch) watch(layer_rows);
    attend(layer_rows, block_ends);
  });
  const example::Footprint footprint = example::footprint(cache_, sequence_);
  usage_.bytes += static_cast<double>(rows * footprint.bytes);
  usage_.held += static_cast<double>(rows * footprint.live_tokens);
  usage_.support = std::min(usage_.support, footprint.support);
  if (block_ends) {
    const kvpare::CompressReport report = cache_.compress(sequence_, method_.compressor);
    usage_.evicted += report.tokens_before - report.tokens_after;
  }
  length_ += static_cast<Position>(rows);
  if (method_.acts != Acts::never && method_.acts != Acts::each_block && length_ == method_.block) take_aging();
  usage_.tokens += rows;
  for (Index i = 0; i < rows; ++i) usage_.seen += live_before + static_cast<double>(i + 1);
  return hidden;
}

void Context::attend(const LayerRows& rows, bool block_ends) {
  if (cache_.append(sequence_, rows.layer, rows.keys, rows.values, rows.positions) != kvpare::Outcome::done)
    throw std::runtime_error("the cache has no pages left");
  const kvpare::AttendRequest request{
      .sequence = sequence_, .queries = rows.queries, .positions = rows.positions, .out = rows.out};
  if (method_.acts == Acts::each_token) {
    usage_.evicted += cache_.decode(rows.layer, std::span(&request, 1), method_.compressor).evicted;
    return;
  }
  cache_.attend(rows.layer, std::span(&request, 1));
  if (method_.acts == Acts::each_block)
    cache_.observe(sequence_, rows.layer, method_.compressor, rows.queries, rows.positions, block_ends);
}

Usage Context::usage() const {
  Usage usage = usage_;
  usage.peak_page_bytes = cache_.pool().stats().peak_bytes_in_use;
  return usage;
}

}  // namespace story
