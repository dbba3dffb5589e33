#include "policies.hpp"

#include <kvpare/runtime/make_compressor.hpp>

namespace example {
namespace {

void print_settings(std::ostream& out, const std::vector<kvpare::SettingText>& settings) {
  for (const kvpare::SettingText& setting : settings)
    out << "  " << setting.name << " = " << setting.value << "  (" << setting.allowed << ") " << setting.help << '\n';
}

}  // namespace

void print_policies(std::ostream& out) {
  for (const kvpare::Recipe& recipe : kvpare::known_recipes()) {
    out << recipe.name << ": " << recipe.summary << '\n';
    if (!recipe.source.empty()) out << "  source: " << recipe.source << '\n';
    if (recipe.has_settings) print_settings(out, kvpare::settings_of(recipe.compressor));
    out << '\n';
  }
  out << "precisions, alone or joined to one of the above, as in \"snap_kv(keep=0.2) + kivi(bits=4)\"\n\n";
  for (const kvpare::PrecisionRecipe& recipe : kvpare::known_precisions()) {
    out << recipe.name << ": " << recipe.summary << '\n';
    if (!recipe.source.empty()) out << "  source: " << recipe.source << '\n';
    out << "  alone it goes with: " << recipe.base << '\n';
    print_settings(out, kvpare::settings_of(recipe.precision));
    out << '\n';
  }
}

}  // namespace example
