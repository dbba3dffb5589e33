# The kernels, dense products and the attention loops over codes compiled once, as a static library: kvpare_loops. Programs
# of many files link it and need not compile them in each (see include/kvpare/backend/cpu/fused/sets.hpp).
set(kvpare_loop_files)
foreach(set RANGE 1 6)
  set(file ${CMAKE_CURRENT_BINARY_DIR}/loops/${set}.cpp)
  file(CONFIGURE OUTPUT ${file} CONTENT
"#undef KVPARE_COMPILED_LOOPS
#define KVPARE_COMPILED_LOOPS ${set}
#include <kvpare/backend/cpu/fused/sets.hpp>
#include <kvpare/backend/cpu/product.hpp>
")
  list(APPEND kvpare_loop_files ${file})
endforeach()
add_library(kvpare_loops STATIC ${kvpare_loop_files})
target_compile_definitions(kvpare_loops INTERFACE KVPARE_COMPILED_LOOPS=0)
