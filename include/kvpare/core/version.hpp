#pragma once
/// The version of the library. The only place where it is written: CMake reads these three lines.

#define KVPARE_VERSION_MAJOR 0
#define KVPARE_VERSION_MINOR 1
#define KVPARE_VERSION_PATCH 0
