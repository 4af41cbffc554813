"""What XLA prints of an optimised HLO module, read back: computations of instructions.

The syntax is that of `compiled.as_text()` of XLA's CPU, TPU and CUDA backends, in which operands are named without
their types. TPU layouts look like `bf16[8,128]{1,0:T(8,128)(2,1)S(1)}`; S(1) is the memory on the chip.
"""

import math
import re
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple


class ArrayType(NamedTuple):
    """One array: its element type, its dimensions and whether it lies in memory on the chip instead of the HBM."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False

    @property
    def bytes(self) -> float:
        """Its size, wherever it lies; 4-bit elements take half a byte."""
        width = 8 if self.dtype == "pred" else int((re.findall(r"\d+", self.dtype) or ["0"])[0])
        return math.prod(self.dims) * width / 8

    @property
    def traffic(self) -> float:
        """Bytes that reading it, or writing it, moves to or from the HBM."""
        return 0.0 if self.on_chip else self.bytes


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
        name: unique in its computation.
        opcode: an asynchronous pair is one instruction with the opcode of what it does, where its `-done` stands; its
            `-start` is left as "start".
        results: the arrays of its result, those of a tuple flattened.
        operands: names.
        argument: the text between the parentheses; of a constant its value, of a parameter its number.
        attributes: the text behind them.
    """

    name: str
    opcode: str
    results: tuple[ArrayType, ...]
    operands: tuple[str, ...]
    argument: str
    attributes: str

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs, but for a loop's condition."""
        return re.findall(r"%([\w.\-]+)", " ".join(re.findall(_CALLED, self.attributes)))

    def attribute(self, pattern: str, default: str = "") -> str:
        """The first group of a pattern in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else default

    def numbers(self, pattern: str) -> list[int]:
        """The integers in the first group of a pattern in the attributes."""
        return [int(number) for number in re.findall(r"\d+", self.attribute(pattern))]

    @property
    def op_name(self) -> str:
        """Where in the JAX program it comes from."""
        return self.attribute(r'op_name="([^"]*)"')


class Computation:
    """Instructions by name, operands before their users; the last one printed with ROOT is the result."""

    def __init__(self, name: str, instructions: list[Instruction], root: str) -> None:
        self.name = name
        self.instructions = _joined({instruction.name: instruction for instruction in instructions})
        self.root = self.instructions[root]

    @cached_property
    def parameters(self) -> list[str]:
        """Names by number."""
        found = [x for x in self.instructions.values() if x.opcode == "parameter"]
        return [x.name for x in sorted(found, key=lambda x: int(x.argument))]

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that take each one as an operand."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return users

    def types(self, instruction: Instruction) -> list[ArrayType]:
        """The arrays of its operands; an operand that is given twice counts once."""
        return [array for name in dict.fromkeys(instruction.operands) for array in self.instructions[name].results]

    def type_of(self, name: str) -> ArrayType:
        """The type of an instruction whose result is one array, or of its first."""
        return self.instructions[name].results[0]


class Module(NamedTuple):
    """A program of one device; `devices` is the number that run it together."""

    computations: dict[str, Computation]
    entry: Computation
    devices: int

    def called(self, instruction: Instruction) -> list[Computation]:
        """The computations that it runs: of a fusion or a call the one, of a loop its body, of a conditional each."""
        return [self.computations[name] for name in instruction.called]


_CALLED = r"\b(?:calls|to_apply|body|branch_computations|(?:true|false)_computation)=(\{[^}]*\}|%[\w.\-]+)"
_ARRAY = re.compile(r"\b([a-z]\w*)\[([^\]]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"  (ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(([^)]*)\)(.*)", re.DOTALL)
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) ")
_OPENINGS = ("  %", "  ROOT %", "%", "ENTRY %", "}")


def parse(text: str) -> Module:
    """Read a whole module."""
    computations: dict[str, Computation] = {}
    header, *statements = _statements(text)
    name = entry = root = ""
    instructions: list[Instruction] = []
    for statement in statements:
        if found := _INSTRUCTION.match(statement):
            is_root, label, types, opcode, argument, attributes = found.groups()
            operands = () if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", argument))
            instructions.append(Instruction(label, opcode, array_types(types), operands, argument, attributes))
            root = label if is_root else root
        elif found := _COMPUTATION.match(statement):
            name, instructions = found[2], []
            entry = name if found[1] else entry
        else:
            computations[name] = Computation(name, instructions, root)
    sizes = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)
    return Module(computations, computations[entry], math.prod(map(int, sizes)))


def array_types(text: str) -> tuple[ArrayType, ...]:
    """All arrays of a type, or of any text with types in it; a bounded dynamic dimension counts with its bound."""
    return tuple(
        ArrayType(dtype, tuple(map(int, re.findall(r"\d+", dims))), _on_chip(layout))
        for dtype, dims, layout in _ARRAY.findall(text)
    )


def group_size(instruction: Instruction, devices: int) -> int:
    """How many devices take part in one group of a collective; replica groups are printed in three forms."""
    if groups := instruction.numbers(r"replica_groups=\[([\d,]+)\]<="):  # [groups,size]<=[...]T(...)
        return groups[-1]
    if members := instruction.numbers(r"replica_groups=\{\{([\d,]+)\}"):
        return len(members)
    found = re.search(r"replica_groups=mesh\[([^{}]*) \{([^}]*)\}", instruction.attributes)
    if not found:
        return devices
    sizes = dict(re.findall(r"'([^']*)'=(\d+)", found[1]))
    axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", found[2])  # 'axis', or its part 'axis':(size before)size
    return math.prod(int(part or sizes[axis]) for axis, part in axes)


def _on_chip(layout: str) -> bool:
    # A GPU's S(1) is a pool of its HBM for collectives; only TPU layouts have tiles, T(...).
    space = re.search(r"S\((\d+)\)", layout)
    return bool(space) and not (space[1] == "1" and "T(" not in layout)


def _statements(text: str) -> Iterator[str]:
    """The header and every line, with the lines that strings in its attributes run on to."""
    statement: list[str] = []
    for line in text.split("\n"):
        if line.startswith(_OPENINGS) and not line.startswith("}}"):
            yield "\n".join(statement)
            statement = []
        statement.append(line)
    yield "\n".join(statement)


def _joined(instructions: dict[str, Instruction]) -> dict[str, Instruction]:
    """Make one instruction of each asynchronous pair."""
    joined = {}
    for name, done in instructions.items():
        opcode, start = done.opcode, done
        if opcode.endswith("-done"):
            start = instructions[done.operands[0]]
            while start.opcode.endswith("-update"):
                start = instructions[start.operands[0]]
        if start is not done and start.opcode == opcode.replace("-done", "-start"):
            joined[name] = start._replace(name=name, opcode=opcode.removesuffix("-done"), results=done.results)
        elif opcode.endswith(("-start", "-update")):
            joined[name] = done._replace(opcode="start")
        else:
            joined[name] = done
    return joined
