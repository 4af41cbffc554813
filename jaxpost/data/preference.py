"""Rows that compare or judge completions: preference, unpaired preference and stepwise."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxpost.data.formats import Block
from jaxpost.data.messages import is_conversational, text_fault
from jaxpost.data.rows import describe

Said = str | list[dict[str, Any]]  # text or messages


class Pair(NamedTuple):
    """Two completions of a prompt, of which the first is preferred."""

    prompt: Said
    chosen: Said
    rejected: Said


class Judged(NamedTuple):
    """A completion of a prompt, and whether it is desirable."""

    prompt: Said
    completion: Said
    label: bool


class Steps(NamedTuple):
    """The steps of an answer, and whether each is correct."""

    prompt: str
    completions: list[str]
    labels: list[bool]


def extract_prompt(example: Mapping[str, Any]) -> dict[str, Any]:
    """Split the longest common beginning of `chosen` and `rejected`, in turns or characters, off them as `prompt`.

    A space before the first difference belongs to the completions, and so does the last turn or character of one that
    the other begins with. TRL's function of this name, but for texts that differ from the first character and end with
    a space: TRL takes the last character there as the prompt's end.
    """
    chosen, rejected = example["chosen"], example["rejected"]
    shared = min(len(chosen), len(rejected))
    split = next((n for n in range(shared) if chosen[n] != rejected[n]), None)
    if split is None:
        split = max(shared - 1, 0)
    elif split > 0 and chosen[split - 1] == " ":
        split -= 1
    return {"prompt": chosen[:split], "chosen": chosen[split:], "rejected": rejected[split:]}


def unpair_preference(columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Preference rows as unpaired ones: all chosen completions, then all rejected; other columns stand twice.

    As TRL's `unpair_preference_dataset`, which does so for each 1000 rows.
    """
    chosen, rejected = columns["chosen"], columns["rejected"]
    others = {column: cells * 2 for column, cells in columns.items() if column not in ("chosen", "rejected")}
    return {**others, "completion": chosen + rejected, "label": [True] * len(chosen) + [False] * len(rejected)}


def pairs(block: Block, conversational: bool) -> list[Pair]:
    """Preference rows; without a prompt, or with one in text beside messages, that is what the completions share."""
    read = _conversational_pair if conversational else _standard_pair
    return [read(block, i, prompt) for i, prompt in enumerate(block.cells("prompt"))]


def judged(block: Block, conversational: bool) -> list[Judged]:
    """Unpaired preference rows, or preference rows as such, in the order of `unpair_preference`."""
    if "chosen" in block.columns:
        found = pairs(block, conversational)
        columns = {name: [pair[n] for pair in found] for n, name in enumerate(Pair._fields)}
        unpaired = unpair_preference(columns)
        return list(map(Judged, unpaired["prompt"], unpaired["completion"], unpaired["label"]))
    read = block.messages if conversational else block.texts
    return list(map(Judged, read("prompt"), read("completion"), block.booleans("label")))


def steps(block: Block) -> list[Steps]:
    """Stepwise rows: as many labels as completions, at least one."""
    found = []
    for i, prompt in enumerate(block.texts("prompt")):
        completions, labels = block.columns["completions"][i], block.columns["labels"][i]
        for column, value in (("completions", completions), ("labels", labels)):
            if not isinstance(value, list) or not value:
                raise block.error(i, column, " must be a list with a value for each step", f", not {describe(value)}")
        if fault := next(filter(None, map(text_fault, completions)), None):
            raise block.error(i, "completions", f": each{fault[0]}", fault[1])
        if "" in completions:
            raise block.error(i, "completions", ": a step is empty", f" (number {completions.index('') + 1})")
        if not all(isinstance(label, int) and label in (0, 1) for label in labels):
            raise block.error(i, "labels", " must be true or false for each step", f", not {describe(labels)}")
        if len(labels) != len(completions):
            counts = f": {len(labels)} for {len(completions)}"
            raise block.error(i, "labels", " has not one value for each of completions", counts)
        found.append(Steps(prompt, completions, [bool(label) for label in labels]))
    return found


def _conversational_pair(block: Block, i: int, prompt: Any) -> Pair:
    cells = {column: block.columns[column][i] for column in ("chosen", "rejected")}
    if is_conversational(prompt):
        read = {column: block.checked_messages(i, column, value, "completion") for column, value in cells.items()}
        return Pair(block.checked_messages(i, "prompt", prompt, "prompt"), **read)
    whole = {column: block.checked_messages(i, column, value, "conversation") for column, value in cells.items()}
    found = extract_prompt(whole)
    if not found["prompt"]:
        raise block.error(i, "chosen", " must begin with messages that 'rejected' begins with too: the prompt")
    read = {column: block.checked_messages(i, column, found[column], "completion") for column in cells}
    return Pair(block.checked_messages(i, "chosen", found["prompt"], "prompt"), **read)


def _standard_pair(block: Block, i: int, prompt: Any) -> Pair:
    cells = {"chosen": block.columns["chosen"][i], "rejected": block.columns["rejected"][i]}
    for column, value in {**cells, **({} if prompt is None else {"prompt": prompt})}.items():
        if fault := text_fault(value):
            raise block.error(i, column, *fault)
        if not value and column != "prompt":
            raise block.error(i, column, " is empty")
    return Pair(**extract_prompt(cells)) if prompt is None else Pair(prompt, **cells)
