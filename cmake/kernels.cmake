# Reads the kernel lists. A line `KERNEL(name, source, target)` is all that a kernel needs besides its own files.
# SPDX-License-Identifier: Apache-2.0

set(TCONV_FLAGS_portable "")
set(TCONV_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(TCONV_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c)
set(TCONV_FLAGS_avx512_bf16 ${TCONV_FLAGS_avx512} -mavx512bf16)
set(TCONV_FLAGS_avx512_amx ${TCONV_FLAGS_avx512_bf16} -mamx-tile -mamx-bf16)
# Sums may contract into FMAs, but nothing may assume the absence of NaN or reorder a sum: results are the same bits for
# every thread count, and NaN propagates.
set(TCONV_KERNEL_FLAGS -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math)
if(TCONV_SANITIZE)
  set(TCONV_KERNEL_FLAGS -O1 -ffp-contract=fast -fno-math-errno -fno-trapping-math)
endif()

# The lines of one list, as `name;source;target` triples in one flat list; empty when the file does not exist.
function(tconv_read_kernels file result)
  set(triples "")
  if(EXISTS ${file})
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${file})
    file(STRINGS ${file} lines REGEX "^KERNEL\\(")
    foreach(line IN LISTS lines)
      if(NOT line MATCHES "^KERNEL\\( *([a-z0-9_]+) *, *([a-z0-9_]+\\.[a-z]+) *, *([a-z0-9_]+) *\\)")
        message(FATAL_ERROR "${file}: expected KERNEL(name, source, target), got: ${line}")
      endif()
      list(APPEND triples ${CMAKE_MATCH_1} ${CMAKE_MATCH_2} ${CMAKE_MATCH_3})
    endforeach()
  endif()
  set(${result} ${triples} PARENT_SCOPE)
endfunction()

# One object library per line of src/cpu/kernels.def, in the order portable, avx2, avx512, avx512_bf16, avx512_amx.
function(tconv_cpu_kernels objects sources)
  tconv_read_kernels(${PROJECT_SOURCE_DIR}/src/cpu/kernels.def triples)
  set(targets portable)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
    list(APPEND targets avx2 avx512 avx512_bf16 avx512_amx)
  endif()
  foreach(target IN ITEMS portable avx2 avx512 avx512_bf16 avx512_amx)
    set(objects_${target} "")
  endforeach()
  set(all_sources "")
  while(triples)
    list(POP_FRONT triples name source target)
    if(NOT DEFINED TCONV_FLAGS_${target})
      message(FATAL_ERROR "src/cpu/kernels.def: ${name}: unknown target ${target}; known: portable avx2 avx512 avx512_bf16 avx512_amx")
    endif()
    list(APPEND all_sources ${PROJECT_SOURCE_DIR}/src/cpu/${source})
    if(NOT target IN_LIST targets)
      continue()
    endif()
    set(library tconv_cpu_${name})
    add_library(${library} OBJECT ${PROJECT_SOURCE_DIR}/src/cpu/${source})
    target_compile_definitions(${library} PRIVATE TCONV_KERNEL=${name} TCONV_TARGET=${target})
    target_link_libraries(${library} PRIVATE tconv_options)
    target_compile_options(${library} PRIVATE ${TCONV_KERNEL_FLAGS} ${TCONV_FLAGS_${target}})
    list(APPEND objects_${target} $<TARGET_OBJECTS:${library}>)
  endwhile()
  list(REMOVE_DUPLICATES all_sources)
  set(${objects} ${objects_portable} ${objects_avx2} ${objects_avx512} ${objects_avx512_bf16} ${objects_avx512_amx} PARENT_SCOPE)
  set(${sources} ${all_sources} PARENT_SCOPE)
endfunction()

# A generated file that holds the text of every device source, for NVRTC.
function(tconv_embed_device_sources result)
  tconv_read_kernels(${PROJECT_SOURCE_DIR}/src/cuda/kernels.def triples)
  while(triples)
    list(POP_FRONT triples name source capability)
    if(NOT EXISTS ${PROJECT_SOURCE_DIR}/src/cuda/${source})
      message(FATAL_ERROR "src/cuda/kernels.def: ${name}: src/cuda/${source} does not exist")
    endif()
  endwhile()
  file(GLOB texts CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/src/cuda/*.cu ${PROJECT_SOURCE_DIR}/src/cuda/*.cuh)
  list(APPEND texts ${PROJECT_SOURCE_DIR}/include/tconv/epilogue.def)
  set(generated ${PROJECT_BINARY_DIR}/embedded_sources.cpp)
  set(script ${PROJECT_SOURCE_DIR}/cmake/embed.cmake)
  add_custom_command(
    OUTPUT ${generated}
    COMMAND ${CMAKE_COMMAND} "-DTEXTS=${texts}" -DGENERATED=${generated} -P ${script}
    DEPENDS ${texts} ${script}
    COMMENT "Embedding device sources"
    VERBATIM)
  set(${result} ${generated} PARENT_SCOPE)
endfunction()
