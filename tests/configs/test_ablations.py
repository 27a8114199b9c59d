"""Every point of every ablation, at every scale: only the intended settings vary."""

import importlib
import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from flax import nnx

from configs import (
    pangea_0_5b_finetune,
    pangea_0_5b_pretrain,
    pangea_7b_finetune,
    pangea_7b_pretrain,
    scales,
)
from pangea_jax import languages
from pangea_jax.data.mixture import Mixture, choose
from pangea_jax.experiment import Experiment, choose_records
from pangea_jax.model import Pangea
from pangea_jax.model import params as model_params
from pangea_jax.sample.sample_store import SampleStore
from pangea_jax.train.optimizer import make_schedule
from pangea_jax.typed_config import build

ABLATIONS = (
    "en_ratio",
    "language_popularity",
    "num_samples",
    "num_languages",
    "vision_tower",
    "loss_mask",
    "anyres",
    "data_origin",
)


def module(name):
    return importlib.import_module(f"configs.ablate_{name}")


def variants():
    for name in ABLATIONS:
        for scale in getattr(module(name), "SCALES", scales.SCALES):
            for design in module(name).DESIGNS:
                yield pytest.param(name, scale, design, id=f"{name}-{scale}-{design}")


def get(name, point="", **arguments):
    items = arguments | ({"point": point} if point else {})
    return module(name).get_config(",".join(f"{k}={v}" for k, v in items.items()))


@pytest.mark.parametrize(
    ("make", "arg", "says"),
    [
        (
            scales.parse,
            "point=en_040,en_ratio=0.8",
            "remove the config argument en_ratio=: point=en_040 sets it",
        ),
        (
            pangea_7b_finetune.get_config,
            "lora=16,batch=512",
            "remove the config argument batch=: with lora=",
        ),
    ],
)
def test_an_argument_without_effect_is_an_error(make, arg, says):
    own = {"designs": {"fixed_total": ""}, "en_ratio": 0.4} if make is scales.parse else {}
    with pytest.raises(ValueError, match=says):
        make(arg, **own)


def counts(config, index=None):
    exp = build(Experiment, config)
    chosen = choose(index or SampleStore().index, exp.mixture, exp.seed)
    assert len(chosen.rows) == sum(chosen.examples_per_language.values())
    return chosen.examples_per_language


def differing(one, other, key=""):
    if isinstance(one, dict) and isinstance(other, dict):
        names = one.keys() | other.keys()
        return {k for n in names for k in differing(one.get(n), other.get(n), f"{key}.{n}")}
    return set() if one == other else {key}


VARIED = {
    ("en_ratio", "fixed_total"): {".mixture.en_ratio"},
    ("en_ratio", "fixed_multilingual"): {".mixture.en_ratio"},
    ("language_popularity", "rotate"): {".mixture.rotate"},
    ("num_samples", "separate"): {".mixture.num_examples"},
    ("num_samples", "one_run"): {".steps"},
    **{("num_languages", f"languages_{n}"): {".mixture.num_examples"} for n in (8, 16, 38)},
    ("vision_tower", "tower"): {".frozen", ".optimizer.lr_scale"},
    ("loss_mask", "mask"): {".pipeline.loss_mask"},
    ("anyres", "tiles"): {".model.pinpoints"},
    ("data_origin", "origin"): {".mixture.sources", ".mixture.exclude_sources"},
}


@pytest.mark.parametrize(("name", "scale", "design"), list(variants()))
def test_points_differ_in_what_is_varied_alone(name, scale, design):
    points = module(name).points(f"scale={scale},design={design}")
    configs = [get(name, point, scale=scale, design=design, seed=3) for point in points]
    assert len({config.title for config in configs}) == len(points) > 1
    plain = [json.loads(config.to_json()) for config in configs]
    allowed = VARIED.get((name, design))
    for config, values in zip(configs, plain, strict=True):
        assert build(Experiment, config).seed == 3
        changed = differing(plain[0], values) - {".title"}
        if allowed is None:
            assert all(key.startswith(".mixture.weights.") for key in changed)
        else:
            assert changed <= allowed


