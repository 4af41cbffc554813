"""How a field is declared: what it takes is checked, and told where it is shown."""

import dataclasses
import inspect

import pytest

from jaxpost.errors import ConfigError
from jaxpost.methods import METHODS
from jaxpost.options import Group, check_choices, option

CONFIGS = [method.config for method in METHODS.values()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drink:
    kind: str = option("tea", "Tea or coffee.", choices=("tea", "coffee"))
    extras: list[str] = option([], "Milk, sugar.", choices=("milk", "sugar"))
    cup: str | None = option(None, "None for a mug.", choices=("small",))


def test_every_value_must_be_among_the_choices():
    check_choices(Drink(kind="coffee", extras=["milk", "sugar"], cup="small"))
    for wrong, message in (
        (Drink(kind="cofee"), "kind is 'cofee' (did you mean 'coffee'?); it takes one of: tea, coffee"),
        (Drink(extras=["milk", "salt"]), "extras is 'salt'"),
        (Drink(cup="large"), "cup is 'large'"),
        (Drink(extras=3), "extras is 3"),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace(")", r"\)").replace("?", r"\?")):
            check_choices(wrong)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_wrong_choice_is_refused_by_every_config(config):
    named = [field for field in dataclasses.fields(config) if field.metadata["help"].choices]
    assert len(named) > 10
    for field in named:
        value = ["never"] if field.default is dataclasses.MISSING else "never"
        with pytest.raises(ConfigError, match=f"{field.name} is 'never'"):
            config(**{field.name: value})


@pytest.mark.parametrize("config", CONFIGS)
def test_help_is_a_sentence_that_tells_the_choices(config):
    for field in dataclasses.fields(config):
        text = field.metadata["help"]
        assert text.endswith((".", "...")), field.name
        names = [name for name in text.choices if name not in text]
        assert not names or (field.name == "optim" and not set(names) & set(text.split())), (field.name, names)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_field_with_another_default_takes_what_it_took_before(config):
    for field in dataclasses.fields(config):
        owners = [owner for owner in config.__mro__ if field.name in inspect.get_annotations(owner)]
        declared = {vars(owner)["__dataclass_fields__"][field.name].metadata["help"].choices for owner in owners}
        assert len(declared) == 1, field.name


def test_every_part_that_methods_share_has_a_heading():
    shared = [part for part in METHODS["sft"].config.__mro__ if dataclasses.is_dataclass(part)]
    named = {part.__name__ for part in shared if "help_group" not in vars(part)}
    assert named == {"SFTConfig", "TrainConfig", "SFT", "ObjectiveBase"}  # the method's own, and without fields
    assert {vars(part)["help_group"] for part in shared if "help_group" in vars(part)} <= set(Group)
