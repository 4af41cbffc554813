import json

from jaxpost.data.sums import generate, main, write
from jaxpost.rl.builtin_rewards import numeric_answer


def test_every_sum_is_there_once_with_its_answer():
    rows = generate()
    assert len({row["prompt"][0]["content"] for row in rows}) == len(rows) == 81
    texts = [row["prompt"][0]["content"].removeprefix("What is ").split("?")[0] for row in rows]
    found = [str(sum(map(int, text.split(" + ")))) for text in texts]
    assert numeric_answer(found, [row["answer"] for row in rows]) == [1.0] * 81


def test_a_quarter_is_held_out_and_equal_seeds_give_equal_bytes(tmp_path):
    assert write(tmp_path / "a") == write(tmp_path / "b") == {"train": 61, "test": 20}
    for name in ("train", "test"):
        assert (tmp_path / "a" / f"{name}.jsonl").read_bytes() == (tmp_path / "b" / f"{name}.jsonl").read_bytes()
    train, test = ((tmp_path / "a" / f"{name}.jsonl").read_text().splitlines() for name in ("train", "test"))
    assert not set(train) & set(test)
    assert main(["--output_dir", str(tmp_path / "c"), "--seed", "1"], write=write) == 0
    assert json.loads((tmp_path / "c" / "test.jsonl").read_text().splitlines()[0]) != json.loads(test[0])
