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
# One instance of gemm/cuda/gemm_tile.cuh: a decoder, the layout that it reads, the groups that it takes (1: whole row),
# and its tile: tokens, channels, K; warps along tokens, channels, K; stages. A macro: partita_instance sets variables
# of its caller.
macro(partita_gemm name decoder layout groups tile)
  partita_instance(gemm_${name} gemm/cuda/gemm_instance.cu.in 11 "NAME=${name}" "DECODER=${decoder}" "LAYOUT=${layout}"
                   "GROUPS=${groups}" "TILE=${tile}" "VERIFIED_ON=")
endmacro()

foreach(type f16 bf16)
  string(TOUPPER "${type}" type_name)
  set(u4 "GroupCodes<GpuActivations::k${type_name}, 4>")
  partita_gemm(u4_${type}_t8 "${u4}" mma_u4_group "32 | 64 | 128 | 1" "8, 64, 256, 1, 1, 4, 4")
  partita_gemm(u4_${type}_t16 "${u4}" mma_u4_group "32 | 64 | 128 | 1" "16, 128, 128, 1, 2, 2, 4")
  partita_gemm(u4_${type}_t32 "${u4}" mma_u4_group "32 | 64 | 128 | 1" "32, 128, 128, 1, 2, 2, 4")
  partita_gemm(u4_${type}_t64 "${u4}" mma_u4_group "32 | 64 | 128 | 1" "64, 128, 64, 1, 4, 1, 4")
  partita_gemm(u4_${type}_t128 "${u4}" mma_u4_group "32 | 64 | 128 | 1" "128, 128, 64, 2, 4, 1, 4")
  set(u8 "GroupCodes<GpuActivations::k${type_name}, 8>")
  partita_gemm(u8_${type}_t16 "${u8}" mma_u8_group "16 | 32 | 64 | 128 | 1" "16, 64, 128, 1, 1, 2, 4")
  partita_gemm(u8_${type}_t128 "${u8}" mma_u8_group "16 | 32 | 64 | 128 | 1" "128, 128, 64, 2, 4, 1, 3")
  set(plain "PlainElements<GpuActivations::k${type_name}>")
  partita_gemm(plain_${type}_t16 "${plain}" mma_plain16 "1" "16, 64, 128, 1, 1, 2, 4")
  partita_gemm(plain_${type}_t64 "${plain}" mma_plain16 "1" "64, 128, 64, 1, 4, 1, 4")
  partita_gemm(plain_${type}_t128 "${plain}" mma_plain16 "1" "128, 128, 64, 2, 4, 1, 3")
endforeach()
partita_gemm(s8_int8_t16 "SignedBytes" mma_s8_channel "1" "16, 64, 256, 1, 1, 4, 4")
partita_gemm(s8_int8_t128 "SignedBytes" mma_s8_channel "1" "128, 128, 128, 2, 4, 1, 3")
partita_gemm(s8_group32_int8_t16 "SignedBytesInGroups" mma_s8_group32 "32" "16, 64, 256, 1, 1, 4, 4")
partita_gemm(s8_group32_int8_t64 "SignedBytesInGroups" mma_s8_group32 "32" "64, 128, 128, 2, 4, 1, 3")
partita_gemm(u4_channel_int8_t16 "Nibbles" mma_u4_channel "1" "16, 128, 256, 1, 2, 2, 4")
partita_gemm(u4_channel_int8_t128 "Nibbles" mma_u4_channel "1" "128, 128, 128, 2, 4, 1, 3")
partita_gemm(u4_two_level_int8_t16 "TwoLevelNibbles" mma_u4_two_level "32 | 64 | 128" "16, 128, 256, 1, 2, 2, 4")
partita_gemm(u4_two_level_int8_t128 "TwoLevelNibbles" mma_u4_two_level "32 | 64 | 128" "128, 128, 128, 2, 4, 1, 3")