@pytest.mark.parametrize("scale", scales.SCALES)
def test_en_ratio_counts(scale):
    index = SampleStore().index if scale == "sample" else published_index()
    total = get("en_ratio", scale=scale).mixture.num_examples
    others = len(get("en_ratio", scale=scale).mixture.languages) - 1
    assert others == (7 if scale == "sample" else 17)
    for point, percent in module("en_ratio").points().items():
        drawn = counts(get("en_ratio", point, scale=scale), index)
        english = drawn.pop("en")
        assert english == round(percent / 100 * total)
        assert sum(drawn.values()) == total - english
        assert max(drawn.values()) - min(drawn.values()) <= 1


def test_fixed_multilingual_counts():
    design = "fixed_multilingual"
    points = module("en_ratio").points(f"design={design}")
    drawn = {p: counts(get("en_ratio", p, design=design)) for p in points}
    at_40 = counts(get("en_ratio", "en_040"))
    for point, percent in points.items():
        english = drawn[point].pop("en")
        others = sum(drawn[point].values())
        assert english == pytest.approx(percent / 100 * (english + others), abs=1)
    assert set(points) == {"en_000", "en_020", "en_040", "en_060"}
    assert len({tuple(d.values()) for d in drawn.values()}) == 1
    assert drawn["en_000"] == {code: n for code, n in at_40.items() if code != "en"}


def test_default_point_is_the_papers():
    assert get("en_ratio").mixture.en_ratio == 0.4
    assert get("en_ratio", en_ratio=0.8).mixture.en_ratio == 0.8
    assert get("en_ratio", "en_080").mixture.en_ratio == 0.8
    with pytest.raises(ValueError, match="point='en_8' is not one of"):
        get("en_ratio", "en_8")
    with pytest.raises(ValueError, match="design='fixed' is not one of"):
        get("en_ratio", design="fixed")
    with pytest.raises(
        ValueError, match=r"scale='sample' is not one of \('pangea_7b', 'pangea_0_5b'\)"
    ):
        get("anyres", scale="sample")


def test_popularity_from_natural_to_uniform():
    total = get("language_popularity").mixture.num_examples
    table = {c: languages.get(c).pangeains_thousands for c in get("en_ratio").mixture.languages}
    natural = counts(get("language_popularity", "alpha_100"))
    half = counts(get("language_popularity", "alpha_050"))
    uniform = counts(get("language_popularity", "alpha_000"))
    for code, thousands in table.items():
        assert natural[code] == pytest.approx(total * thousands / sum(table.values()), abs=1)
        assert uniform[code] == pytest.approx(total / len(table), abs=1)
    assert half["en"] / half["es"] == pytest.approx(
        (natural["en"] / natural["es"]) ** 0.5, rel=0.01
    )
    assert natural["en"] / natural["es"] == pytest.approx(2554.6 / 126.6, rel=0.01)


def test_rotation_is_a_latin_square():
    points = module("language_popularity").points("design=rotate")
    rows = [counts(get("language_popularity", p, design="rotate")) for p in points]
    assert len(rows) == 8
    square = np.array([[row[code] for code in rows[0]] for row in rows])
    for line in (*square, *square.T):
        # If two languages have equal claims to an example, either may get it.
        np.testing.assert_allclose(np.sort(line), np.sort(square[0]), atol=1)
    assert square[0].max() / square[0].min() == pytest.approx(8, rel=0.01)
    seven_b = module("language_popularity").points("design=rotate,scale=pangea_7b")
    assert len(seven_b) == 8


def test_samples_are_nested():
    store = SampleStore()
    chosen = []
    for point, percent in module("num_samples").points().items():
        config = get("num_samples", point, seed=2)
        rows = choose_records(build(Experiment, config), store).rows
        assert len(rows) == round(percent / 100 * get("num_samples").mixture.num_examples)
        chosen.append(np.bincount(rows, minlength=len(store.index)))
    for smaller, larger in itertools.pairwise(chosen):
        assert (smaller <= larger).all()
        assert (smaller < larger).any()


def test_one_run_stops_on_the_way():
    whole = get("num_samples", "samples_100", design="one_run")
    part = get("num_samples", "samples_030", design="one_run")
    assert part.steps == round(0.3 * whole.steps)
    assert whole.steps == scales.steps(whole) == whole.optimizer.schedule_steps
    optimizer = lambda config: build(Experiment, config).optimizer  # noqa: E731
    ours = make_schedule(optimizer(part), part.steps)
    theirs = make_schedule(optimizer(whole), whole.steps)
    alone = make_schedule(optimizer(get("num_samples")), part.steps)
    assert float(ours(part.steps)) == float(theirs(part.steps)) > 0
    assert float(alone(part.steps)) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match=r"schedule_steps is .*, but the run has"):
        make_schedule(optimizer(part), whole.steps + 1)


