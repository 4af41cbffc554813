"""`jaxpost evaluate --judge`: how often a reward model finds a model's completions better than others."""

import json
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxpost.answers import Answers, answered, asked, lengths, mean_of, share
from jaxpost.completer import AnswerConfig, Completer, CompletionsConfig, as_asked
from jaxpost.data.chat import encode_prompt
from jaxpost.data.prompts import Prompts
from jaxpost.data.rows import Rows
from jaxpost.data.sources import load_rows
from jaxpost.errors import ConfigError, DataError
from jaxpost.models.families import read_config
from jaxpost.options import option, part_of
from jaxpost.reward_model import open_reward_model, reward_model
from jaxpost.rl.builtin_rewards import text_of
from jaxpost.writing import write_lines


@dataclass(frozen=True, kw_only=True)
class WinRateConfig:
    """What completions are compared with, and by whom."""

    judge: str | None = option(None, "A reward model that finds which completion of a prompt is better.")
    against: str | None = option(None, "Another model, whose completions the judge compares with the model's.")
    against_file: str | None = option(
        None, "Or its completions: rows with a `completion` for each prompt in order, as jaxpost generate writes them."
    )


def run_win_rate(config: Any) -> dict[str, float]:
    """Write a row a prompt with both completions and their scores, and say how often the model's is better.

    Args:
        config: an EvaluateConfig.

    Returns:
        The win rate, in which a tie is half a win, and the mean scores.

    Raises:
        ConfigError, DataError: a flag, a model or a row cannot be used; nothing is written.
    """
    if (config.against is None) == (config.against_file is None):
        raise ConfigError("--judge compares with something: give either --against MODEL or --against_file FILE")
    rows = load_rows(config.dataset_name, config.dataset_split)
    _check_judge(config.judge, rows)
    completer = Completer(config, "evaluate")
    prompts = asked(rows, completer, config.max_new_tokens)
    if config.against_file is not None:
        others, ours = _others(config.against_file, prompts), _said(completer, prompts, config)
    else:
        rival = Completer(config, "evaluate", name=config.against)
        their_prompts = asked(rows, rival, config.max_new_tokens)
        ours = _said(completer, prompts, config)
        others = _said(rival, their_prompts, config).texts
    judge = reward_model(config.judge, "judge", dtype=config.dtype, batch_size=config.batch_size)
    cells = ours.columns["prompt"]
    scores, other_scores = (
        np.array(judge(cells, [as_asked(text, prompt) for text, prompt in zip(texts, cells, strict=True)]))
        for texts in (ours.texts, others)
    )
    wins = np.where(scores == other_scores, 0.5, scores > other_scores)
    write_lines(
        config.output_file,
        (
            json.dumps(
                {**row, "against": other, "score": score, "against_score": other_score, "win": win},
                ensure_ascii=False,
                default=str,
            )
            for row, other, score, other_score, win in zip(
                ours.rows(), others, scores.tolist(), other_scores.tolist(), wins.tolist(), strict=True
            )
        ),
    )
    ties = int(np.sum(wins == 0.5))
    for line in (
        f"win rate {share(float(wins.sum()), len(wins), 'prompts')}; {ties} ties count half",
        f"score {scores.mean():.4g} against {other_scores.mean():.4g}, difference "
        f"{mean_of((scores - other_scores).tolist(), 'prompts')}",
        lengths(ours.completions, config.max_new_tokens),
    ):
        print(line, file=sys.stderr)
    return {"win_rate": float(wins.mean()), "score": float(scores.mean()), "against_score": float(other_scores.mean())}


def _said(completer: Completer, prompts: Prompts, config: Any) -> Answers:
    """The completion of every prompt; the model is let go of."""
    sampling: AnswerConfig = part_of(config, CompletionsConfig)
    parts = list(answered(completer, prompts, sampling, batch_size=config.batch_size))
    completer.unload()
    return Answers(
        prompts.columns,
        [completion for part in parts for completion in part.completions],
        [text for part in parts for text in part.texts],
    )


def _check_judge(path: str, rows: Rows) -> None:
    """Raise now what would be raised once everything has been sampled: a prompt that the judge cannot read."""
    source = open_reward_model(path, "judge")
    tokenizer, size = source.tokenizer(), read_config(source.checkpoint.config, path).vocab_size
    if "prompt" not in rows.column_names:
        raise DataError(f"{rows.name}: no column 'prompt'; columns: {', '.join(rows.column_names)}")
    for number, prompt in enumerate(rows["prompt"]):
        encode_prompt(prompt, tokenizer, vocab_size=size, name=f"{rows.name}, as the judge reads it", row=number)


def _others(path: str, prompts: Prompts) -> list[str]:
    """The completions of a file.

    Raises:
        DataError: they are not those of the prompts.
    """
    rows = load_rows(path, "train")
    if "completion" not in rows.column_names:
        raise DataError(f"against_file {path}: no column 'completion'; columns: {', '.join(rows.column_names)}")
    completions, expected = list(rows["completion"]), prompts.columns["prompt"]
    if len(completions) != len(expected):
        raise DataError(f"against_file {path} has {len(completions)} completions for {len(expected)} prompts")
    if "prompt" in rows.column_names:
        for number, (theirs, ours) in enumerate(zip(rows["prompt"], expected, strict=True)):
            if _plain(theirs) != _plain(ours):
                raise DataError(f"against_file {path}, row {number + 1} completes another prompt than the dataset's")
    for number, completion in enumerate(completions):
        if not isinstance(completion, str | list):
            raise DataError(f"against_file {path}, row {number + 1}: the completion must be text or messages")
    return [text_of(completion) for completion in completions]


def _plain(prompt: Any) -> Any:
    """A prompt without the fields that other rows of its file have and it has not."""
    if isinstance(prompt, str):
        return prompt
    return [{key: value for key, value in message.items() if value is not None} for message in prompt]
