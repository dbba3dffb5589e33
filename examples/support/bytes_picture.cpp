#include "bytes_picture.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <kvpare/runtime/make_compressor.hpp>
#include <limits>
#include <sstream>
#include <string_view>
#include <vector>

#include "line_styles.hpp"

namespace example {
namespace {

struct Line {
  std::string words;
  Saves saves;
  std::vector<std::size_t> points;
};

std::vector<Line> lines_of(const std::vector<BytesPoint>& points) {
  std::vector<Line> lines;
  for (std::size_t i = 0; i < points.size(); ++i) {
    const std::string words = line_of(points[i].policy);
    auto line = std::find_if(lines.begin(), lines.end(), [&](const Line& l) { return l.words == words; });
    if (line == lines.end()) line = lines.insert(lines.end(), {words, saves_by(points[i].policy), {}});
    line->points.push_back(i);
  }
  for (Line& line : lines)  // a line of one point says what it is
    if (line.points.size() == 1) line.words = points[line.points[0]].policy;
  std::stable_sort(lines.begin(), lines.end(), [](const Line& a, const Line& b) { return a.saves < b.saves; });
  return lines;
}

/// One colour per kind, shades and marks within it.
LineStyle style_of(Saves saves, std::size_t variant) {
  static constexpr std::array<Rgb, 5> colours = {
      Rgb{60, 60, 60}, Rgb{31, 110, 180}, Rgb{225, 120, 10}, Rgb{130, 60, 170}, Rgb{205, 35, 45}};
  static constexpr std::array markers = {7, 5, 9, 13, 6, 4, 8, 12};
  static constexpr std::array dashes = {1, 2, 4, 3, 5};
  const double lighter = std::min(0.45, 0.15 * static_cast<double>(variant));
  return {mix(colours[static_cast<std::size_t>(saves)], white, lighter), markers[variant % markers.size()],
          dashes[variant % dashes.size()]};
}

constexpr std::string_view kind_of(Saves saves) {
  constexpr std::array<std::string_view, 5> names = {"", "eviction: ", "fewer bits: ", "both: ", "one budget: "};
  return names[static_cast<std::size_t>(saves)];
}

}  // namespace

std::string line_of(const std::string& policy) {
  using Keys = std::vector<std::string_view>;
  const Keys keys = saves_by(policy) == Saves::bits ? Keys{"bits", "form", "low", "capacity", "nonzeros", "percent"} : Keys{"keep"};
  std::string words;
  for (std::size_t i = 0; i < policy.size();) {
    bool varies = false;
    for (const std::string_view key : keys) {
      const std::string_view rest = std::string_view(policy).substr(i);
      const bool begins = i > 0 && (policy[i - 1] == '(' || policy[i - 1] == ',' || policy[i - 1] == ' ');
      if (!begins || rest.substr(0, key.size()) != key) continue;
      const auto equals = rest.find_first_not_of(' ', key.size());
      if (equals == std::string_view::npos || rest[equals] != '=') continue;
      words += std::string(key) + "=…";
      i = std::min(policy.find_first_of(",)", i), policy.size());
      varies = true;
      break;
    }
    if (!varies) words += policy[i++];
  }
  return words;
}

Saves saves_by(const std::string& policy) {
  const kvpare::AnyCompressor compressor = kvpare::make_compressor(policy);
  const kvpare::AnyPrecision& precision = compressor.precision;
  if (std::holds_alternative<kvpare::Joint>(precision.held)) return Saves::joint;
  const bool keeps_all = !kvpare::evicts(compressor);
  if (std::holds_alternative<kvpare::AsAppended>(precision.held)) return keeps_all ? Saves::nothing : Saves::eviction;
  // Where the rest stays in fewer bits, nothing is evicted.
  return keeps_all || std::holds_alternative<kvpare::Mikv>(precision.held) ||
                 std::holds_alternative<kvpare::ZipCache>(precision.held)
             ? Saves::bits
             : Saves::both;
}

void plot_bytes(const std::string& path, const BytesPicture& what, const std::vector<BytesPoint>& points) {
  const std::vector<Line> lines = lines_of(points);
  double least = std::numeric_limits<double>::max(), most = 1;
  for (const BytesPoint& point : points)
    for (const double bytes : point.bytes) least = std::min(least, bytes), most = std::max(most, bytes);
  least = std::min(least, most);

  const int key_columns = 2;
  const double left = 80, top = 100, gap = 34;
  const double panel_width = what.panels.size() > 1 ? 430 : 880, panel_height = what.panels.size() > 1 ? 380 : 440;
  std::vector<std::string> words;
  std::size_t longest = 0;  // a little more than its letters where some take several bytes
  for (const Line& line : lines) {
    words.push_back(std::string(kind_of(line.saves)) + line.words);
    longest = std::max(longest, words.back().size());
  }
  constexpr double letter = 8, sample = 60;
  const double width = std::max({left + static_cast<double>(what.panels.size()) * (panel_width + gap),
                                 left + key_columns * (sample + letter * static_cast<double>(longest)), 1000.0});
  const double key_top = top + panel_height + 66;
  Picture picture(path, width, key_top + key_row * key_rows(lines.size(), key_columns) + 16);
  auto& g = picture.script;
  g << "set border 3 lc rgb '#888888'\nset tics nomirror scale 0.5 textcolor rgb '#333333'\n"
       "set grid ytics xtics lc rgb '#e4e4e4' lt 1 lw 1\nset logscale x 2\nset xrange ["
    << least / 1024 / 1.08 << ':' << most / 1024 * 1.08 << "]\nset xlabel 'KiB of pages in use' textcolor rgb '#333333'\n"
    << "set ylabel " << quoted(what.value) << " textcolor rgb '#333333'\nset xtics (";
  const char* comma = "";
  for (double power = 1; power <= most; power *= 2)
    for (const double kib : {power, 1.5 * power}) {
      if (kib < least / 1024 / 1.08 || kib > most / 1024 * 1.08) continue;
      g << comma << '\'' << kib << "' " << kib;
      comma = ", ";
    }
  g << ")\n";
  if (what.shares) g << "set format y '%.0f %%'\n";
  const double scale = what.shares ? 100 : 1;
  picture.title(what.title, what.below, left);

  std::vector<LineStyle> styles;
  std::array<std::size_t, 5> variants{};
  for (const Line& line : lines) styles.push_back(style_of(line.saves, variants[static_cast<std::size_t>(line.saves)]++));
  for (std::size_t p = 0; p < what.panels.size(); ++p) {
    const BytesPanel& panel = what.panels[p];
    for (std::size_t i = 0; i < lines.size(); ++i) {
      std::vector<std::pair<double, double>> path_of_line;
      for (const std::size_t point : lines[i].points) {
        const double value = points[point].values[p];
        if (value >= panel.least && value <= panel.most) path_of_line.emplace_back(points[point].bytes[p] / 1024, value);
      }
      std::sort(path_of_line.begin(), path_of_line.end());
      g << "$line" << i << "_" << p << " << EOD\n";
      for (const auto& [kib, value] : path_of_line) g << kib << ' ' << value * scale << '\n';
      if (path_of_line.empty()) g << least / 4096 << " NaN\n";  // an empty block is an error
      g << "EOD\n";
    }
    picture.place(left + static_cast<double>(p) * (panel_width + gap), top, panel_width, panel_height);
    if (!panel.title.empty()) g << "set title " << quoted(panel.title) << " offset 0,-0.4 textcolor rgb '#333333'\n";
    g << "set yrange [" << panel.least * scale << ':' << panel.most * scale << "]\n";
    std::ostringstream curves;
    for (std::size_t i = 0; i < lines.size(); ++i)
      curves << (i > 0 ? ", " : "") << "$line" << i << "_" << p << ' ' << look(styles[i], false);
    picture.plot(curves.str());
    g << "unset ylabel\nset format y ''\n";  // the next panels share the axis
  }
  std::vector<KeyEntry> key;
  for (std::size_t i = 0; i < lines.size(); ++i)
    key.push_back({words[i], look(styles[i], false)});
  g << "unset format\n";
  draw_key(picture, key, key_columns, left, key_top, width - left);
  picture.draw();
}

}  // namespace example
