"""What a terminal shows of a run: the latest metrics, where time goes, a completion now and then."""

import io
import math

import pytest
from rich.console import Console

from jaxpost.train import screen
from jaxpost.train.logging import LoggingConfig, RunLog
from jaxpost.train.screen import number, plain_text

TIMES = {"step_time": 4.0, "generation_time": 1.0, "input_time": 1.0, "save_time": 1.0}
RATES = {"tokens_per_second": 800.0, "device_tokens_per_second": 100.0, "mfu": 0.412}


def lines(width, height=24, rows=12, extra=None, sample=None):
    """The last picture before the end, as lines."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)
    bar = screen.Bar(console, "run", 100, 0)
    for step in range(1, rows + 1):
        bar.log(
            step,
            {"learning_rate": 1e-5, "loss": 1.0 / step, "kl": 0.5, "other": 3.0, **TIMES, **RATES, **(extra or {})},
        )
    if sample is not None:
        bar.sample(*sample)
    return picture(bar, width, height).splitlines()


def picture(bar, width=80, height=24):
    view = bar._view()
    bar.close()
    plain = Console(file=io.StringIO(), width=width, height=height)
    plain.print(view)
    return plain.file.getvalue()


def test_metrics_stand_in_the_order_of_their_panels_with_last_and_mean():
    shown = lines(80)
    assert [line.split()[0] for line in shown[1:4]] == ["loss", "learning_rate", "kl"]
    assert shown[0].split() == ["metric", "last", "mean", "of", "10"]
    last, mean, trend = shown[1].split()[1:]
    assert (last, mean) == ("0.08333", f"{sum(1 / step for step in range(3, 13)) / 10:.4g}")
    assert trend[0] == "█" and trend[-1] == "▁" and len(trend) == 10
    assert shown[4] == "100 tokens/s/device  MFU 41.2%  update 40%  rollout 20%  input 20%  save 20%"
    assert shown[5].startswith("run ") and len(shown) == 6


@pytest.mark.parametrize("width", [50, 80, 120, 160, 240])
def test_nothing_is_wider_than_the_terminal(width):
    many = {f"rewards/a_function_with_a_rather_long_name_{i}/mean": 1e9 + i for i in range(30)}
    shown = lines(width, extra=many, sample=("a question " * 50, "an answer " * 90, {"right": 1.0}))
    assert max(map(len, shown)) <= width
    assert len(shown) <= 9 + 2 + 1 + 4 + 2  # half of the height, the times, the question, the answer, the bar
    blocks = shown[0].count("last")
    assert blocks == max(1, width // 78)


def test_a_small_terminal_has_the_bar_alone():
    assert len(lines(80, height=8)) == 1
    assert len(lines(40)) == 1


def test_a_completion_is_shown_with_its_rewards_and_stays_for_a_while(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24, color_system=None)
    bar = screen.Bar(console, None, 10, 0)
    bar.log(1, {"loss": 1.0})

    bar.sample([{"role": "user", "content": "two\n and [two]?"}], "it is \x1b[31mfour", {"right": 1.0, "short": -0.25})
    clock[0] += 1
    bar.sample("too", "early", {})
    assert "two and [two]?\nright 1  short -0.25  it is [31mfour\n" in picture(bar)
    clock[0] += 10
    bar.sample("another", "text", {})
    assert "four" not in (shown := picture(bar)) and "another\n" in shown
    assert "another" not in picture(bar)  # the run has ended


def test_plain_lines_show_no_completion(tmp_path, capsys):
    with RunLog(tmp_path, LoggingConfig(report_to=[]), total_steps=2) as log:
        log.sample("a", "b", {"c": 1.0})
    assert capsys.readouterr().out == ""


def test_odd_values_have_a_place():
    [line] = [line for line in lines(80, rows=3, extra={"loss": math.nan}) if line.startswith("loss")]
    assert line.split() == ["loss", "nan", "nan", "▄▄▄"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.123456, "0.1235"), (1234.5, "1,234.5"), (123456, "123,456"), (1e9, "1e+09"), (5e-6, "5e-06")]
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_texts_of_one_line():
    assert plain_text("a\r\n\tb\x07") == "a b"
    assert plain_text(["a", {"role": "user", "content": None}]) == "a None"
