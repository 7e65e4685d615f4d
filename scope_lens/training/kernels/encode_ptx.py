"""The epilogue of the fused encoder in PTX, for the accumulators of a Hopper tensor core product.

A thread holds 128 accumulators there, and about one in 800 is an entry that matters. What Triton makes of a store or a
prefix sum of such a tile moves all of it through shared memory first, and spills. These texts leave the accumulators in
the registers they are in; `scope_lens.training.kernels.encode_triton` applies them to strips of eight latents, in which
a thread has four accumulators, element by element:

1. `hits_text`: compare the four with a bound that nothing that matters is below; the branch behind it is seldom taken.
   There, decide exactly, and set the strip's bit in the element's mask.
2. `reserve_text`: add the element's number of hits to its row's counter, which gives the first of its slots.
3. `store_text`: where the strip's bit is set, store the pre-activation and the latent, and count active ones.

An element's result depends on its own operands alone. The four share a branch, which is a matter of speed and nothing
else, so the texts are right whichever elements Triton hands over together.
"""

from collections.abc import Mapping, Sequence

PACK = 4  # elements that a text is applied to at a time
STRIP = 8  # latents of a strip; a strip of 128 rows has PACK elements in each of 256 threads


def hits_text(strip: int) -> str:
    """Give the text that sets bit `strip` of `bits` where an accumulator matters; operands as in `HITS`."""
    bit, offset = _bit(strip), 4 * STRIP * strip
    above = [
        f"setp.gtu{'.or' if i else ''}.f32 any, {_at('acc', i)}, {_at('low', i)}{', any' if i else ''};"
        for i in range(PACK)
    ]
    exactly = [
        f"""setp.gtu.f32 hit, {_at("acc", i)}, {_at("low", i)};
        mov.f32 bias, 0f00000000;
        mov.f32 gap, 0f00000000;
        @hit ld.global.f32 bias, [{_at("b_enc", i)}+{offset}];
        @hit ld.global.f32 gap, [{_at("threshold", i)}+{offset}];
        add.f32 bias, {_at("acc", i)}, bias;
        sub.f32 gap, gap, bias;
        setp.ltu.and.f32 hit, gap, {_at("half_window", i)}, hit;
        @hit or.b32 {_at("bits", i)}, {_at("bits", i)}, {bit};"""
        for i in range(PACK)
    ]
    lines = [".reg .pred any, hit;", ".reg .f32 bias, gap;", *above, "@!any bra SILENT;", *exactly, "SILENT:"]
    return _block(lines, _operands(("bits",), ("bits", "acc", "low", "b_enc", "threshold", "half_window")))


def store_text(strip: int) -> str:
    """Give the text that stores what bit `strip` of `bits` marks at slot `pos`; operands as in `STORE`."""
    bit, offset = _bit(strip), 4 * STRIP * strip
    marked = [f"or.b32 word, {_at('bits', 0)}, {_at('bits', 1)};"]
    marked += [f"or.b32 word, word, {_at('bits', i)};" for i in range(2, PACK)]
    each = [
        f"""and.b32 word, {_at("bits", i)}, {bit};
        setp.ne.s32 hit, word, 0;
        mov.f32 pre, 0f00000000;
        mov.f32 theta, 0f00000000;
        @hit ld.global.f32 pre, [{_at("b_enc", i)}+{offset}];
        @hit ld.global.f32 theta, [{_at("threshold", i)}+{offset}];
        add.f32 pre, {_at("acc", i)}, pre;
        setp.lt.and.s32 fits, {_at("pos", i)}, {_at("room", i)}, hit;
        mad.wide.s32 place, {_at("pos", i)}, 8, {_at("found", i)};
        add.s32 word, {_at("latent", i)}, {STRIP * strip};
        @fits st.global.v2.b32 [place], {{{{pre, word}}}};
        @hit add.s32 {_at("pos", i)}, {_at("pos", i)}, 1;
        setp.gtu.and.f32 hit, pre, theta, hit;
        @hit add.s32 {_at("active", i)}, {_at("active", i)}, 1;"""
        for i in range(PACK)
    ]
    head = [".reg .pred hit, fits;", ".reg .f32 pre, theta;", ".reg .b32 word;", ".reg .b64 place;"]
    test = [f"and.b32 word, word, {bit};", "setp.eq.s32 hit, word, 0;", "@hit bra SILENT;"]
    inputs = ("pos", "active", "bits", "acc", "latent", "b_enc", "threshold", "found", "room")
    return _block([*head, *marked, *test, *each, "SILENT:"], _operands(("pos", "active"), inputs))


def reserve_text() -> str:
    """Give the text that adds to a counter, at most once for an element, and returns what stood there before."""
    return """{
        .reg .pred some;
        setp.ne.s32 some, $2, 0;
        mov.b32 $0, 0;
        @some atom.relaxed.gpu.global.add.u32 $0, [$1], $2;
    }"""


def constraints(outputs: str, inputs: str) -> str:
    """Spell out the operands' registers for each of PACK elements; the first inputs are the outputs' own registers.

    Args:
        outputs: One letter an output: r is 32 bits, l 64, f a float.
        inputs: Likewise the inputs behind those that begin in the outputs' registers.
    """
    first = [f"={kind}" for kind in outputs for _ in range(PACK)]
    tied = [str(i) for i in range(len(outputs) * PACK)]
    return ",".join([*first, *tied, *(kind for kind in inputs for _ in range(PACK))])


# bits <- bits, acc, low, b_enc and threshold (addresses for strip 0), half_window
HITS = constraints("r", "ffllf")
# pos, active <- pos, active, bits, acc, latent (of strip 0), b_enc, threshold (addresses), found (the row's), room
STORE = constraints("rr", "rfrlllr")
# where the counter's sum stood before <- its address, what is added; one element at a time
RESERVE = "=r,l,r"


def _bit(strip: int) -> int:
    """Bit `strip` of a signed 32-bit number."""
    return 1 << strip if strip < 31 else -(1 << 31)


def _at(name: str, element: int) -> str:
    return f"{{{name}[{element}]}}"


def _operands(outputs: Sequence[str], inputs: Sequence[str]) -> dict[str, list[str]]:
    """The registers $0, $1, ... of each operand's elements; an input with an output's name is that output."""
    named = {name: [f"${position * PACK + i}" for i in range(PACK)] for position, name in enumerate(outputs)}
    for position, name in enumerate(inputs, start=len(outputs)):
        named.setdefault(name, [f"${position * PACK + i}" for i in range(PACK)])
    return named


def _block(lines: Sequence[str], operands: Mapping[str, Sequence[str]]) -> str:
    """A block of its own, so that its registers and its label are nobody else's."""
    return "{{\n{}\n}}".format("\n".join(lines).format(**operands))
