// Runs a fuzz target without a fuzzer: every file of its corpus, then mutations of them, the same ones on every machine,
// for as long as asked.
//
//   <program> [--seconds=<n>] <file or folder>...
//
// The input in flight is kept in `<program's name>.input` in the working directory; what a crash leaves there is the
// finding, and the program repeats it: <program> <program's name>.input
#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <kvpare/core/random.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "fuzz/target.hpp"

namespace {

namespace fs = std::filesystem;
using Bytes = std::vector<std::uint8_t>;
using kvpare::Index;

constexpr std::size_t most_bytes = 4096;

std::vector<Bytes> read_all(const std::vector<fs::path>& paths) {
  std::vector<fs::path> files;
  for (const fs::path& path : paths) {
    if (fs::is_directory(path)) {
      for (const auto& entry : fs::recursive_directory_iterator(path))
        if (entry.is_regular_file()) files.push_back(entry.path());
    } else {
      files.push_back(path);
    }
  }
  std::sort(files.begin(), files.end());  // the order of a folder is not the same everywhere
  std::vector<Bytes> inputs;
  for (const fs::path& file : files) {
    std::ifstream in(file, std::ios::binary);
    if (!in) throw std::runtime_error("can not read " + file.string());
    inputs.emplace_back(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
  }
  return inputs;
}

/// One to four changes of a corpus file, chosen by the mutation's number alone.
class Mutations {
 public:
  explicit Mutations(const std::vector<Bytes>& corpus) : corpus_(corpus) {}

  Bytes operator()(std::uint64_t number) {
    number_ = number, draws_ = 0;
    Bytes x = any_file();
    for (std::size_t changes = 1 + below(4); changes > 0; --changes) change(x);
    if (x.size() > most_bytes) x.resize(most_bytes);
    return x;
  }

 private:
  std::size_t below(std::size_t n) { return static_cast<std::size_t>(kvpare::random_bits(number_, draws_++) % n); }
  const Bytes& any_file() { return corpus_[below(corpus_.size())]; }
  static auto place(Bytes& x, std::size_t at) { return x.begin() + static_cast<std::ptrdiff_t>(at); }

  void change(Bytes& x) {
    static constexpr std::uint8_t odd[] = {0, 1, 2, 0x7f, 0x80, 0xfe, 0xff, '(', ')', '=', ',', '-', '9', ' '};
    const std::size_t at = below(x.size() + 1), length = std::min(below(16) + 1, x.size() - at);
    switch (below(8)) {
      case 0:  // a bit flips
        if (at < x.size()) x[at] = static_cast<std::uint8_t>(x[at] ^ (1u << below(8)));
        break;
      case 1:
        if (at < x.size()) x[at] = static_cast<std::uint8_t>(below(256));
        break;
      case 2:
        if (at < x.size()) x[at] = odd[below(std::size(odd))];
        break;
      case 3:
        x.insert(place(x, at), odd[below(std::size(odd))]);
        break;
      case 4:
        x.erase(place(x, at), place(x, at + length));
        break;
      case 5: {  // a piece comes twice
        const Bytes piece(place(x, at), place(x, at + length));
        const std::size_t to = below(x.size() + 1);
        x.insert(place(x, to), piece.begin(), piece.end());
        break;
      }
      case 6:
        x.resize(at);
        break;
      default: {  // the tail of another file
        const Bytes& other = any_file();
        const std::size_t from = below(other.size() + 1);
        x.resize(at);
        x.insert(x.end(), other.begin() + static_cast<std::ptrdiff_t>(from), other.end());
      }
    }
  }

  const std::vector<Bytes>& corpus_;
  std::uint64_t number_ = 0, draws_ = 0;
};

}  // namespace

int main(int argc, char** argv) try {
  double seconds = 0;
  std::vector<fs::path> paths;
  for (int i = 1; i < argc; ++i) {
    const std::string_view word = argv[i];
    constexpr std::string_view option = "--seconds=";
    if (word.starts_with(option)) {
      const auto [end, error] = std::from_chars(word.data() + option.size(), word.data() + word.size(), seconds);
      if (error != std::errc{} || end != word.data() + word.size() || !(seconds >= 0))
        throw std::runtime_error(std::string(word) + " is no time, wanted --seconds=<number>");
    } else {
      paths.emplace_back(word);
    }
  }
  const std::vector<Bytes> corpus = read_all(paths);
  if (corpus.empty()) throw std::runtime_error("no input, wanted files or folders of files");

  const std::string in_flight = fs::path(argv[0]).filename().string() + ".input";
  std::ofstream kept;  // opened once: creating a file takes longer than most inputs
  if (seconds > 0) kept.open(in_flight, std::ios::binary);
  const auto run = [&](const Bytes& input) {
    if (seconds > 0) {
      kept.seekp(0);
      kept.write(reinterpret_cast<const char*>(input.data()), static_cast<std::streamsize>(input.size())).flush();
      fs::resize_file(in_flight, input.size());
    }
    LLVMFuzzerTestOneInput(input.data(), input.size());
  };
  for (const Bytes& input : corpus) run(input);
  Mutations mutation(corpus);
  std::uint64_t mutations = 0;
  const auto begin = std::chrono::steady_clock::now();
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() < seconds)
    run(mutation(mutations++));
  if (seconds > 0) fs::remove(in_flight);
  std::printf("%zu files and %llu mutations of them\n", corpus.size(), static_cast<unsigned long long>(mutations));
  return 0;
} catch (const std::exception& e) {
  std::fprintf(stderr, "%s\n", e.what());
  return 1;
}
