"""What a run writes: rows of metrics.jsonl, TensorBoard events, trackers, the bar and plain lines."""

import io
import json
import math
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxpost.errors import CheckpointError, ConfigError
from jaxpost.train.logging import LoggingConfig, RunLog, complete_rows

QUIET = LoggingConfig(report_to=[])


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def terminal(width=120):
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def test_rows_keep_the_order_and_are_there_at_once(tmp_path):
    with RunLog(tmp_path / "new" / "folder", QUIET, total_steps=20) as log:
        log.log(10, {"epoch": 0.5, "loss": jnp.float32(1.5), "num_tokens": 2**40, "accuracy": np.float64(0.25)})
        text = (tmp_path / "new" / "folder" / "metrics.jsonl").read_text()
    assert text == '{"step": 10, "epoch": 0.5, "loss": 1.5, "num_tokens": 1099511627776, "accuracy": 0.25}\n'


def test_nan_and_infinity_are_valid_json_and_floats_again(tmp_path):
    with RunLog(tmp_path, QUIET, total_steps=1) as log:
        log.log(1, {"loss": math.nan, "a": math.inf, "b": -math.inf})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {"step": 1, "loss": "NaN", "a": "Infinity", "b": "-Infinity"}
    assert math.isnan(float(row["loss"])) and float(row["a"]) == math.inf == -float(row["b"])


def test_resume_keeps_rows_up_to_its_step_as_they_were(tmp_path):
    with RunLog(tmp_path, QUIET, total_steps=6) as log:
        for step in (1, 2, 3, 4):
            log.log(step, {"loss": 0.1 * step})
        log.log(2, {"eval_loss": 0.1})
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    with RunLog(tmp_path, QUIET, total_steps=6, start_step=2) as log:
        assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [before[0], before[1], before[4]]
        log.log(3, {"loss": 7.0})
    assert [(row["step"], row.get("loss")) for row in rows(tmp_path)][-1] == (3, 7.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history.jsonl", "metrics.jsonl"]


@pytest.mark.parametrize(
    "torn", ['{"step": 3, "lo', '{"step": 3, "loss": 1.0', "{", "\x00\x00\x00", '{"step": 3, "n": "\udc80']
)
def test_resume_drops_a_torn_last_row(tmp_path, torn):
    whole = '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n'
    (tmp_path / "metrics.jsonl").write_bytes((whole + torn).encode(errors="surrogateescape"))
    with RunLog(tmp_path, QUIET, total_steps=5, start_step=4) as log:
        log.log(5, {"loss": 0.25})
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 5]


def test_a_whole_last_row_without_its_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    with RunLog(tmp_path, QUIET, total_steps=5, start_step=2) as log:
        log.log(3, {})
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_a_failed_rewrite_leaves_the_old_rows(tmp_path, monkeypatch):
    old = '{"step": 1}\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(old)

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(ConfigError, match=r"output_dir .* cannot be written .No space left"):
        RunLog(tmp_path, QUIET, total_steps=5, start_step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == old


def test_a_new_run_starts_a_new_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 2.0}\n{"step": 1}\n')
    RunLog(tmp_path, QUIET, total_steps=5).close()
    assert rows(tmp_path) == []


def test_rows_of_a_missing_file_are_none(tmp_path):
    assert list(complete_rows(tmp_path / "metrics.jsonl")) == []


def test_only_the_main_process_writes_or_speaks(tmp_path, capsys):
    with RunLog(tmp_path / "out", LoggingConfig(), total_steps=5, is_main=False, console=terminal()) as log:
        log.log(1, {"loss": 1.0})
        log.progress(1, 1.0, 10.0)
        log.message("hello")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_a_full_disk_is_a_checkpoint_error(tmp_path):
    resource = pytest.importorskip("resource")
    log = RunLog(tmp_path, QUIET, total_steps=100, console=terminal())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl") as caught:
            for step in range(20):
                log.log(step, {"loss": 1.0})
        log.close()  # must not fail on the row that could not be written
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 78


def test_output_dir_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="output_dir"):
        RunLog(tmp_path / "out", QUIET, total_steps=1)


def test_plain_lines_off_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # must not bring the bar back
    with RunLog(tmp_path, QUIET, total_steps=20) as log:
        log.progress(9, 2.0, 100.0)
        assert capsys.readouterr().out == ""
        log.log(10, {"epoch": 0.5, "loss": 1.23456789, "learning_rate": 5e-05, "num_tokens": 1234567, "x": math.nan})
        line = capsys.readouterr().out
        log.message("[saved] checkpoint 10")
        assert capsys.readouterr().out == "[saved] checkpoint 10\n"
    head, _, tail = line.partition("  elapsed ")
    assert head == "step 10/20  epoch 0.5  loss 1.235  learning_rate 5e-05  num_tokens 1234567  x nan"
    assert "  left " in tail and line.count("\n") == 1 and "\x1b" not in line


def test_bar_on_a_terminal(tmp_path, capsys):
    console = terminal()
    with RunLog(tmp_path, LoggingConfig(report_to=[], run_name="[my run]"), total_steps=200, console=console) as log:
        log.progress(50, 1.23456, 12345.6)
        log.log(50, {"loss": 1.23456})
        log.log(50, {"eval_loss": 1.5})
        log.message("a [message] to the user")
    drawn = console.file.getvalue()
    last = drawn.split("\r")[-1]
    for word in ("[my run]", "━", "50/200", "loss 1.235", "12,346 tokens/s", "elapsed", "left"):
        assert word in last, last
    assert "a [message] to the user\n" in drawn and "step 50  eval_loss 1.5\n" in drawn
    assert "step 50  loss" not in drawn
    assert "\x1b[?25h" in drawn.rpartition("\x1b[?25l")[2]  # the cursor is shown again
    assert capsys.readouterr().out == ""


