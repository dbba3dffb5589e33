#include "policies.hpp"

#include <kvpare/runtime/make_compressor.hpp>

namespace example {

void print_policies(std::ostream& out) {
  for (const kvpare::Recipe& recipe : kvpare::known_recipes()) {
    out << recipe.name << ": " << recipe.summary << '\n';
    if (!recipe.source.empty()) out << "  source: " << recipe.source << '\n';
    if (recipe.has_settings)
      for (const kvpare::SettingText& setting : kvpare::settings_of(recipe.compressor))
        out << "  " << setting.name << " = " << setting.value << "  (" << setting.allowed << ") " << setting.help
            << '\n';
    out << '\n';
  }
}

}  // namespace example
