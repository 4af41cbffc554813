"""`jaxpost evaluate --tasks`: the tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

The rules of its `HFLM` are kept: how texts are tokenised and cut, and what ends a completion.
"""

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxpost.completer import AnswerConfig, Completer, LoadConfig, check_least
from jaxpost.data.examples import Example
from jaxpost.data.store import stored
from jaxpost.data.tokenizer import default_template
from jaxpost.errors import ConfigError, DataError, one_line
from jaxpost.objectives.base import Batch
from jaxpost.objectives.logps import score_batch
from jaxpost.objectives.sequences import per_example
from jaxpost.options import nearest, option
from jaxpost.rl.stopping import stopper
from jaxpost.scoring import each_of
from jaxpost.writing import write_lines

LM: Any = importlib.import_module("lm_eval.api.model").LM if find_spec("lm_eval") else object
MAX_GEN_TOKENS = 256  # of a completion for which a task has no limit
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first one counts
DRAWN = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
KEPT = ("results", "groups", "versions", "n-shot", "higher_is_better", "n-samples")


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """Which tasks of lm-evaluation-harness, and how they are asked."""

    tasks: list[str] | None = option(None, "Tasks of lm-evaluation-harness, such as gsm8k; groups too.")
    task_dir: str | None = option(None, "Folder with further tasks, as its YAML files.")
    num_fewshot: int | None = option(None, "Solved examples before each question; by default the task's number.")
    limit: int | None = option(None, "Questions of each task; by default all. A limit is for trying it out.")
    apply_chat_template: bool = option(False, "Ask in the model's chat template.")

    def __post_init__(self) -> None:
        check_least(self, "limit")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ConfigError(f"num_fewshot is {self.num_fewshot}; it must be at least 0")


