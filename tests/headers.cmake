# Tests of the headers themselves: include direction, and each compiled alone with every compiler at hand.
set(include_dir ${PROJECT_SOURCE_DIR}/include)
file(GLOB_RECURSE headers CONFIGURE_DEPENDS ${include_dir}/kvpare/*.hpp)

# The floors, before any test is built, and as a test.
set(floors ${CMAKE_COMMAND} -D INCLUDE_DIR=${include_dir} -P ${PROJECT_SOURCE_DIR}/cmake/floors.cmake)
add_custom_target(kvpare_floors ALL COMMAND ${floors} VERBATIM)
add_test(NAME headers.floors COMMAND ${floors})
add_test(NAME headers.floors_selftest
         COMMAND ${CMAKE_COMMAND} -D FLOORS=${PROJECT_SOURCE_DIR}/cmake/floors.cmake
                 -D SCRATCH=${CMAKE_CURRENT_BINARY_DIR}/floors_selftest -P ${CMAKE_CURRENT_SOURCE_DIR}/floors_selftest.cmake)

# Every header alone, as C++. Twice included, so that a missing guard is found too. .inl files are parts of headers.
set(sources)
foreach(header IN LISTS headers)
  cmake_path(RELATIVE_PATH header BASE_DIRECTORY ${include_dir})
  set(source ${CMAKE_CURRENT_BINARY_DIR}/headers/${header}.cpp)
  file(CONFIGURE OUTPUT ${source} CONTENT "#include <${header}>\n#include <${header}>\n")
  list(APPEND sources ${source})
endforeach()
if(sources)
  add_library(kvpare_headers OBJECT ${sources})
  kvpare_program(kvpare_headers)
  target_compile_options(kvpare_headers PRIVATE -O0)
  add_dependencies(kvpare_headers kvpare_floors)
endif()

# kvpare_include_flags: -I and -isystem flags for compilers that CMake does not drive here.
set(eigen_dirs $<TARGET_PROPERTY:Eigen3::Eigen,INTERFACE_INCLUDE_DIRECTORIES>)
set(kvpare_include_flags -I${include_dir} "$<$<BOOL:${eigen_dirs}>:-isystem$<JOIN:${eigen_dirs},$<SEMICOLON>-isystem>>")

if(NOT EXISTS ${include_dir}/kvpare/kvpare.hpp)
  return()
endif()

# The whole library, in g++ and clang++ alike, with and without exceptions. The compiler of the build comes first; the
# other one is taken where it is found.
set(umbrella ${CMAKE_CURRENT_BINARY_DIR}/headers/kvpare/kvpare.hpp.cpp)
find_program(KVPARE_GXX g++)
find_program(KVPARE_CLANGXX clang++)
mark_as_advanced(KVPARE_GXX KVPARE_CLANGXX)
foreach(compiler IN ITEMS gxx clangxx)
  string(TOUPPER ${compiler} upper)
  set(program ${KVPARE_${upper}})
  if(program)
    foreach(exceptions IN ITEMS exceptions no-exceptions)
      add_test(NAME headers.${compiler}.${exceptions}
               COMMAND ${program} -std=c++20 -fsyntax-only -Wall -Wextra -Werror $<$<STREQUAL:${compiler},gxx>:-Wno-psabi>
                       -f${exceptions} ${kvpare_include_flags} ${umbrella} COMMAND_EXPAND_LISTS)
    endforeach()
  endif()
endforeach()