# ---- gemm, sm_90a: wgmma over the layouts above (gemm/cuda/wgmma_tile_sm90.cuh); tokens, stages
macro(partita_wgmma name decoder layout groups tokens stages)
  partita_instance(gemm_wgmma_${name}_t${tokens}_sm90 gemm/cuda/wgmma_instance_sm90.cu.in 5 "DECODER=${decoder}"
                   "LAYOUT=${layout}" "GROUPS=${groups}" TOKENS=${tokens} STAGES=${stages})
endmacro()
foreach(type f16 bf16)
  string(TOUPPER "${type}" type_name)
  partita_wgmma(u4_${type} "GroupCodes<GpuActivations::k${type_name}, 4>" mma_u4_group "32 | 64 | 128 | 1" 128 5)
  partita_wgmma(u4_${type} "GroupCodes<GpuActivations::k${type_name}, 4>" mma_u4_group "32 | 64 | 128 | 1" 256 4)
  partita_wgmma(u8_${type} "GroupCodes<GpuActivations::k${type_name}, 8>" mma_u8_group "16 | 32 | 64 | 128 | 1" 128 5)
endforeach()
partita_wgmma(s8_int8 "SignedBytes" mma_s8_channel "1" 128 4)
partita_wgmma(u4_channel_int8 "Nibbles" mma_u4_channel "1" 128 5)
partita_wgmma(u4_two_level_int8 "TwoLevelNibbles" mma_u4_two_level "32 | 64 | 128" 128 5)

# ---- gemm, sm_90a (CUTLASS; csrc/gemm/cuda/README_sm90.md says why these tiles)
foreach(tokens 16 64 128)
  partita_instance(cutlass_w4a16_bf16_${tokens}_sm90 gemm/cuda/cutlass_w4a16_sm90.cu.in 33
                   TOKENS=${tokens} ACTIVATION=cutlass::bfloat16_t ACTIVATIONS=kBF16)
  partita_instance(cutlass_w4a16_f16_${tokens}_sm90 gemm/cuda/cutlass_w4a16_sm90.cu.in 33
                   TOKENS=${tokens} ACTIVATION=cutlass::half_t ACTIVATIONS=kF16)
endforeach()
partita_instance(cutlass_w4a16_bf16_256_sm90 gemm/cuda/cutlass_w4a16_sm90.cu.in 33
                 TOKENS=256 ACTIVATION=cutlass::bfloat16_t ACTIVATIONS=kBF16)
foreach(tokens 128 256)
  partita_instance(cutlass_bf16_${tokens}_sm90 gemm/cuda/cutlass_half_sm90.cu.in 22
                   TOKENS=${tokens} ELEMENT=cutlass::bfloat16_t ACTIVATIONS=kBF16 CODES=kBF16)
  partita_instance(cutlass_f16_${tokens}_sm90 gemm/cuda/cutlass_half_sm90.cu.in 22
                   TOKENS=${tokens} ELEMENT=cutlass::half_t ACTIVATIONS=kF16 CODES=kF16)
endforeach()
foreach(tokens 16 64 128)
  partita_instance(cutlass_fp8_${tokens}_sm90 gemm/cuda/cutlass_fp8_sm90.cu.in 18 TOKENS=${tokens})
endforeach()
partita_instance(cutlass_int8_256_sm90 gemm/cuda/cutlass_int8_sm90.cu.in 18 TOKENS=256)
foreach(tokens 64 128)
  partita_instance(cutlass_fp8_block_${tokens}_sm90 gemm/cuda/cutlass_fp8_block_sm90.cu.in 25 TOKENS=${tokens})
endforeach()

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
    partita_instance(${name} attention/cuda/attend_decode.cu.in 10 NAME=${name} VERIFIED= HEAD_DIM=${head_dim} K=k${k}
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
    partita_instance(${name} attention/cuda/attend_prefill.cu.in 10 NAME=${name} VERIFIED= HEAD_DIM=${head_dim}
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
