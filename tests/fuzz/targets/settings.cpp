// Text settings: any text is a method, which prints and reads back the same, or is refused in words.
#include <kvpare/runtime/make_compressor.hpp>

#include "fuzz/target.hpp"

using namespace kvpare;

namespace {

/// `name(key=value, …)` with every setting, or the name alone when there are none.
std::string text_of(std::string_view words, const AnyCompressor& method) {
  std::string text(detail::trimmed(words.substr(0, words.find('('))));
  for (const Recipe& r : known_recipes())
    if (r.name == text && !r.has_settings) return text;
  const char* separator = "(";
  for (const SettingText& s : settings_of(method)) text += separator + s.name + "=" + s.value, separator = ", ";
  return text + ")";
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string words(reinterpret_cast<const char*>(data), size);
  AnyCompressor method;
  try {
    method = make_compressor(words);
  } catch (const InvalidArgument& e) {
    test::must(e.what()[0] != '\0', "a refusal says nothing");
    return 0;
  }
  const std::string printed = text_of(words, method);
  const AnyCompressor again = make_compressor(printed);
  test::must(again == method, "'" + printed + "' is another method than the text it was printed for");
  test::must(text_of(words, again) == printed, "'" + printed + "' prints differently the second time");
  return 0;
}
