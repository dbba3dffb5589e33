# What kvpare needs from outside, in one table, and how it is found.
#
#   kvpare_dependency(<name>)   in CMakeLists.txt: the installed package, else its sources by version and hash.
#                               Never installs anything.
#
# cmake/test.cmake and cmake/demo.cmake read the same table, and may ask the system's package manager (steps.cmake).
include_guard(GLOBAL)

# kvpare_describe(<name> FOR <scripts> ...) is one row of the table:
#   FOR      the scripts that need it: test, demo
#   VERSION  the oldest version that serves
#   TARGET   what to link
#   URL      the sources, checked against SHA256
#   HEADERS  for header-only packages: the folder of the sources to include; nothing of their build is run
#   CACHE    for others: settings of their build, as name=value
#   PROGRAM  instead of the above: a program, wanted for the reason in WHY
#   APT, DNF, PACMAN, ZYPPER, APK, BREW   its name there
function(kvpare_describe name)
  set_property(GLOBAL APPEND PROPERTY KVPARE_DEPENDENCIES ${name})
  set_property(GLOBAL PROPERTY KVPARE_DEPENDENCY_${name} "${ARGN}")
endfunction()

# kvpare_row(<name>) sets row_FOR, row_VERSION, ... for the caller.
macro(kvpare_row name)
  get_property(kvpare_columns GLOBAL PROPERTY KVPARE_DEPENDENCY_${name})
  cmake_parse_arguments(row "" "VERSION;TARGET;URL;SHA256;HEADERS;PROGRAM;WHY;APT;DNF;PACMAN;ZYPPER;APK;BREW" "FOR;CACHE"
                        ${kvpare_columns})
endmacro()

kvpare_describe(Eigen3 FOR test demo VERSION 3.4 TARGET Eigen3::Eigen
  URL https://gitlab.com/libeigen/eigen/-/archive/3.4.0/eigen-3.4.0.tar.bz2
  SHA256 b4c198460eba6f28d34894e3a5710998818515104d6e74e5cc331ce31e46e626
  HEADERS .
  APT libeigen3-dev DNF eigen3-devel PACMAN eigen ZYPPER eigen3-devel APK eigen-dev BREW eigen)

kvpare_describe(GTest FOR test VERSION 1.11 TARGET GTest::gtest_main
  URL https://github.com/google/googletest/archive/refs/tags/release-1.12.1.tar.gz
  SHA256 81964fe578e9bd7c94dfdb09c8e4d6e6759e19967e397dbea48d1c10e45d0df2
  CACHE INSTALL_GTEST=OFF BUILD_GMOCK=OFF
  APT libgtest-dev DNF gtest-devel PACMAN gtest ZYPPER googletest-devel APK gtest-dev BREW googletest)

kvpare_describe(benchmark FOR test VERSION 1.6 TARGET benchmark::benchmark
  URL https://github.com/google/benchmark/archive/refs/tags/v1.7.1.tar.gz
  SHA256 6430e4092653380d9dc4ccb45a1e2dc9259d581f4866dc0759713126056bc1d7
  CACHE BENCHMARK_ENABLE_TESTING=OFF BENCHMARK_ENABLE_INSTALL=OFF BENCHMARK_ENABLE_WERROR=OFF
  APT libbenchmark-dev DNF google-benchmark-devel PACMAN benchmark ZYPPER benchmark-devel APK benchmark-dev
  BREW google-benchmark)

kvpare_describe(CLI11 FOR test demo VERSION 2.1 TARGET CLI11::CLI11
  URL https://github.com/CLIUtils/CLI11/archive/refs/tags/v2.3.2.tar.gz
  SHA256 aac0ab42108131ac5d3344a9db0fdf25c4db652296641955720a4fbe52334e22
  HEADERS include
  APT libcli11-dev DNF cli11-devel PACMAN cli11 ZYPPER cli11-devel APK cli11-dev BREW cli11)

kvpare_describe(nlohmann_json FOR test demo VERSION 3.9 TARGET nlohmann_json::nlohmann_json
  URL https://github.com/nlohmann/json/archive/refs/tags/v3.11.2.tar.gz
  SHA256 d69f9deb6a75e2580465c6c4c5111b89c4dc2fa94e3a85fcd2ffcd9a143d9273
  HEADERS include
  APT nlohmann-json3-dev DNF json-devel PACMAN nlohmann-json ZYPPER nlohmann_json-devel APK nlohmann-json
  BREW nlohmann-json)

kvpare_describe(gnuplot FOR demo PROGRAM gnuplot WHY "pictures are drawn with it, the numbers do not need it"
  APT gnuplot-nox DNF gnuplot PACMAN gnuplot ZYPPER gnuplot APK gnuplot BREW gnuplot)

kvpare_describe(ninja PROGRAM ninja WHY "it builds, make serves too"
  APT ninja-build DNF ninja-build PACMAN ninja ZYPPER ninja APK samurai BREW ninja)

function(kvpare_dependency name)
  kvpare_row(${name})
  if(TARGET ${row_TARGET})
    return()
  endif()
  find_package(${name} ${row_VERSION} QUIET GLOBAL)
  if(TARGET ${row_TARGET})
    message(STATUS "kvpare: ${name} ${${name}_VERSION}, installed")
    return()
  endif()

  message(STATUS "kvpare: ${name} is not installed, fetching ${row_URL}")
  include(FetchContent)
  if(row_HEADERS)  # a folder that is not there keeps FetchContent from running their build
    FetchContent_Declare(${name} URL ${row_URL} URL_HASH SHA256=${row_SHA256} SOURCE_SUBDIR none
                         DOWNLOAD_EXTRACT_TIMESTAMP OFF)
    FetchContent_MakeAvailable(${name})
    FetchContent_GetProperties(${name} SOURCE_DIR sources)
    add_library(${row_TARGET} INTERFACE IMPORTED GLOBAL)
    target_include_directories(${row_TARGET} SYSTEM INTERFACE ${sources}/${row_HEADERS})
  else()
    foreach(setting IN LISTS row_CACHE)
      string(REGEX MATCH "^(.*)=(.*)$" _ ${setting})
      set(${CMAKE_MATCH_1} ${CMAKE_MATCH_2} CACHE INTERNAL "set by kvpare")
    endforeach()
    FetchContent_Declare(${name} URL ${row_URL} URL_HASH SHA256=${row_SHA256} SYSTEM DOWNLOAD_EXTRACT_TIMESTAMP OFF)
    FetchContent_MakeAvailable(${name})
  endif()
endfunction()
