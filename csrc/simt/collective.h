// Instructions that the lanes of a warp carry out together. Internal to csrc/simt.
#pragma once

#include "simt/block.h"

namespace partita::simt {

// Rests until all lanes of the mask that live have come with the same instruction; the last one carries it out for all:
// complete(warp, lanes that came, parameter), operands and results in Thread::operands. With is_aligned they must have
// come from the same place, as the instructions marked .aligned demand.
void meet(Thread& thread, uint32_t mask, void (*complete)(Warp&, uint32_t, int), int parameter, bool is_aligned,
          Site site);

}  // namespace partita::simt
