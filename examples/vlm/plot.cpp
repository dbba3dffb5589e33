#include "plot.hpp"

#include <sys/wait.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <iomanip>
#include <map>
#include <sstream>

#include "report.hpp"

namespace vlm {
namespace {

// ---- talking to gnuplot

/// A text in gnuplot's single quotes.
std::string quoted(const std::string& text) {
  std::string out = "'";
  for (const char c : text) out += c == '\'' ? std::string("''") : std::string(1, c);
  return out + "'";
}

bool ends_with(const std::string& text, std::string_view end) {
  return text.size() >= end.size() && std::string_view(text).substr(text.size() - end.size()) == end;
}

std::string terminal(const std::string& path, int width_px, int height_px) {
  const char* kind = ends_with(path, ".png") ? "pngcairo noenhanced" : "svg noenhanced dynamic";
  std::ostringstream out;
  out << "set encoding utf8\nset terminal " << kind << " size " << width_px << ',' << height_px
      << " font 'Helvetica,13' background rgb '#ffffff'\nset output " << quoted(path) << '\n';
  return out.str();
}

void run_gnuplot(const std::string& script, const std::string& path) {
  const auto before = std::signal(SIGPIPE, SIG_IGN);  // a gnuplot that stops early must not stop us
  std::FILE* pipe = popen("gnuplot", "w");
  const bool written = pipe != nullptr && std::fwrite(script.data(), 1, script.size(), pipe) == script.size();
  const int status = pipe != nullptr ? pclose(pipe) : -1;
  std::signal(SIGPIPE, before);
  if (!written || status != 0) throw PlotError("gnuplot could not draw " + path + " (what it says stands above)");
}

// ---- colours: one per recipe, lighter for each further variant of it

struct Rgb {
  int r, g, b;
  std::string hex() const {
    char text[8];
    std::snprintf(text, sizeof text, "#%02x%02x%02x", r, g, b);
    return text;
  }
};

Rgb mix(Rgb a, Rgb b, double share_of_b) {
  const auto channel = [&](int x, int y) { return static_cast<int>(std::lround(x + (y - x) * share_of_b)); };
  return {channel(a.r, b.r), channel(a.g, b.g), channel(a.b, b.b)};
}

constexpr Rgb white{255, 255, 255};

struct LineStyle {
  Rgb colour;
  int marker, dash;
};

/// Styles in the order of the policies: those that share a recipe share a colour and differ in shade, marker and dash.
std::vector<LineStyle> line_styles(const std::vector<std::string>& policies) {
  static constexpr Rgb colours[] = {{200, 40, 40},  {31, 110, 180}, {30, 140, 70},  {225, 140, 20},
                                    {130, 80, 170}, {20, 160, 165}, {150, 100, 60}, {215, 90, 160}};
  static constexpr int markers[] = {7, 6, 5, 4, 9, 8};
  static constexpr int dashes[] = {1, 2, 4, 3, 5, 1};
  std::map<std::string, std::pair<std::size_t, std::size_t>> recipes;  // colour, variants so far
  std::vector<LineStyle> styles;
  for (const std::string& policy : policies) {
    const std::string recipe = policy.substr(0, policy.find('('));
    if (recipe == "full") {
      styles.push_back({{60, 60, 60}, 0, 3});
    } else if (recipe == "random") {
      styles.push_back({{140, 140, 140}, 2, 1});
    } else {
      auto& [colour, variants] = recipes.try_emplace(recipe, recipes.size(), 0).first->second;
      const std::size_t variant = variants++ % std::size(markers);
      const double lighter = std::min(0.4, 0.13 * static_cast<double>(variant));
      styles.push_back({mix(colours[colour % std::size(colours)], white, lighter), markers[variant], dashes[variant]});
    }
  }
  return styles;
}

/// One colour per budget, from pale for the largest to dark for the smallest.
std::vector<Rgb> heat_colours(std::size_t budgets) {
  static constexpr Rgb stops[] = {{254, 217, 118}, {253, 141, 60}, {227, 26, 28}, {128, 0, 60}, {48, 0, 50}};
  std::vector<Rgb> colours;
  for (std::size_t i = 0; i < budgets; ++i) {
    const double at =
        budgets > 1 ? static_cast<double>(i) * (std::size(stops) - 1) / static_cast<double>(budgets - 1) : 2;
    const auto below = std::min(static_cast<std::size_t>(at), std::size(stops) - 2);
    colours.push_back(mix(stops[below], stops[below + 1], at - static_cast<double>(below)));
  }
  return colours;
}

/// `survived` budgets, perhaps a mean over heads and so no whole number; below 1 the colour fades.
Rgb heat_at(const std::vector<Rgb>& heat, double survived) {
  if (survived < 1) return mix(white, heat.front(), survived);
  const auto below = std::min(static_cast<std::size_t>(survived), heat.size());
  const Rgb from = heat[below - 1];
  return below < heat.size() ? mix(from, heat[below], survived - static_cast<double>(below)) : from;
}

// ---- the accuracy picture

double right_share(const Result& result, Task task) {
  return task == Task::desc ? result[task].by_token() : result[task].exact();
}

std::string panel_title(Task task) {
  switch (task) {
    case Task::desc:
      return "describe everything (right words)";
    case Task::same:
      return "ask on about the same object";
    case Task::other:
      return "ask on about other objects";
    case Task::turn1:
      return "the first question itself";
  }
  return {};
}

/// A line of the picture: the results of one policy, in the order of `keep`.
struct Line {
  std::string policy;
  std::vector<std::size_t> points = {};  // indices of results that have a keep
  std::size_t level = 0;                 // index of the result without one
  bool is_level = false;                 // a policy without a budget is a horizontal line
};

std::vector<Line> lines_of(const std::vector<Setting>& settings) {
  std::vector<Line> lines;
  for (std::size_t i = 0; i < settings.size(); ++i) {
    if (lines.empty() || lines.back().policy != settings[i].policy) lines.push_back({.policy = settings[i].policy});
    if (settings[i].keep)
      lines.back().points.push_back(i);
    else
      lines.back().level = i, lines.back().is_level = true;
  }
  for (Line& line : lines)
    std::sort(line.points.begin(), line.points.end(),
              [&](std::size_t a, std::size_t b) { return *settings[a].keep > *settings[b].keep; });
  return lines;
}

}  // namespace

void check_plot(const std::string& path) {
  if (!ends_with(path, ".svg") && !ends_with(path, ".png"))
    throw PlotError("--plot " + path + ": the name must end in .svg or .png");
  if (std::system("gnuplot --version > /dev/null 2>&1") != 0)
    throw PlotError(
        "--plot needs gnuplot, which was not found: install it (Debian, Ubuntu: apt install gnuplot-nox) or "
        "leave --plot out");
}

void plot_accuracy(const std::string& path, const std::vector<Setting>& settings, const std::vector<Result>& results,
                   const EvaluateOptions& options) {
  const std::vector<Line> lines = lines_of(settings);
  std::vector<std::string> names;
  for (const Line& line : lines) names.push_back(line.policy);
  const std::vector<LineStyle> styles = line_styles(names);
  std::vector<double> keeps;
  for (const Setting& setting : settings)
    if (setting.keep) keeps.push_back(*setting.keep);
  std::sort(keeps.begin(), keeps.end(), std::greater<>());
  keeps.erase(std::unique(keeps.begin(), keeps.end()), keeps.end());
  if (keeps.empty()) keeps = {1.0};
  const double least = keeps.back(), most = std::max(keeps.front(), least * 1.01);

  const int panels = static_cast<int>(options.tasks.size());
  const int columns = panels == 4 ? 2 : panels, rows = panels == 4 ? 2 : 1;
  const int panel_width = 380, panel_height = 330, left_px = 70, gap_px = 28, top_px = 100, row_gap_px = 72;
  const int key_rows = (static_cast<int>(lines.size()) + 2) / 3;
  const int below_px = 70 + 21 * key_rows;
  const int total_width = std::max(left_px + columns * (panel_width + gap_px), 900);
  const int total_height = top_px + rows * panel_height + (rows - 1) * row_gap_px + below_px;

  std::ostringstream g;
  g << std::setprecision(6) << terminal(path, total_width, total_height);
  for (std::size_t i = 0; i < lines.size(); ++i) {
    for (const Task task : options.tasks) {
      g << "$line" << i << name_of(task) << " << EOD\n";
      if (lines[i].is_level) {
        const double share = right_share(results[lines[i].level], task);
        g << most << ' ' << share << '\n' << least << ' ' << share << '\n';
      }
      for (const std::size_t point : lines[i].points)
        g << *settings[point].keep << ' ' << right_share(results[point], task) << '\n';
      g << "EOD\n";
    }
  }
  g << "set multiplot\n"
       "set border 3 lc rgb '#888888'\nset tics nomirror scale 0.5 textcolor rgb '#333333'\n"
       "set grid ytics lc rgb '#e4e4e4' lt 1 lw 1\n"
       "set logscale x 10\nset yrange [0:1.03]\nunset key\n";
  g << "set xrange [" << most * 1.06 << ':' << least / 1.06 << "]\nset xtics (";
  for (std::size_t k = 0; k < keeps.size(); ++k)
    g << (k > 0 ? ", " : "") << "'" << keeps[k] * 100 << " %%' " << keeps[k];
  g << ")\nset ytics ('0 %%' 0, '20 %%' 0.2, '40 %%' 0.4, '60 %%' 0.6, '80 %%' 0.8, '100 %%' 1)\n";
  g << "set label 1 'Right answers when the visual part of the KV cache shrinks' at screen "
    << static_cast<double>(left_px) / total_width << ',' << 1 - 26.0 / total_height
    << " left font 'Helvetica,18' textcolor rgb '#111111'\nset label 2 '" << options.scenes << " scenes of "
    << visual_tokens << " visual tokens; text is always kept' at screen " << static_cast<double>(left_px) / total_width
    << ',' << 1 - 48.0 / total_height << " left textcolor rgb '#666666'\n";

  for (int p = 0; p < panels; ++p) {
    const Task task = options.tasks[static_cast<std::size_t>(p)];
    const double left = left_px + p % columns * (panel_width + gap_px);
    const double top = top_px + p / columns * (panel_height + row_gap_px);
    g << "set lmargin at screen " << left / total_width << "\nset rmargin at screen "
      << (left + panel_width) / total_width << "\nset tmargin at screen " << 1 - top / total_height
      << "\nset bmargin at screen " << 1 - (top + panel_height) / total_height << '\n';
    g << "set title " << quoted(panel_title(task)) << " offset 0,-0.4 textcolor rgb '#333333'\n"
      << "set xlabel 'visual tokens kept' textcolor rgb '#333333'\n";
    if (p % columns > 0) g << "set ytics ('' 0, '' 0.2, '' 0.4, '' 0.6, '' 0.8, '' 1)\n";
    g << "plot ";
    for (std::size_t i = 0; i < lines.size(); ++i) {
      const LineStyle& style = styles[i];
      g << (i > 0 ? ", " : "") << "$line" << i << name_of(task) << " with ";
      if (lines[i].is_level)
        g << "lines lw 2 dt " << style.dash;
      else
        g << "linespoints lw 2 dt " << style.dash << " pt " << style.marker << " ps 0.7";
      g << " lc rgb '" << style.colour.hex() << "' notitle";
    }
    g << "\nunset label 1\nunset label 2\n";
  }

  // The key: an empty plot below the panels.
  g << "unset border\nunset tics\nunset title\nunset xlabel\nunset grid\nunset logscale x\nset xrange [0:1]\n"
    << "set yrange [0:1]\nset lmargin at screen " << static_cast<double>(left_px) / total_width
    << "\nset rmargin at screen 0.995\nset bmargin at screen 0.01\nset tmargin at screen "
    << static_cast<double>(below_px - 58) / total_height << "\nset key at graph 0,1 left top Left reverse maxrows "
    << key_rows << " samplen 3.2 spacing 1.15 width 2 textcolor rgb '#222222'\nplot ";
  for (std::size_t i = 0; i < lines.size(); ++i) {
    const LineStyle& style = styles[i];
    g << (i > 0 ? ", " : "") << "NaN with " << (lines[i].is_level ? "lines" : "linespoints") << " lw 2 dt "
      << style.dash;
    if (!lines[i].is_level) g << " pt " << style.marker << " ps 0.7";
    g << " lc rgb '" << style.colour.hex() << "' title " << quoted(lines[i].policy);
  }
  g << "\nunset multiplot\n";
  run_gnuplot(g.str(), path);
}

void plot_survival(const std::string& path, const Scene& scene, const std::string& title, const std::string& caption,
                   const std::vector<double>& keeps, const std::vector<Survival>& rows) {
  const int columns = 1 + static_cast<int>(layer_count);
  const int cell = 190, gap = 14, left_px = 24, top_px = 104, name_px = 30, below_px = 84;
  const int total_width = left_px + columns * (cell + gap) + 10;
  const int total_height = top_px + static_cast<int>(rows.size()) * (cell + name_px) + below_px;
  const std::vector<Rgb> heat = heat_colours(keeps.size());

  std::ostringstream g;
  g << std::setprecision(6) << terminal(path, total_width, total_height);
  const auto pixels = [&](const char* name, double grey) {
    g << name << " << EOD\n";
    for (int y = 0; y < image_side; ++y) {
      for (int x = 0; x < image_side; ++x) {
        const std::uint8_t* rgb = &scene.image[static_cast<std::size_t>((y * image_side + x) * 3)];
        const Rgb colour{rgb[0], rgb[1], rgb[2]};
        const int level = static_cast<int>(std::lround(0.299 * colour.r + 0.587 * colour.g + 0.114 * colour.b));
        const Rgb shown = mix(colour, mix({level, level, level}, white, 0.45), grey);
        g << x + 0.5 << ' ' << y + 0.5 << ' ' << shown.r << ' ' << shown.g << ' ' << shown.b << '\n';
      }
    }
    g << "EOD\n";
  };
  pixels("$photo", 0);
  pixels("$faint", 1);
  for (std::size_t r = 0; r < rows.size(); ++r) {
    for (std::size_t l = 0; l < rows[r].layers.size(); ++l) {
      g << "$heat" << r << '_' << l << " << EOD\n";
      for (std::size_t p = 0; p < rows[r].layers[l].size(); ++p) {
        const double survived = rows[r].layers[l][p];
        if (survived <= 0) continue;
        const Rgb colour = heat_at(heat, survived);
        g << (static_cast<double>(p % patches_per_side) + 0.5) * 8 << ' '
          << (static_cast<double>(p / patches_per_side) + 0.5) * 8 << ' ' << (colour.r << 16 | colour.g << 8 | colour.b)
          << '\n';
      }
      g << "EOD\n";
    }
  }

  const auto text_at = [&](int label, const std::string& text, double x_px, double y_px, const char* style) {
    g << "set label " << label << ' ' << quoted(text) << " at screen " << x_px / total_width << ','
      << 1 - y_px / total_height << ' ' << style << '\n';
  };
  const auto place = [&](double x_px, double y_px, double w_px, double h_px) {
    g << "set lmargin at screen " << x_px / total_width << "\nset rmargin at screen " << (x_px + w_px) / total_width
      << "\nset tmargin at screen " << 1 - y_px / total_height << "\nset bmargin at screen "
      << 1 - (y_px + h_px) / total_height << '\n';
  };

  g << "set multiplot\nunset key\nunset tics\nunset colorbox\nset border 15 lc rgb '#bbbbbb'\n";
  text_at(1, title, left_px, 26, "left font 'Helvetica,18' textcolor rgb '#111111'");
  text_at(2, caption, left_px, 50, "left textcolor rgb '#666666'");
  for (int c = 1; c < columns; ++c)
    text_at(2 + c, "layer " + std::to_string(c - 1), left_px + c * (cell + gap) + cell / 2.0, 88,
            "center textcolor rgb '#333333'");
  const char* image_axes = "set xrange [0:96]\nset yrange [96:0]\n";
  g << image_axes;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const double top = top_px + static_cast<double>(r) * (cell + name_px);
    text_at(20, rows[r].policy, left_px, top + cell + 15, "left textcolor rgb '#111111'");
    for (int c = 0; c < columns; ++c) {
      place(left_px + c * (cell + gap), top, cell, cell);
      g << "plot " << (c == 0 ? "$photo" : "$faint") << " with rgbimage";
      if (c > 0 && std::any_of(rows[r].layers[static_cast<std::size_t>(c - 1)].begin(),
                               rows[r].layers[static_cast<std::size_t>(c - 1)].end(), [](double s) { return s > 0; }))
        g << ", $heat" << r << '_' << c - 1
          << " using 1:2:(3.7):(3.7):3 with boxxyerror fill transparent solid 0.75 noborder lc rgb variable";
      g << '\n';
      for (int label = 1; label <= 2 + columns; ++label) g << "unset label " << label << '\n';
      g << "unset label 20\n";
    }
  }

  // The scale: one box per budget.
  const double scale_top = total_height - 50, box = 74;
  g << "unset border\nset xrange [0:" << keeps.size() << "]\nset yrange [0:1]\n";
  place(left_px + 200, scale_top, box * static_cast<double>(keeps.size()), 18);
  g << "$scale << EOD\n";
  for (std::size_t k = 0; k < keeps.size(); ++k)
    g << static_cast<double>(k) + 0.5 << " 0.5 " << (heat[k].r << 16 | heat[k].g << 8 | heat[k].b) << '\n';
  g << "EOD\n";
  text_at(1, "still there when the budget is", left_px, scale_top + 9, "left textcolor rgb '#333333'");
  for (std::size_t k = 0; k < keeps.size(); ++k) {
    std::ostringstream percent;
    percent << keeps[k] * 100 << " %";
    text_at(2 + static_cast<int>(k), percent.str(), left_px + 200 + box * (static_cast<double>(k) + 0.5),
            scale_top + 32, "center textcolor rgb '#333333'");
  }
  g << "plot $scale using 1:2:(0.48):(0.5):3 with boxxyerror fill solid noborder lc rgb variable\nunset multiplot\n";
  run_gnuplot(g.str(), path);
}

}  // namespace vlm
