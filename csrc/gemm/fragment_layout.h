// Where an element of the weight lies: the one description that the kernels' documentation and the packer share.
//
// The weight is operand A of mma.sync: a fragment is 16 channels x one K step (16 inputs against 16-bit activations, 32
// against bytes). A lane's registers of a fragment are written to packed memory in the order in which it will load
// them, so a load is one 16-byte vector per lane, the lanes side by side: no ldmatrix, no swizzle, no bank conflict.
//
//   packed codes: [padded N / 64][padded K / 64][4 fragments of 16 channels][vectors][32 lanes][16 bytes]
//
// A vector holds as many K steps as fit: codes of 4 bits 4 (2 against bytes), of 8 bits 2 (1), of 16 bits 1.
// Parameters of a group (scale, zero ...) lie [padded N / 64][groups][8 lane groups][4 fragments][2 rows], so that the
// channels of a lane are neighbours too.
#pragma once

#include <cstdint>

namespace partita {

constexpr int kPackedChannels = 64;  // of a block
constexpr int kPackedInputs = 64;
constexpr int kFragmentChannels = 16;
constexpr int kFragmentsPerBlock = kPackedChannels / kFragmentChannels;

struct FragmentElement {
  int channel, k;
};

// Element `element` (low bits first) of register 0..3 of a lane.
constexpr FragmentElement fragment_coordinates(int lane, int reg, int element, int activation_bytes) {
  const int per_register = 4 / activation_bytes;
  return {lane / 4 + 8 * (reg & 1), per_register * (lane % 4) + element + 4 * per_register * (reg >> 1)};
}

// Bits of a code in packed memory, and the K steps in a lane's vector of 16 bytes.
constexpr int fragment_k(int activation_bytes) { return 32 / activation_bytes; }
constexpr int steps_per_vector(int code_bits, int activation_bytes) {
  return 128 / (code_bits * fragment_k(activation_bytes) / 2);
}
constexpr int vectors_per_block(int code_bits) { return kPackedInputs * kFragmentChannels * code_bits / 8 / 512; }

// Bit offset, in a lane's vector, of an element of the fragment of step `step` of that vector.
//   16-bit elements: registers follow each other.
//   8-bit codes: likewise.
//   4-bit codes against 16-bit activations: register r takes nibbles r and r + 4 of the step's word, so that one mask
//   brings the pair under two fp16 or bf16 exponents; registers 1 and 3 (rows + 8) may stay four bits up.
//   4-bit codes against bytes: the low nibbles of word r / 2 of the step are register r (even), the high ones r + 1.
constexpr int packed_bit(int code_bits, int activation_bytes, int step, int reg, int element) {
  if (code_bits == 4 && activation_bytes == 2) return 32 * step + 4 * (reg + 4 * element);
  if (code_bits == 4) return 64 * step + 32 * (reg >> 1) + 8 * element + 4 * (reg & 1);
  const int per_register = 4 / activation_bytes;
  return code_bits * (4 * per_register * step + per_register * reg + element);
}

// Place of a channel's parameters among the 64 of its block.
constexpr int packed_parameter_index(int channel) {
  return channel % 8 * 8 + channel / kFragmentChannels * 2 + channel / 8 % 2;
}

}  // namespace partita
