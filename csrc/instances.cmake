# The instantiations of kernel templates, each in a generated file of its own so that they compile side by side and a
# developer can build a subset: -DPARTITA_KERNELS=<regular expression over the names below>.
#
#   partita_instance(<name> <template> <seconds> KEY=VALUE ...)
#
# makes <build>/instances/<name>.cu from csrc/<template> with every @KEY@ replaced. A name that ends in _sm90 is compiled
# for sm_90a alone and is not in the simt library. <seconds> is what it costs nvcc for all architectures on one core;
# their sum is held under a budget, so that a whole build stays under 20 minutes on two cores.
set(PARTITA_KERNELS ".*" CACHE STRING "Regular expression of the kernel instantiations to build")
set(PARTITA_INSTANCE_BUDGET_SECONDS 1500)
set(PARTITA_INSTANCE_SECONDS 0)
set(PARTITA_INSTANCES "")
set(PARTITA_INSTANCES_SM90 "")

function(partita_instance name template seconds)
  if(NOT name MATCHES "${PARTITA_KERNELS}")
    return()
  endif()
  foreach(pair IN LISTS ARGN)
    string(REGEX MATCH "^([A-Za-z_0-9]+)=(.*)$" matched "${pair}")
    set(${CMAKE_MATCH_1} "${CMAKE_MATCH_2}")
  endforeach()
  set(file "${CMAKE_BINARY_DIR}/instances/${name}.cu")
  configure_file("${CMAKE_SOURCE_DIR}/csrc/${template}" "${file}" @ONLY)
  math(EXPR total "${PARTITA_INSTANCE_SECONDS} + ${seconds}")
  set(PARTITA_INSTANCE_SECONDS ${total} PARENT_SCOPE)
  if(name MATCHES "_sm90$")
    set(PARTITA_INSTANCES_SM90 ${PARTITA_INSTANCES_SM90} "${file}" PARENT_SCOPE)
  else()
    set(PARTITA_INSTANCES ${PARTITA_INSTANCES} "${file}" PARENT_SCOPE)
  endif()
endfunction()

# ---- gemm

# ---- attention
# Decode: attend_decode_d<head_dim>_<k>_<v>. Smaller heads run in the next larger one, padded.
foreach(head_dim 64 128 256)
  foreach(pair "BF16 BF16" "F16 F16" "Int8 Int8" "E4M3 E4M3" "Int4Plain Int4Plain" "Int4Plain BF16" "Int4Plain F16"
          "Int8 Int4Plain")
    string(REPLACE " " ";" codecs ${pair})
    list(GET codecs 0 k)
    list(GET codecs 1 v)
    string(TOLOWER "attend_decode_d${head_dim}_${k}_${v}" name)
    string(REPLACE "int4plain" "int4" name ${name})
    string(REPLACE "e4m3" "fp8" name ${name})
    partita_instance(${name} attention/cuda/attend_decode.cu.in 20 NAME=${name} VERIFIED= HEAD_DIM=${head_dim} K=k${k}
                     V=k${v})
  endforeach()
endforeach()

# Prefill: attend_prefill_d<head_dim>_<type>, for pages of that type, or _converting, for any codec but fp32.
foreach(head_dim 64 128 256)
  foreach(kind "bf16 BF16 false" "fp16 F16 false" "converting F16 true")
    string(REPLACE " " ";" kind ${kind})
    list(GET kind 0 label)
    list(GET kind 1 codec)
    list(GET kind 2 converts)
    set(name attend_prefill_d${head_dim}_${label})
    partita_instance(${name} attention/cuda/attend_prefill.cu.in 20 NAME=${name} VERIFIED= HEAD_DIM=${head_dim}
                     CODEC=k${codec} CONVERTS=${converts})
  endforeach()
endforeach()

# ----
if(PARTITA_INSTANCE_SECONDS GREATER PARTITA_INSTANCE_BUDGET_SECONDS)
  message(FATAL_ERROR "csrc/instances.cmake: ${PARTITA_INSTANCE_SECONDS} s of nvcc, more than the budget of "
                      "${PARTITA_INSTANCE_BUDGET_SECONDS} s")
endif()

# Kernels that are no template instances lie in csrc/<op>/cuda/*.cu; *_sm90.cu as above.
file(GLOB PARTITA_CUDA_FILES CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/*/cuda/*.cu ${CMAKE_SOURCE_DIR}/csrc/simt/tests/*.cu)
set(PARTITA_FAMILY_SOURCES ${PARTITA_INSTANCES})
set(PARTITA_SM90_SOURCES ${PARTITA_INSTANCES_SM90})
foreach(source IN LISTS PARTITA_CUDA_FILES)
  if(source MATCHES "_sm90\\.cu$")
    list(APPEND PARTITA_SM90_SOURCES ${source})
  else()
    list(APPEND PARTITA_FAMILY_SOURCES ${source})
  endif()
endforeach()
