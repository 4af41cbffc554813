"""The value model of an actor-critic method: loaded, or made of what the policy starts from."""

import os
from typing import Any

from jax.sharding import Mesh

from jaxpost.errors import ConfigError
from jaxpost.models.actor_critic import ActorCritic, as_copy, beside, on_trunk, with_adapter
from jaxpost.models.adapters import active_config
from jaxpost.models.hf import place
from jaxpost.models.lora_config import LoraConfig
from jaxpost.models.pretrained import Source, named, open_source
from jaxpost.models.transformer import Decoder


def load_value_model(
    policy: Decoder,
    value_model: str | os.PathLike[str] | Decoder | None,
    args: Any,
    mesh: Mesh,
    *,
    lora: LoraConfig | None,
    tokenizer: Any,
    notes: list[str],
) -> ActorCritic:
    """The policy with its value model.

    Args:
        policy: loaded.
        value_model: a reward model to start from, or its name; by default what the config says.
        args: the run's config.
        mesh: where its weights go.
        lora: the adapter that is trained, None for none that is new.
        tokenizer: of the policy.
        notes: for the user; says what the value model starts from.

    Raises:
        ConfigError: it cannot be loaded or made, or cannot read what the policy writes.
    """
    lora = active_config(policy) if lora is None else lora
    given = args.value_model_path if value_model is None else value_model
    if given is not None and args.value_model != "copy":
        raise ConfigError(f"a value model is given, and value_model is {args.value_model}; leave one of them out")
    if args.value_model == "trunk":
        notes.append("the value model is a head of zeros on the policy's hidden states")
        return on_trunk(policy)
    if args.value_model == "adapter":
        if lora is None:
            raise ConfigError("value_model adapter shares the base of the policy's adapter; add --use_peft")
        notes.append("the value model is an adapter of its own on the policy's base, with a head of zeros")
        return with_adapter(policy, lora, seed=args.seed + 1)
    if isinstance(given, Decoder):
        if given.head_kind != "reward":
            raise ConfigError('the given value model has no score; load it with from_pretrained(path, head="reward")')
        notes.append("the value model starts from the given one")
        return beside(policy, _fitting(place(given, args.compute(), mesh), "the given value model", policy))
    source, name = None, given
    if given is not None:
        source = open_source(named(given, "value_model"))
        if not source.has_trained_head("reward"):
            raise ConfigError(f"value_model_path: {given} has no trained reward head; leave it out for a new one")
        if not reads_alike(source, tokenizer):
            raise ConfigError(
                f"value_model_path: {given} has another vocabulary than the policy; a value model reads its tokens"
            )
    elif args.reward_model_path is not None:
        source, name = open_source(args.reward_model_path), args.reward_model_path
        source = source if reads_alike(source, tokenizer) else None
    if source is None:
        notes.append("the value model starts as a copy of the policy, with a head of zeros")
        return as_copy(policy)
    notes.append(f"the value model starts from {name}")
    options = {"dtype": args.dtype, "compute": args.compute(), "mesh": mesh}
    model = source.load(head="reward", allow_nonfinite=args.allow_nonfinite_weights, **options)
    return beside(policy, _fitting(model, str(name), policy))


def reads_alike(source: Source, tokenizer: Any) -> bool:
    """Whether a model's tokenizer gives texts the same ids."""
    return source.tokenizer().get_vocab() == tokenizer.get_vocab()


def _fitting(model: Decoder, name: str, policy: Decoder) -> Decoder:
    """The model, if it can read every token of the policy."""
    rows, needed = model.config.vocab_size, policy.config.vocab_size
    if rows < needed:
        raise ConfigError(f"{name} has {rows} embedding rows, the policy {needed}; a value model reads the same tokens")
    return model
