#include "inspect.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <kvpare/kvpare.hpp>
#include <map>
#include <span>
#include <stdexcept>

#include "support/formats.hpp"

namespace inspect {
namespace {

using example::Trace;
using example::TraceLayer;

constexpr Index rows_per_attend = 64;  // the most that one call takes

/// Pages that one kv head takes for these positions; a page's positions lie less than 65536 apart.
Index pages_of(std::span<const Position> positions, Index page_tokens) {
  Index pages = 0, used = page_tokens;
  Position first = 0;
  for (const Position p : positions) {
    if (used == page_tokens || p - first > 65535) ++pages, used = 0, first = p;
    ++used;
  }
  return pages;
}

/// Attention outputs of the last rows: [rows, q_heads * value_dim].
struct Outputs {
  std::vector<float> values;
  Index rows = 0, width = 0;
  std::span<const float> row(Index r) const {
    return std::span(values).subspan(static_cast<std::size_t>(r * width), static_cast<std::size_t>(width));
  }
};

/// Sums over rows from which a Difference comes; those of layers can be added up.
struct Sums {
  double squared_difference = 0, squared_full = 0, cosines = 0;
  Index rows = 0;

  void add(std::span<const float> full, std::span<const float> now) {
    double dot = 0, full2 = 0, now2 = 0, difference2 = 0;
    for (std::size_t i = 0; i < full.size(); ++i) {
      const double f = full[i], n = now[i];
      dot += f * n, full2 += f * f, now2 += n * n, difference2 += (n - f) * (n - f);
    }
    squared_difference += difference2, squared_full += full2;
    // A row of zeros points nowhere: like another such row, unlike everything else.
    cosines += full2 == 0 && now2 == 0 ? 1 : full2 == 0 || now2 == 0 ? 0 : dot / std::sqrt(full2 * now2);
    ++rows;
  }
  void add(const Sums& more) {
    squared_difference += more.squared_difference, squared_full += more.squared_full;
    cosines += more.cosines, rows += more.rows;
  }
  Difference result() const {
    return {squared_difference == 0 ? 0 : std::sqrt(squared_difference / squared_full),
            cosines / static_cast<double>(rows)};
  }
};

/// Runs policies on a cache whose pages hold T.
template <class T>
class Runner {
 public:
  Runner(const Trace& trace, const Options& options)
      : trace_(trace), model_(trace.model()), options_(options),
        cache_(backend_, model_,
               example::with_room_for_forms<Formats>({.page_tokens = options.page_tokens,
                                                      .pool_bytes = bytes_as_appended(trace, model_, options.page_tokens)},
                                                     model_)),
        first_row_(std::max<Index>(0, trace.tokens() - options.rows)) {
    for (const example::States& states : options.states) example::share_states(cache_, states);
  }

  Result run(const std::string& policy) {
    const kvpare::AnyCompressor compressor = kvpare::make_compressor(policy);
    const kvpare::SequenceId sequence = cache_.create();
    Result result = run(sequence, compressor);
    cache_.release(sequence);
    result.policy = policy;
    result.settings = kvpare::settings_of(compressor);
    for (kvpare::SettingText& setting : kvpare::settings_of(compressor.precision))
      result.settings.push_back(std::move(setting));
    return result;
  }

 private:
  using Formats = example::ModelFormats<T, 32>;
  using Cache = kvpare::KvCache<kvpare::cpu::Backend, Formats>;

  /// For one sequence: the pool cuts its memory into chunks, each for pages of one size.
  static Index bytes_as_appended(const Trace& trace, const kvpare::Model& model, Index page_tokens) {
    const Index pages = pages_of(trace.positions, page_tokens);
    std::map<Index, Index> pages_of_size;
    for (const kvpare::LayerShape& shape : model.layers)
      pages_of_size[kvpare::Pair<kvpare::Raw<T>, kvpare::Raw<T>>::page_bytes(page_tokens, shape.key_dim, shape.value_dim)] +=
          pages * shape.kv_heads;
    Index bytes = 0;
    for (const auto& [size, count] : pages_of_size) bytes += size * (count + 1);
    return bytes + bytes / 16;  // a chunk is cut with a waste of 3 % at most
  }

