# Fetches the model that examples/story is shown with, stories260K (1 MB), from its author's public place:
#
#   cmake [-D DIR=<folder>] [-D URL=<where the two files are>] -P cmake/get_story_model.cmake
#
# DIR is build/story unless given. What is not byte for byte the expected file is refused and not kept.
cmake_minimum_required(VERSION 3.25)

cmake_path(GET CMAKE_CURRENT_LIST_DIR PARENT_PATH source)
if(NOT DIR)
  set(DIR ${source}/build/story)
endif()
cmake_path(ABSOLUTE_PATH DIR)
if(NOT URL)
  set(URL https://huggingface.co/karpathy/tinyllamas/resolve/main/stories260K)
endif()

function(get_file name sha256)
  set(file ${DIR}/${name})
  if(EXISTS ${file})
    file(SHA256 ${file} found)
    if(found STREQUAL sha256)
      message(STATUS "${file} is there")
      return()
    endif()
  endif()
  message(STATUS "fetching ${URL}/${name}")
  file(DOWNLOAD ${URL}/${name} ${file}.part STATUS status)
  list(POP_FRONT status code)
  if(NOT code EQUAL 0)
    file(REMOVE ${file}.part)
    message(FATAL_ERROR "${URL}/${name} could not be fetched: ${status}")
  endif()
  file(SHA256 ${file}.part found)
  if(NOT found STREQUAL sha256)
    file(REMOVE ${file}.part)
    message(FATAL_ERROR "${URL}/${name} is not the expected file: its SHA256 is ${found}, must be ${sha256}")
  endif()
  file(RENAME ${file}.part ${file})
endfunction()

get_file(stories260K.bin b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696)
get_file(tok512.bin 037cb335abb25d1fa9e8ecae30ed2a3a8ace9302862ebcdc05d51a6bbb10c312)
message(STATUS "try:  build/release/bin/kvpare_story --model ${DIR}/stories260K.bin --tokenizer ${DIR}/tok512.bin "
               "--prompt \"Once upon a time\"")
