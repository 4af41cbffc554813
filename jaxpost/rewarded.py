"""`jaxpost evaluate --reward_funcs`: what functions give a model's completions of held-out prompts."""

import json
import sys
from typing import Any

import numpy as np

from jaxpost.answers import Answers, answered, asked, lengths, mean_of, share
from jaxpost.completer import Completer, CompletionsConfig, as_asked
from jaxpost.data.sources import load_rows
from jaxpost.errors import ConfigError
from jaxpost.options import part_of
from jaxpost.reward_model import reward_function
from jaxpost.rl.rewards import RewardFunctionsConfig, Rewards, Scored
from jaxpost.writing import write_lines


def run_rewarded(config: Any) -> dict[str, float]:
    """Write a row a completion with its rewards, and sum these up.

    Args:
        config: an EvaluateConfig.

    Returns:
        The means, by name.

    Raises:
        ConfigError, DataError: a flag, the model, a function or a row cannot be used; nothing is written.
    """
    each = config.num_return_sequences
    if each > 1 and config.temperature == 0:
        raise ConfigError(
            f"num_return_sequences is {each}, but greedy completions of a prompt are all the same; give --temperature"
        )
    rows = load_rows(config.dataset_name, config.dataset_split)
    completer = Completer(config, "evaluate")
    prompts = asked(rows, completer, config.max_new_tokens)
    options = {"dtype": config.dtype, "batch_size": config.batch_size}
    functions = [reward_function(name, completer.tokenizer, **options) for name in config.reward_funcs]
    rewards = Rewards(functions, part_of(config, RewardFunctionsConfig))
    try:
        completer.load()
        sampling, parts, done = part_of(config, CompletionsConfig), [], 0
        for answers in answered(completer, prompts, sampling, each=each, batch_size=config.batch_size):
            scored = rewards(_arguments(answers), len(answers.texts))
            places = range(done, done + len(answers.texts))
            rewards.check(scored, [prompts.rows[place // each] for place in places])
            parts.append((answers, scored))
            done += len(places)
    finally:
        rewards.close()
    scored = Scored.joined([scored for _, scored in parts])
    write_lines(config.output_file, _lines(parts, rewards.names))
    completions = [completion for answers, _ in parts for completion in answers.completions]
    metrics, lines = summary(scored, rewards.names, each)
    for line in [*lines, lengths(completions, config.max_new_tokens)]:
        print(line, file=sys.stderr)
    return metrics


def _arguments(answers: Answers) -> dict[str, list[Any]]:
    """What reward functions are given, as in training."""
    columns = dict(answers.columns)
    prompts = columns.pop("prompt")
    return {
        **columns,
        "prompts": prompts,
        "completions": [as_asked(text, prompt) for text, prompt in zip(answers.texts, prompts, strict=True)],
        "completion_ids": [completion.tokens for completion in answers.completions],
    }


def _lines(parts: list[tuple[Answers, Scored]], names: list[str]) -> list[str]:
    lines = []
    for answers, scored in parts:
        for row, values in zip(answers.rows(), scored.rewards, strict=True):
            given = [None if np.isnan(value) else float(value) for value in values]
            row["rewards"] = dict(zip(names, given, strict=True))
            lines.append(json.dumps(row, ensure_ascii=False, default=str))
    return lines


def summary(scored: Scored, names: list[str], each: int) -> tuple[dict[str, float], list[str]]:
    """What is to be said of rewards, as metrics and in lines.

    Completions of a prompt are alike, so what an interval is of are the means of prompts. Where rewards are 0 or 1,
    pass@k is the share of prompts that one of k completions is right for (Chen et al., 2021, "Evaluating Large Language
    Models Trained on Code", arXiv:2107.03374).

    Args:
        scored: of N completions.
        names: of the functions.
        each: completions of a prompt.
    """
    metrics, lines = {}, []
    for name, values, failed, fault in zip(names, scored.rewards.T, scored.failed.T, scored.faults, strict=True):
        known = values[~np.isnan(values)]
        missing = len(values) - len(known)
        if missing:
            why = f", {int(failed.sum())} of them since it fails: {fault}" if failed.any() else ""
            lines.append(f"{name}: no reward for {missing} of {len(values)} completions{why}")
        if not len(known):
            continue
        by_prompt = [group[~np.isnan(group)] for group in values.reshape(-1, each)]
        by_prompt = [group.astype(float) for group in by_prompt if len(group)]
        means, is_right = [float(group.mean()) for group in by_prompt], bool(np.isin(known, (0, 1)).all())
        metrics[name] = float(np.mean(means))
        if is_right and each == 1:
            lines.append(f"{name} {share(int(known.sum()), len(known), 'completions')}")
            continue
        lines.append(f"{name} {mean_of(means, 'prompts')}")
        if is_right:
            right = sum(bool(group.any()) for group in by_prompt)
            metrics[f"{name}/pass@{each}"] = right / len(by_prompt)
            lines.append(f"{name} pass@{each} {share(right, len(by_prompt), 'prompts')}")
    return metrics, lines