  /// Whole pages of one layer.
  Index page_bytes(kvpare::SequenceId sequence, Index layer) const {
    const kvpare::LayerShape& shape = model_.layers[static_cast<std::size_t>(layer)];
    Index bytes = 0;
    for (const kvpare::HeadPages& list : cache_.pages(sequence, layer))
      for (const kvpare::Entry& entry : list.entries)
        bytes += cache_.formats()[entry.format].page_bytes(options_.page_tokens, shape.key_dim, shape.value_dim);
    return bytes;
  }

  std::vector<FormInUse> forms(kvpare::SequenceId sequence) const {
    std::vector<FormInUse> all;
    for (std::size_t f = 0; f < cache_.formats().size(); ++f) {
      const auto& format = cache_.formats()[f];
      FormInUse form{kvpare::print_setting(kvpare::Form(format.keys.name, format.values.name)), 0, kvpare::Support::fused};
      for (Index l = 0; l < cache_.layers(); ++l)
        for (const kvpare::HeadPages& list : cache_.pages(sequence, l))
          for (const kvpare::Entry& entry : list.entries) {
            if (entry.format != f || entry.live == 0) continue;
            form.tokens += std::popcount(entry.live);
            form.support = std::min(form.support, cache_.support(l, entry.format));
          }
      if (form.tokens > 0) all.push_back(std::move(form));
    }
    return all;
  }

  Result run(kvpare::SequenceId sequence, const kvpare::AnyCompressor& compressor) {
    tag(sequence);
    for (Index l = 0; l < cache_.layers(); ++l) {
      const TraceLayer& layer = at(l);
      if (cache_.append(sequence, l, layer.keys.tensor(), layer.values.tensor(), trace_.positions) !=
          kvpare::Outcome::done)
        throw std::runtime_error("the cache is full at layer " + std::to_string(l) + " of " +
                                 std::to_string(cache_.layers()));
      cache_.observe(sequence, l, compressor, layer.queries.tensor(), trace_.positions);
    }

    Result result;
    result.before = bytes(sequence);
    std::vector<Index> bytes_before;
    for (Index l = 0; l < cache_.layers(); ++l) bytes_before.push_back(page_bytes(sequence, l));
    std::vector<Outputs> full;
    for (Index l = 0; l < cache_.layers(); ++l) full.push_back(attend(sequence, l));

    const bool ranks = options_.scores && kvpare::evicts(compressor);
    std::vector<std::vector<std::vector<float>>> scores;
    for (Index l = 0; ranks && l < cache_.layers(); ++l)
      scores.push_back(cache_.scores(sequence, l, compressor).values);  // of all tokens: none has been evicted yet

    const kvpare::CompressReport report = cache_.compress(sequence, compressor);
    result.after = bytes(sequence);
    result.forms = forms(sequence), result.notes = report.notes;
    result.tokens_before = report.tokens_before, result.tokens_after = report.tokens_after;
    result.bytes_freed = report.bytes_freed, result.nan_scores = report.nan_scores;
    Sums all;
    for (Index l = 0; l < cache_.layers(); ++l) {
      const auto index = static_cast<std::size_t>(l);
      LayerResult& layer = result.layers.emplace_back();
      layer.budget = report.layer_budgets[index];
      for (Index h = 0; h < model_.layers[index].kv_heads; ++h) layer.kept.push_back(kept(sequence, l, h));
      layer.page_bytes_before = bytes_before[index], layer.page_bytes_after = page_bytes(sequence, l);
      if (ranks) layer.scores = std::move(scores[index]);
      const Outputs now = attend(sequence, l);
      Sums sums;
      for (Index r = 0; r < now.rows; ++r) sums.add(full[index].row(r), now.row(r));
      layer.difference = sums.result();
      all.add(sums);
    }
    result.difference = all.result();
    return result;
  }

