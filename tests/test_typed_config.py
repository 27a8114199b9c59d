"""A dataclass decides names, types and defaults of a config."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
from ml_collections import ConfigDict

from pangea_jax.typed_config import ConfigError, build, check_key, section


@dataclasses.dataclass(frozen=True)
class Part:
    rate: float
    names: tuple[str, ...] = ()
    pair: tuple[int, int] = (1, 2)
    limit: int | None = None


@dataclasses.dataclass(frozen=True)
class Whole:
    title: str
    part: Part
    other: Part | None = None
    weights: Mapping[str, float] | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    on: bool = False

    def __post_init__(self):
        if not self.title:
            raise ValueError("title is empty")


def test_a_section_has_every_key_and_its_default():
    config = section(Whole, title="A", part={"rate": 2.0})
    assert set(config) == {"title", "part", "other", "weights", "sizes", "on"}
    assert config.part.pair == (1, 2)
    assert build(Whole, config) == Whole("A", Part(2.0))


def test_values_are_set_one_by_one_as_flags_do():
    config = section(Whole)
    config.title, config.part.rate = "A", 3.0
    config.part.limit, config.part.names = 4, ("x", "y")
    config.weights, config.sizes = {"en": 1, "de": 0.5}, [[1, 2], [3, 4]]
    built = build(Whole, config)
    assert built.part == Part(3.0, ("x", "y"), limit=4)
    assert built.weights == {"en": 1.0, "de": 0.5}
    assert built.sizes == ((1, 2), (3, 4))


def test_a_part_that_may_be_none_is_made_from_a_section():
    config = section(Whole, title="A", part={"rate": 1.0}, other={"rate": 5.0})
    assert build(Whole, config).other == Part(5.0)
    config.other = None
    assert build(Whole, config).other is None


def test_a_value_of_another_type_cannot_be_set():
    """ml_collections keeps the declared type, even if the value is None."""
    config = section(Part, rate=1.0)
    with pytest.raises(TypeError):
        config.limit = "four"
    with pytest.raises(TypeError):
        config.rate = "fast"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"titel": "A"}, r"config\.titel is an unknown key; did you mean 'title'\?"),
        ({"part": {"rat": 1.0}}, r"config\.part\.rat is an unknown key; did you mean 'rate'\?"),
        ({"part": {}}, r"config\.part\.rate is not set; Part needs it"),
        ({"title": 3}, r"config\.title is 3; expected str"),
        ({"part": {"rate": True}}, r"config\.part\.rate is True; expected float"),
        ({"part": {"rate": 1.0, "pair": (1,)}}, r"config\.part\.pair is \(1,\); expected tuple"),
        ({"part": {"rate": 1.0, "names": "ab"}}, r"config\.part\.names is 'ab'; expected tuple"),
        ({"part": {"rate": 1.0, "names": (1,)}}, r"config\.part\.names is 1; expected str"),
        ({"part": 3}, r"config\.part is 3; expected Part"),
        ({"weights": {"en": "much"}}, r"config\.weights\.en is 'much'; expected float"),
        ({"on": 1}, r"config\.on is 1; expected bool"),
        ({"on": None}, r"config\.on is None; expected bool"),
    ],
)
def test_an_error_names_the_key_and_what_was_expected(change, says):
    config = ConfigDict({"title": "A", "part": {"rate": 1.0}} | change)
    with pytest.raises(ConfigError, match=says):
        build(Whole, config)


def test_values_of_any_type_are_plain():
    @dataclasses.dataclass(frozen=True)
    class Request:
        body: Mapping[str, Any]

    built = build(Request, ConfigDict({"body": {"outer": {"inner": [1]}, "n": 2}}))
    assert built.body == {"outer": {"inner": [1]}, "n": 2}
    assert type(built.body["outer"]) is dict


def test_the_dataclass_checks_its_values():
    with pytest.raises(ValueError, match="title is empty"):
        build(Whole, {"title": "", "part": {"rate": 1.0}})


def test_a_section_knows_its_keys():
    with pytest.raises(ConfigError, match=r"Part\.rats is an unknown key; did you mean 'rate'\?"):
        section(Part, rats=1.0)


@pytest.mark.parametrize("key", ["title", "part.rate", "other.names", "weights.en"])
def test_known_keys(key):
    check_key(Whole, key)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("tite", r"config\.tite is an unknown key; did you mean 'title'\?"),
        ("other.rte", r"config\.other\.rte is an unknown key; did you mean 'rate'\?"),
        ("part.zzz", r"config\.part\.zzz is an unknown key; known are limit, names, pair, rate"),
    ],
)
def test_unknown_keys(key, says):
    with pytest.raises(ConfigError, match=says):
        check_key(Whole, key)
