#include "plot.hpp"

#include <algorithm>
#include <cmath>
#include <sstream>

#include "report.hpp"
#include "support/picture.hpp"

namespace inspect {
namespace {

using example::Rgb;
using example::Trace;

// Pixels.
constexpr double left = 70, map_width = 640, gap = 36, bar_width = 140, right = 30;
constexpr double top = 92, heading = 44, axis = 44, strip = 7;

Rgb class_colour(std::uint8_t token_class) {
  static constexpr Rgb colours[] = {{58, 84, 122}, {206, 88, 28}, {150, 40, 110}, {20, 130, 95}, {90, 90, 90}};
  return colours[std::min<std::size_t>(token_class, 4)];
}

/// Evicted everywhere is almost white, kept by every kv head is the colour of the token's class.
Rgb shade(std::uint8_t token_class, double kept) {
  return mix(mix(example::white, class_colour(token_class), 0.07), class_colour(token_class), kept);
}

/// Neighbouring tokens that are drawn alike.
struct Box {
  double begin, end;  // tokens
  int colour;
};

/// One layer's row. A column of the map is a token, or several where there are more than the map has pixels: then the
/// mean, and the class of the first.
std::vector<Box> row_of(const Trace& trace, const LayerResult& layer) {
  const Index tokens = trace.tokens(), columns = std::min(tokens, static_cast<Index>(map_width));
  std::vector<double> kept(static_cast<std::size_t>(tokens), 0);
  for (const auto& head : layer.kept)
    for (const Index token : head)
      kept[static_cast<std::size_t>(token)] += 1.0 / static_cast<double>(layer.kept.size());
  std::vector<Box> boxes;
  for (Index c = 0; c < columns; ++c) {
    const Index begin = c * tokens / columns, end = (c + 1) * tokens / columns;
    double sum = 0;
    for (Index t = begin; t < end; ++t) sum += kept[static_cast<std::size_t>(t)];
    const std::uint8_t token_class = trace.token_class.empty() ? 0 : trace.token_class[static_cast<std::size_t>(begin)];
    // In steps of a 32nd, which nobody sees, so that fewer boxes differ.
    const double share = std::round(32 * sum / static_cast<double>(end - begin)) / 32;
    const int colour = shade(token_class, share).packed();
    if (!boxes.empty() && boxes.back().colour == colour)
      boxes.back().end = static_cast<double>(end);
    else
      boxes.push_back({static_cast<double>(begin), static_cast<double>(end), colour});
  }
  return boxes;
}

/// A round number not above `about`: 1, 2 or 5 times a power of ten.
double round_down(double about) {
  const double power = std::pow(10, std::floor(std::log10(about)));
  return power * (about >= 5 * power ? 5 : about >= 2 * power ? 2 : 1);
}

class Drawing {
 public:
  Drawing(const std::string& path, const Trace& trace, const std::vector<Result>& results, const Options& options)
      : trace_(trace), results_(results), options_(options), layers_(static_cast<double>(trace.layers.size())),
        row_(std::clamp(180 / layers_, 7.0, 22.0)),
        picture_(path, width(), top + static_cast<double>(results.size()) * block() + 6) {}

  void draw(const std::string& title) {
    picture_.title(title,
                   "every row is a layer, every column a token of the prompt; a token's colour is paler the fewer kv "
                   "heads keep it",
                   left - 46);
    legend();
    for (const Result& result : results_)
      for (const LayerResult& layer : result.layers) {
        most_kept_ = std::max(most_kept_, kept_per_head(layer));
        if (std::isfinite(layer.difference.relative_l2))
          most_error_ = std::max(most_error_, layer.difference.relative_l2);
      }
    if (most_kept_ == 0) most_kept_ = 1;
    if (most_error_ == 0) most_error_ = 1;
    for (std::size_t i = 0; i < results_.size(); ++i) block(results_[i], top + static_cast<double>(i) * block(), i);
    picture_.draw();
  }

 private:
  static double width() { return left + map_width + 2 * (gap + bar_width) + right; }
  double block() const { return heading + strip + 3 + layers_ * row_ + axis; }

  /// The classes that occur, beside each other.
  void legend() {
    std::vector<std::string> seen;
    double x = left - 46;
    std::ostringstream data;
    for (const ClassRun& run : class_runs(trace_)) {
      if (std::find(seen.begin(), seen.end(), run.name) != seen.end()) continue;
      seen.push_back(run.name);
      swatches_ << x + 6 << ' ' << 6 << ' ' << class_colour(run.token_class).packed() << '\n';
      picture_.write(run.name, x + 18, 76, "left textcolor rgb '#333333'");
      x += 40 + 8 * static_cast<double>(run.name.size());
    }
    auto& g = picture_.script;
    g << "$legend << EOD\n"
      << swatches_.str() << "EOD\nunset border\nunset tics\nset xrange [0:" << width() << "]\nset yrange [12:0]\n";
    picture_.place(0, 70, width(), 12);
    picture_.plot("$legend using 1:2:(6):(6):3 with boxxyerror fill solid noborder lc rgb variable");
  }

