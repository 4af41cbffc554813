import numpy as np
import pytest

from jaxpost.errors import ConfigError
from jaxpost.models.text_part import TextPart

TEXT = {"model_type": "gemma3_text", "hidden_size": 8, "eos_token_id": 3}
NAMES = ("language_model.model.norm.weight", "language_model.lm_head.weight", "vision_tower.encoder.weight")


class Whole:
    """A checkpoint of a model that sees images."""

    def __init__(self, names=NAMES, **config):
        self.config = {"model_type": "gemma3", "text_config": TEXT, "vision_config": {}, **config}
        self.generation_config = {"eos_token_id": [1, 106]}
        self.tensors = {name: np.full(number + 1, number) for number, name in enumerate(names)}

    def names(self):
        return frozenset(self.tensors)

    def shape(self, name):
        return self.tensors[name].shape

    def read(self, name):
        return self.tensors[name]

    def tokenizer(self):
        return "tokenizer"


@pytest.mark.parametrize(
    "names", [NAMES, ("model.language_model.norm.weight", "lm_head.weight", "model.vision_tower.w")]
)
def test_text_part_is_a_checkpoint_of_its_own(names):
    part = TextPart(Whole(names, tie_word_embeddings=False, eos_token_id=[1, 106]), "gemma")
    assert part.names() == {"model.norm.weight", "lm_head.weight"}
    assert part.shape("lm_head.weight") == (2,)
    assert part.read("model.norm.weight").tolist() == [0]
    assert part.config == {**TEXT, "tie_word_embeddings": False}
    assert part.generation_config == {"eos_token_id": [1, 106]}
    assert part.tokenizer() == "tokenizer"


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        (Whole(text_config=3), "text_config in config.json must be an object"),
        (Whole(model_type="llava"), "model_type 'llava' is not supported"),
        (Whole(audio_config={}), "audio_config"),
        (Whole(("language_model.model.norm.weight", "model.language_model.norm.weight")), "under two names"),
    ],
)
def test_what_is_not_known_is_refused(whole, message):
    with pytest.raises(ConfigError, match=message):
        TextPart(whole, "gemma")
