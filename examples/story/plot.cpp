#include "plot.hpp"

#include <algorithm>
#include <filesystem>
#include <iomanip>
#include <limits>
#include <set>
#include <sstream>

#include "support/bytes_picture.hpp"
#include "support/line_styles.hpp"

namespace story {
namespace {

/// One policy: a line over its budgets, or a level when it has none.
struct Line {
  std::string policy;
  Method method;
  std::vector<std::size_t> points = {};  // indices of its results, smallest budget first
  bool is_level = false;
};

std::vector<Line> lines_of(const std::vector<Setting>& settings) {
  std::vector<Line> lines;
  for (std::size_t i = 0; i < settings.size(); ++i) {
    if (lines.empty() || lines.back().policy != settings[i].policy)
      lines.push_back({.policy = settings[i].policy, .method = settings[i].method});
    lines.back().points.push_back(i);
    lines.back().is_level = !settings[i].budget;
  }
  for (Line& line : lines)
    std::sort(line.points.begin(), line.points.end(), [&](std::size_t a, std::size_t b) {
      return !line.is_level && settings[a].budget->amount < settings[b].budget->amount;
    });
  return lines;
}

/// Where the picture ends: policies that are much worse than the best would leave no room for the others.
constexpr double worst_shown = 0.6;  // nats above the best

}  // namespace

void check_one_axis(const std::vector<kvpare::Keep>& budgets) {
  for (const kvpare::Keep& budget : budgets) {
    kvpare::require(budget.unit == budgets[0].unit,
                    "--plot: budgets in tokens and as shares, one axis has one of them");
    kvpare::require(budget.amount > 0, "--plot: a budget of 0 is not on a logarithmic axis");
  }
}

void plot_nats(const std::string& path, const Measured& measured, const std::vector<Setting>& settings,
               const std::vector<Result>& results) {
  const std::vector<Line> lines = lines_of(settings);
  std::vector<std::string> names;
  for (const Line& line : lines) names.push_back(line.policy);
  std::vector<example::LineStyle> styles = example::line_styles(names);
  std::set<double> budgets;
  bool is_share = false;
  Index block = 0;  // of those that evict in blocks
  for (const Setting& setting : settings) {
    if (!setting.budget) continue;
    budgets.insert(setting.budget->amount);
    is_share = setting.budget->unit == kvpare::Keep::Unit::ratio;
  }
  if (budgets.empty()) budgets.insert(1);
  double best = std::numeric_limits<double>::max(), worst = 0;
  for (const Result& result : results)
    best = std::min(best, result.nats_per_token()), worst = std::max(worst, result.nats_per_token());
  for (std::size_t i = 0; i < lines.size(); ++i) {
    if (lines[i].method.acts != Acts::each_block) continue;
    styles[i].marker = 6, styles[i].dash = 2;
    block = lines[i].method.block;
  }

  const int key_columns = 4;
  const double left = 80, top = 92, plot_width = 880, plot_height = 430, width = 1000;
  const double key_top = top + plot_height + 62;
  example::Picture picture(path, width, key_top + example::key_row * example::key_rows(lines.size(), key_columns) + 14);
  auto& g = picture.script;
  const double least = *budgets.begin(), most = std::max(*budgets.rbegin(), 1.01 * least);
  for (std::size_t i = 0; i < lines.size(); ++i) {
    g << "$line" << i << " << EOD\n";
    for (const std::size_t point : lines[i].points) {
      const double nats = results[point].nats_per_token();
      if (lines[i].is_level)
        g << least << ' ' << nats << '\n' << most << ' ' << nats << '\n';
      else
        g << settings[point].budget->amount << ' ' << nats << '\n';
    }
    g << "EOD\n";
  }

  std::ostringstream below;
  below << std::filesystem::path(measured.text).filename().string() << ", " << measured.tokens << " tokens of "
        << measured.stories << " stories.";
  if (worst > best + worst_shown)
    below << std::setprecision(3) << " What is above " << best + worst_shown << " is not shown.";
  if (block > 0)
    below << " Dashed: evicts every " << block << " tokens, and holds up to " << block << " more in between.";
  picture.title("How well the next token is predicted when the KV cache shrinks", below.str(), left);
  g << "set border 3 lc rgb '#888888'\nset tics nomirror scale 0.5 textcolor rgb '#333333'\n"
       "set grid ytics lc rgb '#e4e4e4' lt 1 lw 1\nset logscale x 2\nset xrange ["
    << least / 1.06 << ':' << most * 1.06 << "]\nset yrange [" << best - 0.03 << ':'
    << std::min(worst + 0.03, best + worst_shown) << "]\nset xlabel "
    << example::quoted(is_share ? "share of the tokens read so far that stays"
                                : "tokens that stay, per kv head of each layer")
    << " textcolor rgb '#333333'\nset ylabel 'nats per token' textcolor rgb '#333333'\nset xtics (";
  const char* comma = "";
  for (const double budget : budgets) {
    g << comma << '\'' << (is_share ? example::percent(budget) + "%" : kvpare::message(budget)) << "' " << budget;
    comma = ", ";
  }
  g << ")\n";
  picture.place(left, top, plot_width, plot_height);
  std::ostringstream curves;
  std::vector<example::KeyEntry> key;
  for (std::size_t i = 0; i < lines.size(); ++i) {
    const std::string look = example::look(styles[i], lines[i].is_level);
    curves << (i > 0 ? ", " : "") << "$line" << i << ' ' << look;
    key.push_back({lines[i].policy, look});
  }
  picture.plot(curves.str());
  g << "unset ytics\n";
  example::draw_key(picture, key, key_columns, left, key_top, width - left);
  picture.draw();
}

void plot_nats_over_bytes(const std::string& path, const Measured& measured, const std::vector<Setting>& settings,
                          const std::vector<Result>& results) {
  std::ostringstream below;
  below << std::filesystem::path(measured.text).filename().string() << ", " << measured.tokens << " tokens of "
        << measured.stories << " stories. KiB: whole pages of " << measured.options.page_tokens
        << " tokens as a token is attended, on average.";
  double best = std::numeric_limits<double>::max();
  std::vector<example::BytesPoint> points;
  for (std::size_t i = 0; i < settings.size(); ++i) {
    points.push_back({settings[i].policy, {results[i].bytes_in_use()}, {results[i].nats_per_token()}});
    best = std::min(best, results[i].nats_per_token());
  }
  constexpr double shown = 0.35;
  below << std::setprecision(3) << " What is above " << best + shown << " is not shown.";
  example::plot_bytes(path,
                      {.title = "How well the next token is predicted, against the bytes of the KV cache",
                       .below = below.str(),
                       .value = "nats per token",
                       .panels = {{"", best - 0.01, best + shown}}},
                      points);
}

}  // namespace story
