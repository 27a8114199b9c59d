"""The adapter as lmms-eval calls it: with its own base class if installed, else one of the same interface."""

import importlib.util
import sys
import types

import jax
import numpy as np
import pytest
from PIL import Image

import pangea_jax
from eval.bench import lmms_eval_adapter
from eval.bench.lmms_eval_adapter import Answerer

DOCUMENTS = [
    {"question": "Nini?", "picture": Image.new("RGB", (40, 20), "red"), "target": " paka"},
    {"question": "Where <image> is it?", "picture": Image.new("RGB", (20, 50), "blue")},
    {"question": "No picture.", "picture": None},
]


class FakeBase:
    """What `lmms_eval.api.model.lmms` does for its subclasses."""

    def __init__(self):
        self.task_dict = {}

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config=None):
        pairs = (part.split("=") for part in arg_string.split(",") if part)
        given = {k: v for k, v in (additional_config or {}).items() if v is not None}
        return cls(**dict(pairs), **given)


@pytest.fixture(scope="module")
def model_class():
    if importlib.util.find_spec("lmms_eval"):
        yield lmms_eval_adapter.PangeaJax
        return
    modules = {name: types.ModuleType(name) for name in ("lmms_eval", "lmms_eval.api")}
    modules["lmms_eval.api.model"] = types.ModuleType("lmms_eval.api.model")
    modules["lmms_eval.api.model"].lmms = FakeBase
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        lmms_eval_adapter.model_class.cache_clear()
        yield lmms_eval_adapter.PangeaJax
    lmms_eval_adapter.model_class.cache_clear()


@pytest.fixture(scope="module")
def engine(checkpoint):
    return pangea_jax.load(checkpoint, dtype="float32")


@pytest.fixture(scope="module")
def model(model_class, checkpoint):
    given = {"batch_size": 2, "max_batch_size": None, "device": "cpu"}
    arguments = f"pretrained={checkpoint},dtype=float32"
    model = model_class.create_from_arg_string(arguments, given)
    model.task_dict["task"] = {"test": DOCUMENTS}
    return model


def _visual(document):
    return [document["picture"]] if document["picture"] else []


def _request(doc_id, second):
    arguments = (DOCUMENTS[doc_id]["question"], second, _visual, doc_id, "task", "test")
    return types.SimpleNamespace(args=arguments)


def test_generation(model, engine):
    settings = {"max_new_tokens": 8, "temperature": 0, "top_p": None, "num_beams": 1}
    asked = [_request(i, dict(settings)) for i in range(3)]
    asked += [_request(2, settings | {"max_new_tokens": 3, "do_sample": False})]
    found = model.generate_until(asked)
    texts = ["<image>\nNini?", "Where <image> is it?", "No picture.", "No picture."]
    for request, text, answer in zip(asked, texts, found, strict=True):
        pictures = _visual(DOCUMENTS[request.args[3]])
        message = {"role": "user", "content": text} | ({"images": pictures} if pictures else {})
        new = request.args[1]["max_new_tokens"]
        assert [answer] == engine.generate([[message]], new)
    assert found[2].startswith(found[3]) and len(set(found)) == 4


def test_stop_strings_are_applied(model):
    (whole,) = model.generate_until([_request(2, {"max_new_tokens": 8})])
    (cut,) = model.generate_until([_request(2, {"max_new_tokens": 8, "until": whole[2:4]})])
    assert cut == whole[: whole.index(whole[2:4])]


def test_log_likelihood_is_a_mean_loss(model, engine):
    """lmms-eval takes the choice of the smallest number."""
    by_function = _request(0, lambda document: document["target"])
    (loss, greedy), again, (other, _) = model.loglikelihood(
        [by_function, _request(0, " paka"), _request(0, " mbwa na ng'ombe")]
    )
    assert (loss, greedy) == again and loss != other
    message = {"role": "user", "content": "Nini?", "images": [DOCUMENTS[0]["picture"]]}
    prompt = engine.read([message])
    new = engine.tokenizer.encode(" paka")
    tokens = np.concatenate([prompt.tokens, new]).astype(np.int32)
    index = np.concatenate([prompt.image_index, np.full(len(new), -1, np.int32)])
    whole = type(prompt)(tokens, index, prompt.tiles)
    logits = engine.logits(whole)[len(prompt.tokens) - 1 : -1]
    expected = -np.asarray(jax.nn.log_softmax(logits))[np.arange(len(new)), new].mean()
    assert loss == pytest.approx(expected, abs=1e-4)


def test_pictures_beyond_the_marks_are_not_shown(engine):
    answerer = Answerer(engine, 2, system_prompt="Be brief.")
    system, message = answerer.conversation("One <image>.", ["a.png", "b.png"])
    assert system["content"] == "Be brief."
    assert message["images"] == ["a.png"]
    assert answerer.conversation("None.", ["a.png", "b.png"])[1]["images"] == ["a.png", "b.png"]


def test_beams_are_refused(model):
    with pytest.raises(ValueError, match="num_beams=4: there is no beam search"):
        model.generate_until([_request(2, {"num_beams": 4})])


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is not None, reason="it is installed")
def test_without_lmms_eval_the_command_says_what_to_do():
    with pytest.raises(SystemExit, match="pip install 'lmms-eval"):
        lmms_eval_adapter.main()
