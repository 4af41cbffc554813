"""Rows to batches: packed or not, what is trained is the same."""

import numpy as np
import pytest

from jaxpost import SFTConfig, SFTTrainer
from jaxpost.errors import ConfigError
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
        return SFTTrainer(str(tiny_folder), args, TEXTS, TEXTS).evaluate()["eval_loss"]

    np.testing.assert_allclose(loss(packing=True), loss(padding_free=False), rtol=1e-5)


def test_packing_without_a_length_is_refused():
    with pytest.raises(ConfigError, match="give --max_length"):
        Pipeline(METHODS["sft"], SFTConfig(packing=True, max_length=None), make_tokenizer(), 320, 1, []).loaders(TEXTS)
