// The policies that can be had by name, for people.
#pragma once

#include <ostream>

namespace example {

/// Every policy, then every precision, with its source and its settings: present value, what is allowed, what for.
void print_policies(std::ostream& out);

}  // namespace example
