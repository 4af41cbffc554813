"""Rows to batches: packed or not, what is trained is the same."""

import itertools
import json

import numpy as np
import pytest

from jaxpost import SFTConfig, SFTTrainer
from jaxpost.cli import parse
from jaxpost.errors import ConfigError, DataError
from jaxpost.methods import METHODS
from jaxpost.pipeline import Pipeline
from tests.conftest import make_tokenizer

TEXTS = [{"text": "ab" * n} for n in (3, 40, 17, 9, 28, 33, 5, 12)]


def make_pipeline(**options):
    args = SFTConfig(per_device_train_batch_size=2, max_length=64, pad_to_multiple_of=8, **options)
    return Pipeline(METHODS["sft"], args, make_tokenizer(), 320, 1, [])


def trained(batch):
    return int(batch["loss_mask"].sum())


def test_packs_fill_rows_and_hold_every_trained_token():
    plain, packed = make_pipeline(), make_pipeline(packing=True)
    loose, _ = plain.loaders(TEXTS)
    full, _ = packed.loaders(TEXTS)
    assert full.steps_per_epoch < loose.steps_per_epoch
    totals = [sum(trained(loader.batch(step)) for step in range(loader.steps_per_epoch)) for loader in (loose, full)]
    assert totals[0] == totals[1] > 0
    assert any("packed into" in note and "% full" in note for note in packed.notes)
    assert full.batch(0)["tokens"].shape == (2, 64)


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_strategies_that_split_lose_no_token(strategy):
    long = [{"text": "abcdefgh" * 41}]
    loader, _ = make_pipeline(packing=True, packing_strategy=strategy).loaders(long)
    tokens = sum(int((loader.batch(step)["segments"] > 0).sum()) for step in range(loader.steps_per_epoch))
    assert tokens == 329  # and the end token


def test_packing_changes_no_loss(tiny_folder, tmp_path):
    def loss(**options):
        args = SFTConfig(output_dir=str(tmp_path), max_length=64, eval_strategy="epoch", report_to=["none"], **options)
        return SFTTrainer(str(tiny_folder), args, train_dataset=TEXTS, eval_dataset=TEXTS).evaluate()["eval_loss"]

    np.testing.assert_allclose(loss(packing=True), loss(padding_free=False), rtol=1e-5)


def test_packing_without_a_length_is_refused():
    with pytest.raises(ConfigError, match="give --max_length"):
        Pipeline(METHODS["sft"], SFTConfig(packing=True, max_length=None), make_tokenizer(), 320, 1, []).loaders(TEXTS)


def test_bad_rows_are_skipped_and_counted_only_when_asked():
    rows = [*TEXTS, {"text": None}, {"text": 3}]
    pipeline = make_pipeline(on_bad_row="skip")
    loader, _ = pipeline.loaders(rows)
    assert loader.fingerprint() == make_pipeline().loaders(TEXTS)[0].fingerprint()
    assert "2 rows skipped: 2 x column 'text' must be text" in pipeline.notes[0]
    with pytest.raises(DataError, match="row 9, column 'text' must be text, not null"):
        make_pipeline().loaders(rows)


def test_preference_rows_are_not_trained_on_as_prompts():
    with pytest.raises(DataError, match="chosen"):
        make_pipeline().loaders([{"prompt": "a", "chosen": "b", "rejected": "c"}])


def test_a_mixture_in_yaml_and_rows_held_out_of_it(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} {n}"}}\n' for n in range(6)))
    entries = "".join(f"  - path: {tmp_path}/{name}.jsonl\n    weight: 1e0\n" for name in ("one", "two"))
    (tmp_path / "run.yaml").write_text(f"datasets:\n{entries}test_split_size: 4\neval_strategy: epoch\n")
    args = parse(SFTConfig, "sft", ["--config", str(tmp_path / "run.yaml")])
    train, held_out = Pipeline(METHODS["sft"], args, make_tokenizer(), 320, 1, []).loaders()
    assert train.batch(0)["segments"].max() == 8
    assert held_out is not None and held_out.batch(0)["segments"].max() == 4


def test_a_stream_needs_a_number_of_steps(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "ab"}\n' * 50)
    options = {"dataset_name": str(tmp_path / "rows.jsonl"), "dataset_streaming": True}
    with pytest.raises(ConfigError, match="needs --max_steps"):
        make_pipeline(**options).loaders()
    loader, _ = make_pipeline(**options, max_steps=3).loaders()
    assert loader.steps_per_epoch == 3


def pieces(loader, steps):
    return [np.asarray(loader.batch(step)["tokens"]) for step in range(steps)]


def tokenized_again(*args, **options):
    raise AssertionError("the rows were tokenised again")
    yield


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_without_an_end_is_read_as_far_as_the_run_goes(packing):
    read = []

    def endless():
        for number in itertools.count():
            read.append(number)
            yield {"text": "ab" * (number % 30 + 1)}

    loader, _ = make_pipeline(dataset_streaming=True, max_steps=40, packing=packing).loaders(endless)
    assert len(loader.fingerprint()) == 32 and loader.num_steps == 40
    assert loader.steps_per_epoch >= 40  # no row comes twice
    assert max(read) < 10_000


def test_a_file_is_tokenised_once_for_one_set_of_flags(tmp_path, monkeypatch):
    data, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*TEXTS, {"text": None}]))

    def loader(**options):
        flags = {"dataset_name": str(data), "tokenized_cache_dir": str(cache), "on_bad_row": "skip", **options}
        pipeline = make_pipeline(**flags)
        found, _ = pipeline.loaders()
        return found, pipeline.notes

    first, notes = loader()
    with monkeypatch.context() as patch:
        patch.setattr("jaxpost.encode.encode_rows", tokenized_again)
        again, notes_again = loader()
        loader(seed=7)
        loader(packing=True)  # from the same examples
        with pytest.raises(AssertionError, match="again"):
            loader(dataset_text_field="body")
    assert first.fingerprint() == again.fingerprint() and notes == notes_again
    for one, other in zip(pieces(first, 3), pieces(again, 3), strict=True):
        np.testing.assert_array_equal(one, other)
    count = len(list(cache.iterdir()))
    data.write_text(json.dumps(TEXTS[0]) + "\n")
    loader()
    assert len(list(cache.iterdir())) == count + 1 == 2


def test_a_function_of_the_users_makes_the_text():
    pipeline = make_pipeline(train_sampling_strategy="sequential", padding_free=False)
    rows = [{"q": "1+1", "a": "2"}, {"q": "2+2", "a": "4"}]
    loader, _ = pipeline._replace(formatting=lambda row: f"{row['q']}={row['a']}").loaders(rows)
    assert [pipeline.tokenizer.decode(tokens[:6]) for tokens in loader.batch(0)["tokens"]] == [
        "1+1=2<|im_end|>",
        "2+2=4<|im_end|>",
    ]
    with pytest.raises(DataError, match=r"row 1: formatting_func fails \(KeyError: 'question'\)"):
        pipeline._replace(formatting=lambda row: row["question"]).loaders(rows)
    with pytest.raises(DataError, match="row 1: formatting_func must return text, not int 3"):
        pipeline._replace(formatting=lambda row: 3).loaders(rows)
