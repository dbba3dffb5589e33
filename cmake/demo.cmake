# Configures, builds and runs the main job, examples/vlm, on all policies:  cmake -P cmake/demo.cmake
# steps.cmake says how missing dependencies are found, and which environment variables are read.
cmake_minimum_required(VERSION 3.25)
include(${CMAKE_CURRENT_LIST_DIR}/steps.cmake)

# ---- The main job: its program, and what it is given. ----
set(demo_program kvpare_vlm)
set(demo_arguments --demo)
# ----------------------------------------------------------

kvpare_prepare(demo)
if(EXISTS ${KVPARE_BUILD}/CMakeCache.txt)
  kvpare_configure(KVPARE_BUILD_EXAMPLES=ON)
else()
  kvpare_configure(KVPARE_BUILD_EXAMPLES=ON KVPARE_BUILD_TESTS=OFF KVPARE_BUILD_BENCH=OFF)
endif()
kvpare_build(${demo_program})
kvpare_step("running ${demo_program}" ${KVPARE_BUILD}/bin/${demo_program} ${demo_arguments})
kvpare_say("${demo_program} ran through, its output is in ${kvpare_log}")
