# How our own programs (tests, benchmarks, examples) are compiled. Nothing here reaches a user of kvpare::kvpare.
#
#   kvpare_program(target)   gives a target of ours the library, the warnings and the sanitizers

if(PROJECT_IS_TOP_LEVEL)
  set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
  set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
  set(CMAKE_CXX_EXTENSIONS OFF)
  if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
    set(CMAKE_BUILD_TYPE Release CACHE STRING "Release, Debug, RelWithDebInfo or MinSizeRel" FORCE)
  endif()
endif()

# Warnings are errors where we know them all: in our own builds, with the compilers that we build with. A newer compiler
# has newer warnings; it shows them and goes on.
set(kvpare_known_compiler OFF)
if((CMAKE_CXX_COMPILER_ID STREQUAL GNU AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13) OR
   (CMAKE_CXX_COMPILER_ID STREQUAL Clang AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 15))
  set(kvpare_known_compiler ${PROJECT_IS_TOP_LEVEL})
endif()
option(KVPARE_WERROR "Treat warnings in kvpare's own programs as errors" ${kvpare_known_compiler})
set(KVPARE_SANITIZE "" CACHE STRING "Sanitizers for kvpare's own programs, e.g. address,undefined or thread")

add_library(kvpare_settings INTERFACE)
target_link_libraries(kvpare_settings INTERFACE kvpare::kvpare)
# -Wno-psabi: passing 32-byte vectors by value is fine inside one program, g++ notes an ABI change of its version 4.6.
target_compile_options(kvpare_settings INTERFACE -Wall -Wextra -Wpedantic -Wshadow $<$<CXX_COMPILER_ID:GNU>:-Wno-psabi>)
if(KVPARE_WERROR)
  target_compile_options(kvpare_settings INTERFACE -Werror)
endif()
if(KVPARE_SANITIZE)
  set(sanitize_flags -fsanitize=${KVPARE_SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer)
  target_compile_options(kvpare_settings INTERFACE ${sanitize_flags})
  target_link_options(kvpare_settings INTERFACE ${sanitize_flags})
  # g++ 12 warns of its own _mm512_undefined_epi32, where sanitizers keep it from seeing through it.
  target_compile_options(kvpare_settings INTERFACE $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)
endif()

# The loops are compiled once for all programs; where few are built (threads, fuzzing) each compiles what it uses.
set(kvpare_compiled_loops)
if(NOT KVPARE_SANITIZE MATCHES thread AND NOT KVPARE_FUZZ)
  include(${CMAKE_CURRENT_LIST_DIR}/loops.cmake)
  target_link_libraries(kvpare_loops PRIVATE kvpare_settings)
  if(KVPARE_SANITIZE)  # of the address sanitizer alone: a file of them takes 50 s unoptimised, 180 s at -O1 (loops/5.cpp, g++ 12)
    target_compile_options(kvpare_loops PRIVATE -O0 -fno-sanitize=undefined)
  endif()
  set(kvpare_compiled_loops kvpare_loops)
endif()

function(kvpare_program target)
  target_link_libraries(${target} PRIVATE kvpare_settings ${kvpare_compiled_loops})
endfunction()

# What tests are compiled with instead: of a release build, and, where they take long, with sanitizers (tests/CMakeLists.txt).
set(kvpare_release $<AND:$<CONFIG:Release>,$<CXX_COMPILER_ID:GNU,Clang>>)
set(kvpare_test_options $<${kvpare_release}:-O0>)
set(kvpare_optimised_test_options $<${kvpare_release}:-O1>)
if(KVPARE_SANITIZE)
  set(kvpare_optimised_test_options -O1)
endif()
