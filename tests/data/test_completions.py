"""Completions that are compared or judged, as examples, and as the batches that they come in."""

import numpy as np
import pytest

from jaxpost.data.bad_rows import BadRows
from jaxpost.data.completions import encode_judged, encode_pairs
from jaxpost.data.examples import Counts, LengthConfig, flattened
from jaxpost.data.loader import Loader
from jaxpost.data.packing import units
from jaxpost.data.store import stored
from jaxpost.errors import DataError

PAIR = {"prompt": "ab", "chosen": "cde", "rejected": "f", "margin": 0.5}
END = "<|im_end|>"


def pairs(rows, tokenizer, **options):
    return list(encode_pairs(rows, tokenizer, LengthConfig(**options), vocab_size=len(tokenizer)))


def texts(example, tokenizer):
    return tokenizer.decode(example.tokens), tokenizer.decode(example.tokens[example.loss_mask])


def loader(packs, **changes):
    options = {"global_batch_size": 4, "num_rows": 2, "num_steps": 3, "pad_id": 0, "seed": 0, "sampling": "random"}
    return Loader(packs, **{**options, "num_lengths": 1, "multiple": 8, **changes})


def test_a_pair_is_two_examples_and_the_first_has_the_margin(tokenizer):
    [(chosen, rejected)] = pairs([PAIR], tokenizer)
    assert texts(chosen, tokenizer) == (f"abcde{END}", f"cde{END}")
    assert texts(rejected, tokenizer) == (f"abf{END}", f"f{END}")
    assert (chosen.value, rejected.value) == (0.5, 0.0)


def test_messages_share_a_prompt_that_is_not_written_out(tokenizer):
    question = [{"role": "user", "content": "q"}]
    answers = [[*question, {"role": "assistant", "content": text}] for text in ("yes", "no")]
    [unit] = pairs([{"chosen": answers[0], "rejected": answers[1]}], tokenizer)
    for example, answer in zip(unit, ("yes", "no"), strict=True):
        assert texts(example, tokenizer)[1] == f"{answer}{END}\n"


def test_a_pair_is_cut_or_left_out_as_one(tokenizer):
    counts = Counts()
    rows = [PAIR, {**PAIR, "prompt": "ab" * 9}]
    config = LengthConfig(max_length=6)
    kept = list(encode_pairs(rows, tokenizer, config, vocab_size=len(tokenizer), counts=counts))
    assert len(kept) == 1 and counts == Counts(kept=1, dropped=1)
    config, counts = LengthConfig(max_length=5, on_long_row="drop"), Counts()
    with pytest.raises(DataError, match="none of the 2 rows"):
        list(encode_pairs(rows, tokenizer, config, vocab_size=len(tokenizer), counts=counts))
    assert counts.too_long == 2


def test_judged_completions_and_pairs_that_are_taken_apart(tokenizer):
    rows = [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "c", "completion": "d", "label": False}]
    options = {"vocab_size": len(tokenizer)}
    found = list(flattened(encode_judged(rows, tokenizer, LengthConfig(), **options)))
    assert [texts(example, tokenizer)[0] for example in found] == [f"ab{END}", f"cd{END}"]
    assert [example.value for example in found] == [1.0, 0.0]
    apart = list(flattened(encode_judged([PAIR, {**PAIR, "prompt": "xy"}], tokenizer, LengthConfig(), **options)))
    assert [texts(example, tokenizer)[0] for example in apart] == [
        f"abcde{END}",
        f"xycde{END}",
        f"abf{END}",
        f"xyf{END}",
    ]
    assert [example.value for example in apart] == [1.0, 1.0, 0.0, 0.0]


