// For files that run the model on the CPU. Templates are instantiated once, in the .cpp of their name.
#pragma once

#include "decoder.hpp"
#include "support/formats.hpp"
