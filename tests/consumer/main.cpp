// The smallest program of a project that uses kvpare.
#include <cstdio>
#include <kvpare/kvpare.hpp>

int main() {
  std::printf("kvpare %d.%d.%d\n", KVPARE_VERSION_MAJOR, KVPARE_VERSION_MINOR, KVPARE_VERSION_PATCH);
  return 0;
}
