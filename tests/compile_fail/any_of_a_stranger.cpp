// expect: AnyOf<kvpare::Random, kvpare::SinksAndRecent>
#include <kvpare/policy/score/elite_window.hpp>
#include <kvpare/policy/score/unobserved.hpp>
#include <kvpare/runtime/any.hpp>

using Choice = kvpare::AnyOf<kvpare::Random, kvpare::SinksAndRecent>;
Choice scorer(kvpare::EliteWindow{});
