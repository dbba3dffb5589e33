# Enforces which header may include which: cmake [-D INCLUDE_DIR=<folder that holds kvpare/>] -P cmake/floors.cmake
#
# A header includes its own folder or a lower floor; backend/cpu and backend/cuda never include each other; the headers
# directly under kvpare/ may include all. From outside: the standard library and Eigen, and CUDA under backend/cuda only.
cmake_minimum_required(VERSION 3.25)

set(floors core codec cache backend policy pipeline runtime)  # lowest first
list(JOIN floors " < " ascending)
set(std_headers "^(algorithm|any|array|atomic|barrier|bit|bitset|cassert|cctype|cerrno|cfenv|cfloat|charconv|chrono|cinttypes\
|climits|cmath|compare|complex|concepts|condition_variable|csetjmp|csignal|cstdarg|cstddef|cstdint|cstdio|cstdlib|cstring\
|ctime|cuchar|deque|exception|execution|filesystem|format|forward_list|fstream|functional|future|initializer_list|iomanip|ios\
|iosfwd|iostream|istream|iterator|latch|limits|list|locale|map|memory|memory_resource|mutex|new|numbers|numeric|optional\
|ostream|queue|random|ranges|ratio|regex|scoped_allocator|semaphore|set|shared_mutex|source_location|span|sstream|stack\
|stdexcept|stop_token|streambuf|string|string_view|syncstream|system_error|thread|tuple|type_traits|typeindex|typeinfo\
|unordered_map|unordered_set|utility|valarray|variant|vector|version)$")
# Instruction sets and system calls: only backend/cpu may ask for them.
set(machine_headers "^(immintrin|arm_neon|arm_sve|cpuid|sys/auxv|asm/hwcap|sys/mman)\\.h$")
set(cuda_headers "^(cuda(_[a-z0-9_]+)?(\\.h|\\.hpp)?|cuda/.+|cub/.+|thrust/.+|mma\\.h|device_launch_parameters\\.h|nv/.+)$")

if(NOT INCLUDE_DIR)
  cmake_path(SET INCLUDE_DIR NORMALIZE ${CMAKE_CURRENT_LIST_DIR}/../include)
endif()
file(GLOB_RECURSE headers RELATIVE ${INCLUDE_DIR} ${INCLUDE_DIR}/kvpare/*.hpp ${INCLUDE_DIR}/kvpare/*.cuh
     ${INCLUDE_DIR}/kvpare/*.inl)
set(broken 0)
if(NOT headers)
  message(FATAL_ERROR "floors: no headers under ${INCLUDE_DIR}/kvpare")
endif()

macro(complain rule)
  message("${INCLUDE_DIR}/${header}:${number}: ${rule}")
  math(EXPR broken "${broken} + 1")
endmacro()

foreach(header IN LISTS headers)
  string(REGEX MATCH "^kvpare/([a-z]+)/(cpu/|cuda/)?" _ ${header})
  set(own_folder "${CMAKE_MATCH_1}")
  set(own_side "${CMAKE_MATCH_2}")
  list(FIND floors "${own_folder}" own_floor)
  if(own_folder AND own_floor EQUAL -1)
    set(number 1)
    complain("there is no floor '${own_folder}'; known: ${ascending}")
    continue()
  endif()

  # One list element per line; what would disturb a list has no place in an include.
  file(READ ${INCLUDE_DIR}/${header} text)
  string(REGEX REPLACE "[][;\\]" "" text "${text}")
  string(REPLACE "\n" ";" lines "${text}")
  set(number 0)
  foreach(line IN LISTS lines)
    math(EXPR number "${number} + 1")
    if(own_side STREQUAL "cuda/" AND line MATCHES "std::(popcount|count[lr]_|bit_width|has_single_bit|rot[lr])")
      complain("std::${CMAKE_MATCH_1} is wrong in device code, see core/bits.hpp")
    endif()
    if(NOT line MATCHES "^[ \t]*#[ \t]*include[ \t]*([<\"])([^>\"]+)[>\"]")
      continue()
    endif()
    set(bracket "${CMAKE_MATCH_1}")
    set(included "${CMAKE_MATCH_2}")

    if(bracket STREQUAL "\"")  # relative to the file
      cmake_path(GET header PARENT_PATH here)
      cmake_path(APPEND here ${included} OUTPUT_VARIABLE included)
      cmake_path(NORMAL_PATH included)
    endif()

    if(included MATCHES "^kvpare/")
      if(NOT EXISTS ${INCLUDE_DIR}/${included})
        complain("<${included}> does not exist")
        continue()
      endif()
      if(NOT own_folder)
        continue()  # the headers directly under kvpare/
      endif()
      string(REGEX MATCH "^kvpare/([a-z]+)/(cpu/|cuda/)?" _ ${included})
      set(folder "${CMAKE_MATCH_1}")
      set(side "${CMAKE_MATCH_2}")
      list(FIND floors "${folder}" floor)
      if(NOT folder OR floor GREATER own_floor)
        complain("${own_folder} must not include <${included}>: only its own folder or lower floors (${ascending})")
      elseif(own_side AND side AND NOT own_side STREQUAL side)
        complain("backend/${own_side} and backend/${side} never include each other: <${included}>")
      endif()
    elseif(bracket STREQUAL "\"")
      complain("\"${included}\" is outside of kvpare/")
    elseif(included MATCHES "${cuda_headers}")
      if(NOT own_side STREQUAL "cuda/")
        complain("<${included}>: CUDA headers belong under backend/cuda only")
      endif()
    elseif(included MATCHES "${machine_headers}")
      if(NOT own_side STREQUAL "cpu/")
        complain("<${included}>: headers of one machine or system belong under backend/cpu only")
      endif()
    elseif(NOT included MATCHES "^Eigen/" AND NOT included MATCHES "${std_headers}")
      complain("<${included}>: headers include the standard library, Eigen and kvpare only")
    endif()
  endforeach()
endforeach()

list(LENGTH headers count)
if(broken)
  message(FATAL_ERROR "floors: ${broken} includes break the rules")
endif()
message("floors: ${count} headers keep the rules")
