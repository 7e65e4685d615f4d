"""Decisions packed as bits: what the kernels that write and read them share."""

from typing import no_type_check

import triton
import triton.language as tl


@no_type_check
@triton.jit
def ones(word) -> tl.tensor:
    """Give the number of ones of each 32-bit word, by sums within pairs, fours and bytes of bits."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return ((word + (word >> 16)) & 63).to(tl.int32)
