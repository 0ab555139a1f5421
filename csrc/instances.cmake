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

# ---- gemm, sm_90a (CUTLASS; csrc/gemm/cuda/README_sm90.md says why these tiles)
foreach(tokens 16 64 128 256)
  partita_instance(cutlass_w4a16_bf16_${tokens}_sm90 gemm/cuda/cutlass_w4a16_sm90.cu.in 33
                   TOKENS=${tokens} ACTIVATION=cutlass::bfloat16_t ACTIVATIONS=kBF16)
  partita_instance(cutlass_w4a16_f16_${tokens}_sm90 gemm/cuda/cutlass_w4a16_sm90.cu.in 33
                   TOKENS=${tokens} ACTIVATION=cutlass::half_t ACTIVATIONS=kF16)
endforeach()
foreach(tokens 128 256)
  partita_instance(cutlass_bf16_${tokens}_sm90 gemm/cuda/cutlass_half_sm90.cu.in 22
                   TOKENS=${tokens} ELEMENT=cutlass::bfloat16_t ACTIVATIONS=kBF16 CODES=kBF16)
  partita_instance(cutlass_f16_${tokens}_sm90 gemm/cuda/cutlass_half_sm90.cu.in 22
                   TOKENS=${tokens} ELEMENT=cutlass::half_t ACTIVATIONS=kF16 CODES=kF16)
endforeach()
foreach(tokens 16 64 128)
  partita_instance(cutlass_fp8_${tokens}_sm90 gemm/cuda/cutlass_fp8_sm90.cu.in 18 TOKENS=${tokens})
endforeach()
foreach(tokens 128 256)
  partita_instance(cutlass_int8_${tokens}_sm90 gemm/cuda/cutlass_int8_sm90.cu.in 18 TOKENS=${tokens})
endforeach()
foreach(tokens 64 128)
  partita_instance(cutlass_fp8_block_${tokens}_sm90 gemm/cuda/cutlass_fp8_block_sm90.cu.in 25 TOKENS=${tokens})
endforeach()

# ---- attention

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
