"""Some of the completions that an online run has kept."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from jaxpost.errors import one_line

SHOWN = 3  # of a generation
CHARACTERS = 1200
_OWN = ("step", "prompt", "completion", "advantage")


class Example(NamedTuple):
    """A completion: its prompt, its text, and its rewards by function."""

    prompt: str
    completion: str
    rewards: dict[str, float]


class Generation(NamedTuple):
    """Some completions that a step was the first to learn from, from the least rewarded to the most."""

    step: int
    num_completions: int
    examples: list[Example]


def read_generations(folder: Path, notes: list[str]) -> list[Generation]:
    """The first and the last generation of a run; none where it has kept none."""
    files = sorted((folder / "completions").glob("completions_*.parquet"))
    found = []
    for path in dict.fromkeys([*files[:1], *files[-1:]]):
        try:
            found.append(_read(path))
        except Exception as error:  # whatever pyarrow makes of bytes that are not its own
            notes.append(f"completions/{path.name} cannot be read ({one_line(error)})")
    return found


def _read(path: Path) -> Generation:
    import pyarrow.parquet as pq

    table = pq.read_table(path).to_pydict()
    rewards = {name: cells for name, cells in table.items() if name not in _OWN and _are_numbers(cells)}
    count = len(table["completion"])
    order = sorted(range(count), key=lambda row: sum(cells[row] or 0.0 for cells in rewards.values()))
    places = dict.fromkeys(round(place * (count - 1) / (SHOWN - 1)) for place in range(SHOWN))
    examples = [
        Example(
            _text(table["prompt"][row], is_end=True),
            _text(table["completion"][row]),
            {name: float(cells[row]) for name, cells in rewards.items() if cells[row] is not None},
        )
        for row in (order[place] for place in places)
        if count
    ]
    return Generation(int(table["step"][0]), count, examples)


def _are_numbers(cells: list[Any]) -> bool:
    return all(cell is None or isinstance(cell, int | float) for cell in cells) and any(c is not None for c in cells)


def _text(cell: Any, *, is_end: bool = False) -> str:
    """A cell as text: messages, which are kept as JSON, one after the other; long ones are cut."""
    text = str(cell)
    try:
        messages = json.loads(text) if text.startswith('[{"') else None
    except (json.JSONDecodeError, RecursionError):
        messages = None
    if isinstance(messages, list) and all(isinstance(each, dict) and "content" in each for each in messages):
        said = [str(each["content"]) for each in messages]
        roles = [f"{each.get('role', '')}: " if len(messages) > 1 else "" for each in messages]
        text = "\n\n".join(role + content for role, content in zip(roles, said, strict=True))
    if len(text) <= CHARACTERS:
        return text
    return f"… {text[-CHARACTERS:]}" if is_end else f"{text[:CHARACTERS]} …"
