"""A prediction for people."""

from rich.console import Console
from rich.table import Table

from jaxpost.planning.prediction import Measured, Prediction

BINDS = {"compute": "the matrix units", "memory": "the memory's bandwidth", "network": "the network"}


def show(prediction: Prediction, title: str, console: Console) -> None:
    """Print what a run would take, and what is an estimate of it."""
    console.rule(title, align="left")
    console.print(memory_table(prediction.memory, prediction.capacity, fits=prediction.fits))
    if not prediction.fits:
        return
    console.print(_programs(prediction))
    seconds = prediction.step_seconds
    slowest = max(prediction.programs, key=lambda each: each.step_seconds)
    name, resource = slowest.compiled.program.name, max(slowest.seconds, key=lambda name: slowest.seconds[name])
    console.print(
        f"a step of {prediction.num_tokens:,} tokens takes {seconds:.3g} s at the roofline: MFU {prediction.mfu:.0%}, "
        f"{prediction.tokens_per_second:,.0f} tokens/s/device; {BINDS[resource]} in {name} binds"
    )
    unknown = sorted({name for each in prediction.programs for name in each.cost.opaque})
    if unknown:
        console.print(f"kernels whose FLOPs are not known and count as none: {', '.join(unknown)}")
    spent = sum(each.compiled.compile_seconds for each in prediction.programs)
    console.print(
        f"the compiler took {spent:.0f} s, and this process at most {prediction.host_bytes / 1e9:.1f} GB", style="dim"
    )
    console.print(
        "compiled: memory, FLOPs, bytes and what the network carries. Estimated: that each program is as fast as its "
        "slowest resource at its published rate, and which links of the network it uses.",
        style="dim",
    )


def memory_table(memory: dict[str, float], capacity: float, *, fits: bool) -> Table:
    """Bytes of a device by what they are for, and what is left of all that it has."""
    table = Table("bytes of a device", "GB", title=None, box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, size in memory.items():
        table.add_row(name, f"{size / 1e9:.3g}")
    spare = capacity - sum(memory.values())
    verdict = f"{spare / 1e9:.2f} left" if fits else f"[bold red]{-spare / 1e9:.2f} too much[/]"
    table.add_row(f"of {capacity / 1e9:.2f}", verdict)
    return table


def _programs(prediction: Prediction) -> Table:
    names = ("program", "a step", "TFLOPs", "HBM GB", "net GB", "compute s", "memory s", "net s")
    table = Table(*names, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in table.columns:
        column.no_wrap, column.justify = True, "left" if column is table.columns[0] else "right"
    for each in prediction.programs:
        received = sum(kind.bytes for kind in each.cost.collectives.values())
        table.add_row(
            each.compiled.program.name,
            f"{each.compiled.program.times:.3g} x",
            *(f"{number:.3g}" for number in (each.cost.flops / 1e12, each.cost.bytes / 1e9, received / 1e9)),
            *(f"{seconds:.2g}" for seconds in each.seconds.values()),
        )
    return table


def as_dict(prediction: Prediction) -> dict[str, object]:
    """The numbers, for a file."""
    return {
        "fits": prediction.fits,
        "memory_bytes": prediction.memory,
        "capacity_bytes": prediction.capacity,
        "programs": {each.compiled.program.name: _numbers(each) for each in prediction.programs},
        **(
            {
                "step_seconds": prediction.step_seconds,
                "mfu": prediction.mfu,
                "tokens_per_second_per_device": prediction.tokens_per_second,
            }
            if prediction.fits
            else {}
        ),
        "tokens_per_step": prediction.num_tokens,
        "compiler_host_bytes": prediction.host_bytes,
    }


def _numbers(each: Measured) -> dict[str, object]:
    return {
        "times_per_step": each.compiled.program.times,
        "flops": each.cost.flops,
        "hbm_bytes": each.cost.bytes,
        "network_bytes": {kind: found.bytes for kind, found in each.cost.collectives.items()},
        "seconds": each.seconds,
        "temporary_bytes": each.compiled.temporaries,
        "argument_bytes": each.compiled.arguments,
        "compile_seconds": each.compiled.compile_seconds,
    }