def test_bar_fits_a_narrow_terminal(tmp_path):
    console = terminal(width=80)
    with RunLog(tmp_path, QUIET, total_steps=10_000, console=console) as log:
        log.progress(1234, 1.23456, 123456.7)
    last = console.file.getvalue().split("\r")[-1].replace("\x1b[2K", "").split("\n")[0]
    assert len(last) <= 80 and "…" not in last
    assert "1234/10000 loss 1.235 123,457 tok/s" in last


def test_disable_tqdm_gives_lines_on_a_terminal(tmp_path, capsys):
    console = terminal()
    config = LoggingConfig(report_to=[], disable_tqdm=True)
    with RunLog(tmp_path, config, total_steps=2, console=console) as log:
        log.log(1, {"loss": 1.0})
    assert console.file.getvalue() == ""
    assert capsys.readouterr().out.startswith("step 1/2  loss 1")


def test_an_exception_restores_the_terminal_and_passes(tmp_path):
    console = terminal()
    with pytest.raises(KeyboardInterrupt), RunLog(tmp_path, QUIET, total_steps=2, console=console):
        raise KeyboardInterrupt
    assert console.file.getvalue().rstrip("\n").endswith("\x1b[?25h")


def test_close_twice_and_calls_after_it_do_nothing(tmp_path, capsys):
    log = RunLog(tmp_path, QUIET, total_steps=2)
    log.close()
    log.close()
    log.log(1, {"loss": 1.0})
    log.message("late")
    assert rows(tmp_path) == [] and capsys.readouterr().out == ""


def tensorboard_events(folder):
    """(file name, step, {tag: value}) of every event, read with the TFRecord framing: length, crc, data, crc."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            yield path.name, event.step, {value.tag: value.simple_value for value in event.summary.value}
            data = data[16 + size :]


def test_tensorboard_gets_the_rows_and_a_purge_point_on_resume(tmp_path):
    for start, steps in ((0, (1, 2, 3)), (2, (3,))):
        with RunLog(tmp_path, LoggingConfig(), total_steps=3, start_step=start) as log:
            for step in steps:
                log.log(step, {"loss": 0.5 * step, "rewards/margins": 2, "eval_loss": math.nan})
    events = list(tensorboard_events(tmp_path / "runs"))
    assert len({name for name, _, _ in events}) == 2
    logged = [(step, values) for _, step, values in events if values]
    assert [step for step, _ in logged] == [1, 2, 3, 3]
    assert set(logged[0][1]) == {"train/loss", "train/rewards/margins", "eval/loss"}
    assert logged[1][1]["train/loss"] == 1.0 and math.isnan(logged[1][1]["eval/loss"])
    assert [step for name, step, values in events if not values and name.endswith("from3") and step] == [3, 3]


TRACKER = """
calls = []
def init(**kwargs):
    if kwargs["name"] == "offline":
        raise RuntimeError("No API key.\\nRun wandb login")
    calls.append(("init", kwargs))
def log(metrics, step): calls.append(("log", metrics, step))
def finish(): calls.append(("finish",))
"""


@pytest.fixture
def tracker(tmp_path, monkeypatch):
    """A stand-in for the wandb package."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(TRACKER)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    yield
    sys.modules.pop("wandb", None)


def test_wandb_gets_every_row(tmp_path, tracker):
    with RunLog(tmp_path / "run7", LoggingConfig(report_to=["wandb"]), total_steps=2) as log:
        log.log(1, {"loss": 1.0, "eval_loss": 2.0})
    expected = [
        ("init", {"project": "jaxpost", "name": "run7"}),
        ("log", {"train/loss": 1.0, "eval/loss": 2.0}, 1),
        ("finish",),
    ]
    assert sys.modules["wandb"].calls == expected


def test_a_tracker_that_cannot_start_is_one_line(tmp_path, tracker):
    with pytest.raises(ConfigError) as caught:
        RunLog(tmp_path, LoggingConfig(report_to=["wandb"], run_name="offline"), total_steps=2)
    assert str(caught.value) == "report_to wandb cannot start: No API key. Run wandb login"


def test_a_missing_tracker_names_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("wandb", "trackio"):
        with pytest.raises(ConfigError, match=rf"pip install 'jaxpost\[{name}\]'"):
            LoggingConfig(report_to=[name])


@pytest.mark.parametrize(
    ("report_to", "expected"),
    [(["tensorboard"], ["tensorboard"]), ("tensorboard", ["tensorboard"]), (["none"], []), ("none", []), ([], [])],
)
def test_report_to_spellings(report_to, expected):
    assert LoggingConfig(report_to=report_to).reporters() == expected


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"report_to": ["tensorbord"]}, ["report_to", "did you mean 'tensorboard'"]),
        ({"report_to": ["none", "tensorboard"]}, ["report_to", "none"]),
        ({"logging_steps": 0}, ["logging_steps", "from 1"]),
        ({"logging_steps": 0.5}, ["logging_steps", "whole"]),
    ],
)
def test_mistakes_name_the_field(fields, words):
    with pytest.raises(ConfigError) as caught:
        LoggingConfig(**fields)
    assert all(word in str(caught.value) for word in words)
