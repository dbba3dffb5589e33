# What a program of many files compiles once, as a static library: kvpare_loops. Programs link it and need not compile it in
# each file: the CPU's kernels and its attention loops over codes (include/kvpare/backend/cpu/fused/sets.hpp says how: 1 … 6),
# and the cache on the CPU (include/kvpare/compiled.hpp: 7).
set(kvpare_loop_files)
foreach(part RANGE 1 7)
  set(file ${CMAKE_CURRENT_BINARY_DIR}/loops/${part}.cpp)
  set(header compiled.hpp)
  if(part LESS 7)
    set(header backend/cpu/fused/sets.hpp)
  endif()
  file(CONFIGURE OUTPUT ${file} CONTENT
"#undef KVPARE_COMPILED_LOOPS
#define KVPARE_COMPILED_LOOPS ${part}
#include <kvpare/${header}>
#include <kvpare/backend/cpu/product.hpp>
")
  list(APPEND kvpare_loop_files ${file})
endforeach()
set(kvpare_cache_file ${file})
add_library(kvpare_loops STATIC ${kvpare_loop_files})
target_compile_definitions(kvpare_loops INTERFACE KVPARE_COMPILED_LOOPS=0)
