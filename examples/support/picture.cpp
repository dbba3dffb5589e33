#include "picture.hpp"

#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <iomanip>
#include <string_view>
#include <utility>

namespace example {
namespace {

bool ends_with(const std::string& text, std::string_view end) {
  return text.size() >= end.size() && std::string_view(text).substr(text.size() - end.size()) == end;
}

}  // namespace

bool gnuplot_found() { return std::system("gnuplot --version > /dev/null 2>&1") == 0; }

void check_plot(const std::string& path) {
  if (!ends_with(path, ".svg") && !ends_with(path, ".png"))
    throw PlotError("--plot " + path + ": the name must end in .svg or .png");
  if (!gnuplot_found())
    throw PlotError(
        "--plot needs gnuplot, which was not found: install it (Debian, Ubuntu: apt install gnuplot-nox) or leave "
        "--plot out");
}

std::string quoted(const std::string& text) {
  std::string out = "'";
  for (const char c : text) out += c == '\'' ? std::string("''") : std::string(1, c);
  return out + "'";
}

std::string percent(double share) {
  std::ostringstream out;
  out << share * 100 << " %";
  return out.str();
}

std::string Rgb::hex() const {
  char text[8];
  std::snprintf(text, sizeof text, "#%06x", static_cast<unsigned>(packed()) & 0xffffffu);
  return text;
}

Rgb mix(Rgb a, Rgb b, double share_of_b) {
  const auto channel = [&](int x, int y) { return static_cast<int>(std::lround(x + (y - x) * share_of_b)); };
  return {channel(a.r, b.r), channel(a.g, b.g), channel(a.b, b.b)};
}

Picture::Picture(std::string path, double width, double height)
    : path_(std::move(path)), width_(width), height_(height) {
  script << std::setprecision(6) << "set encoding utf8\nset terminal "
         << (ends_with(path_, ".png") ? "pngcairo noenhanced fontscale 0.76" : "svg noenhanced dynamic") << " size "
         << width << ',' << height << " font 'Helvetica,13' background rgb '#ffffff'\nset output " << quoted(path_)
         << "\nset multiplot\nunset key\n";
}

void Picture::place(double left, double top, double width, double height) {
  script << "set lmargin at screen " << left / width_ << "\nset rmargin at screen " << (left + width) / width_
         << "\nset tmargin at screen " << 1 - top / height_ << "\nset bmargin at screen "
         << 1 - (top + height) / height_ << '\n';
}

void Picture::write(const std::string& text, double x, double y, const char* style) {
  script << "set label " << ++labels_ << ' ' << quoted(text) << " at screen " << x / width_ << ',' << 1 - y / height_
         << ' ' << style << '\n';
}

void Picture::title(const std::string& words, const std::string& below, double left) {
  write(words, left, 26, "left font 'Helvetica,18' textcolor rgb '#111111'");
  const auto line_end = below.size() <= 150 ? below.size() : below.rfind(' ', 150);
  write(below.substr(0, line_end), left, 50, "left textcolor rgb '#666666'");
  if (line_end < below.size()) write(below.substr(line_end + 1), left, 68, "left textcolor rgb '#666666'");
}

void Picture::plot(const std::string& what) {
  script << "plot " << what << '\n';
  for (; labels_ > 0; --labels_) script << "unset label " << labels_ << '\n';
}

void Picture::draw() {
  script << "unset multiplot\n";
  const std::string text = script.str();
  const auto before = std::signal(SIGPIPE, SIG_IGN);  // a gnuplot that stops early must not stop us
  std::FILE* pipe = popen("gnuplot", "w");
  const bool written = pipe != nullptr && std::fwrite(text.data(), 1, text.size(), pipe) == text.size();
  const int status = pipe != nullptr ? pclose(pipe) : -1;
  std::signal(SIGPIPE, before);
  if (!written || status != 0) throw PlotError("gnuplot could not draw " + path_ + "; what it says stands above");
}

}  // namespace example
