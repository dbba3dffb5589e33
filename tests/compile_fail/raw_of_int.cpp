// expect: is_element
#include <kvpare/codec/raw.hpp>

kvpare::Raw<int> rows;