def test_every_language_has_the_same_number_of_examples():
    drawn = {}
    for number in (8, 16, 38):
        design = f"languages_{number}"
        for point, examples in module("num_languages").points(f"design={design}").items():
            drawn[number] = counts(get("num_languages", point, design=design))
            assert set(drawn[number].values()) == {examples}
            assert len(drawn[number]) == number
    assert set(drawn[8]) == set(get("en_ratio").mixture.languages)
    assert set(drawn[8]) < set(drawn[16]) < set(drawn[38]) == set(languages.EMOJI)
    config = get("num_languages", examples=300, design="languages_16")
    assert config.mixture.num_examples == 16 * 300
    for argument in ("languages=all", "num_examples=100"):
        with pytest.raises(
            ValueError, match=f"remove the config argument {argument.split('=')[0]}="
        ):
            module("num_languages").get_config(argument)


def published_index():
    """An index with as many records of each language as in Table 5 of the paper."""
    codes = list(languages.PANGEAINS)
    sizes = [round(1000 * languages.get(code).pangeains_thousands) for code in codes]
    which = np.repeat(np.arange(len(codes), dtype=np.int32), sizes)
    constant = lambda text: pa.DictionaryArray.from_arrays(np.zeros(len(which), np.int32), [text])  # noqa: E731
    return pa.table(
        {
            "language": pa.DictionaryArray.from_arrays(which, codes),
            "kind": constant("image"),
            "source": constant("general/cambrian"),
            "category": constant("general"),
        }
    )


def test_all_of_pangeains_is_drawn_as_it_comes():
    index = published_index()
    config = get("num_samples", scale="pangea_7b")
    drawn = counts(config, index)
    assert sum(drawn.values()) == 6_150_624
    assert set(drawn) == set(languages.PANGEAINS)
    for code, count in drawn.items():
        share = languages.get(code).pangeains_thousands * 1000 / len(index)
        assert count == pytest.approx(6_150_624 * share, abs=1)


@pytest.fixture(scope="module")
def released_sample(tmp_path_factory):
    """The index of 135 records of the release, made like the index of all."""
    from pangea_jax.data.record import Conversation, identify_language

    file = (
        Path(__file__).parents[2].parent / "shared" / "data" / "pangeains_sample" / "PangeaIns.json"
    )
    if not file.exists():
        pytest.skip("the sample of PangeaIns is not here")
    rows = []
    for record in json.loads(file.read_text(encoding="utf-8")):
        one = Conversation.from_pangeains(record, default_language=identify_language)
        rows.append(
            {
                "id": one.id,
                "language": one.language,
                "kind": one.kind,
                "source": one.source,
                "category": one.category,
            }
        )
    return pa.Table.from_pylist(rows)


@pytest.mark.parametrize(
    ("name", "scale", "design"), [v for v in variants() if "pangea_7b" in v.id]
)
def test_7b_mixtures_come_exactly_from_released_records(name, scale, design, released_sample):
    """Every ablation at 7B scale, with as many examples and languages as 135 records allow."""
    few = {"languages": "en+vi+fr+ja+ru+zh", "num_examples": 120}
    if name == "en_ratio":  # French, Vietnamese and Russian are native here, not translated
        few["languages"] = "en+ja+zh+ur"
    if name == "data_origin":
        few["languages"] = "en+ru+vi"
    shared = ",".join(f"{key}={value}" for key, value in few.items())
    for point in module(name).points(f"scale={scale},design={design},{shared}"):
        config = get(name, point, scale=scale, design=design, **few)
        config.mixture.max_repeat = 1000.0
        mixture = build(Mixture, config.mixture)
        if point in ("cultural", "translated"):
            # The sample has five cultural records, but none in these languages, so this is an error.
            with pytest.raises(ValueError, match="no records in language"):
                choose(released_sample, mixture, config.seed)
            continue
        chosen = choose(released_sample, mixture, config.seed)
        drawn = released_sample.take(chosen.rows)
        codes = drawn["language"].to_pylist()
        for code, count in chosen.examples_per_language.items():
            assert codes.count(code) == count
        assert not {"ocr"} & set(drawn["category"].to_pylist())
        if design == "fixed_total":
            assert codes.count("en") == round(mixture.en_ratio * 120)


