// Text settings: any text is a method, which prints and reads back the same, or is refused in words.
#include <kvpare/runtime/make_compressor.hpp>

#include "fuzz/target.hpp"

using namespace kvpare;

namespace {

template <class Settings>
std::string with_settings(std::string_view name, const Settings& settings) {
  std::string text(name);
  const char* separator = "(";
  for (const SettingText& s : settings) text += separator + s.name + "=" + s.value, separator = ", ";
  return text + ")";
}

/// `name(key=value, …)` with every setting, or the name alone when there are none; with ` + ` and the same of a precision,
/// where there is one. The name is that of the method that evicts, or the one a precision alone goes with.
std::string text_of(std::string_view words, const AnyCompressor& method) {
  const Recipe* recipe = nullptr;
  std::string_view base;
  for (const std::string_view part : detail::split_methods(words)) {
    const std::string_view name = detail::trimmed(part.substr(0, part.find('(')));
    if (const Recipe* r = detail::find_named(known_recipes(), name)) recipe = r;
    if (const PrecisionRecipe* p = detail::find_named(known_precisions(), name)) base = p->base;
  }
  if (recipe == nullptr) recipe = detail::find_named(known_recipes(), base);
  std::string text = recipe->has_settings ? with_settings(recipe->name, settings_of(method)) : std::string(recipe->name);
  if (!(method.precision == AnyPrecision()))
    text += " + " + with_settings(method.precision.held_name(), settings_of(method.precision));
  return text;
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
