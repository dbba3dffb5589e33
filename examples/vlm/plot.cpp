#include "plot.hpp"

#include <algorithm>
#include <cmath>
#include <iomanip>
#include <sstream>
#include <string_view>

#include "support/bytes_picture.hpp"
#include "support/line_styles.hpp"
#include "support/picture.hpp"

namespace vlm {
namespace {

using namespace example;

// ---- the accuracy picture

/// One policy: a line over its budgets; a level where it keeps everything; else a point at what it keeps.
struct Line {
  std::string policy;
  std::vector<std::size_t> points = {};  // indices of its results, largest budget first
  bool is_level = false, is_point = false;
};

std::vector<Line> lines_of(const std::vector<Setting>& settings) {
  std::vector<Line> lines;
  for (std::size_t i = 0; i < settings.size(); ++i) {
    if (lines.empty() || lines.back().policy != settings[i].policy) lines.push_back({.policy = settings[i].policy});
    Line& line = lines.back();
    line.points.push_back(i);
    line.is_level = settings[i].keeps_all();
    line.is_point = !settings[i].keep && !line.is_level;
  }
  for (Line& line : lines)
    std::sort(line.points.begin(), line.points.end(),
              [&](std::size_t a, std::size_t b) { return settings[a].keep > settings[b].keep; });
  return lines;
}

/// The lines that share a row of panels.
struct Group {
  std::string title;
  std::vector<std::size_t> lines;
};

/// Few lines stand together, many by family; one that keeps everything stands in every row, as what there is to reach.
std::vector<Group> groups_of(const std::vector<Line>& lines) {
  constexpr std::size_t most_together = 10;
  if (lines.size() <= most_together) {
    Group all;
    for (std::size_t i = 0; i < lines.size(); ++i) all.lines.push_back(i);
    return {all};
  }
  std::vector<Group> groups;
  for (std::size_t f = 0; f < family_count; ++f) {
    const Family family = static_cast<Family>(f);
    Group group{std::string(name_of(family)), {}};
    bool any = false;
    for (std::size_t i = 0; i < lines.size(); ++i) {
      const bool mine = !lines[i].is_level && family_of(lines[i].policy) == family;
      if (mine || lines[i].is_level) group.lines.push_back(i);
      any = any || mine;
    }
    if (any) groups.push_back(group);
  }
  return groups;
}

double kept_share(const Result& result) { return result.kept_visual_tokens() / static_cast<double>(visual_tokens); }

/// What is kept and how much of it is right: a pair per row. A level goes from everything to `least`.
std::string points_of(const Line& line, const std::vector<Result>& results, Task task, double least) {
  std::ostringstream out;
  for (const std::size_t point : line.points) {
    const Score& score = results[point][task];
    const double right = task == Task::desc ? score.by_token() : score.exact();
    if (line.is_level)
      out << 1 << ' ' << right << '\n' << least << ' ' << right << '\n';
    else if (kept_share(results[point]) > 0)
      out << kept_share(results[point]) << ' ' << right << '\n';
  }
  return out.str();
}

/// Where the axis has ticks: at the budgets, and at all there is.
std::vector<double> ticks_of(const std::vector<Setting>& settings) {
  std::vector<double> keeps = {1};
  for (const Setting& setting : settings)
    if (setting.keep && *setting.keep > 0) keeps.push_back(*setting.keep);
  std::sort(keeps.begin(), keeps.end(), std::greater<>());
  keeps.erase(std::unique(keeps.begin(), keeps.end()), keeps.end());
  return keeps;
}

/// What the picture shows: the first answer hardly depends on the budget (it has been read when the eviction comes), so
/// it is drawn only when nothing else was asked.
std::vector<Task> panels_of(const std::vector<Task>& tasks) {
  std::vector<Task> panels;
  for (const Task task : tasks)
    if (task != Task::turn1) panels.push_back(task);
  return panels.empty() ? tasks : panels;
}

const char* panel_title(Task task) {
  switch (task) {
    case Task::desc:
      return "describe everything (right words)";
    case Task::same:
      return "ask on about the same object";
    case Task::other:
      return "ask on about other objects";
    case Task::turn1:
      break;
  }
  return "the first question";
}

// ---- the survival picture

/// One colour per budget, from pale for the largest to dark for the smallest.
std::vector<Rgb> heat_colours(std::size_t budgets) {
  static constexpr Rgb stops[] = {{254, 217, 118}, {253, 141, 60}, {227, 26, 28}, {128, 0, 60}, {48, 0, 50}};
  constexpr std::size_t last = std::size(stops) - 1;
  std::vector<Rgb> colours;
  for (std::size_t i = 0; i < budgets; ++i) {
    const double at = budgets > 1 ? static_cast<double>(i * last) / static_cast<double>(budgets - 1) : last / 2.0;
    const std::size_t below = std::min(static_cast<std::size_t>(at), last - 1);
    colours.push_back(mix(stops[below], stops[below + 1], at - static_cast<double>(below)));
  }
  return colours;
}

/// `survived` budgets, a mean over heads and so perhaps no whole number; below 1 the colour fades.
Rgb heat_at(const std::vector<Rgb>& heat, double survived) {
  if (survived < 1) return mix(white, heat.front(), survived);
  const std::size_t below = std::min(static_cast<std::size_t>(survived), heat.size());
  if (below == heat.size()) return heat.back();
  return mix(heat[below - 1], heat[below], survived - static_cast<double>(below));
}

/// The picture as a data block; `faded` turns it to pale grey, for colours to be laid over.
std::string photo_data(const char* name, const Scene& scene, bool faded) {
  std::ostringstream out;
  out << name << " << EOD\n";
  for (Index y = 0; y < image_side; ++y) {
    for (Index x = 0; x < image_side; ++x) {
      const std::uint8_t* at = &scene.image[static_cast<std::size_t>((y * image_side + x) * 3)];
      Rgb shown{at[0], at[1], at[2]};
      if (faded) {
        const int grey = static_cast<int>(std::lround(0.299 * shown.r + 0.587 * shown.g + 0.114 * shown.b));
        shown = mix({grey, grey, grey}, white, 0.45);
      }
      out << x << ".5 " << y << ".5 " << shown.r << ' ' << shown.g << ' ' << shown.b << '\n';
    }
  }
  out << "EOD\n";
  return out.str();
}

/// The patches that survive something: x, y in pixels, colour.
std::string heat_data(const std::string& name, const std::vector<double>& patches, const std::vector<Rgb>& heat) {
  std::ostringstream out;
  out << name << " << EOD\n";
  for (std::size_t p = 0; p < patches.size(); ++p)
    if (patches[p] > 0)
      out << (static_cast<double>(p % patches_per_side) + 0.5) * patch_side << ' '
          << (static_cast<double>(p / patches_per_side) + 0.5) * patch_side << ' ' << heat_at(heat, patches[p]).packed()
          << '\n';
  out << "EOD\n";
  return out.str();
}

// ---- the picture of budgets

/// From pale for few tokens to dark for all.
Rgb budget_colour(double share) {
  static constexpr Rgb stops[] = {{247, 251, 255}, {198, 219, 239}, {107, 174, 214}, {33, 113, 181}, {8, 48, 107}};
  constexpr std::size_t last = std::size(stops) - 1;
  const double at = std::sqrt(std::clamp(share, 0.0, 1.0)) * last;  // so that small budgets differ
  const std::size_t below = std::min(static_cast<std::size_t>(at), last - 1);
  return mix(stops[below], stops[below + 1], at - static_cast<double>(below));
}

std::string tenths(double value) {
  std::ostringstream out;
  out << std::fixed << std::setprecision(value < 9.95 ? 1 : 0) << value;
  return out.str();
}

}  // namespace

void plot_accuracy(const std::string& path, const std::vector<Setting>& settings, const std::vector<Result>& results,
                   const EvaluateOptions& options) {
  const std::vector<Line> lines = lines_of(settings);
  std::vector<std::string> names;
  for (const Line& line : lines) names.push_back(line.policy);
  const std::vector<LineStyle> styles = line_styles(names);
  const std::vector<Group> groups = groups_of(lines);
  const std::vector<Task> panels = panels_of(options.tasks);
  const std::vector<double> ticks = ticks_of(settings);
  double least = std::min(ticks.back(), 0.5);
  for (const Result& result : results)
    if (kept_share(result) > 0) least = std::min(least, kept_share(result));

  const double left = 62, top = 106, panel_width = 285, panel_height = 230, gap = 30, row_gap = 34, key_width = 300;
  const double row_step = panel_height + row_gap;
  const double key_left = left + static_cast<double>(panels.size()) * (panel_width + gap) + 6;
  std::size_t longest_key = 0;
  for (const Group& group : groups) longest_key = std::max(longest_key, group.lines.size());
  const double rows_height =
      std::max(row_step * static_cast<double>(groups.size()),
               row_step * static_cast<double>(groups.size() - 1) + key_row * static_cast<double>(longest_key + 1));
  Picture picture(path, key_left + key_width, top + rows_height + 26);
  auto& g = picture.script;

  for (std::size_t i = 0; i < lines.size(); ++i)
    for (const Task task : panels)
      g << "$line" << i << name_of(task) << " << EOD\n" << points_of(lines[i], results, task, least) << "EOD\n";
  const auto look_of = [&](std::size_t line) {
    return lines[line].is_point ? look_of_point(styles[line]) : look(styles[line], lines[line].is_level);
  };

  g << "set border 3 lc rgb '#888888'\nset tics nomirror scale 0.5 textcolor rgb '#333333'\n"
       "set grid ytics lc rgb '#e4e4e4' lt 1 lw 1\nset logscale x 10\nset yrange [0:1.03]\nset xrange ["
    << 1.06 << ':' << least / 1.06 << "]\n";
  picture.title("Right answers when the visual part of the KV cache shrinks",
                std::to_string(options.scenes) + " scenes of " + std::to_string(visual_tokens) +
                    " visual tokens; text is always kept. Points alone: no budget." +
                    (groups.size() > 1 ? " Pale: the lines of the other rows." : ""),
                left);
  for (std::size_t row = 0; row < groups.size(); ++row) {
    const double row_top = top + row_step * static_cast<double>(row);
    const bool bottom = row + 1 == groups.size();
    g << "set xtics (";
    for (std::size_t k = 0; k < ticks.size(); ++k)
      g << (k > 0 ? ", " : "") << "'" << (bottom ? percent(ticks[k]) + "%" : std::string()) << "' " << ticks[k];
    g << ")\nset xlabel "
      << (bottom ? "'visual tokens kept, mean over layers and heads' textcolor rgb '#333333'" : "''") << '\n';
    for (std::size_t p = 0; p < panels.size(); ++p) {
      picture.place(left + static_cast<double>(p) * (panel_width + gap), row_top, panel_width, panel_height);
      g << "set ytics ("
        << (p == 0 ? "'0 %%' 0, '20 %%' 0.2, '40 %%' 0.4, '60 %%' 0.6, '80 %%' 0.8, '100 %%' 1"
                   : "'' 0, '' 0.2, '' 0.4, '' 0.6, '' 0.8, '' 1")
        << ")\nset title " << quoted(row == 0 ? panel_title(panels[p]) : "")
        << " offset 0,-0.4 textcolor rgb '#333333'\n";
      std::ostringstream curves;
      for (std::size_t i = 0; i < lines.size(); ++i)
        if (!lines[i].is_level && !lines[i].is_point &&
            std::find(groups[row].lines.begin(), groups[row].lines.end(), i) == groups[row].lines.end())
          curves << "$line" << i << name_of(panels[p]) << " with lines lw 1 lc rgb '#dcdcdc', ";
      for (const std::size_t i : groups[row].lines)
        curves << (i != groups[row].lines.front() ? ", " : "") << "$line" << i << name_of(panels[p]) << ' '
               << look_of(i);
      picture.plot(curves.str());
    }
  }
  for (std::size_t row = 0; row < groups.size(); ++row) {
    const double row_top = top + row_step * static_cast<double>(row);
    std::vector<KeyEntry> key;
    for (const std::size_t i : groups[row].lines) key.push_back({lines[i].policy, look_of(i), lines[i].is_point});
    picture.write(groups[row].title, key_left, row_top + 2, "left font 'Helvetica,14' textcolor rgb '#111111'");
    draw_key(picture, key, 1, key_left, row_top + 16, key_width);
  }
  picture.draw();
}

void plot_accuracy_over_bytes(const std::string& path, const std::vector<Setting>& settings,
                              const std::vector<Result>& results, const EvaluateOptions& options) {
  const std::vector<Task> panels = panels_of(options.tasks);
  BytesPicture picture{.title = "Right answers against the bytes of the KV cache",
                       .below = std::to_string(options.scenes) + " scenes of " + std::to_string(visual_tokens) +
                                " visual tokens. KiB: whole pages of " + std::to_string(options.page_tokens) +
                                " tokens, text included, as an answer begins; full cache: float.",
                       .value = "right",
                       .shares = true,
                       .panels = {}};
  std::vector<BytesPoint> points;
  double least = 1;
  for (std::size_t i = 0; i < settings.size(); ++i) {
    BytesPoint& point = points.emplace_back(BytesPoint{settings[i].policy, {}, {}});
    for (const Task task : panels) {
      const Score& score = results[i][task];
      point.bytes.push_back(score.answer_bytes());
      point.values.push_back(task == Task::desc ? score.by_token() : score.exact());
      least = std::min(least, point.values.back());
    }
  }
  least = std::max(0.0, std::ceil(10 * least - 1) / 10);  // the axis begins at the tenth below the lowest
  for (const Task task : panels) picture.panels.push_back({panel_title(task), least, 1.02});
  plot_bytes(path, picture, points);
}

void plot_budgets(const std::string& path, const std::vector<Setting>& settings,
                  const std::vector<LayerBudgets>& budgets, const EvaluateOptions& options) {
  const double left = 24, names = 400, top = 112, cell = 60, row = 30, gap = 12;
  const double layer_step = cell * kv_heads + gap, cells_left = left + names;
  const double width = cells_left + layer_step * layer_count + 80;
  const double bottom = top + row * static_cast<double>(settings.size()), scale_top = bottom + 26;
  Picture picture(path, width, scale_top + 56);
  auto& g = picture.script;
  const auto any = std::find_if(settings.begin(), settings.end(), [](const Setting& s) { return s.keep.has_value(); });
  picture.title("Visual tokens that each layer keeps",
                "of " + std::to_string(visual_tokens) +
                    (any != settings.end() ? ", under a budget of " + percent(*any->keep) : "") + "; mean of " +
                    std::to_string(options.scenes) + " scenes. Two numbers: the kv heads of a layer differ.",
                left);
  for (Index l = 0; l < layer_count; ++l)
    picture.write("layer " + std::to_string(l), cells_left + layer_step * static_cast<double>(l) + cell * kv_heads / 2,
                  top - 16, "center textcolor rgb '#333333'");
  picture.write("kept", cells_left + layer_step * layer_count + 30, top - 16, "center textcolor rgb '#333333'");

  g << "unset tics\nunset border\nset xrange [0:" << width << "]\nset yrange [" << scale_top + 56 << ":0]\n";
  std::ostringstream cells;
  const auto box = [&](double x, double y, double box_width, double box_height, Rgb colour) {
    cells << x + box_width / 2 << ' ' << y + box_height / 2 << ' ' << box_width / 2 << ' ' << box_height / 2 << ' '
          << colour.packed() << '\n';
  };
  const auto number = [&](double tokens, double x, double y) {
    const bool dark = tokens > 0.38 * static_cast<double>(visual_tokens);
    picture.write(tenths(tokens), x, y,
                  dark ? "center front textcolor rgb '#ffffff'" : "center front textcolor rgb '#222222'");
  };
  for (std::size_t s = 0; s < settings.size(); ++s) {
    const double y = top + row * static_cast<double>(s), middle = y + row / 2;
    picture.write(settings[s].policy + (settings[s].keep ? "" : "  (no budget)"), left, middle,
                  "left textcolor rgb '#222222'");
    for (Index l = 0; l < layer_count; ++l) {
      const auto& heads = budgets[s][static_cast<std::size_t>(l)];
      const double x = cells_left + layer_step * static_cast<double>(l);
      const auto [least, most] = std::minmax_element(heads.begin(), heads.end());
      const bool alike = *most - *least < 0.05;
      const double box_width = alike ? cell * kv_heads : cell;
      for (std::size_t h = 0; h < (alike ? 1 : heads.size()); ++h) {
        const double at = x + box_width * static_cast<double>(h);
        box(at + 1, y + 1, box_width - 2, row - 2, budget_colour(heads[h] / static_cast<double>(visual_tokens)));
        number(heads[h], at + box_width / 2, middle);
      }
    }
    picture.write(percent(std::round(1000 * share_of(budgets[s])) / 1000), cells_left + layer_step * layer_count + 30,
                  middle, "center textcolor rgb '#222222'");
  }
  picture.write("tokens", cells_left - 12, scale_top + 10, "right textcolor rgb '#333333'");
  constexpr double marks[] = {0, 2, 10, 29, 72, 144};
  for (std::size_t m = 0; m < std::size(marks); ++m) {
    const double x = cells_left + 66 * static_cast<double>(m);
    box(x, scale_top, 64, 20, budget_colour(marks[m] / static_cast<double>(visual_tokens)));
    picture.write(std::to_string(static_cast<int>(marks[m])), x + 32, scale_top + 34, "center textcolor rgb '#333333'");
  }
  g << "$cells << EOD\n" << cells.str() << "EOD\n";
  picture.place(0, 0, width, scale_top + 56);
  picture.plot("$cells using 1:2:3:4:5 with boxxyerror fill solid noborder lc rgb variable");
  picture.draw();
}

void plot_survival(const std::string& path, const Scene& scene, const std::string& title, const std::string& caption,
                   const std::vector<double>& keeps, const std::vector<Survival>& rows) {
  const std::vector<Rgb> heat = heat_colours(keeps.size());
  const double left = 24, top = 104, cell = 190, gap = 14, heading = 34, scale_left = 220, box = 74;
  const double step = cell + gap, row_step = cell + heading;
  const double scale_top = top + row_step * static_cast<double>(rows.size()) + 22;
  const double width =
      std::max(left + step * (1 + layer_count), scale_left + box * static_cast<double>(keeps.size())) + 10;
  Picture picture(path, width, scale_top + 56);
  auto& g = picture.script;
  g << photo_data("$photo", scene, false) << photo_data("$faded", scene, true);

  g << "unset tics\nunset colorbox\nset border 15 lc rgb '#bbbbbb'\nset xrange [0:96]\nset yrange [96:0]\n";
  picture.title(title, caption, left);
  for (Index l = 0; l < layer_count; ++l)
    picture.write("layer " + std::to_string(l), left + step * static_cast<double>(l + 1) + cell / 2, top - 4,
                  "center textcolor rgb '#333333'");
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const double row_top = top + row_step * static_cast<double>(r) + heading - 10;
    picture.write(rows[r].policy, left, row_top - 12, "left font 'Helvetica,14' textcolor rgb '#111111'");
    picture.place(left, row_top, cell, cell);
    picture.plot("$photo with rgbimage");
    for (std::size_t l = 0; l < rows[r].layers.size(); ++l) {
      const std::string data = "$heat" + std::to_string(r) + "_" + std::to_string(l);
      const bool any = std::any_of(rows[r].layers[l].begin(), rows[r].layers[l].end(), [](double s) { return s > 0; });
      g << heat_data(data, rows[r].layers[l], heat);
      picture.place(left + step * static_cast<double>(l + 1), row_top, cell, cell);
      picture.plot(
          "$faded with rgbimage" +
          (any ? ", " + data +
                     " using 1:2:(3.7):(3.7):3 with boxxyerror fill transparent solid 0.75 noborder lc rgb variable"
               : std::string()));
    }
  }

  // The scale: one box per budget.
  g << "unset border\nset xrange [0:" << keeps.size() << "]\nset yrange [0:1]\n$scale << EOD\n";
  for (std::size_t k = 0; k < keeps.size(); ++k)
    g << static_cast<double>(k) + 0.5 << " 0.5 " << heat[k].packed() << '\n';
  g << "EOD\n";
  picture.write("still there when the budget is", left, scale_top + 9, "left textcolor rgb '#333333'");
  for (std::size_t k = 0; k < keeps.size(); ++k)
    picture.write(percent(keeps[k]), scale_left + box * (static_cast<double>(k) + 0.5), scale_top + 32,
                  "center textcolor rgb '#333333'");
  picture.place(scale_left, scale_top, box * static_cast<double>(keeps.size()), 18);
  picture.plot("$scale using 1:2:(0.48):(0.5):3 with boxxyerror fill solid noborder lc rgb variable");
  picture.draw();
}

}  // namespace vlm