  void block(const Result& result, double at, std::size_t index) {
    auto& g = picture_.script;
    const double map_top = at + heading + strip + 3, map_height = layers_ * row_;
    const std::string name = std::to_string(index);
    picture_.write(result.policy, left - 46, at + 12, "left font 'Helvetica,15' textcolor rgb '#111111'");
    std::ostringstream summary;
    summary.precision(3);
    summary << "keeps "
            << std::lround(100.0 * static_cast<double>(result.tokens_after) / static_cast<double>(result.tokens_before))
            << " % of the tokens; pages " << result.before.pages / 1024 << " → " << result.after.pages / 1024 << " KiB";
    picture_.write(summary.str(), left - 46, at + 30, "left textcolor rgb '#666666'");

    // Which class stands where, above the map.
    g << "$classes" << name << " << EOD\n";
    for (const ClassRun& run : class_runs(trace_))
      g << run.begin << ' ' << run.end << ' ' << class_colour(run.token_class).packed() << '\n';
    g << "EOD\nunset border\nunset tics\nset xrange [0:" << trace_.tokens() << "]\nset yrange [0:1]\n";
    picture_.place(left, at + heading, map_width, strip);
    picture_.plot("$classes" + name + " using 1:(0):1:2:(0):(1):3 with boxxyerror fill solid noborder lc rgb variable");

    g << "$map" << name << " << EOD\n";
    for (std::size_t l = 0; l < result.layers.size(); ++l)
      for (const Box& box : row_of(trace_, result.layers[l]))
        g << box.begin << ' ' << box.end << ' ' << l << ' ' << box.colour << '\n';
    g << "EOD\nset xrange [0:" << trace_.tokens() << "]\nset yrange [" << layers_ << ":0]\n"
      << tics("x") << round_down(static_cast<double>(trace_.tokens()) / 4) << "\n"
      << layer_tics() << "set border 3 lc rgb '#999999'\n";
    picture_.write("layer", left - 46, map_top + map_height / 2, "center rotate by 90 textcolor rgb '#444444'");
    picture_.write("token", left - 12, map_top + map_height + 20, "right textcolor rgb '#444444'");
    picture_.place(left, map_top, map_width, map_height);
    picture_.plot("$map" + name +
                  " using 1:3:1:2:($3+0.06):($3+0.94):4 with boxxyerror fill solid noborder lc rgb variable");

    bars("kept per kv head", "kept" + name, left + map_width + gap, map_top, result, most_kept_, {110, 125, 145},
         kept_per_head);
    bars("L2 error, last " + std::to_string(std::min(options_.rows, trace_.tokens())) + " rows", "error" + name,
         left + map_width + 2 * gap + bar_width, map_top, result, most_error_, {185, 60, 70},
         [](const LayerResult& layer) { return layer.difference.relative_l2; });
  }

  static double kept_per_head(const LayerResult& layer) {
    double tokens = 0;
    for (const auto& head : layer.kept) tokens += static_cast<double>(head.size());
    return tokens / static_cast<double>(layer.kept.size());
  }

  /// One number per layer, as bars beside the map's rows.
  template <class Number>
  void bars(const std::string& words, const std::string& name, double x, double y, const Result& result, double most,
            Rgb colour, Number&& number) {
    auto& g = picture_.script;
    g << "$" << name << " << EOD\n";
    for (std::size_t l = 0; l < result.layers.size(); ++l) {
      const double value = number(result.layers[l]);
      if (std::isfinite(value)) g << value << ' ' << l << '\n';
    }
    g << "EOD\nset xrange [0:" << 1.04 * most << "]\n" << tics("x") << round_down(most / 2) << "\nunset ytics\n";
    picture_.write(words, x, y - 12, "left textcolor rgb '#444444'");
    picture_.place(x, y, bar_width, layers_ * row_);
    picture_.plot("$" + name + " using (0):2:(0):1:($2+0.18):($2+0.82) with boxxyerror fill solid noborder lc rgb '" +
                  colour.hex() + "'");
  }

  /// Layers' numbers in the middle of their rows, not all of them where rows are low.
  std::string layer_tics() const {
    const auto step = static_cast<std::size_t>(std::ceil(14 / row_));
    std::ostringstream out;
    out << tics("y") << '(';
    for (std::size_t l = 0; l < trace_.layers.size(); l += step)
      out << (l > 0 ? ", " : "") << "'" << l << "' " << l << ".5";
    out << ")\n";
    return out.str();
  }
  static std::string tics(const char* which) {
    return kvpare::message("set ", which, "tics nomirror out scale 0.4 textcolor rgb '#555555' ");
  }

  const Trace& trace_;
  const std::vector<Result>& results_;
  const Options& options_;
  double layers_, row_;
  double most_kept_ = 0, most_error_ = 0;  // over all policies, which share their scales
  example::Picture picture_;
  std::ostringstream swatches_;
};

}  // namespace

void plot(const std::string& path, const std::string& title, const Trace& trace, const std::vector<Result>& results,
          const Options& options) {
  Drawing(path, trace, results, options).draw(title);
}

}  // namespace inspect
