# Compiles FILE with COMPILER and FLAGS; it must fail, and say the sentence of the file's first line.
cmake_minimum_required(VERSION 3.25)

function(fail text)  # printed plainly: an error message of CMake breaks long lines
  message("${text}")
  message(FATAL_ERROR "failed")
endfunction()

file(STRINGS ${FILE} first LIMIT_COUNT 1)
if(NOT first MATCHES "^// expect: (.+)$")
  fail("${FILE}: the first line must be `// expect: <sentence>`")
endif()
set(sentence "${CMAKE_MATCH_1}")

separate_arguments(FLAGS UNIX_COMMAND "${FLAGS}")
execute_process(COMMAND ${COMPILER} -std=c++20 -fsyntax-only ${FLAGS} ${FILE} RESULT_VARIABLE code
                OUTPUT_VARIABLE said ERROR_VARIABLE said)
if(code EQUAL 0)
  fail("${FILE} compiles, but must not")
endif()
string(FIND "${said}" "${sentence}" at)
if(at EQUAL -1)
  fail("${FILE} fails, but not with the sentence\n  ${sentence}\nThe compiler said:\n${said}")
endif()
message("refused, as it should be: ${sentence}")
