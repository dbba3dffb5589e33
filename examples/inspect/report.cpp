#include "report.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <iomanip>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

namespace inspect {
namespace {

using example::Trace;
using Json = nlohmann::ordered_json;

std::string class_name(std::uint8_t token_class) {
  static constexpr std::array names = {"text", "image", "video", "audio", "system"};
  return token_class < names.size() ? names[token_class] : "class " + std::to_string(token_class);
}

std::string fixed(double value, int digits) {
  std::ostringstream out;
  out << std::fixed << std::setprecision(digits) << value;
  return out.str();
}

std::string kib(Index bytes) { return fixed(static_cast<double>(bytes) / 1024, 1); }

std::string trace_type(const Trace& trace) {
  const auto type = trace.common_dtype();
  return type ? std::string(name_of(*type)) : "mixed";
}

/// "8 query heads on 2 kv heads", or the range over the layers where they differ.
std::string print_heads(const Trace& trace) {
  Index q_least = trace.layers[0].queries.heads, q_most = q_least;
  Index kv_least = trace.layers[0].keys.heads, kv_most = kv_least;
  for (const auto& layer : trace.layers) {
    q_least = std::min(q_least, layer.queries.heads), q_most = std::max(q_most, layer.queries.heads);
    kv_least = std::min(kv_least, layer.keys.heads), kv_most = std::max(kv_most, layer.keys.heads);
  }
  const auto range = [](Index least, Index most) {
    return most > least ? kvpare::message(least, '-', most) : kvpare::message(least);
  };
  return range(q_least, q_most) + " query heads on " + range(kv_least, kv_most) + " kv heads";
}

double mean_kept(const LayerResult& layer) {
  double tokens = 0;
  for (const auto& head : layer.kept) tokens += static_cast<double>(head.size());
  return tokens / static_cast<double>(layer.kept.size());
}

/// JSON has no NaN and no infinity. A float is written with its own digits, not with those of the nearest double.
template <class Float>
Json number(Float value) {
  if (!std::isfinite(value)) return Json();
  char digits[32];
  const char* end = std::to_chars(digits, digits + sizeof digits, value).ptr;
  double nearest = 0;
  std::from_chars(digits, end, nearest);
  return nearest;
}

/// What holds objects or lists over several lines, lists of numbers and small objects on one: no line per token.
void write(std::ostream& out, const Json& value, const std::string& indent) {
  const bool is_list = value.is_array();
  const bool holds_plain = std::none_of(value.begin(), value.end(), [](const Json& v) { return v.is_structured(); });
  const bool flat = holds_plain && (is_list || value.size() <= 6);
  if (!value.is_structured() || flat || value.empty()) {
    out << value.dump();
    return;
  }
  const std::string inner = indent + ' ';
  out << (is_list ? "[" : "{");
  bool first = true;
  for (const auto& [name, part] : value.items()) {
    out << (first ? "\n" : ",\n") << inner;
    if (!is_list) out << Json(name).dump() << ": ";
    write(out, part, inner);
    first = false;
  }
  out << '\n' << indent << (is_list ? "]" : "}");
}

Json print(const Bytes& bytes) {
  return {{"pages", bytes.pages},
          {"live", bytes.live},
          {"bookkeeping", bytes.bookkeeping},
          {"observation", bytes.observation},
          {"running", bytes.running},
          {"states", bytes.states},
          {"total", bytes.total()}};
}

Json print(const LayerResult& layer, std::size_t index, bool scores) {
  Json out = {{"layer", index},
              {"budget", layer.budget >= 0 ? Json(layer.budget) : Json()},
              {"kept", layer.kept},
              {"page_bytes_before", layer.page_bytes_before},
              {"page_bytes_after", layer.page_bytes_after},
              {"relative_l2", number(layer.difference.relative_l2)},
              {"cosine", number(layer.difference.cosine)}};
  if (!scores) return out;
  Json& rows = out["scores"] = Json::array();
  for (const auto& head : layer.scores) {
    Json& row = rows.emplace_back(Json::array());
    for (const float score : head) row.push_back(number(score));
  }
  return out;
}

}  // namespace

std::vector<ClassRun> class_runs(const Trace& trace) {
  const auto class_of = [&](Index token) {
    return trace.token_class.empty() ? std::uint8_t{0} : trace.token_class[static_cast<std::size_t>(token)];
  };
  std::vector<ClassRun> runs;
  for (Index t = 0; t < trace.tokens(); ++t) {
    if (runs.empty() || runs.back().token_class != class_of(t))
      runs.push_back({class_name(class_of(t)), class_of(t), t, t});
    ++runs.back().end;
  }
  return runs;
}

std::string print_tokens(const Trace& trace) {
  std::map<std::uint8_t, Index> counts;
  for (const ClassRun& run : class_runs(trace)) counts[run.token_class] += run.end - run.begin;
  std::string list;
  for (const auto& [token_class, count] : counts)
    list += (list.empty() ? "" : ", ") + std::to_string(count) + " " + class_name(token_class);
  return std::to_string(trace.tokens()) + " tokens (" + list + ")";
}

void print_tables(std::ostream& out, const std::string& file, const Trace& trace, const std::vector<Result>& results,
                  const Options& options) {
  out << file << ": " << trace.layers.size() << (trace.layers.size() == 1 ? " layer, " : " layers, ")
      << print_tokens(trace) << ", " << print_heads(trace) << ", " << trace_type(trace) << "\npages of "
      << options.page_tokens << " tokens, " << name_of(page_type(trace)) << "; outputs of the last "
      << std::min(options.rows, trace.tokens()) << " rows compared with those over the full cache\n";
  for (const Result& result : results) {
    out << '\n' << result.policy << '\n';
    out << std::setw(5) << "" << std::setw(10) << "budget" << std::setw(12) << "kept" << std::setw(20) << "KiB of pages"
        << std::setw(13) << "relative" << std::setw(10) << "" << '\n';
    out << std::setw(5) << "layer" << std::setw(10) << "per head" << std::setw(12) << "per head" << std::setw(10)
        << "before" << std::setw(10) << "after" << std::setw(13) << "L2 error" << std::setw(10) << "cosine" << '\n';
    const auto row = [&](const std::string& name, const std::string& budget, double kept, Index before, Index after,
                         const Difference& difference) {
      out << std::setw(5) << name << std::setw(10) << budget << std::setw(12) << fixed(kept, 1) << std::setw(10)
          << kib(before) << std::setw(10) << kib(after) << std::setw(13) << fixed(difference.relative_l2, 4)
          << std::setw(10) << fixed(difference.cosine, 4) << '\n';
    };
    double heads = 0;
    for (std::size_t l = 0; l < result.layers.size(); ++l) {
      const LayerResult& layer = result.layers[l];
      heads += static_cast<double>(layer.kept.size());
      row(std::to_string(l), layer.budget >= 0 ? std::to_string(layer.budget) : "-", mean_kept(layer),
          layer.page_bytes_before, layer.page_bytes_after, layer.difference);
    }
    row("all", "", static_cast<double>(result.tokens_after) / heads, result.before.pages, result.after.pages,
        result.difference);
    out << "with bookkeeping and scores " << kib(result.before.total()) << " KiB before, " << kib(result.after.total())
        << " KiB after; " << kib(result.bytes_freed) << " KiB went back to the pool\n";
    if (result.forms.size() > 1 || (!result.forms.empty() && result.forms[0].name != name_of(page_type(trace)))) {
      for (const FormInUse& form : result.forms)
        out << (&form == &result.forms[0] ? "tokens are " : ", ")
            << fixed(100 * static_cast<double>(form.tokens) / static_cast<double>(std::max<Index>(result.tokens_after, 1)), 1)
            << " % " << form.name << " (" << name_of(form.support) << ")";
      out << '\n';
    }
    for (const std::string& note : result.notes) out << note << '\n';
    if (result.nan_scores > 0) out << result.nan_scores << " scores were not numbers (NaN); those tokens went first\n";
    if (result.tokens_after == result.tokens_before) out << "nothing was evicted\n";
  }
}

std::string print_json(const std::string& file, const Trace& trace, const std::vector<Result>& results,
                       const Options& options) {
  Json classes = Json::array();
  for (const ClassRun& run : class_runs(trace))
    classes.push_back({{"class", run.name}, {"begin", run.begin}, {"end", run.end}});
  Json shapes = Json::array();
  for (const kvpare::LayerShape& shape : trace.model().layers)
    shapes.push_back({{"q_heads", shape.q_heads},
                      {"kv_heads", shape.kv_heads},
                      {"key_dim", shape.key_dim},
                      {"value_dim", shape.value_dim},
                      {"scale", number(shape.scale)}});
  Json all = {{"format", "kvpare_inspect"},
              {"version", json_version},
              {"trace",
               {{"file", file},
                {"tokens", trace.tokens()},
                {"element_type", trace_type(trace)},
                {"layers", shapes},
                {"classes", classes},
                {"metadata", trace.metadata}}},
              {"page_tokens", options.page_tokens},
              {"page_element_type", name_of(page_type(trace))},
              {"rows", std::min(options.rows, trace.tokens())},
              {"runs", Json::array()}};
  for (const Result& result : results) {
    Json settings = Json::object();
    for (const kvpare::SettingText& setting : result.settings) settings[setting.name] = setting.value;
    Json forms = Json::array();
    for (const FormInUse& form : result.forms)
      forms.push_back({{"name", form.name}, {"tokens", form.tokens}, {"attention", name_of(form.support)}});
    Json run = {{"policy", result.policy},
                {"settings", settings},
                {"tokens_before", result.tokens_before},
                {"tokens_after", result.tokens_after},
                {"bytes_before", print(result.before)},
                {"bytes_after", print(result.after)},
                {"bytes_freed", result.bytes_freed},
                {"nan_scores", result.nan_scores},
                {"forms", forms},
                {"notes", result.notes},
                {"relative_l2", number(result.difference.relative_l2)},
                {"cosine", number(result.difference.cosine)},
                {"layers", Json::array()}};
    for (std::size_t l = 0; l < result.layers.size(); ++l)
      run["layers"].push_back(print(result.layers[l], l, options.scores));
    all["runs"].push_back(std::move(run));
  }
  std::ostringstream out;
  write(out, all, "");
  out << '\n';
  return out.str();
}

}  // namespace inspect
