"""`jaxpost report`: what the page says, that it needs nothing else, and what becomes of folders that are not right."""

import json
import math
import os
import re
import socket
from html.parser import HTMLParser

import numpy as np
import pytest

from jaxpost.cli import main
from jaxpost.methods import DPOConfig, SFTConfig, config_yaml
from jaxpost.reporting.charts import short, svg, thinned, ticks
from jaxpost.reporting.runs import Series, names_of, read_run
from jaxpost.rl.report import Recorder
from jaxpost.train.logging import LoggingConfig, RunLog

EVIL = '<script>alert("x")</script>&\u2028'


class Page(HTMLParser):
    """What stands in a page: its texts, the tags with their attributes, and the numbers for its script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.scripts, self._in = [], [], [], None
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._in = tag

    def handle_endtag(self, tag):
        self._in = None

    def handle_data(self, data):
        if self._in == "script":
            self.scripts.append(data)
        elif self._in != "style":
            self.words.append(data)

    def count(self, tag, **wanted):
        return sum(name == tag and wanted.items() <= attributes.items() for name, attributes in self.tags)


def make_run(folder, rows, config=None, total=None):
    with RunLog(folder, config or LoggingConfig(report_to=[]), total_steps=total or len(rows)) as log:
        for step, row in rows:
            log.progress(step, None, None)
            log.log(step, row)
    if config is not None:
        (folder / "config.yaml").write_text(config_yaml(config))
    return folder


def losses(*values):
    return [(step, {"epoch": step / 10, "loss": value}) for step, value in enumerate(values, 1)]


def report(tmp_path, capsys, *runs):
    out = tmp_path / "page.html"
    capsys.readouterr()
    assert main(["report", *map(str, runs), "--output_file", str(out)]) == 0
    return Page(out.read_text(encoding="utf-8")), capsys.readouterr().out


def refused(capsys, code, *words):
    assert main(["report", *map(str, words)]) == code
    error = capsys.readouterr().err
    assert error.startswith("jaxpost: ") and error.count("\n") == 1
    return error


def test_runs_side_by_side(tmp_path, capsys):
    first = make_run(tmp_path / "a", losses(3.0, 1.0, 2.0), SFTConfig(learning_rate=1e-3, report_to=[]))
    second = make_run(tmp_path / "b", losses(3.0, 2.5, 2.25), SFTConfig(learning_rate=1e-4, report_to=[]))
    page, said = report(tmp_path, capsys, first, second)
    assert said == f"{tmp_path / 'page.html'}: 2 runs\n"
    assert "state Done Done method sft sft steps 3 of 3 3 of 3 epochs 0.3 0.3" in page.text
    assert "loss 2 best 1 at step 2 2.25 best 2.25 at step 3" in page.text.replace("\u2028", "")
    assert "Settings that differ a b learning_ rate 0.001 0.0001 All" in page.text
    assert [line["run"] for line in page.data["charts"][0]["lines"]] == [0, 1]
    assert page.data["charts"][0]["lines"][0]["points"] == [[1, 2, 3], [3.0, 1.0, 2.0]]
    assert page.count("input", type="checkbox") == 2 and page.count("figure") == 1


def test_one_run_has_a_chart_for_each_kind_and_the_settings_that_were_changed(tmp_path, capsys):
    row = {"loss": 1.0, "rewards/chosen": 1.0, "rewards/rejected": -1.0, "odd": 2.0}
    config = DPOConfig(beta=0.5, report_to=["none"])
    run = make_run(tmp_path / "a", [(1, row), (1, {"eval_loss": 0.5, "eval_rewards/chosen": 2.0})], config)
    page, _ = report(tmp_path, capsys, run)
    found = [[(line["name"], line["color"], line["dashed"]) for line in each["lines"]] for each in page.data["charts"]]
    assert found == [
        [("loss", 0, False), ("eval_loss", 0, True)],
        [("rewards/chosen", 0, False), ("eval_rewards/chosen", 0, True), ("rewards/rejected", 1, False)],
        [("odd", 0, False)],
    ]
    assert 'Settings that are not the default beta 0.5 report_ to ["none"] All' in page.text
    assert page.count("input") == 0


def test_the_page_needs_nothing_else_and_runs_nothing_of_the_runs(tmp_path, capsys):
    folder = tmp_path / EVIL.replace("/", "_")
    config = SFTConfig(dataset_name=EVIL, report_to=[])
    make_run(folder, [(1, {EVIL: 1.0, "loss": math.nan})], config)
    with (folder / "config.yaml").open("a") as file:
        file.write("hub_token: hf_SECRET\n")
    Recorder(folder, ["f"], 0)(0, {"prompt": [EVIL], "completion": [EVIL], "f": [0.5], "advantage": [0.0]})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    page, said = report(tmp_path, capsys, folder)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("script") == 2 and "alert" not in page.scripts[1]
    assert "<script>alert" not in text and text.count("</script>") == 2
    assert page.text.count("alert(") >= 5
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert not any({"src", "href", "onclick", "onload"} & set(attributes) for _, attributes in page.tags)
    assert "SECRET" not in text
    assert "metrics.jsonl: 1 lines are not whole and left out" in page.text and "1 lines are not whole" in said


def test_what_stopped_a_run_and_where_it_went_on(tmp_path, capsys):
    run = tmp_path / "a"
    for start, end, error in ((0, 2, KeyboardInterrupt()), (2, 3, ValueError("the disk\nis full"))):
        try:
            with RunLog(run, LoggingConfig(report_to=[]), total_steps=9, start_step=start) as log:
                for step in range(start + 1, end + 1):
                    log.progress(step, None, None)
                    log.log(step, {"loss": 1.0, "skipped_steps": step})
                raise error
        except (KeyboardInterrupt, ValueError):
            pass
    page, _ = report(tmp_path, capsys, run)
    assert "state Stopped at step 3: the disk is full steps 3 of 9" in page.text
    assert "went on from step 2 skipped steps 3" in page.text


def test_a_run_is_going_as_long_as_its_process_lives(tmp_path):
    log = RunLog(tmp_path / "a", LoggingConfig(report_to=[]), total_steps=9)
    log.log(4, {"loss": 1.0})
    log.close()  # as a process that is killed
    assert read_run(tmp_path / "a", "a").status[0] == "unknown"
    lock = tmp_path / "a" / ".lock"
    lock.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    assert read_run(tmp_path / "a", "a").status == ("going", "Still going")
    lock.write_text(f"process 99999999 on {socket.gethostname()}\n")
    state, words = read_run(tmp_path / "a", "a").status
    assert state == "stopped" and "after step 4: killed" in words


def test_completions_from_the_least_to_the_most_rewarded(tmp_path, capsys):
    run = make_run(tmp_path / "a", losses(1.0))
    record = Recorder(run, ["f", "g"], 0)
    messages = [[{"role": "user", "content": "two?"}]] * 5
    for step in (0, 4, 8):
        values = {"f": [3.0, 1.0, 5.0, 2.0, 4.0], "g": [0.0, None, 0.0, 0.0, 0.0]}
        texts = [f"answer {n} of {step}" for n in (3, 1, 5, 2, 4)]
        record(step, {"prompt": messages, "completion": texts, **values, "advantage": [0.0] * 5})
    page, _ = report(tmp_path, capsys, run)
    shown = page.text[page.text.index("Completions step 1") :]
    assert re.findall(r"answer \d of \d", shown) == [f"answer {n} of {step}" for step in (0, 8) for n in (1, 3, 5)]
    assert "step 9 3 of 5, by their rewards two? answer 1 of 8 f 1 two? answer 3 of 8 f 3 g 0" in shown


def test_where_time_went_is_of_all_steps(tmp_path, capsys):
    times = [(2, {"loss": 1.0, "step_time": 1.0, "input_time": 0.5}), (10, {"loss": 1.0, "step_time": 2.0})]
    page, _ = report(tmp_path, capsys, make_run(tmp_path / "a", times))
    assert "update 94% input 6%" in page.text  # 2 steps of a second and 8 of two, one second of which waited


def test_a_long_run_is_a_small_page_with_its_extremes(tmp_path, capsys):
    folder = tmp_path / "a"
    folder.mkdir()
    rng = np.random.default_rng(0)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 20_001):
            loss = 50.0 if step == 12_345 else round(rng.random(), 4)
            file.write(json.dumps({"step": step, "loss": loss, "other": step}) + "\n")
    page, _ = report(tmp_path, capsys, folder)
    [line] = page.data["charts"][0]["lines"]
    steps, values = line["points"]
    assert len(steps) <= 400 and steps[0] == 1 and steps[-1] == 20_000 and values[steps.index(12_345)] == 50.0
    assert len(line["mean"][0]) <= 200
    assert (tmp_path / "page.html").stat().st_size < 150_000


def test_what_is_no_run(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "many" / "inner", losses(1.0))
    assert "is no folder" in refused(capsys, 2, tmp_path / "none")
    assert "metrics.jsonl" in refused(capsys, 2, tmp_path / "empty")
    assert "it holds runs: inner" in refused(capsys, 2, tmp_path / "many")
    assert "needs a run" in refused(capsys, 2)
    assert "is a folder" in refused(capsys, 2, tmp_path / "many" / "inner", "--output_file", tmp_path)
    assert "did you mean" in refused(capsys, 2, tmp_path / "many" / "inner", "--outputfile", "a")


def test_runs_without_rows(tmp_path, capsys):
    empty = tmp_path / "empty"
    RunLog(empty, LoggingConfig(report_to=[]), total_steps=2).close()
    assert "has no rows" in refused(capsys, 3, empty)
    page, said = report(tmp_path, capsys, empty, make_run(tmp_path / "a", losses(1.0)))
    assert "metrics.jsonl has no rows yet" in page.text and "empty: metrics.jsonl has no rows yet" in said


def test_files_that_cannot_be_read_are_noted(tmp_path, capsys):
    run = make_run(tmp_path / "a", [*losses(1.0), (2, {"loss": math.inf})])
    (run / "config.yaml").write_text("a: [")
    (run / "completions").mkdir()
    (run / "completions" / "completions_00001.parquet").write_bytes(b"PAR1")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": null, "text": "a", "list": [1], "huge": 1' + "0" * 400 + "}\n")
    page, _ = report(tmp_path, capsys, run)
    assert "config.yaml cannot be read" in page.text and "completions_00001.parquet cannot be read" in page.text
    assert page.data["charts"][0]["lines"][0]["points"] == [[1, 2], [1.0, None]]


def test_names_tell_folders_apart(tmp_path):
    assert names_of([tmp_path / "x" / "out", tmp_path / "y" / "out"]) == ["x/out", "y/out"]
    assert names_of([tmp_path / "x" / "a", tmp_path / "x" / "b"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("low", "high", "whole"), [(0.0, 1.0, False), (-3e-7, 2e-6, False), (1, 3, True), (1, 123_456, True)]
)
def test_ticks_are_round_and_within(low, high, whole):
    found = ticks(low, high, 4, whole=whole)
    assert 2 <= len(found) <= 6 and all(low <= tick <= high for tick in found)
    assert not whole or all(tick == int(tick) for tick in found)


def test_numbers_beside_an_axis():
    assert [short(value) for value in (0, 1.5, 9_999, 20_000, 1.5e6, -2.5e-5)] == [
        *("0", "1.5", "9999", "20k", "1.5M", "-2.5e-5")
    ]


def test_a_gap_breaks_a_line():
    from jaxpost.reporting.charts import Chart, Line

    values = np.array([1.0, math.nan, 2.0, 3.0])
    line = Line(0, "loss", 0, False, Series(np.arange(4), values), None)
    drawn = re.search(r'class="line c0" d="([^"]+)"', svg(Chart("a", "b", True, False, [line]), "c"))[1]
    assert drawn.count("M") == 2 and drawn.count("L") == 1


def test_few_points_stay_as_they_are():
    series = Series(np.arange(10), np.arange(10.0))
    assert thinned(series, 10) is series
