"""Adapters against PEFT, live, both ways: logits, gradients, merged weights, files and initial values."""

import copy
import dataclasses
import json
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxpost import from_pretrained, save_pretrained
from jaxpost.models.adapters import (
    active_parts,
    attach,
    keep_reference,
    merge_adapter,
    reference_view,
    set_adapter,
    without_adapters,
)
from jaxpost.models.families import FAMILIES, read_config
from jaxpost.models.lora import LoRAParam, trainable_filter, view
from jaxpost.models.lora_config import LoRAArguments, LoraConfig, as_lora_config
from jaxpost.models.lora_targets import choose, targets_of
from jaxpost.models.peft import load_adapter, save_adapter
from tests.parity.family_configs import CONFIGS
from tests.parity.test_families import make_theirs, quick_jit, relative

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")
pytestmark = pytest.mark.parity


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PLAIN = {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama-biases", {**PLAIN, "lora_dropout": 0.1}),
    "default_rslora": ("qwen2-tied", {"r": 4, "use_rslora": True, "init_lora_weights": "gaussian"}),
    "dora": ("llama-biases", {**PLAIN, "use_dora": True}),
    "all_linear": ("gemma2-caps", {"r": 3, "target_modules": "all-linear", "exclude_modules": ["mlp.up_proj"]}),
    "regex": ("olmo2-untied", {"r": 4, "target_modules": r"model\.layers\.[02]\.(self_attn|mlp)\.(q|up|down)_proj"}),
    "layers": ("granite-untied", {**PLAIN, "layers_to_transform": [0, 2]}),
    "one_layer_dora": ("smollm3-tied", {**PLAIN, "layers_to_transform": [1], "use_dora": True}),
    "patterns": (
        "mistral-window",
        {**PLAIN, "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 5}, "alpha_pattern": {"v_proj": 9}},
    ),
    "saved": ("llama-biases", {**PLAIN, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "saved_tied": ("llama-tied", {**PLAIN, "modules_to_save": ["embed_tokens"]}),
    "saved_tied_both": ("gemma-tied", {**PLAIN, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "embedding_and_head": ("gemma3_text-untied", {"r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "embedding_dora_tied": ("qwen2-tied", {"r": 4, "target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "fused": ("phi3-window", {"r": 4, "target_modules": "all-linear"}),
    "fused_dora_rslora": ("phi3-tied", {"r": 4, "target_modules": "all-linear", "use_dora": True, "use_rslora": True}),
    "moe_attention": ("qwen3_moe-plain", PLAIN),
    "moe_all_linear": ("qwen3_moe-normalized", {"r": 4, "target_modules": "all-linear"}),
    "moe_shared": ("qwen2_moe-plain", {"r": 1, "lora_alpha": 2, "target_modules": "all-linear"}),
    "moe_parameters": (
        "qwen2_moe-normalized",
        {"r": 3, "target_modules": ["v_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "moe_former_names": ("mixtral-untied", {"r": 3, "target_modules": ["w1", "w2", "w3", "gate", "q_proj"]}),
    "moe_down": ("mixtral-tied", {"r": 3, "target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}),
}
BOTH_OFF = ["plain", "saved_tied_both", "moe_down"]
TOKENS = np.random.default_rng(0).integers(3, 301, (2, 14)).astype(np.int32)
WEIGHT = np.random.default_rng(1).normal(size=(2, 14, 301)).astype(np.float32)


class Case(NamedTuple):
    """A PEFT model with a random adapter, and the folders of its base and its adapter."""

    theirs: Any
    base: Any
    adapter: Any
    settings: dict[str, Any]


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """The folder of a random transformers model, by the name of its config; each is written once."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            make_theirs(name).save_pretrained(folders[name])
        return folders[name]

    return folder


def their_base(folder):
    from transformers import AutoModelForCausalLM

    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def randomize(theirs):
    """Far from where adapters start, so that nothing is 0 and every number counts."""
    torch.manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            noise = 0.3 * torch.randn_like(parameter)
            with torch.no_grad():
                parameter.copy_(parameter * (1 + noise) if "magnitude" in name else parameter + noise)


@pytest.fixture(scope="session")
def case(request, base_folder, tmp_path_factory):
    """Pytest orders the tests by it, so that each case is built once."""
    name, settings = CASES[request.param]
    base, adapter = base_folder(name), tmp_path_factory.mktemp("adapter")
    config = peft.LoraConfig(task_type="CAUSAL_LM", **copy.deepcopy(settings))
    theirs = peft.get_peft_model(their_base(base), config).eval()
    randomize(theirs)
    theirs.save_pretrained(adapter)
    return Case(theirs, base, adapter, settings)


every_case = pytest.mark.parametrize("case", CASES, indirect=True)


@quick_jit
def our_logits(model):
    return model(jnp.asarray(TOKENS))


def their_logits(theirs):
    with torch.no_grad():
        return theirs(torch.tensor(TOKENS).long()).logits.numpy()


def loaded(base, adapter):
    """An adapter's folder as PEFT loads it on a base."""
    return peft.PeftModel.from_pretrained(their_base(base), adapter).eval()


@every_case
def test_their_adapter_computes_the_same_here(case):
    ours = load_adapter(from_pretrained(case.base), case.adapter)
    assert relative(np.asarray(our_logits(ours)), their_logits(case.theirs)) < 1e-4


@pytest.mark.parametrize("case", BOTH_OFF, indirect=True)
def test_switched_off_it_is_the_base(case):
    ours = load_adapter(from_pretrained(case.base), case.adapter)
    off = np.asarray(our_logits(without_adapters(ours)))
    with case.theirs.disable_adapter():
        assert relative(off, their_logits(case.theirs)) < 1e-4
    assert np.array_equal(off, np.asarray(our_logits(from_pretrained(case.base))))
    assert relative(off, their_logits(case.theirs)) > 1e-2


@every_case
def test_it_computes_the_same_there_after_a_round_trip_and_its_config_survives(case, tmp_path):
    ours = load_adapter(from_pretrained(case.base), case.adapter)
    save_adapter(ours, tmp_path, str(case.base))
    assert relative(their_logits(loaded(case.base, tmp_path)), their_logits(case.theirs)) < 1e-4
    before, after = (json.loads((folder / "adapter_config.json").read_text()) for folder in (case.adapter, tmp_path))
    for fields in (before, after):
        for name in ("target_modules", "target_parameters", "modules_to_save"):
            fields[name] = sorted(fields[name] or [])
    is_fused = "phi3" in case.theirs.config.model_type or any("gate_up" in name for name in after["target_parameters"])
    patterns = {name: {} for name in ("rank_pattern", "alpha_pattern")} if is_fused else {}
    assert {**after, **patterns} == {**before, **patterns}
    if not is_fused:
        expected, got = (load_file(folder / "adapter_model.safetensors") for folder in (case.adapter, tmp_path))
        assert got.keys() == {name for name in expected if not name.endswith(".base_layer.weight")}
        assert all(np.array_equal(got[name], expected[name]) for name in got)


@every_case
def test_our_adapter_computes_the_same_there(case, tmp_path):
    ours = attach(from_pretrained(case.base), LoraConfig(**case.settings), seed=3)
    start = np.asarray(our_logits(without_adapters(ours)))
    assert relative(np.asarray(our_logits(ours)), start) < 1e-5
    train_a_little(ours)
    expected = np.asarray(our_logits(ours))
    assert relative(expected, start) > 1e-2
    save_adapter(ours, tmp_path, str(case.base))
    assert relative(their_logits(loaded(case.base, tmp_path)), expected) < 1e-4
    assert relative(np.asarray(our_logits(from_pretrained(tmp_path))), expected) < 1e-5


def train_a_little(model):
    """Add noise to all that is trained, where it has an effect."""
    rng = np.random.default_rng(2)
    for part in active_parts(model).values():
        for name in ("lora_a", "lora_b", "magnitude", "kernel"):
            variable = vars(part).get(name)
            if variable is not None:
                noise = 0.3 * rng.normal(size=variable.shape)
                noise = noise * variable[...] if name == "magnitude" else noise * in_use(part, name)
                setattr(part, name, LoRAParam(jnp.asarray(variable[...] + noise, jnp.float32)))


def in_use(part, name):
    """1 for entries within a layer's rank, 0 beyond."""
    if name == "kernel":
        return 1
    ranks = np.asarray(part.ranks).reshape(*part.scale.shape, *[1] * (part.lora_a.ndim - part.scale.ndim))
    counts = np.arange(max(part.ranks)) < ranks
    return counts if name == "lora_a" else counts.swapaxes(-1, -2)


@every_case
def test_merged_it_is_what_they_merge(case, tmp_path):
    ours = load_adapter(from_pretrained(case.base), case.adapter)
    merged = merge_adapter(ours)
    assert relative(np.asarray(our_logits(merged)), np.asarray(our_logits(ours))) < 1e-5
    save_pretrained(merged, None, tmp_path / "ours")
    exported = their_base(tmp_path / "ours")
    assert relative(their_logits(exported), their_logits(case.theirs)) < 1e-4
    if not (
        ours.config.tie_embeddings and case.settings.get("use_dora") and "lm_head" in case.settings["target_modules"]
    ):
        # PEFT adds what both have learnt to the one tensor that a tied embedding and head share.
        expected = copy.deepcopy(case.theirs).merge_and_unload().state_dict()
        got = exported.state_dict()
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert relative(got[name].numpy(), tensor.numpy()) < 1e-5, name


@every_case
def test_gradients(case, tmp_path):
    ours = load_adapter(from_pretrained(case.base), case.adapter)
    graphdef, trained, others = nnx.split(ours, trainable_filter(ours), ...)

    def total(trained, others):
        return jnp.sum(nnx.merge(graphdef, trained, others)(jnp.asarray(TOKENS)) * WEIGHT)

    case.theirs.zero_grad()
    (case.theirs(torch.tensor(TOKENS).long()).logits * torch.tensor(WEIGHT)).sum().backward()
    expected = {name: parameter.grad for name, parameter in case.theirs.named_parameters() if parameter.requires_grad}
    holder = copy.deepcopy(case.theirs)
    with torch.no_grad():
        for name, parameter in holder.named_parameters():
            if name in expected:
                parameter.copy_(expected[name])
    holder.save_pretrained(tmp_path)
    compare_gradients(
        ours, quick_jit(jax.grad(total))(trained, others), load_adapter(from_pretrained(case.base), tmp_path)
    )


def compare_gradients(model, gradient, theirs):
    """Theirs hang on a model as if they were an adapter; the A of a module of HF's is the A of all our parts of it."""
    holder = view(model)
    nnx.update(holder, gradient)
    ours, expected = active_parts(holder), active_parts(theirs)
    assert ours.keys() == expected.keys()
    names = {target.place: target.name for target in targets_of(model.config, model.head_kind)}
    for place, part in ours.items():
        for kind in ("lora_a", "lora_b", "magnitude", "kernel"):
            variable = vars(part).get(kind)
            if variable is not None:
                together = [other for other in ours if names[other] == names[place]] if kind == "lora_a" else [place]
                got = sum(np.asarray(vars(ours[each])[kind][...]) for each in together)
                wanted = np.asarray(vars(expected[place])[kind][...])
                if kind != "kernel" and part.scale.ndim:
                    left_out = np.asarray(part.ranks) == 0
                    assert not np.any(got[left_out])
                    got, wanted = got[~left_out], wanted[~left_out]
                assert relative(got, wanted) < 1e-4, (place, kind)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_begins_with_a_part_of_the_base(init, rslora, base_folder, tmp_path):
    base = base_folder("llama-biases")
    config = partial(peft.LoraConfig, task_type="CAUSAL_LM", use_rslora=rslora, init_lora_weights=init, **PLAIN)
    theirs = peft.get_peft_model(their_base(base), config()).eval()
    theirs.save_pretrained(tmp_path / "new")
    ours, new = attach(from_pretrained(base), config()), load_adapter(from_pretrained(base), tmp_path / "new")
    for place, part in active_parts(new).items():
        a, b = (np.asarray(variable[...]) for variable in (part.lora_a, part.lora_b))
        mine = active_parts(ours)[place]
        signs = np.sign(np.sum(a * np.asarray(mine.lora_a[...]), axis=-2, keepdims=True))
        assert relative(np.asarray(mine.lora_a[...]) * signs, a) < 1e-3
        assert relative(np.asarray(mine.lora_b[...]) * signs.swapaxes(-1, -2), b) < 1e-3
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "trained")
    expected = their_logits(theirs)
    ours = load_adapter(from_pretrained(base), tmp_path / "trained")
    assert relative(np.asarray(our_logits(ours)), expected) < 1e-4
    save_adapter(ours, tmp_path / "plain", str(base))
    assert relative(their_logits(loaded(base, tmp_path / "plain")), expected) < 1e-4
    fields = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert fields["r"] == 8 and fields["init_lora_weights"] is True and not fields["rank_pattern"]


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_initial_values_are_distributed_alike(init, base_folder):
    base = base_folder("llama-biases")
    config = partial(peft.LoraConfig, r=16, target_modules=["q_proj", "down_proj"], init_lora_weights=init)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(their_base(base), config())
    parts = active_parts(attach(from_pretrained(base), config(), seed=1))
    for place, end in (("layers.attention.query.adapter", "q_proj"), ("layers.mlp.down.adapter", "down_proj")):
        names = f"{end}.lora_A.default.weight"
        expected = torch.cat([p.flatten() for n, p in theirs.named_parameters() if n.endswith(names)]).detach().numpy()
        got = np.asarray(parts[place].lora_a[...]).ravel()
        assert got.size == expected.size > 1500 and not np.any(parts[place].lora_b[...])
        both = np.sort(np.concatenate([got, expected]))
        shares = [np.searchsorted(np.sort(sample), both, side="right") / sample.size for sample in (got, expected)]
        # Kolmogorov and Smirnov: two samples of one distribution are farther apart once in a thousand times.
        assert np.abs(shares[0] - shares[1]).max() < 1.95 * np.sqrt(2 / got.size)
        if init is True:
            bound = 1 / np.sqrt(parts[place].lora_a.shape[-2])
            assert np.abs(got).max() <= bound * (1 + 1e-6) and np.abs(got).max() > 0.98 * bound


def test_a_reward_model(base_folder, tmp_path):
    from transformers import AutoModelForSequenceClassification

    base = base_folder("llama-biases")
    options = {"num_labels": 1, "attn_implementation": "eager", "pad_token_id": 0}
    theirs = AutoModelForSequenceClassification.from_pretrained(base, **options)
    config = peft.LoraConfig(task_type="SEQ_CLS", use_dora=True, **PLAIN)
    theirs = peft.get_peft_model(theirs, config).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = their_logits(theirs)[:, 0]
    ours = load_adapter(from_pretrained(base, head="reward"), tmp_path / "theirs")
    assert relative(np.asarray(our_logits(ours))[:, -1], expected) < 1e-4
    save_adapter(ours, tmp_path / "ours", str(base))
    again = AutoModelForSequenceClassification.from_pretrained(base, **options)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "ours").eval()
    assert relative(their_logits(again)[:, 0], expected) < 1e-4
    found = from_pretrained(tmp_path / "ours", head="reward")
    assert relative(np.asarray(our_logits(found))[:, -1], expected) < 1e-4


@pytest.mark.parametrize("kind", FAMILIES)
def test_default_targets_are_theirs(kind):
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as THEIRS

    name = next(name for name in CONFIGS if name.startswith(f"{kind}-"))
    config = read_config(CONFIGS[name], name)
    chosen = {choice.target.name.rpartition(".")[2] for choice in choose(LoraConfig(r=1), config, "lm")}
    assert chosen == set(THEIRS.get(kind, ["qkv_proj"] if kind == "phi3" else ["q_proj", "v_proj"]))


def test_flags_are_those_of_trl():
    from trl import ModelConfig

    theirs = ModelConfig()
    for field in dataclasses.fields(LoRAArguments):
        if field.name in vars(theirs):
            assert getattr(LoRAArguments(), field.name) == getattr(theirs, field.name), field.name
    names = {"use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save"}
    assert names | {"use_rslora", "use_dora"} == {field.name for field in dataclasses.fields(LoRAArguments)} & set(
        vars(theirs)
    )
    ours = LoRAArguments(use_peft=True, lora_target_modules=["q_proj", "v_proj"], use_dora=True).lora_config()
    args = ModelConfig(use_peft=True, lora_target_modules=["q_proj", "v_proj"], use_dora=True)
    assert ours == dataclasses.replace(as_lora_config(trl.get_peft_config(args)), task_type=None)


def test_several_adapters_take_turns(base_folder, tmp_path):
    base = base_folder("llama-biases")
    ours, expected = from_pretrained(base), {}
    expected[None] = np.asarray(our_logits(ours))
    for name in ("plain", "dora"):
        settings = {**PLAIN, **CASES[name][1]}
        theirs = peft.get_peft_model(their_base(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
        randomize(theirs)
        theirs.save_pretrained(tmp_path / name)
        expected[name] = their_logits(theirs)
        load_adapter(ours, tmp_path / name, name)
    for name in ("plain", None, "dora", "plain"):
        assert relative(np.asarray(our_logits(set_adapter(ours, name))), expected[name]) < 1e-4
    keep_reference(ours)
    train_a_little(ours)
    assert relative(np.asarray(our_logits(ours)), expected["plain"]) > 1e-2
    assert relative(np.asarray(our_logits(reference_view(ours))), expected["plain"]) < 1e-4
