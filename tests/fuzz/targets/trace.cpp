// Safetensors files and traces of attention: refused in words, or read, and then written and read again as the same.
#include <kvpare/core/shape.hpp>

#include "fuzz/target.hpp"
#include "support/safetensors.hpp"
#include "support/trace.hpp"

using namespace example;
using kvpare::test::must;

namespace {

void check_written_again(const Safetensors& file) {
  SafetensorsWriter writer;
  writer.metadata = file.metadata();
  for (const auto& [name, array] : file.arrays()) writer.add(name, array.dtype, array.shape, file.raw(name));
  const Safetensors again = Safetensors::parse(writer.bytes(), "again");
  must(again.metadata() == file.metadata() && again.arrays().size() == file.arrays().size(),
       "texts or arrays were lost");
  for (const auto& [name, array] : file.arrays()) {
    const Safetensors::Array& copy = again.array(name);
    const auto before = file.raw(name), after = again.raw(name);
    must(copy.dtype == array.dtype && copy.shape == array.shape &&
             std::equal(before.begin(), before.end(), after.begin(), after.end()),
         "array '" + name + "' came back as another");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const Safetensors file = Safetensors::parse(std::string(reinterpret_cast<const char*>(data), size), "input");
    check_written_again(file);
    const Trace trace = parse_trace(file);
    const Trace again = parse_trace(Safetensors::parse(print_trace(trace, "trace"), "again"));
    must(again == trace, "a trace came back as another");
    kvpare::check(trace.model());
  } catch (const BadFile& e) {
    must(std::string(e.what()).size() > std::string("input: ").size(), "a refusal says nothing");
  }
  return 0;
}
