"""The process that a reward function runs in: it can hang, crash or print what it likes without touching the run.

Started as `python -m jaxpost.rl.reward_worker FD`, it talks over that inherited connection: first what to run, then
batches of arguments. It must not import jax.
"""

import asyncio
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from jaxpost.rl.builtin_rewards import builtin


class Source(NamedTuple):
    """Where a function is found.

    Attributes:
        kind: `builtin`, `file` or `module`.
        place: path of the file, or name of the module.
        name: of the function.
        options: of a built-in.
        path: where modules are looked for.
    """

    kind: str
    place: str
    name: str
    options: dict[str, Any]
    path: list[str]


class Answer(NamedTuple):
    """What a function has said of a batch.

    Attributes:
        values: what it returned.
        metrics: what it passed to `log_metric`.
        columns: what it passed to `log_extra`.
    """

    values: Any
    metrics: dict[str, list[float]]
    columns: dict[str, list[Any]]


def name_of(function: Callable[..., Any]) -> str:
    """What a function is called."""
    return getattr(function, "__name__", type(function).__name__)


def find(source: Source) -> Callable[..., Any]:
    """Import the function.

    Raises:
        Exception: whatever the import raises.
    """
    if source.kind == "builtin":
        return builtin(source.name, source.options)
    sys.path[:0] = [entry for entry in source.path if entry not in sys.path]
    if source.kind == "module":
        found: Any = importlib.import_module(source.place)
    else:
        sys.path.insert(0, str(Path(source.place).parent))
        spec = importlib.util.spec_from_file_location(Path(source.place).stem, source.place)
        assert spec is not None and spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = found
        spec.loader.exec_module(found)
    for part in source.name.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{source.name} is {type(found).__name__}, no function")
    return found


def ask(function: Callable[..., Any], arguments: dict[str, Any]) -> Answer:
    """Call a function, sync or async, with those of the arguments that it takes."""
    answer = Answer(None, {}, {})

    def log_metric(name: str, value: float) -> None:
        answer.metrics.setdefault(name, []).append(float(value))

    def log_extra(column: str, values: list[Any]) -> None:
        answer.columns[column] = list(values)

    arguments = arguments | {"log_metric": log_metric, "log_extra": log_extra}
    parameters = inspect.signature(function).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        arguments = {name: value for name, value in arguments.items() if name in parameters}
    values = function(**arguments)
    if inspect.isawaitable(values):
        values = asyncio.run(_awaited(values))
    return answer._replace(values=values if values is None or isinstance(values, str) else _plain(values))


async def _awaited(values: Any) -> Any:
    return await values


def _plain(values: Any) -> Any:
    """A list, of whatever sequence or array there was."""
    return values.tolist() if hasattr(values, "tolist") else list(values) if hasattr(values, "__iter__") else values


def serve(connection: Connection) -> None:
    """Reply until the other side goes away: `(True, fields of an Answer)`, or `(False, what went wrong)`."""
    try:
        function = find(connection.recv())
    except BaseException as error:
        connection.send((False, describe(error)))
        return
    connection.send((True, None))
    while True:
        try:
            arguments = connection.recv()
        except EOFError:
            return
        try:
            reply = (True, tuple(ask(function, arguments)))
        except Exception as error:
            reply = (False, describe(error))
        try:
            connection.send(reply)
        except Exception as error:  # the answer cannot be pickled
            connection.send((False, describe(error)))


def describe(error: BaseException) -> str:
    """One line for a message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
