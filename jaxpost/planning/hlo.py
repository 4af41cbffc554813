"""The cost of a compiled program on one device, read from the text of its optimised, partitioned HLO module.

XLA's own `cost_analysis` counts the body of a loop once; here it counts as often as it runs. Elementwise arithmetic is
not counted as FLOPs: on the chips that matter it waits for memory, whose traffic is counted.

Kernels that XLA cannot look into count what they would do without skipping anything, but for splash attention, which is
causal; so does everything else whose extent is only known at run time.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxpost.planning import hlo_flops
from jaxpost.planning.hlo_loops import Known, Trips, loop_trips
from jaxpost.planning.hlo_text import ArrayType, Computation, Instruction, Module, array_types, group_size, parse


class Collective(NamedTuple):
    """What all collectives of one kind come to: how many run, and the bytes that a device receives by them."""

    count: float  # pyright: ignore[reportIncompatibleMethodOverride]
    bytes: float


class Cost(NamedTuple):
    """One run of a program on one device.

    Attributes:
        flops: of matrix products, convolutions and kernels; a multiplication and an addition are two.
        bytes: read from and written to the HBM.
        transfers: its collectives, those first that receive the most each time.
        opaque: op_names of the kernels whose FLOPs the text does not tell, which count as none, and how often they run.
    """

    flops: float
    bytes: float
    transfers: list["Transfer"]
    opaque: dict[str, float]

    @property
    def collectives(self) -> dict[str, Collective]:
        """The same by kind, `all-gather` and so on."""
        kinds: dict[str, Collective] = defaultdict(lambda: Collective(0.0, 0.0))
        for transfer in self.transfers:
            count, received = kinds[transfer.kind]
            kinds[transfer.kind] = Collective(count + transfer.times, received + transfer.times * transfer.bytes)
        return dict(kinds)


class Transfer(NamedTuple):
    """One collective of a program.

    Attributes:
        kind: `all-gather` and so on.
        dtype, dims: of its result, or of the largest array where it has several.
        bytes: that a device receives each time: of a ring, or where each device sends to each other one, directly.
        times: how often it runs.
        op_name: where in the JAX program it comes from.
        group: devices that take part in it together.
    """

    kind: str
    dtype: str
    dims: tuple[int, ...]
    bytes: float
    times: float
    op_name: str
    group: int


def program_cost(text: str, *, trips: Trips = lambda op_name, bound: bound) -> Cost:
    """The cost of one run on one device.

    A loop's body counts as often as `hlo_loops.loop_trips` says, nested loops multiply, and of a conditional the most
    expensive branch counts. An instruction moves its operands and its result; one that slices, updates, gathers or
    scatters moves what it touches of a buffer. What happens within a fusion moves nothing.

    Args:
        text: `compiled.as_text()`.
        trips: (op_name of a loop whose bound is only known at run time, its upper bound) -> how often it runs.
    """
    module = parse(text)
    total = _Count(module, trips).computation(module.entry, {})
    transfers = sorted(total.transfers, key=lambda transfer: -transfer.bytes)
    return Cost(total.flops, total.bytes, transfers, total.opaque)


def shapes(text: str) -> set[tuple[str, tuple[int, ...]]]:
    """(dtype, dims) of every array in a module, also of those that only exist within a fusion."""
    return {(array.dtype, array.dims) for array in array_types(text)}


_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "optimization-barrier", "start"),
    *("partition-id", "replica-id", "send", "recv", "send-done", "recv-done", "domain", "add-dependency"),
}
_VIEWS = ("bitcast", "reshape", "tuple")
_WINDOWED = ("dynamic-slice", "slice", "gather")
# Buffers are only handed round by these; a collective that is spread over fusions counts where it starts.
_BOOKKEEPING = ("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone")
_COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)


@dataclass
class _Tally:
    flops: float = 0.0
    bytes: float = 0.0
    transfers: list[Transfer] = field(default_factory=list)
    opaque: dict[str, float] = field(default_factory=dict)

    def add(self, other: "_Tally", times: float = 1.0) -> None:
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        self.transfers += [x._replace(times=times * x.times) for x in other.transfers]
        for name, count in other.opaque.items():
            self.opaque[name] = self.opaque.get(name, 0.0) + times * count

    def weight(self) -> tuple[float, float]:
        """For comparison of branches: what is computed, then what is moved."""
        return self.flops, self.bytes + sum(x.times * x.bytes for x in self.transfers)


@dataclass(frozen=True)
class _Count:
    """Goes through a module in the order of execution."""

    module: Module
    trips: Trips

    def computation(self, computation: Computation, known: Known) -> _Tally:
        """Of one whose results lie in memory; `known` are integers among its parameters."""
        tally, running = _Tally(), set()
        for it in computation.instructions.values():
            if it.opcode == "while":
                loop = loop_trips(self.module, computation, it, known, self.trips)
                tally.add(self.computation(self.module.called(it)[0], loop.known), loop.trips)
            elif it.opcode == "conditional":
                branches = (self.computation(branch, {}) for branch in self.module.called(it))
                tally.add(max(branches, key=_Tally.weight))
            elif it.opcode in ("call", "async"):
                tally.add(self.computation(self.module.called(it)[0], {}))
            elif it.opcode == "fusion":
                (inner,) = self.module.called(it)
                tally.add(self.fused(inner, running))
                tally.bytes += self.fusion_traffic(computation, it, inner)
            else:
                tally.add(self.single(computation, it))
        return tally

    def single(self, computation: Computation, it: Instruction) -> _Tally:
        """Of an instruction that calls no other."""
        tally = _work(computation, it)
        tally.bytes = _traffic(computation, it)
        if it.opcode in _COLLECTIVES:
            tally.transfers.append(_transfer(computation, it, self.module.devices))
        return tally

    def fused(self, computation: Computation, running: set[str]) -> _Tally:
        """Of what is within a fusion: only collectives move anything.

        A collective of which each fusion of a sequence does a part is printed in all of them, with one channel.
        """
        tally = _Tally()
        for it in computation.instructions.values():
            if it.opcode == "fusion":
                tally.add(self.fused(self.module.called(it)[0], running))
            elif it.opcode not in _COLLECTIVES:
                tally.add(_work(computation, it))
            elif (channel := it.attribute(r"channel_id=(\d+)", it.name)) not in running:
                running.add(channel)
                tally.add(self.single(computation, it))
        return tally

    def fusion_traffic(self, caller: Computation, fusion: Instruction, inner: Computation) -> float:
        """What a fusion reads of its operands, and writes."""
        operands = zip(inner.parameters, fusion.operands, strict=True)
        read = sum(self.read(inner, name) for name, operand in operands if not caller.type_of(operand).on_chip)
        parts = inner.root.operands if inner.root.opcode == "tuple" else [inner.root.name]
        given = [0.0] * len(inner.parameters)
        if len(parts) != len(fusion.results):
            return read + self.written(inner, inner.root.name, given)
        results = zip(parts, fusion.results, strict=True)
        return read + sum(self.written(inner, name, given) for name, result in results if not result.on_chip)

    def read(self, computation: Computation, name: str) -> float:
        """Bytes that a fused computation reads of one of its arrays that lies in memory."""
        whole = sum(array.bytes for array in computation.instructions[name].results)
        return min(whole, sum(self.read_by(computation, user, name, whole) for user in computation.users[name]))

    def read_by(self, computation: Computation, user: Instruction, name: str, whole: float) -> float:
        """What one of its users reads of an array."""
        if user.opcode in _VIEWS:
            return self.read(computation, user.name)
        if user.opcode == "fusion":
            inner = self.module.called(user)[0]
            return self.read(inner, inner.parameters[user.operands.index(name)])
        if user.opcode in _COLLECTIVES or _is_bookkeeping(user):
            return 0.0
        buffer = user.operands[0] == name
        if buffer and user.opcode in _WINDOWED:
            return _bytes(user.results)
        if buffer and user.opcode in ("dynamic-update-slice", "scatter"):  # in place, so that the rest stays unread
            return self.read(computation, user.name) + (user.opcode == "scatter") * _updates(computation, user)
        return whole

    def written(self, computation: Computation, name: str, given: list[float]) -> float:
        """Bytes that a fused computation writes to make one of its arrays; `given`: those that made its parameters."""
        it = computation.instructions[name]
        if it.opcode == "parameter":
            return given[int(it.argument)]
        if it.opcode in _VIEWS:
            return sum(self.written(computation, operand, given) for operand in it.operands)
        if it.opcode == "fusion":
            inner = self.module.called(it)[0]
            operands = [self.written(computation, operand, given) for operand in it.operands]
            return self.written(inner, inner.root.name, operands)
        if it.opcode in ("dynamic-update-slice", "scatter"):
            return self.written(computation, it.operands[0], given) + _updates(computation, it)
        return 0.0 if it.opcode in _COLLECTIVES or _is_bookkeeping(it) else _bytes(it.results)


def _work(computation: Computation, it: Instruction) -> _Tally:
    flops = hlo_flops.flops(computation, it)
    return _Tally(opaque={it.op_name or it.name: 1.0}) if flops is None else _Tally(flops)


def _traffic(computation: Computation, it: Instruction) -> float:
    """Bytes that an instruction moves whose operands and results lie in memory."""
    if it.opcode in _FREE or it.opcode.endswith("-done") or _is_bookkeeping(it):
        return 0.0
    operands = [computation.type_of(name) for name in it.operands]
    written = sum(array.traffic for array in it.results)
    if it.opcode in _WINDOWED:
        touched = 0.0 if operands[0].on_chip else _bytes(it.results)
        return touched + written + sum(array.traffic for array in operands[1:])
    if it.opcode in ("dynamic-update-slice", "scatter"):
        updates = 0.0 if it.results[0].on_chip else _updates(computation, it)
        reads = it.opcode == "scatter"  # combines them with what is there
        return (1 + reads) * updates + sum(array.traffic for array in operands[1:])
    return written + sum(array.traffic for array in computation.types(it))


def _updates(computation: Computation, it: Instruction) -> float:
    """Size of what a dynamic-update-slice (buffer, update, places) or scatter (buffers, indices, updates) puts in."""
    if it.opcode == "dynamic-update-slice":
        return computation.type_of(it.operands[1]).bytes
    return _bytes(computation.type_of(name) for name in it.operands[len(it.operands) // 2 + 1 :])


def _transfer(computation: Computation, it: Instruction, devices: int) -> Transfer:
    """What a device must receive; n devices of a group each hold, or want, a part."""
    size = group_size(it, devices)
    # A ragged one is also given the buffer to fill, and how much goes where.
    arrays = [computation.type_of(it.operands[0])] if it.opcode == "ragged-all-to-all" else computation.types(it)
    sent = _bytes(arrays)
    others = (size - 1) / size
    received = {
        "all-gather": others * _bytes(it.results),
        "all-reduce": 2 * others * sent,
        "collective-permute": sent,
        "collective-broadcast": sent,
    }.get(it.opcode, others * sent)
    largest = max(it.results, key=lambda array: array.bytes)
    return Transfer(it.opcode, largest.dtype, largest.dims, received, 1.0, it.op_name, size)


def _is_bookkeeping(it: Instruction) -> bool:
    return it.opcode == "custom-call" and it.attribute(r'custom_call_target="([^"]*)"') in _BOOKKEEPING


def _bytes(arrays: Iterable[ArrayType]) -> float:
    return sum(array.bytes for array in arrays)
