"""What the wiring does with the vocabulary, the end tokens and the router's coefficient."""

import json

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from jaxpost import SFTConfig, SFTTrainer, from_pretrained, save_pretrained
from jaxpost.cli import main
from jaxpost.errors import ConfigError
from tests.conftest import make_model, make_tokenizer

MOE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "mlp_bias": None,  # a field of the tiny Llama
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.02,
}
ROWS = [{"text": f"number {n}"} for n in range(8)]


def folder(path, ends=(1, 5), **changes):
    """A tiny model whose generation config lists several ends."""
    save_pretrained(make_model(**changes), make_tokenizer(), path, generation_config={"eos_token_id": list(ends)})
    return str(path)


def trainer(model, out, rows=ROWS, processing_class=None, **options):
    args = SFTConfig(
        output_dir=str(out),
        max_steps=2,
        per_device_train_batch_size=1,
        logging_steps=1,
        save_strategy="no",
        report_to=["none"],
        **options,
    )
    return SFTTrainer(model, args, None, rows, processing_class=processing_class)


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("mixture") / "model", **MOE)


@pytest.fixture
def wider():
    """The tokenizer with tokens up to id 328 added in Python."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<new_{n}>" for n in range(70)])
    return tokenizer


def test_tokens_added_in_python_grow_the_model(base, wider, tmp_path):
    run = trainer(base, tmp_path / "out", [{"text": f"<new_{60 + n}>"} for n in range(8)], wider)
    assert run.notes[0].startswith("the vocabulary grew from 320 to 384 rows for the tokenizer's 329 ids")
    assert run.model.config.vocab_size == 384
    mean = load_file(f"{base}/model.safetensors")["model.embed_tokens.weight"].mean(0)
    np.testing.assert_allclose(run.model.embed.embedding[...][320:], np.tile(mean, (64, 1)), atol=1e-6)
    run.train()
    again = from_pretrained(tmp_path / "out")
    assert again(np.array([[383]], np.int32)).shape == (1, 1, 384)
    assert read(tmp_path / "out" / "config.json")["vocab_size"] == 384
    assert run.evaluate([{"text": "<new_69>"}])["eval_loss"] > 0


def test_a_given_model_grows_in_place(wider, tmp_path):
    model = make_model()
    run = trainer(model, tmp_path / "out", processing_class=wider)
    assert run.model is model and model.config.vocab_size == 384
    assert model.config.hf["eos_token_id"] == 1


def test_the_export_keeps_every_end_of_the_base_model(base, tmp_path):
    run = trainer(base, tmp_path / "out", eos_token="<pad>", pad_token="<|im_start|>")
    run.save_model(tmp_path / "model")
    expected = {"bos_token_id": 0, "eos_token_id": [2, 1, 5], "pad_token_id": 0}
    assert read(tmp_path / "model" / "generation_config.json") == expected
    assert read(tmp_path / "model" / "config.json").items() >= expected.items()
    assert read(tmp_path / "model" / "tokenizer_config.json")["eos_token"] == "<pad>"


def test_generation_stops_at_any_of_the_ends(tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "abc"}\n')

    def complete(*ends):
        model = folder(tmp_path / "-".join(map(str, ends)), ends)
        command = f"generate --model_name_or_path {model} --dataset_name {prompts} --output_file {out}"
        assert main([*command.split(), "--temperature", "0", "--max_new_tokens", "8"]) == 0
        return read(out)["completion_ids"]

    free = complete(1)
    assert len(free) == 8
    stop = free[3]
    assert complete(1, 318, stop) == free[: free.index(stop) + 1]


@pytest.mark.parametrize("command", ["sft", "generate"])
def test_an_end_that_is_no_id_is_exit_2(command, tmp_path, capsys):
    model = folder(tmp_path / "model", ends=[True])
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "abc", "completion": "d"}\n')
    assert main([command, "--model_name_or_path", model, "--dataset_name", str(rows)]) == 2
    assert "generation_config.json: eos_token_id is [True]" in capsys.readouterr().err


def logged(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_mixture_takes_its_own_router_coefficient(mixture, tmp_path):
    trainer(mixture, tmp_path / "own").train()
    assert [row["aux_loss"] > 0 for row in logged(tmp_path / "own")] == [True, True]
    assert yaml.safe_load((tmp_path / "own" / "config.yaml").read_text())["router_aux_loss_coef"] == 0.02
    run = trainer(mixture, tmp_path / "given", router_aux_loss_coef=0.5)
    assert run.objective.router_aux_loss_coef == run.args.router_aux_loss_coef == 0.5
    assert trainer(mixture, tmp_path / "none", router_aux_loss_coef=0.0).objective.router_aux_loss_coef == 0


def test_a_dense_model_has_no_router_to_balance_and_keeps_its_size(base, tmp_path):
    run = trainer(base, tmp_path / "out")
    assert run.model.config.vocab_size == 320 and "grew" not in run.notes[0]
    run.train()
    assert run.args.router_aux_loss_coef == 0
    assert all("aux_loss" not in row for row in logged(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"router_aux_loss_coef is 0.1, but a llama model has no experts"):
        trainer(base, tmp_path / "out", router_aux_loss_coef=0.1)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_coefficient_is_a_number_from_0_on(value, mixture, tmp_path):
    with pytest.raises(ConfigError, match=r"router_aux_loss_coef is .*; it must not be negative"):
        trainer(mixture, tmp_path / "out", router_aux_loss_coef=value)
