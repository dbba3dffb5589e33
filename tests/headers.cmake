# Tests of the headers themselves: include direction, and each compiled alone with every compiler at hand.
set(include_dir ${PROJECT_SOURCE_DIR}/include)
file(GLOB_RECURSE headers CONFIGURE_DEPENDS ${include_dir}/kvpare/*.hpp)
file(GLOB_RECURSE cuda_headers CONFIGURE_DEPENDS ${include_dir}/kvpare/*.cuh)

# The floors, before any test is built, and as a test.
set(floors ${CMAKE_COMMAND} -D INCLUDE_DIR=${include_dir} -P ${PROJECT_SOURCE_DIR}/cmake/floors.cmake)
add_custom_target(kvpare_floors ALL COMMAND ${floors} COMMENT "Checking which header includes which" VERBATIM)
add_test(NAME headers.floors COMMAND ${floors})
add_test(NAME headers.floors_selftest
         COMMAND ${CMAKE_COMMAND} -D FLOORS=${PROJECT_SOURCE_DIR}/cmake/floors.cmake
                 -D SCRATCH=${CMAKE_CURRENT_BINARY_DIR}/floors_selftest -P ${CMAKE_CURRENT_SOURCE_DIR}/floors_selftest.cmake)

# A .cuh is C++ but for what it has for nvcc only.
set(nvcc_headers)
foreach(header IN LISTS cuda_headers)
  file(STRINGS ${header} for_nvcc REGEX "__CUDACC__" LIMIT_COUNT 1)
  if(for_nvcc)
    list(APPEND nvcc_headers ${header})
  endif()
endforeach()
set(plain_headers ${headers} ${cuda_headers})
list(REMOVE_ITEM plain_headers ${nvcc_headers})

# Every header alone, as C++. Twice included, so that a missing guard is found too. .inl files are parts of headers.
#
# A file each would parse the same over and over. After headers that it includes itself a header is as alone as without them, so one
# file takes a chain: the first is in the second, the second in the third (and not the other way round, as parts of one class may
# be); half the time of a file each.
function(kvpare_headers_within header out)  # what it includes of ours, however deep
  set(all ${header})
  list(LENGTH all count)
  set(at 0)
  while(at LESS count)
    list(GET all ${at} here)
    file(STRINGS ${here} lines REGEX "^#include \"")
    cmake_path(GET here PARENT_PATH folder)
    foreach(line IN LISTS lines)
      string(REGEX REPLACE "^#include \"([^\"]+)\".*" "\\1" included ${line})
      cmake_path(ABSOLUTE_PATH included BASE_DIRECTORY ${folder} NORMALIZE)
      if(NOT included IN_LIST all)
        list(APPEND all ${included})
      endif()
    endforeach()
    list(LENGTH all count)
    math(EXPR at "${at} + 1")
  endwhile()
  set(${out} ${all} PARENT_SCOPE)
endfunction()

set(by_depth)
foreach(header IN LISTS plain_headers)
  kvpare_headers_within(${header} within_${header})
  list(LENGTH within_${header} depth)
  list(APPEND by_depth "${depth} ${header}")
endforeach()
list(SORT by_depth COMPARE NATURAL ORDER DESCENDING)
list(TRANSFORM by_depth REPLACE "^[0-9]+ " "")
set(sources)
while(by_depth)
  list(POP_FRONT by_depth last)
  cmake_path(RELATIVE_PATH last BASE_DIRECTORY ${include_dir} OUTPUT_VARIABLE name)
  set(source ${CMAKE_CURRENT_BINARY_DIR}/headers/${name}.cpp)
  set(text "#include <${name}>\n#include <${name}>\n")
  foreach(header IN LISTS by_depth)
    if(header IN_LIST within_${last} AND NOT last IN_LIST within_${header})
      cmake_path(RELATIVE_PATH header BASE_DIRECTORY ${include_dir} OUTPUT_VARIABLE name)
      string(PREPEND text "#include <${name}>\n#include <${name}>\n")
      list(REMOVE_ITEM by_depth ${header})
      set(last ${header})
    endif()
  endforeach()
  file(CONFIGURE OUTPUT ${source} CONTENT "${text}")
  list(APPEND sources ${source})
endwhile()
add_library(kvpare_headers OBJECT ${sources})
kvpare_program(kvpare_headers)
target_compile_options(kvpare_headers PRIVATE -O0)
add_dependencies(kvpare_headers kvpare_floors)

# kvpare_include_flags: what compilers that CMake does not drive need to find the headers and Eigen.
get_target_property(eigen_include_dirs Eigen3::Eigen INTERFACE_INCLUDE_DIRECTORIES)
list(TRANSFORM eigen_include_dirs PREPEND "-isystem;" OUTPUT_VARIABLE eigen_flags)
set(kvpare_include_flags -I${include_dir} ${eigen_flags})

# As CUDA, where there is an nvcc that accepts this C++ compiler: all headers in one file (that each stands alone is seen
# above), and those with parts for nvcc alone.
find_program(KVPARE_NVCC nvcc HINTS /usr/local/cuda/bin ENV CUDA_PATH PATH_SUFFIXES bin)
mark_as_advanced(KVPARE_NVCC)
if(KVPARE_NVCC)
  # -diag-suppress 20012: Eigen's annotations on defaulted functions.
  set(kvpare_nvcc_flags --expt-relaxed-constexpr -diag-suppress 20012 -ccbin ${CMAKE_CXX_COMPILER})
  set(nvcc ${KVPARE_NVCC} -std=c++20 -arch=sm_90 ${kvpare_nvcc_flags})
  file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/headers/empty.cu CONTENT "int main() {}\n")
  execute_process(COMMAND ${nvcc} -c empty.cu -o empty.o WORKING_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/headers
                  RESULT_VARIABLE code OUTPUT_QUIET ERROR_QUIET)
  if(code EQUAL 0)
    set(includes)
    foreach(header IN LISTS headers cuda_headers)
      cmake_path(RELATIVE_PATH header BASE_DIRECTORY ${include_dir})
      string(APPEND includes "#include <${header}>\n")
    endforeach()
    file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/headers/all.cu CONTENT "${includes}")
    set(sources all.cu)
    foreach(header IN LISTS nvcc_headers)
      cmake_path(RELATIVE_PATH header BASE_DIRECTORY ${include_dir})
      file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/headers/${header}.cu
           CONTENT "#include <${header}>\n#include <${header}>\n")
      list(APPEND sources ${header}.cu)
    endforeach()
    set(objects)
    foreach(source IN LISTS sources)
      set(file ${CMAKE_CURRENT_BINARY_DIR}/headers/${source})
      set(stage -c)
      if(NOT source STREQUAL all.cu)
        set(stage -ptx)  # that nothing is missing
      endif()
      add_custom_command(OUTPUT ${file}.o COMMAND ${nvcc} ${kvpare_include_flags} -MD -MF ${file}.d ${stage} ${file} -o ${file}.o
                         DEPENDS ${file} DEPFILE ${file}.d COMMENT "Compiling headers as CUDA: ${source}"
                         COMMAND_EXPAND_LISTS VERBATIM)
      list(APPEND objects ${file}.o)
    endforeach()
    # What kernels call, as device code only. That a kernel reaches a host function is a warning to nvcc.
    set(source ${CMAKE_CURRENT_SOURCE_DIR}/cuda/device_code.cu)
    set(file ${CMAKE_CURRENT_BINARY_DIR}/headers/device_code.cubin)
    add_custom_command(OUTPUT ${file} COMMAND ${nvcc} ${kvpare_include_flags} -Werror all-warnings -Xptxas -O0
                                              -MD -MF ${file}.d -cubin ${source} -o ${file}
                       DEPENDS ${source} DEPFILE ${file}.d
                       COMMENT "Compiling what kernels call" COMMAND_EXPAND_LISTS VERBATIM)
    list(APPEND objects ${file})
    add_custom_target(kvpare_headers_cuda ALL DEPENDS ${objects})
    add_dependencies(kvpare_headers_cuda kvpare_floors)
    include(cuda/matrix.cmake)
  else()
    message(STATUS "kvpare: ${KVPARE_NVCC} does not work with ${CMAKE_CXX_COMPILER}, headers are not compiled as CUDA")
  endif()
endif()

# The whole library by g++ without exceptions and by clang++ with them, whichever are found.
set(umbrella ${CMAKE_CURRENT_BINARY_DIR}/headers/umbrella.cpp)
file(CONFIGURE OUTPUT ${umbrella} CONTENT "#include <kvpare/kvpare.hpp>\n")
foreach(how IN ITEMS "g++;no-exceptions" "clang++;exceptions")
  list(GET how 0 compiler)
  list(GET how 1 exceptions)
  find_program(KVPARE_${compiler} ${compiler})
  mark_as_advanced(KVPARE_${compiler})
  if(KVPARE_${compiler})
    add_test(NAME headers.${compiler}.${exceptions}
             COMMAND ${KVPARE_${compiler}} -std=c++20 -fsyntax-only -Wall -Wextra -Werror -Wno-psabi -f${exceptions}
                     ${kvpare_include_flags} ${umbrella} COMMAND_EXPAND_LISTS)
  endif()
endforeach()