  const TraceLayer& at(Index layer) const { return trace_.layers[static_cast<std::size_t>(layer)]; }

  /// One span per run of tokens of one class; what is not tagged is text.
  void tag(kvpare::SequenceId sequence) {
    const auto& classes = trace_.token_class;
    for (std::size_t begin = 0, end; begin < classes.size(); begin = end) {
      for (end = begin + 1; end < classes.size() && classes[end] == classes[begin];) ++end;
      const auto token_class = static_cast<kvpare::TokenClass>(classes[begin]);
      if (token_class == kvpare::TokenClass::text) continue;
      cache_.tag(sequence,
                 {.begin = trace_.positions[begin], .end = trace_.positions[end - 1] + 1, .token_class = token_class});
    }
  }

  Outputs attend(kvpare::SequenceId sequence, Index layer) {
    const kvpare::LayerShape& shape = model_.layers[static_cast<std::size_t>(layer)];
    Outputs out;
    out.rows = trace_.tokens() - first_row_, out.width = shape.q_heads * shape.value_dim;
    out.values.resize(static_cast<std::size_t>(out.rows * out.width));
    const kvpare::Tensor target(out.values.data(), out.rows, shape.q_heads, shape.value_dim);
    for (Index begin = 0; begin < out.rows; begin += rows_per_attend) {
      const Index rows = std::min(rows_per_attend, out.rows - begin);
      cache_.attend(
          layer,
          {{.sequence = sequence,
            .queries = at(layer).queries.tensor().part(first_row_ + begin, rows),
            .positions = std::span(trace_.positions)
                             .subspan(static_cast<std::size_t>(first_row_ + begin), static_cast<std::size_t>(rows)),
            .out = target.part(begin, rows)}});
    }
    return out;
  }

  std::vector<Index> kept(kvpare::SequenceId sequence, Index layer, Index kv_head) const {
    std::vector<Index> tokens;
    auto next = trace_.positions.begin();
    for (const Position position : cache_.kept(sequence, layer, kv_head)) {
      next = std::lower_bound(next, trace_.positions.end(), position);
      tokens.push_back(next - trace_.positions.begin());
    }
    return tokens;
  }

  Bytes bytes(kvpare::SequenceId sequence) const {
    const kvpare::SequenceStats stats = cache_.stats(sequence);
    return {stats.page_bytes, stats.live_bytes, stats.bookkeeping_bytes, stats.observation_bytes, stats.running_bytes,
            stats.state_bytes};
  }

  const Trace& trace_;
  kvpare::Model model_;
  Options options_;
  kvpare::cpu::Backend backend_;
  Cache cache_;
  Index first_row_;
};

}  // namespace

void print_formats(std::ostream& out, const Trace& trace, Index page_tokens) {
  with_type(page_type(trace), [&](auto* type) {
    using Formats = example::ModelFormats<std::remove_pointer_t<decltype(type)>, 32>;
    const kvpare::Model model = trace.model();
    kvpare::cpu::Backend backend({.threads = 1});
    example::print_formats(out, kvpare::KvCache<kvpare::cpu::Backend, Formats>(
                                    backend, model,
                                    example::with_room_for_forms<Formats>({.page_tokens = page_tokens}, model)));
  });
}

kvpare::DType page_type(const Trace& trace) { return trace.common_dtype().value_or(kvpare::DType::f32); }

std::vector<Result> run(const Trace& trace, const std::vector<std::string>& policies, const Options& options) {
  kvpare::require(options.rows >= 1, "rows = ", options.rows, ", must be at least 1");
  for (const std::string& policy : policies) kvpare::make_compressor(policy);  // refused before any work
  return with_type(page_type(trace), [&](auto* type) {
    Runner<std::remove_pointer_t<decltype(type)>> runner(trace, options);
    std::vector<Result> results;
    for (const std::string& policy : policies) results.push_back(runner.run(policy));
    return results;
  });
}

}  // namespace inspect
