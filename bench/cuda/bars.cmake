# What the CUDA benchmarks should reach, for cmake/gpu.cmake: of an H200, whose copies run at about 4.3 TB/s.
#
#   kvpare_describe_bar(<name> TITLE <text> REGEX <of benchmark names> COUNTER <name> OP <or =, less> MUST <number>
#                       AHEAD <number>)
#   KVPARE_BARS            all names
#   kvpare_bar(<name>)     sets bar_TITLE, bar_REGEX, … for the caller
#   kvpare_judge(<out> <value>)   of the bar set last: missed, met, ahead
set(KVPARE_BARS)

macro(kvpare_describe_bar name)
  list(APPEND KVPARE_BARS ${name})
  set(KVPARE_BAR_${name} "${ARGN}")
endmacro()
macro(kvpare_bar name)
  cmake_parse_arguments(bar "" "TITLE;REGEX;COUNTER;OP;MUST;AHEAD" "" ${KVPARE_BAR_${name}})
endmacro()
macro(kvpare_judge out value)
  set(${out} missed)
  foreach(level IN ITEMS MUST AHEAD)
    if((bar_OP STREQUAL "≥" AND NOT "${value}" LESS "${bar_${level}}") OR
       (bar_OP STREQUAL "≤" AND NOT "${value}" GREATER "${bar_${level}}"))
      if(level STREQUAL MUST)
        set(${out} met)
      elseif(${out} STREQUAL met)
        set(${out} ahead)
      endif()
    endif()
  endforeach()
endmacro()

set(llama "Q:32/H:8/D:128")
set(much "(B:64/N:(4096|32768|131072)|B:8/N:32768)")  # batch x context from 256k tokens
kvpare_describe_bar(bf16 TITLE "bf16 decode, batch 32 x 4k" REGEX "^attend/cuda/bfloat16/${llama}/B:32/N:4096$"
                    COUNTER of_copy OP "≥" MUST 0.90 AHEAD 0.94)
kvpare_describe_bar(int8 TITLE "8-bit decode, batch x context from 256k" REGEX "^attend/cuda/(int8|fp8_e4m3)/.*/${much}$"
                    COUNTER of_copy OP "≥" MUST 0.82 AHEAD 0.88)
kvpare_describe_bar(int4 TITLE "4-bit decode, the same" REGEX "^attend/cuda/(int4|int4_g32|nvfp4)/.*/${much}$"
                    COUNTER of_copy OP "≥" MUST 0.75 AHEAD 0.85)
kvpare_describe_bar(int2 TITLE "2-bit decode, the same" REGEX "^attend/cuda/(int2|kivi2)/.*/${much}$"
                    COUNTER of_copy OP "≥" MUST 0.50 AHEAD 0.70)
kvpare_describe_bar(ternary TITLE "ternary and 1-bit decode, the same" REGEX "^attend/cuda/(ternary|int1)/.*/${much}$"
                    COUNTER of_copy OP "≥" MUST 0.35 AHEAD 0.50)
kvpare_describe_bar(mixed TITLE "mixed formats, one launch, against the parts" REGEX "^attend_mixed/"
                    COUNTER of_parts OP "≤" MUST 1.15 AHEAD 1.08)
kvpare_describe_bar(one_long TITLE "one 128k sequence among 63 of 2k, against balanced" REGEX "^attend_one_long/"
                    COUNTER of_balanced OP "≤" MUST 1.15 AHEAD 1.08)
kvpare_describe_bar(small TITLE "batch 1 x 4k" REGEX "^attend/cuda/.*/${llama}/B:1/N:4096$"
                    COUNTER us OP "≤" MUST 8 AHEAD 6)
kvpare_describe_bar(fp8_32k TITLE "batch 1 x 32k, 8 bits" REGEX "^attend/cuda/(fp8_e4m3|int8)/${llama}/B:1/N:32768$"
                    COUNTER us OP "≤" MUST 24 AHEAD 20)
kvpare_describe_bar(int4_32k TITLE "batch 1 x 32k, int4" REGEX "^attend/cuda/int4/${llama}/B:1/N:32768$"
                    COUNTER us OP "≤" MUST 16 AHEAD 12.5)
kvpare_describe_bar(window TITLE "window scoring, 32 rows x 32k, lse given"
                    REGEX "^attention_mass/cuda/lse_given/.*N:32768/rows:32$" COUNTER us OP "≤" MUST 25 AHEAD 19)
kvpare_describe_bar(top TITLE "top-k, 64 rows x 32k, k 2048" REGEX "^select_top/cuda/float/rows:64/N:32768/k:2048$"
                    COUNTER us OP "≤" MUST 15 AHEAD 10)
kvpare_describe_bar(compact TITLE "compaction, all layers in one launch" REGEX "^compact/"
                    COUNTER of_copy OP "≥" MUST 0.80 AHEAD 0.90)
kvpare_describe_bar(encode TITLE "quantise and pack" REGEX "^encode/" COUNTER of_copy OP "≥" MUST 0.90 AHEAD 0.95)
kvpare_describe_bar(append TITLE "append, batch 64" REGEX "^append/" COUNTER us OP "≤" MUST 4 AHEAD 3)