class JaxpostLM(LM):
    """A model as lm-evaluation-harness asks it, for its `simple_evaluate(model=JaxpostLM("out"), tasks=[...])`.

    Args:
        model: a name or path, or an opened one.
        batch_size: texts that a device reads together, and completions that are decoded together.
        seed: of completions that are not greedy.

    Attributes:
        completer: the model.
    """

    def __init__(self, model: str | Completer, *, batch_size: int = 8, seed: int = 0):
        super().__init__()
        opened = Completer(LoadConfig(model_name_or_path=model), "lm_eval") if isinstance(model, str) else model
        self.completer, self._batch_size, self._seed = opened, batch_size, seed
        self._tokenizer, self._room = opened.tokenizer, opened.max_positions
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if bos is None and eos is None:
            raise ConfigError("the tokenizer has neither a BOS nor an EOS token, which a text without context follows")
        self._prefix: int = eos if bos is None else bos
        self._asked = 0

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability (nats) of each continuation after its context, and whether it is the greedy one."""
        return self._scored([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability (nats) of each text; one that is longer than the model reads, in windows."""
        windows = [list(self._windows(self._encode(request.args[0]))) for request in requests]
        scores = iter(self._scored([window for part in windows for window in part]))
        return [sum(next(scores)[0] for _ in part) for part in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The completion of each context, without the text that ends it."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            contexts = [requests[number].args[0] for number in numbers]
            for number, text in zip(numbers, self._completed(contexts, requests[numbers[0]].args[1]), strict=True):
                texts[number] = text
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as a text; without `add_generation_prompt` the last one is left open."""
        ends = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return self._tokenizer.apply_chat_template(chat_history, tokenize=False, **ends)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template itself."""
        return default_template(self._tokenizer) or "" if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps its requests under."""
        return self.completer.source.name.replace("/", "__")

    def _encode(self, text: str) -> list[int]:
        """With BOS and the like where the tokenizer adds them, unless the text brings it."""
        special = not text.startswith(self._tokenizer.decode(self._prefix))
        return self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both; spaces between them belong to the continuation."""
        if not context:
            ids = self._tokenizer(continuation, add_special_tokens=False, verbose=False)["input_ids"]
            return ([self._prefix], ids) if ids[:1] != [self._prefix] else (ids[:1], ids[1:])
        bare = context.rstrip()
        before, whole = self._encode(bare), self._encode(context + continuation)
        return before, whole[len(before) :]

    def _windows(self, tokens: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """What each token follows, as much as fits: every token is predicted once, and whole windows are read."""
        whole = [self._prefix, *tokens]
        for begin in range(0, len(tokens), self._room):
            end = min(begin + self._room, len(tokens))
            yield whole[max(0, end - self._room) : begin + 1], tokens[begin:end]

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        if not pairs:
            return []
        for _, continuation in pairs:
            if not 0 < len(continuation) <= self._room:
                raise DataError(f"a continuation has {len(continuation)} tokens; the model reads 1 to {self._room}")
        store = stored(self._example(*pair) for pair in pairs)
        options = {"batch_size": self._batch_size, "mesh": self.completer.mesh}
        logps, missed = each_of(store, continuations, self.completer.load(), **options)
        return [(float(logp), bool(count == 0)) for logp, count in zip(logps, missed, strict=True)]

    def _example(self, context: list[int], continuation: list[int]) -> Example:
        tokens = np.array([*context, *continuation][-(self._room + 1) :], np.int32)
        return Example(tokens, np.arange(len(tokens)) >= len(tokens) - len(continuation))

    def _completed(self, contexts: Sequence[str], given: dict[str, Any]) -> list[str]:
        config, until = asked_for(given, self._seed)
        room = self._room - config.max_new_tokens
        if room < 1:
            raise ConfigError(f"a task asks for {config.max_new_tokens} tokens; the model reads {self._room} in all")
        prompts = [np.array((self._encode(context) or [self._prefix])[-room:], np.int32) for context in contexts]
        options = {"stop": stopper(self._tokenizer, until), "batch_size": self._batch_size}
        completions = self.completer.complete(prompts, config, first_request=self._asked, **options)
        self._asked += len(prompts)
        return [_before(self.completer.text(completion.tokens), until) for completion in completions]


def continuations(model: Any, batch: Batch) -> tuple[Array, Array]:
    """Log-probability of each example's targets, and how many of them are not the greedy token; [B, S] each."""
    scores, mask, _ = score_batch(model, batch)
    missed = (mask & (scores.top < 1)).astype(jnp.float32)
    return per_example(scores.logps, batch), per_example(missed, batch)


def asked_for(given: dict[str, Any], seed: int) -> tuple[AnswerConfig, list[str]]:
    """The `generation_kwargs` of a task: how completions are drawn, and the texts before which they end.

    Raises:
        ConfigError: they ask for what there is not.
    """
    given = dict(given)
    until = given.pop("until", None) or []
    until = [until] if isinstance(until, str) else list(until)
    limits = [int(limit) for name in LIMITS if (limit := given.pop(name, None)) is not None]
    temperature = float(given.pop("temperature", None) or 0.0)
    samples = given.pop("do_sample", temperature > 0)
    drawn = {name: value for name in DRAWN if (value := given.pop(name, None)) is not None}
    if given.pop("num_beams", 1) != 1 or given:
        raise ConfigError(f"a task's generation_kwargs ask for {', '.join(given) or 'beams'}, which jaxpost has not")
    drawn["temperature"] = temperature if samples else 0.0
    config = AnswerConfig(max_new_tokens=limits[0] if limits else MAX_GEN_TOKENS, seed=seed, **drawn)
    return config, [text for text in until if text]


def _before(text: str, ends: Sequence[str]) -> str:
    for end in ends:
        text = text.split(end)[0]
    return text


def run_tasks(config: Any) -> None:
    """Ask a model the questions of tasks, print what the harness makes of its answers and write it as JSON.

    Args:
        config: an EvaluateConfig.

    Raises:
        ConfigError, DataError: the harness is not installed, or a flag, a task or the model cannot be used.
    """
    if not find_spec("lm_eval"):
        raise ConfigError("--tasks needs lm-evaluation-harness: pip install 'jaxpost[lm-eval]'")
    harness, tables = (importlib.import_module(f"lm_eval.{name}") for name in ("evaluator", "utils"))
    manager = _tasks(config, importlib.import_module("lm_eval.tasks").TaskManager)
    completer = Completer(config, "evaluate")
    if config.apply_chat_template and default_template(completer.tokenizer) is None:
        raise ConfigError("apply_chat_template: the model has no chat template; leave it out")
    completer.load()
    found = harness.simple_evaluate(
        model=JaxpostLM(completer, batch_size=config.batch_size, seed=config.seed),
        tasks=list(config.tasks),
        task_manager=manager,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        apply_chat_template=config.apply_chat_template,
        log_samples=False,
    )
    write_lines(config.output_file, [json.dumps({name: found[name] for name in KEPT if name in found}, default=str)])
    print(tables.make_table(found), file=sys.stderr)


def _tasks(config: Any, manager_of: Callable[..., Any]) -> Any:
    """The harness's manager, which knows the tasks and can load them.

    Raises:
        ConfigError, DataError: it does not, or cannot; or one runs code that the model has written.
    """
    if config.task_dir is not None and not Path(config.task_dir).is_dir():
        raise ConfigError(f"task_dir: there is no folder {config.task_dir}")
    manager = manager_of(include_path=config.task_dir)
    if not config.tasks:
        raise ConfigError("--tasks needs the name of a task")
    for name in config.tasks:
        if name not in manager.all_tasks:
            raise ConfigError(f"tasks: there is no task {name!r}{nearest(name, manager.all_tasks)}")
    try:
        loaded = manager.load(list(config.tasks))
    except Exception as error:  # the harness and the datasets that it fetches raise whatever they do
        raise DataError(f"tasks: they cannot be loaded ({one_line(error)})") from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(f"tasks: {name} runs code that the model writes, which jaxpost leaves to the harness")
    return manager
