"""The house's floors: imports point down only, and siblings do not import each other."""

import ast
from pathlib import Path

import pytest

FLOOR = {
    **dict.fromkeys(
        [
            "sharding",
            "metrics",
            "errors",
            "options",
            "platform",
            "compilation",
            "chips",
            "locks",
            "writing",
            "watch",
            "processes",
            "foreign",
            "hub",
        ],
        1,
    ),
    **dict.fromkeys(["models", "data"], 2),
    **dict.fromkeys(["objectives", "rl"], 3),
    **dict.fromkeys(["train", "encode", "prompt_weights"], 4),
    **dict.fromkeys(["methods", "base_model", "ref_model", "value_model", "speed", "completer"], 5),
    **dict.fromkeys(["pipeline", "scoring", "record", "spoken", "answers"], 6),
    **dict.fromkeys(["generating", "chat", "export", "evaluate", "offline", "reward_model", "reporting", "lm_eval"], 7),
    "prompt_embeddings": 7,
    **dict.fromkeys(["online", "rewarded", "win_rate"], 8),
    **dict.fromkeys(["trainer", "plan", "planning", "preview", "evaluation"], 9),
    **dict.fromkeys(["trainers", "dry_run"], 10),
    # Commands name what they run, and import it when it is called.
    "flags": 2,
    **dict.fromkeys(["help_text", "config_file", "shells"], 3),
    **dict.fromkeys(["parsing", "commands"], 10),
    "completion": 11,
    "cli": 12,
    **dict.fromkeys(["__main__", "__init__"], 13),
}
PACKAGE = Path(__file__).parent.parent / "jaxpost"
FILES = sorted(PACKAGE.rglob("*.py"))


def imported_rooms(file):
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: relative import"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "jaxpost" else [node.module]
            )
        for name in names:
            parts = name.split(".")
            if parts[0] == "jaxpost" and len(parts) > 1:
                yield parts[1]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_down(file):
    room = file.relative_to(PACKAGE).with_suffix("").parts[0]
    for other in imported_rooms(file):
        assert other == room or FLOOR[other] < FLOOR[room] or FLOOR[other] == FLOOR[room] == 1, (
            f"{room} imports {other}"
        )


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_and_functions_are_small(file):
    text = file.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"


def test_the_loop_knows_no_method():
    for file in (PACKAGE / "train").glob("*.py"):
        words = set(file.read_text().lower().replace(".", " ").split())
        assert not words & {"sft", "dpo", "grpo", "ppo", "kto", "orpo"}, file
