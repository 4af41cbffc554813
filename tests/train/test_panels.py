"""Kinds of metrics, which of their values is best, and where time goes."""

import pytest

from jaxpost.train.panels import PANELS, base_name, best_of, matching, time_shares


def test_evaluations_belong_to_the_panel_of_their_metric():
    names = ["loss", "eval_loss", "eval_other_loss", "loss/value_avg", "aux_loss", "evaluation_time"]
    assert matching(PANELS[0], names) == ["loss", "eval_loss", "eval_other_loss"]
    assert [base_name(name) for name in names] == ["loss"] * 3 + ["loss/value_avg", "aux_loss", "evaluation_time"]
    assert base_name("eval_rewards/f/mean") == "rewards/f/mean" and base_name("eval_unknown") == "unknown"
    assert base_name("eval_mean_token_accuracy") == base_name("eval_other_mean_token_accuracy") == "mean_token_accuracy"


@pytest.mark.parametrize(
    ("name", "best"),
    [
        ("loss", "least"),
        ("eval_loss", "least"),
        ("eval_mean_token_accuracy", "most"),
        ("rewards/margins", "most"),
        ("rewards/f/mean", "most"),
        ("rewards/rejected", ""),
        ("kl", ""),
        ("learning_rate", ""),
        ("something", ""),
    ],
)
def test_which_value_is_best(name, best):
    assert best_of(name) == best


def test_where_time_goes_adds_up_to_all_of_it():
    row = {"step_time": 6.0, "generation_time": 3.0, "reward_time": 0.5, "input_time": 0.5, "host_time": 1.0}
    assert time_shares(row | {"save_time": 4.0}) == {
        "update": 0.2,
        "rollout": 0.3,
        "reward": 0.05,
        "input": 0.05,
        "save": 0.4,
    }
    assert time_shares({"loss": 1.0}) == {} == time_shares({"step_time": float("nan")})
