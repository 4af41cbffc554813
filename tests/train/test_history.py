"""When a run was at work, as its folder tells it."""

import json

from jaxpost.errors import PreemptedError
from jaxpost.train.history import History, sessions
from jaxpost.train.logging import LoggingConfig, RunLog

QUIET = LoggingConfig(report_to=[])


def work(folder, start, end, error=None, total=10):
    try:
        with RunLog(folder, QUIET, total_steps=total, start_step=start) as log:
            for step in range(start + 1, end + 1):
                log.progress(step, None, None)
            if error is not None:
                raise error
    except BaseException as caught:
        assert caught is error


def test_each_session_says_where_and_why_it_ended(tmp_path):
    work(tmp_path, 0, 4, PreemptedError("told to stop at step 4,\nwhich is saved"))
    work(tmp_path, 4, 6, KeyboardInterrupt())
    work(tmp_path, 5, 10)
    found = sessions(tmp_path)
    assert [(one.start, one.step, one.total, one.config) for one in found] == [
        (0, 4, 10, "LoggingConfig"),
        (4, 6, 10, "LoggingConfig"),
        (5, 10, 10, "LoggingConfig"),
    ]
    assert [one.why for one in found] == ["told to stop at step 4, which is saved", "interrupted", "done"]
    assert all(one.ended >= one.began > 1.7e9 for one in found)


def test_a_killed_session_has_no_end(tmp_path):
    History(tmp_path, 0, 10, "SFTConfig").progress(3)
    work(tmp_path, 2, 10)
    assert [(one.start, one.ended is None, one.why) for one in sessions(tmp_path)] == [
        (0, True, ""),
        (2, False, "done"),
    ]


def test_a_fresh_run_forgets_and_a_finished_one_that_is_asked_again_adds_nothing(tmp_path):
    work(tmp_path, 0, 3, ValueError())
    work(tmp_path, 0, 10)
    before = (tmp_path / "history.jsonl").read_text()
    work(tmp_path, 10, 10)
    assert (tmp_path / "history.jsonl").read_text() == before
    [one] = sessions(tmp_path)
    assert (one.step, one.why) == (10, "done")


def test_an_error_without_words_has_its_name(tmp_path):
    work(tmp_path, 0, 1, ZeroDivisionError())
    assert sessions(tmp_path)[0].why == "ZeroDivisionError"


def test_torn_and_foreign_lines_are_no_sessions(tmp_path):
    good = {"began": 1.8e9, "start": 0, "total": 5, "config": "SFTConfig"}
    lines = [
        "[]",
        '{"ended": 1}',
        '{"began": "soon"}',
        json.dumps(good),
        '{"ended": 2, "step": null, "why": ""}',
        '{"e',
    ]
    (tmp_path / "history.jsonl").write_text("\n".join(lines))
    assert [(one.start, one.ended) for one in sessions(tmp_path)] == [(0, None)]
    assert sessions(tmp_path / "none") == []