def test_pangea_7b_is_the_published_model():
    """The sizes were counted in the four shards of the release."""
    config = pangea_7b_finetune.get_config()
    model = build(Experiment, config).model
    _, shapes = model_params.abstract(lambda: Pangea(model, rngs=nnx.Rngs(0)))
    sizes = {name: int(np.prod(value.shape)) for name, value in shapes.items()}
    part = lambda prefix: sum(n for name, n in sizes.items() if name.startswith(prefix))  # noqa: E731
    assert part("language.") == 7_615_616_512
    assert part("projector.") == 16_522_240
    assert part("newline_d") == 3_584
    trains = set(sizes) - model_params.select(sizes, config.frozen)
    assert trains == set(sizes)
    assert model_params.select(sizes, dict(config.optimizer.lr_scale)) == {
        name for name in sizes if name.startswith("vision.")
    }
    first = pangea_7b_pretrain.get_config()
    left = set(sizes) - model_params.select(sizes, first.frozen)
    assert left == {name for name in sizes if name.startswith("projector.")}
    assert sum(sizes[name] for name in left) == 16_522_240


def test_pangea_0_5b_differs_from_the_7b_in_its_decoder_alone():
    """The decoder has as many parameters as Qwen/Qwen2-0.5B-Instruct, whose head is its embedding."""
    model = build(Experiment, pangea_0_5b_finetune.get_config()).model
    _, shapes = model_params.abstract(lambda: Pangea(model, rngs=nnx.Rngs(0)))
    sizes = {name: int(np.prod(value.shape)) for name, value in shapes.items()}
    part = lambda prefix: sum(n for name, n in sizes.items() if name.startswith(prefix))  # noqa: E731
    assert part("language.") == 494_032_768
    assert part("projector.") == (1024 + 1) * 896 + (896 + 1) * 896
    own = {f".model.language.{name}" for name in pangea_0_5b_finetune.QWEN2_0_5B}
    own |= {".title", ".pretrained", ".accumulation"}
    for small, large in (
        (pangea_0_5b_finetune, pangea_7b_finetune),
        (pangea_0_5b_pretrain, pangea_7b_pretrain),
    ):
        one, other = (
            json.loads(stage.get_config("root=gs://b").to_json()) for stage in (small, large)
        )
        assert differing(one, other) == own
        assert all(folder.startswith("gs://b/") for folder in one["pretrained"])


def test_a_root_holds_the_folders_of_an_ablation():
    for scale in scales.FULL:
        config = get("en_ratio", scale=scale, root="gs://b")
        folders = (config.data.store, config.data.tokenizer, *config.pretrained)
        assert all(folder.startswith("gs://b/") for folder in folders)
    with pytest.raises(ValueError, match="remove the config argument root=: the sample is in"):
        get("en_ratio", root="gs://b")


def test_stages_follow_table_1():
    first, second = pangea_7b_pretrain.get_config(), pangea_7b_finetune.get_config()
    one, two = build(Experiment, first), build(Experiment, second)
    ours = two.optimizer
    assert (ours.learning_rate, dict(ours.lr_scale)) == (2e-5, {r"vision\..*": 0.1})
    assert (ours.warmup_ratio, ours.weight_decay, ours.clip_norm) == (0.03, 0, 1)
    assert one.optimizer.learning_rate == 1e-3
    assert one.pipeline.examples == 128
    assert scales.steps(first) == 558_128 // 128 == 4360
    assert first.pretrained[0].endswith(":vision")
    rows = [pangea_7b_finetune.get_config(f"batch={b}").pipeline.rows for b in (64, 128, 512)]
    assert rows == [16, 32, 128]
    assert second.pipeline.row_tokens == 8192
    assert two.pipeline.loss_mask == "pangea"
    with pytest.raises(ValueError, match="batch='100' is not one of"):
        pangea_7b_finetune.get_config("batch=100")


@pytest.mark.parametrize("scale", scales.FULL)
def test_ablations_at_full_scale_have_128_examples_a_step(scale):
    config = get("en_ratio", scale=scale)
    assert build(Experiment, config).pipeline.examples == 128
    assert scales.steps(config) == 3906
    assert config.mixture.languages[0] == "en"
