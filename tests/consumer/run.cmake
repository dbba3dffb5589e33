# Configures the project SOURCE with ARGS into a fresh BUILD, builds it, and runs its program.
cmake_minimum_required(VERSION 3.25)

file(REMOVE_RECURSE ${BUILD})
foreach(step IN ITEMS "${CMAKE_COMMAND};-S;${SOURCE};-B;${BUILD};${ARGS}" "${CMAKE_COMMAND};--build;${BUILD}" "${BUILD}/consumer")
  execute_process(COMMAND ${step} RESULT_VARIABLE code)
  if(NOT code EQUAL 0)
    message(FATAL_ERROR "failed: ${step}")
  endif()
endforeach()
