// expect: a cache needs at least one page format, e.g. Formats<Pair<Raw<half>, Raw<half>>>
#include <kvpare/codec/raw.hpp>

kvpare::Formats<> nothing;
