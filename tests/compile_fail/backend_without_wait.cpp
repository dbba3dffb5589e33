// expect: be.wait(
#include <kvpare/backend/cpu/backend.hpp>

struct Impatient : kvpare::cpu::Backend {
  void wait(Ticket) = delete;
};

static_assert(kvpare::Backend<Impatient>);
