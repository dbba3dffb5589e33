// expect: BasicTensor<void>
#include <kvpare/backend/arguments.hpp>

void mistake(kvpare::ConstTensor queries, kvpare::AttendSequence& s) {
  s.out = kvpare::Tensor{queries};
}
