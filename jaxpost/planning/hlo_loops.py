"""How often the loops of an HLO module run.

XLA on CPU and GPU writes down the trip counts that it knows; on TPU it does not. Those that it leaves out are found by
following the loop's counters, whose first values, steps and bound are mostly constants. A loop whose bound is only
known at run time gets the bound that the shapes give, see `loop_trips`.
"""

import bisect
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from jaxpost.planning.hlo_text import Computation, Instruction, Module

Trips = Callable[[str, float], float]  # (op_name of a loop of open length, its upper bound) -> how often it runs
Known = Mapping[tuple[int, int], int]  # (number of a parameter, element of it or 0) -> the integer that it holds

_MOST_TRIPS = 2**40
_SAME = ("copy", "convert", "bitcast", "reshape")
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "maximum": max,
    "minimum": min,
}
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}


class Loop(NamedTuple):
    """How often a loop's body runs, and the integers that stay the same in it."""

    trips: float
    known: Known


class _Counter(NamedTuple):
    start: int
    step: int


def loop_trips(module: Module, caller: Computation, loop: Instruction, known: Known, open_trips: Trips) -> Loop:
    """How often the body of a `while` runs.

    The first of these that can be told: what XLA has written down; the least number of trips after which the condition
    is False, given the counters that are known; what `open_trips` makes of an upper bound. That bound is the number of
    windows that cover a buffer: the body slices, or updates, windows of buffers (also in what it fuses), and each trip
    is expected to take another one. Of all of these the buffer with the most windows counts, along the dimensions at
    whose place the trip matters. A loop that takes no windows counts once.

    Args:
        caller: where the loop stands.
        known: integers among the caller's parameters.
    """
    body = module.called(loop)[0]
    counters = _counters(module, caller, loop, body, known)
    constants = {(0, index): counter.start for index, counter in counters.items() if counter.step == 0}
    if written := loop.numbers(r'"known_trip_count":\{"n":"(\d+)"'):
        return Loop(written[0], constants)
    condition = module.computations[loop.attribute(r"\bcondition=%([\w.\-]+)")]
    trips = _counted_trips(module, condition, counters)
    if trips is None:
        windows = max(_windows(module, body, _moving(body)), default=1.0)
        trips = open_trips(loop.op_name, windows)
    return Loop(trips, constants)


def _counters(
    module: Module, caller: Computation, loop: Instruction, body: Computation, known: Known
) -> dict[int, _Counter]:
    """The elements of the loop's state that are integers which every trip changes by the same amount, 0 included."""
    first = caller.instructions[loop.operands[0]]
    if first.opcode != "tuple" or body.root.opcode != "tuple":
        return {}
    starts = {index: _integer(module, caller, name, known) for index, name in enumerate(first.operands)}
    values = [{(0, index): start for index, start in starts.items() if start is not None}]
    for _ in range(2):
        after = {(0, index): _integer(module, body, name, values[-1]) for index, name in enumerate(body.root.operands)}
        values.append({key: value for key, value in after.items() if value is not None})
    zeroth, once, twice = values
    return {
        key[1]: _Counter(zeroth[key], once[key] - zeroth[key])
        for key in zeroth.keys() & once.keys() & twice.keys()
        if twice[key] - once[key] == once[key] - zeroth[key]
    }


def _counted_trips(module: Module, condition: Computation, counters: dict[int, _Counter]) -> int | None:
    """After how many trips the condition is False first; None where the counters do not tell, or never."""

    def goes_on(trips: int) -> int | None:
        known = {(0, index): counter.start + trips * counter.step for index, counter in counters.items()}
        return _integer(module, condition, condition.root.name, known)

    if goes_on(0) is None:
        return None
    enough = 1
    while goes_on(enough):
        enough *= 2
        if enough > _MOST_TRIPS:
            return None
    return bisect.bisect_left(range(enough), True, key=lambda trips: not goes_on(trips))


def _integer(module: Module, computation: Computation, name: str, known: Known) -> int | None:
    """What a scalar holds, where it is an integer (or a truth value) that follows from the known ones."""
    it = computation.instructions[name]
    if len(it.results) != 1 or it.results[0].dims or it.results[0].dtype[0] not in "sup":
        return None
    if it.opcode == "constant":
        return {"true": 1, "false": 0}[it.argument] if it.results[0].dtype == "pred" else int(it.argument)
    if it.opcode == "parameter":
        return known.get((int(it.argument), 0))
    if it.opcode in _SAME:
        return _integer(module, computation, it.operands[0], known)
    if it.opcode == "get-tuple-element":
        source, (element,) = computation.instructions[it.operands[0]], it.numbers(r"index=(\d+)")
        return known.get((int(source.argument), element)) if source.opcode == "parameter" else None
    if it.opcode not in (*_ARITHMETIC, "and", "compare", "fusion"):
        return None
    values = [_integer(module, computation, operand, known) for operand in it.operands]
    told = [value for value in values if value is not None]
    if it.opcode == "fusion":
        inner = {(number, 0): value for number, value in enumerate(values) if value is not None}
        fused = module.called(it)[0]
        return _integer(module, fused, fused.root.name, inner)
    if (
        it.opcode == "and" and it.results[0].dtype == "pred"
    ):  # what may end a loop early is not known; the rest bounds it
        return min(told, default=None)
    if it.opcode == "and" or len(told) < len(values):
        return None
    calculate = _ARITHMETIC.get(it.opcode) or _COMPARISONS[it.attribute(r"direction=(\w\w)")]
    return int(calculate(*told))


def _moving(body: Computation) -> set[str]:
    """The elements of a loop's state that its body changes; what it hands on as it was is no reason to move."""
    (state,) = body.parameters
    elements = {x.name: x.numbers(r"index=(\d+)")[0] for x in body.users[state] if x.opcode == "get-tuple-element"}
    results = [_source(body, name) for name in body.root.operands if body.root.opcode == "tuple"]
    kept = {index for index, name in enumerate(results) if elements.get(name) == index}
    return {name for name, index in elements.items() if index not in kept}


def _source(computation: Computation, name: str) -> str:
    """What an instruction is a copy of."""
    while (it := computation.instructions[name]).opcode in _SAME:
        name = it.operands[0]
    return name


def _windows(module: Module, computation: Computation, moving: set[str]) -> Iterator[float]:
    """For each slice or update of a window at a moving place: how many such windows cover the whole."""
    moving = set(moving)
    for it in computation.instructions.values():
        if not moving.isdisjoint(it.operands):
            moving.add(it.name)
        if it.opcode in ("dynamic-slice", "dynamic-update-slice"):
            taken, places = (it.name, 1) if it.opcode == "dynamic-slice" else (it.operands[1], 2)
            whole, window = computation.type_of(it.operands[0]).dims, computation.type_of(taken).dims
            sizes = zip(whole, window, it.operands[places:], strict=True)
            yield math.prod(math.ceil(size / part) for size, part, place in sizes if place in moving)
        elif it.opcode in ("fusion", "call"):
            inner = module.called(it)[0]
            inputs = zip(inner.parameters, it.operands, strict=True)
            yield from _windows(module, inner, {name for name, operand in inputs if operand in moving})
