"""Runs the inline PTX of a kernel under Triton's interpreter, which has none: a few instructions, on NumPy arrays.

    with emulated_ptx():
        kernel[grid](...)

Registers are arrays with an element for each group of elements that a text is applied to. A branch forwards, the only
kind there is, masks what is written until its label. Memory is the process's own, element by element, so a wrong
address is found as it would be on a GPU, by what it breaks.
"""

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import numpy as np

_COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less,
    "gtu": lambda a, b: ~(a <= b), "ltu": lambda a, b: ~(a >= b),
}  # fmt: skip
_TYPES = {"f32": np.float32, "s32": np.int32, "b32": np.uint32, "u32": np.uint32}


class _Machine:
    def __init__(self, registers: dict[str, np.ndarray], size: int) -> None:
        self.registers, self.size = registers, size
        self.running = np.ones(size, bool)

    def run(self, text: str) -> None:
        parts = text.strip().removeprefix("{").removesuffix("}").replace("SILENT:", "SILENT:;").split(";")
        for line in (part.strip() for part in parts):
            if line == "SILENT:":
                self.running[:] = True
            elif line and not line.startswith(".reg"):
                self.step(line)

    def step(self, line: str) -> None:
        guard, line = re.fullmatch(r"(?:@(!?\w+)\s+)?(.*)", line, re.DOTALL).groups()
        on = self.running.copy()
        if guard:
            on &= ~self.registers[guard[1:]] if guard.startswith("!") else self.registers[guard]
        name, rest = line.split(None, 1)
        kind, *suffixes = name.split(".")
        args = [arg.strip() for arg in re.sub(r"[{}]", "", rest).split(",")]
        if kind == "bra":
            self.running &= ~on
            return
        getattr(self, f"do_{kind}")(on, suffixes, *args)

    def value(self, name: str, dtype: type) -> np.ndarray:
        if re.fullmatch(r"-?\d+", name):
            return np.full(self.size, int(name)).astype(dtype)
        if name.startswith("0f"):
            return np.full(self.size, int(f"0x{name[2:]}", 0), np.uint32).view(dtype)
        held = self.registers[name]
        return held if held.dtype.itemsize == 8 else held.view(dtype)

    def write(self, on: np.ndarray, name: str, value: np.ndarray) -> None:
        raw = value if value.dtype == bool or value.dtype.itemsize == 8 else np.ascontiguousarray(value).view(np.uint32)
        # What was never written holds anything.
        held = self.registers.get(name, np.full_like(raw, True if raw.dtype == bool else 0xABAD1DEA))
        self.registers[name] = np.where(on, raw, held)

    def address(self, text: str) -> np.ndarray:
        name, offset = re.fullmatch(r"\[([$\w]+)(?:\+(\d+))?\]", text).groups()
        return self.registers[name].astype(np.int64) + int(offset or 0)

    def do_setp(self, on, suffixes, to, a, b, *other) -> None:
        compare, *logic, dtype = suffixes
        found = _COMPARE[compare](self.value(a, _TYPES[dtype]), self.value(b, _TYPES[dtype]))
        if logic:
            found = {"and": np.logical_and, "or": np.logical_or}[logic[0]](found, self.registers[other[0]])
        self.write(on, to, found)

    def do_mov(self, on, suffixes, to, a) -> None:
        self.write(on, to, self.value(a, _TYPES[suffixes[0]]))

    def do_add(self, on, suffixes, to, a, b) -> None:
        self.write(on, to, self.value(a, _TYPES[suffixes[0]]) + self.value(b, _TYPES[suffixes[0]]))

    def do_sub(self, on, suffixes, to, a, b) -> None:
        self.write(on, to, self.value(a, _TYPES[suffixes[0]]) - self.value(b, _TYPES[suffixes[0]]))

    def do_or(self, on, _, to, a, b) -> None:
        self.write(on, to, self.value(a, np.uint32) | self.value(b, np.uint32))

    def do_and(self, on, _, to, a, b) -> None:
        self.write(on, to, self.value(a, np.uint32) & self.value(b, np.uint32))

    def do_popc(self, on, _, to, a) -> None:
        self.write(on, to, np.array([int(v).bit_count() for v in self.value(a, np.uint32)], np.int32))

    def do_mad(self, on, suffixes, to, a, b, c) -> None:
        assert suffixes == ["wide", "s32"]
        self.write(on, to, self.value(a, np.int32).astype(np.int64) * int(b) + self.registers[c].astype(np.int64))

    def do_ld(self, on, suffixes, to, place) -> None:
        assert suffixes == ["global", "f32"]
        where = self.address(place)
        loaded = [ctypes.c_float.from_address(int(at)).value if yes else 0 for at, yes in zip(where, on, strict=True)]
        self.write(on, to, np.array(loaded, np.float32))

    def do_st(self, on, suffixes, place, low, high) -> None:
        assert suffixes == ["global", "v2", "b32"]
        values = self.value(low, np.uint32), self.value(high, np.uint32)
        for at, yes, *words in zip(self.address(place), on, *values, strict=True):
            if yes:
                (ctypes.c_uint32 * 2).from_address(int(at))[:] = [int(word) for word in words]

    def do_atom(self, on, suffixes, to, place, amount) -> None:
        assert suffixes == ["relaxed", "gpu", "global", "add", "u32"]
        before = np.zeros(self.size, np.uint32)
        for i, (at, yes, more) in enumerate(zip(self.address(place), on, self.value(amount, np.uint32), strict=True)):
            if yes:
                counter = ctypes.c_uint32.from_address(int(at))
                before[i] = counter.value
                counter.value += int(more)
        self.write(on, to, before)


def _inline_asm(_builder, text, constraints, values, types, _is_pure, pack):
    from triton.runtime.interpreter import TensorHandle

    shape = np.broadcast_shapes(*(value.data.shape for value in values))
    inputs = [np.broadcast_to(value.data, shape).reshape(-1, pack) for value in values]
    kinds = constraints.split(",")
    assert len(kinds) == (len(types) + len(values)) * pack
    registers = {}
    for position, data in enumerate(inputs, start=len(types)):
        for i in range(pack):
            kind = kinds[position * pack + i]
            assert data.dtype.itemsize == (8 if kind == "l" else 4), f"operand {position}: {data.dtype} as {kind}"
            raw = data[:, i].copy() if kind == "l" else data[:, i].copy().view(np.uint32)
            registers[f"${position * pack + i}"] = raw
            if kind.isdigit():
                registers[f"${kind}"] = raw
    machine = _Machine(registers, len(inputs[0]))
    machine.run(text)
    outputs = []
    for position, kind in enumerate(types):
        scalar = kind.scalar
        data = np.stack([registers[f"${position * pack + i}"] for i in range(pack)], 1).reshape(shape)
        outputs.append(TensorHandle(data.view(np.int32), scalar))
    return SimpleNamespace(get_result=outputs.__getitem__)


@contextmanager
def emulated_ptx() -> Iterator[None]:
    """Give the interpreter inline assembly."""
    from triton.runtime import interpreter

    with mock.patch.object(interpreter.InterpreterBuilder, "create_inline_asm", _inline_asm):
        yield
