# The README's first program is examples/01_first_run.cpp, and its output is what the program prints:
#   cmake -DREADME=<file> -DSOURCE=<file> -DPROGRAM=<executable> -P readme.cmake
file(READ ${README} readme)
file(READ ${SOURCE} source)
execute_process(COMMAND ${PROGRAM} OUTPUT_VARIABLE output COMMAND_ERROR_IS_FATAL ANY)

function(expect_block what content)
  string(FIND "${readme}" "${content}" at)
  if(at EQUAL -1)
    message(FATAL_ERROR "README.md does not show ${what} as it is:\n${content}")
  endif()
endfunction()
expect_block("the source of examples/01_first_run.cpp" "```cpp\n${source}```\n")
expect_block("what examples/01_first_run.cpp prints" "```\n${output}```\n")
