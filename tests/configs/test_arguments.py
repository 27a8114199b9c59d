import pytest

from configs import sample
from configs.arguments import choice, parse_arg
from pangea_jax import languages
from pangea_jax.experiment import Experiment
from pangea_jax.typed_config import build

DEFAULTS = {"en_ratio": 0.4, "num_examples": 40_000, "small": False, "scale": "sample"}


@pytest.mark.parametrize(
    ("arg", "changed"),
    [
        (None, {}),
        ("", {}),
        ("en_ratio=0.8", {"en_ratio": 0.8}),
        ("en_ratio=1,small", {"en_ratio": 1.0, "small": True}),
        ("small=true,scale=7b", {"small": True, "scale": "7b"}),
        ("small=0,num_examples=12", {"small": False, "num_examples": 12}),
        ("scale=a=b", {"scale": "a=b"}),
    ],
)
def test_values_have_the_type_of_their_default(arg, changed):
    values = parse_arg(arg, **DEFAULTS)
    assert values == DEFAULTS | changed
    assert {k: type(v) for k, v in values.items()} == {k: type(v) for k, v in DEFAULTS.items()}


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("en_ration=0.8", r"'en_ration' is not one of \[.*\]; did you mean 'en_ratio'"),
        ("qqq=1", r"'qqq' is not one of \['en_ratio', 'num_examples', 'scale', 'small'\]$"),
        ("en_ratio=half", r"en_ratio='half': expected a value of type float, like 0.4"),
        ("num_examples=1.5", r"num_examples='1.5': expected a value of type int, like 40000"),
        ("small=maybe", r"small='maybe': expected a value of type bool, like False"),
    ],
)
def test_errors_say_what_was_expected(arg, message):
    with pytest.raises(ValueError, match=message):
        parse_arg(arg, **DEFAULTS)


def test_choice():
    assert choice("scale", "7b", ("sample", "7b")) == "7b"
    with pytest.raises(ValueError, match=r"scale='8b' is not one of \('sample', '7b'\)"):
        choice("scale", "8b", ("sample", "7b"))


def test_arguments_reach_the_experiment():
    exp = build(Experiment, sample.get_config("languages=all,num_examples=100,seed=3"))
    assert exp.mixture.languages == languages.EMOJI
    assert exp.mixture.num_examples == 100
    assert exp.seed == 3
    assert exp.pipeline.max_targets <= exp.pipeline.row_tokens


@pytest.mark.parametrize(("chosen", "number"), [("default", 8), ("all", 38)])
def test_a_language_has_as_many_examples_in_company(chosen, number):
    mixture = sample.get_config(f"languages={chosen}").mixture
    assert len(mixture.languages) == number
    assert mixture.num_examples == 6_000 * number
