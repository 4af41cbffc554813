"""A policy with a value model beside it, and how the two share what they have in common.

Modules may hold the same Variables: what is shared is one array in memory, in the train state and on the way to the
optimizer. What is trained of a value model, its adapter aside, is told by a type of its own.
"""

import os
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from jaxpost.errors import ConfigError
from jaxpost.models.adapters import active_config, attach, merge_adapter
from jaxpost.models.export import save_pretrained
from jaxpost.models.layers import Head
from jaxpost.models.lora import ADAPTERS, Adapter, LoRAParam, trainable_filter
from jaxpost.models.lora_config import LoraConfig
from jaxpost.models.lora_init import mesh_of, placed
from jaxpost.models.peft import save_adapter
from jaxpost.models.quant import Quantized, dequantize
from jaxpost.models.transformer import Decoder
from jaxpost.options import Group, check_choices, option

VALUE_MODELS = ("copy", "trunk", "adapter")


class ValueParam(nnx.Param):
    """What is trained of a value model beside an adapter of its own."""


@dataclass(frozen=True, kw_only=True)
class ValueModelConfig:
    """What says how good a state is."""

    help_group = Group.VALUE_MODEL

    value_model: str = option(
        "copy",
        "Value model: copy (a model of its own), trunk (a head on the policy's hidden states, whose gradient goes "
        "on into the policy) or adapter (with use_peft: an adapter of its own on the policy's base).",
        choices=VALUE_MODELS,
    )
    value_model_path: str | None = option(
        None,
        "What a value model of its own starts from: a reward model with the policy's vocabulary; by default that of "
        "reward_model_path where it has it, else a copy of the policy with a head of zeros.",
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if self.value_model_path is not None and self.value_model != "copy":
            raise ConfigError(
                f"value_model_path is what a copy starts from, but value_model is {self.value_model}; "
                "leave one of them out"
            )


class ValueHead(nnx.Module):
    """The part of a value model that the policy does not have, where it reads the policy's hidden states."""

    def __init__(self, head: Head):
        self.head = head

    def score(self, h: Float[Array, "*rows D"]) -> Float[Array, "*rows"]:
        """Values of hidden states, float32."""
        return self.head(h)[..., 0]


class ActorCritic(nnx.Module):
    """A policy with its value model; to an objective it is the policy, which also has `values`."""

    def __init__(self, policy: Decoder, critic: "Decoder | ValueHead"):
        self.policy = policy
        self.critic = critic

    def hidden(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], segments: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """As the policy's."""
        return self.policy.hidden(tokens, positions, segments)

    def unembed(self, h: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """As the policy's."""
        return self.policy.unembed(h)

    def unembedding(self) -> jax.tree_util.Partial:
        """As the policy's."""
        return self.policy.unembedding()

    def score(self, h: Float[Array, "*rows D"]) -> Float[Array, "*rows"]:
        """Values of the value model's hidden states, float32."""
        return self.critic.score(h)

    def values(
        self,
        h: Float[Array, "B T D"],
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segments: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B T"], Float[Array, ""]]:
        """The value of having read each token, and the load-balancing loss of the value model's own routers.

        `h` is what the policy makes of the same tokens.
        """
        if isinstance(self.critic, ValueHead):
            return self.critic.score(h), jnp.zeros(())
        own, balance = self.critic.hidden(tokens, positions, segments)
        return self.critic.score(own), balance


def policy_of(model: Any) -> Any:
    """The policy, of a model that may have a value model beside."""
    return model.policy if isinstance(model, ActorCritic) else model


def trainable_of(model: Any) -> Any:
    """The nnx filter of what is trained of a policy and its value model; see `lora.trainable_filter`."""
    if not isinstance(model, ActorCritic):
        return trainable_filter(model)
    return nnx.Any(trainable_filter(model.policy), ValueParam, LoRAParam)


def on_trunk(policy: Decoder) -> ActorCritic:
    """A value model that is a head of zeros on the policy's hidden states."""
    head = _new_head(policy)
    head.kernel = ValueParam(head.kernel[...])
    return ActorCritic(policy, ValueHead(head))


def with_adapter(policy: Decoder, lora: LoraConfig, *, seed: int) -> ActorCritic:
    """A value model that is an adapter of its own, with a head that starts as zeros, on the policy's base.

    What is trained of the policy's adapter in the place of a whole head is not the value model's.
    """
    kept = [name for name in lora.modules_to_save or () if name != "lm_head"]
    return ActorCritic(policy, attach(shared(policy), replace(lora, modules_to_save=[*kept, "score"]), seed=seed))


def as_copy(policy: Decoder) -> ActorCritic:
    """A value model of its own that starts as the policy, without its adapters, with a head of zeros.

    Raises:
        ConfigError: the policy's kernels are in few bits, in which a copy of them could not be trained.
    """
    if any(isinstance(module, Quantized) for _, module in nnx.iter_modules(policy)):
        raise ConfigError("value_model copy trains a whole model, not one in few bits; give --value_model adapter")
    graphdef, weights = nnx.split(shared(policy))
    return beside(policy, nnx.merge(graphdef, jax.tree.map(jnp.copy, weights)))


def beside(policy: Decoder, critic: Decoder) -> ActorCritic:
    """A value model of its own, which is trained as a whole; an adapter that it has is merged into it."""
    critic = critic if critic.adapters is None else merge_adapter(critic)
    for _, module in nnx.iter_modules(critic):
        for name, value in list(vars(module).items()):
            if isinstance(value, nnx.Param):
                setattr(module, name, ValueParam(value[...]))
    return ActorCritic(policy, critic)


def save_critic(model: ActorCritic, path: str | os.PathLike[str], base: tuple[str, str | None], tokenizer: Any) -> None:
    """Write the value model as a folder that `from_pretrained(path, head="reward")` loads.

    A head on the policy's hidden states is written with all of the policy, an adapter of which is merged.
    """
    if isinstance(model.critic, ValueHead):
        merged = dequantize(merge_adapter(model.policy), model.policy.compute.dtype)
        save_pretrained(shared(merged, model.critic.head), tokenizer, path)
    elif active_config(model.critic) is None:
        save_pretrained(model.critic, tokenizer, path)
    else:
        save_adapter(model.critic, path, base[0], revision=base[1], tokenizer=tokenizer)


def shared(policy: Decoder, head: Head | None = None) -> Decoder:
    """A reward model on the policy's own Variables, without its adapters; its head is new and gives 0 unless given."""
    model = nnx.eval_shape(
        lambda: Decoder(policy.config, head="reward", compute=policy.compute, rngs=nnx.Rngs(0)),
    )
    _share(policy, model)
    model.head = nnx.data(_new_head(policy) if head is None else head)
    return model


def _share(source: nnx.Module, target: nnx.Module) -> None:
    """Let a module hold what another one of the same shape does, its adapters and its head aside."""
    for name, value in list(vars(source).items()):
        if isinstance(value, nnx.Variable | Quantized):
            setattr(target, name, value)
        elif isinstance(value, nnx.Module) and not isinstance(value, Adapter) and name not in (ADAPTERS, "head"):
            _share(value, getattr(target, name))


def _new_head(policy: Decoder) -> Head:
    """A head of one output that gives 0, in the dtype of the policy's embedding."""
    head = nnx.eval_shape(lambda: Head(policy.config.embed_dim, 1, rngs=nnx.Rngs(0)))
    dtype = policy.embed.embedding[...].dtype
    zeros = placed(lambda: {"kernel": jnp.zeros((policy.config.embed_dim, 1), dtype)}, "head", mesh_of(policy))
    head.kernel = nnx.Param(zeros["kernel"])
    return head