def test_errors_name_the_column_of_the_file(tokenizer):
    bad_rows = BadRows("skip")
    rows = [PAIR, {**PAIR, "rejected": 3}, {**PAIR, "rejected": "cde"}, {**PAIR, "chosen": "\ud800"}]
    kept = list(encode_pairs(rows, tokenizer, LengthConfig(), vocab_size=len(tokenizer), bad_rows=bad_rows))
    assert len(kept) == 1
    assert sum(bad_rows.counts.values()) == 3
    assert all("column 'rejected'" in reason or "column 'chosen'" in reason for reason in bad_rows.counts)


def test_batches_tell_of_each_example_in_the_order_of_the_segments(tokenizer):
    rows = [{**PAIR, "prompt": "p" * (1 + i), "margin": float(i)} for i in range(7)]
    store = stored(flattened(pairs(rows, tokenizer)))
    assert store.values.tolist()[::2] == [float(i) for i in range(7)] and not store.values[1::2].any()
    assert store.starts.tolist() == [1 + i for i in range(7) for _ in range(2)]
    source = loader(units(store, 2, {"margin": store.values}))
    seen = []
    for step in range(2):  # an epoch
        batch = source.batch(step)
        for segments, exists, margins in zip(batch["segments"], batch["examples"], batch["margin"], strict=True):
            assert segments.max() == exists.sum() and exists[: segments.max()].all()
            for number in range(1, segments.max() + 1, 2):
                prompt = int(margins[number - 1]) + 1
                assert (segments == number).sum() == prompt + 4 and (segments == number + 1).sum() == prompt + 2
                seen.append(margins[number - 1])
    assert sorted(seen) == [float(i) for i in range(7)]
    empty = source.empty(source.lengths[0])
    assert {name: x.shape for name, x in empty.items()} == {name: x.shape for name, x in source.batch(0).items()}


def test_each_prompt_is_beside_the_completion_of_another(tokenizer):
    rows = [{"prompt": chr(97 + i) * (1 + i), "completion": chr(65 + i) * 2, "label": i % 2 == 0} for i in range(6)]
    store = stored(flattened(encode_judged(rows, tokenizer, LengthConfig(), vocab_size=len(tokenizer))))
    packs = units(store, 1, {"label": store.values})
    source = loader(packs, mismatch=6, sampling="sequential", global_batch_size=5)
    batch = source.batch(0)

    def said(batch):
        rows = zip(batch["mismatched_tokens"], batch["mismatched_segments"], strict=True)
        return sorted(
            tokenizer.decode(tokens[segments == s]) for tokens, segments in rows for s in range(1, segments.max() + 1)
        )

    assert said(batch) == sorted([f"aFF{END}", f"bbAA{END}", f"cccBB{END}", "ddddCC", "eeeeeD"])
    assert said(source.batch(1)) == ["ffffff"[:6]]
    assert batch["mismatched_tokens"].shape == source.empty(8)["mismatched_tokens"].shape
    for step in range(2):
        mask, segments = (source.batch(step)[f"mismatched_{name}"] for name in ("loss_mask", "segments"))
        assert not mask[segments == 0].any()
    whole = np.concatenate([source.batch(step)["examples"].sum(1) for step in range(2)]).sum()
    assert whole == 6
    # In any order and in batches of any size.
    shuffled = loader(packs, mismatch=6, sampling="random", global_batch_size=1, num_rows=1)
    assert sorted(said(shuffled.batch(step))[0] for step in range(6)) == sorted([*said(batch), "ffffff"])


def test_a_partner_has_another_prompt_where_there_is_one(tokenizer):
    rows = [{"prompt": prompt, "completion": f"{i}", "label": True} for i, prompt in enumerate("aabbba")]
    for chosen, partners in ((rows, [4, 4, 1, 1, 1, 4]), (rows[:2], [1, 0]), (rows[:1], [0])):
        store = stored(flattened(encode_judged(chosen, tokenizer, LengthConfig(), vocab_size=len(tokenizer))))
        packs = units(store, 1, {"label": store.values})
        assert [packs.partner(i) for i in range(len(packs))] == partners
