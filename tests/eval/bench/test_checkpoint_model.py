"""A checkpoint of ours under evaluation: the engine's own answers, in batches, whatever is asked beside."""

import dataclasses
import functools
import json
import random

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import pangea_jax
from eval import run
from eval.bench import checkpoint_model, responses, tasks
from eval.bench.checkpoint_model import CheckpointModel
from eval.bench.models import Request
from eval.bench.task import Document, Failed, Generation, Prompt
from pangea_jax.checkpoints import adapter
from pangea_jax.generate import fit
from pangea_jax.model import LoraConfig, Pangea
from pangea_jax.model import params as model_params

NEW = 12


@pytest.fixture(scope="module")
def engine(checkpoint):
    return pangea_jax.load(checkpoint, dtype="float32")


def _request(text, id="1", images=(), choices=(), task="xgqa_de", **settings):
    settings = {"max_new_tokens": NEW} | settings
    prompt = Prompt(text, tuple(map(str, images)))
    document = Document(id, {"text": text, "id": id})
    generation = Generation(**settings)
    return Request(tasks.ALL_TASKS[task], document, prompt, generation, tuple(images), choices)


@pytest.fixture
def pictures(tmp_path):
    """Two that look different and have different shapes."""
    paths = [tmp_path / "tall.png", tmp_path / "wide.png"]
    for path, size, colour in zip(paths, [(20, 60), (90, 30)], ["red", "blue"], strict=True):
        Image.new("RGB", size, colour).save(path)
    return paths


def _ask(model, requests):
    """The responses in the order of the requests."""
    likelihood = requests[0].generation.output_type == "loglikelihood"
    answers = model.loglikelihood(requests) if likelihood else model.generate(requests)
    found = {request.document.id: response for request, response in answers}
    return [found[request.document.id] for request in requests]


class Spy:
    """An engine that notes the rows and widths of its batches, and has memory for so many rows."""

    def __init__(self, engine, fits=None):
        self._engine, self._fits, self.rows, self.widths = engine, fits, [], []

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def serve(self, prompts, *args, rows, width, **kwargs):
        self.rows.append(rows)
        self.widths.append(width)
        answers = self._engine.serve(prompts, *args, rows=rows, width=width, **kwargs)
        if self._fits is not None and rows > self._fits:
            if self._fits:
                yield next(answers)
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        yield from answers

    def loglikelihood(self, items, **kwargs):
        self.rows.append(len(items))
        if self._fits is not None and len(items) > self._fits:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return self._engine.loglikelihood(items, **kwargs)


def test_responses_are_those_of_each_prompt_alone(engine, pictures):
    texts = ["Swali: a?", "What is this?", "猫は?", "long " * 60, "x"]
    requests = [_request(text, str(i)) for i, text in enumerate(texts)]
    requests += [_request("Rangi?", f"p{i}", images=[path]) for i, path in enumerate(pictures)]
    spy = Spy(engine)
    found = _ask(CheckpointModel(spy, "m", batch_size=4), requests)
    assert len(spy.rows) < len(requests)
    for request, response in zip(requests, found, strict=True):
        parts = [{"type": "image", "image": str(path)} for path in request.images]
        parts.append({"type": "text", "text": request.prompt.text})
        alone = engine.generate([[{"role": "user", "content": parts}]], NEW)
        assert [response] == alone
    assert len(set(found)) == len(requests)


def test_raw_text_and_stop_strings(engine):
    text = "Question: 1 + 1?\nAnswer:"
    (whole,) = engine.generate([text], NEW)
    stop = whole[3:5]
    request = _request(text, chat=False, until=(stop, "never"))
    (response,) = _ask(CheckpointModel(engine, "m"), [request])
    assert response == whole[: whole.index(stop)]


def test_several_pictures_stand_where_their_marks_are(engine, pictures):
    marked = _request("First <image> then <image>?", images=pictures)
    unmarked = _request("Which?", images=pictures)
    model = CheckpointModel(engine, "m")
    for request, text in ((marked, marked.prompt.text), (unmarked, "<image> <image>\nWhich?")):
        message = {"role": "user", "content": text, "images": list(map(str, pictures))}
        (response,) = _ask(model, [request])
        assert [response] == engine.generate([[message]], NEW)


def test_pictures_without_a_mark_are_the_papers(engine, pictures):
    request = _request("Only <image> is shown.", images=pictures)
    (response,) = _ask(CheckpointModel(engine, "m"), [request])
    assert isinstance(response, Failed) and "1 <image> markers, but 2 images" in response.reason
    (response,) = _ask(CheckpointModel(engine, "m", profile="paper"), [request])
    first = _request("Only <image> is shown.", images=pictures[:1])
    assert [response] == _ask(CheckpointModel(engine, "m"), [first])


def test_what_fails_fails_alone(engine, pictures, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    requests = [
        _request("fine", "a"),
        _request("broken", "b", images=[broken]),
        _request("gone", "c", images=[tmp_path / "gone.png"]),
        _request("long " * 9_000, "d"),
        _request("raw", "e", images=pictures[:1], chat=False),
    ]
    found = {r.document.id: a for r, a in CheckpointModel(engine, "m").generate(requests[:4])}
    found |= {r.document.id: a for r, a in CheckpointModel(engine, "m").generate(requests[4:])}
    assert isinstance(found["a"], str)
    reasons = {id: answer.reason for id, answer in found.items() if id != "a"}
    assert "broken.png" in reasons["b"] and "gone.png" in reasons["c"]
    assert "exceed the model's context" in reasons["d"]
    assert "raw text" in reasons["e"]


LIKELIHOOD = {"output_type": "loglikelihood", "chat": False, "max_new_tokens": 0}


@pytest.mark.parametrize("settings", [{}, LIKELIHOOD])
def test_batches_that_do_not_fit_are_halved(engine, settings):
    """Texts are more than rows: what comes again is as much as is read ahead, or more."""
    choices, count = ((" a", " b"), 6) if settings else ((), 20)
    requests = [_request(f"q{i}", str(i), choices=choices, **settings) for i in range(count)]
    expected = _ask(CheckpointModel(engine, "m", batch_size=6), requests)
    spy = Spy(engine, fits=2)
    model = CheckpointModel(spy, "m", batch_size=6)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    same = same if settings else np.testing.assert_array_equal
    same(_ask(model, requests), expected)
    assert spy.rows == ([6, 3, 1, 2, 3, 1, 2] if settings else [6, 3, 1])
    spy.rows.clear()
    same(_ask(model, requests), expected)
    assert max(spy.rows) <= 2  # it has learnt
    (response,) = _ask(CheckpointModel(Spy(engine, fits=0), "m"), requests[:1])
    assert "too little memory" in response.reason


def test_what_does_not_fit_is_the_long_one(engine):
    """A short one beside it is answered, on one device or where each of several has one row."""

    class Narrow(Spy):
        def serve(self, prompts, *args, width, **kwargs):
            if width > 64:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            yield from super().serve(prompts, *args, width=width, **kwargs)

    texts = ["x", "word " * 16, "y", "z"]
    requests = [_request(text, str(i)) for i, text in enumerate(texts)]
    for shards in (1, 8):
        model = CheckpointModel(Narrow(engine), "m", batch_size=4)
        model._shards = shards
        found = _ask(model, requests)
        assert "too little memory" in found[1].reason
        assert all(isinstance(found[i], str) for i in (0, 2, 3))


def test_sampled_responses_depend_on_the_document_alone(engine):
    requests = [_request("Tell me.", str(i), temperature=1.0) for i in range(3)]
    together = _ask(CheckpointModel(engine, "m"), requests)
    assert len(set(together)) == 3
    for request, response in zip(requests, together, strict=True):
        assert _ask(CheckpointModel(engine, "m"), [request]) == [response]


def test_log_likelihoods(engine):
    texts = ["Hadithi moja.", "Hadithi nyingine ndefu zaidi. " * 6, "A?"]
    choices = [(" one", " another thing"), (" mbili", " moja"), (" A", " B", " C", " D")]
    requests = [
        _request(text, str(i), choices=c, task="xstorycloze_sw", **LIKELIHOOD)
        for i, (text, c) in enumerate(zip(texts, choices, strict=True))
    ]
    found = _ask(CheckpointModel(engine, "m"), requests)
    for request, totals in zip(requests, found, strict=True):
        context = engine.tokenizer.encode(request.prompt.text)
        for choice, total in zip(request.choices, totals, strict=True):
            whole = engine.tokenizer.encode(request.prompt.text + choice)
            logits = engine.logits(request.prompt.text + choice)[len(context) - 1 : -1]
            new = np.array(whole[len(context) :])
            expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(new)), new].sum()
            assert total == pytest.approx(expected, abs=2e-4)


def test_prompts_share_rows_with_others_of_about_their_length(engine, pictures):
    """Within a factor of two; a picture of few tokens is no exception, whatever its tiles."""
    texts = ["long " * 200, "word " * 16, "x", "y"]
    requests = [_request(text, str(i)) for i, text in enumerate(texts)]
    requests.append(_request("Rangi?", "p", images=pictures[:1]))
    widths = [engine.shape(engine.read([{"role": "user", "content": t}]))[0] for t in texts]
    assert widths == [640, 128, 64, 64]
    spy = Spy(engine)
    _ask(CheckpointModel(spy, "m"), requests)
    assert spy.widths == [640, 128]
    assert spy.rows == [1, 4]  # and none is there for nobody


def test_one_long_prompt_does_not_part_the_short(engine):
    texts = ["x", "long " * 200, "y", "z"]
    spy = Spy(engine)
    model = CheckpointModel(spy, "m")
    _ask(model, [_request(text, str(i)) for i, text in enumerate(texts)])
    assert (spy.widths, spy.rows) == ([64, 640], [3, 1])


def test_what_is_left_is_scored_in_few_batches(engine):
    texts = ["x", "y", "word " * 16, "long " * 200]
    requests = [_request(t, str(i), choices=(" a",), **LIKELIHOOD) for i, t in enumerate(texts)]
    spy = Spy(engine)
    _ask(CheckpointModel(spy, "m"), requests)
    assert sorted(spy.rows) == [1, 3]


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "tensor": 2}, {"data": 8}])
def test_devices_share_the_work(engine, checkpoint, pictures, sizes):
    """Responses and log-likelihoods of eight devices are those of one."""
    spread = pangea_jax.load(checkpoint, dtype="float32", mesh=sizes)
    texts = ["Swali: a?", "What is this?", "word " * 16, "x"]
    asked = [_request(text, str(i)) for i, text in enumerate(texts)]
    asked += [_request("Rangi?", f"p{i}", images=[path]) for i, path in enumerate(pictures)]
    scored = [_request(t, str(i), choices=(" a", " bc"), **LIKELIHOOD) for i, t in enumerate(texts)]
    model, alone = CheckpointModel(spread, "m"), CheckpointModel(engine, "m")
    assert _ask(model, asked) == _ask(alone, asked)
    np.testing.assert_allclose(_ask(model, scored), _ask(alone, scored), atol=2e-4)
    assert model._rows_of_answers(64, 0, 64) > 64  # of each device as many as of one


def test_rows_follow_memory(engine, monkeypatch):
    config = engine.config
    scored = fit.row_bytes(config, 64, 3, 4, 8)
    reading = fit.row_bytes(config, 64, 3, 1, 0)
    each = fit.cache_bytes(config, 128) + 4 * config.language.vocab_size
    rows = []
    for memory in (0, 5 * scored, reading + 5 * each, 1e15):
        monkeypatch.setattr(checkpoint_model, "_memory", lambda memory=memory: memory)
        model = CheckpointModel(engine, "m")
        rows.append((model._rows((64, 3, 4, 8)), model._rows_of_answers(64, 3, 64)))
    assert rows[0] == (1, 1) and rows[1][0] == rows[2][1] == 4 and rows[3] == (64, 64)
    assert fit.row_bytes(config, 128, 3, 4, 8) > scored


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=nowhere"], "there is no folder nowhere"),
        (["--model=sample", "--batch_size=0"], "expected auto or a positive number"),
        (["--model={folder}"], "config.json"),
        (["--model=sample", "--mesh=4"], "--mesh=4: expected auto, or sizes as in data=2,tensor=4"),
        (["--model=sample", "--mesh=rows=2"], "mesh has no axis 'rows'; it has data, fsdp, tensor"),
        (["--model=sample", "--mesh=data=3"], "does not fill the 8 devices"),
    ],
)
def test_wrong_models_say_what_is_wrong(flags, message, data_dir, tmp_path, capsys):
    flags = [flag.format(folder=tmp_path) for flag in flags]
    needed = ["--tasks=mgsm_en", f"--data_dir={data_dir}", f"--output_path={tmp_path / 'out'}"]
    assert run.main([*needed, *flags]) == 2
    assert message in capsys.readouterr().err


class Killed(BaseException):
    pass


class Mortal:
    """A model that notes what has been answered, and dies after so many answers."""

    def __init__(self, model, lives):
        self.name, self.answered, self._model, self._lives = model.name, [], model, lives

    def generate(self, requests):
        for request, response in self._model.generate(requests):
            if len(self.answered) == self._lives:
                raise Killed
            self.answered.append(request.key)
            yield request, response


def _run(model, requests, output):
    log = responses.ResponseLog(output)
    return responses.run(model, requests, log, console=run.Console(quiet=True))


def _responses(output):
    rows = [
        json.loads(line)
        for path in sorted((output / "responses").iterdir())
        for line in path.read_text("utf-8").splitlines()
    ]
    found = {(row["task"], row["doc_id"]): row["resps"][0][0] for row in rows}
    assert len(found) == len(rows)  # each once
    return found


def test_real_data_killed_twice_and_resumed(engine, real_data, tmp_path):
    """xChat with its photographs, MGSM and FLORES: the same responses as without interruption."""
    names = ["xchat_en", "xchat_ja", "mgsm_sw", "mgsm_zh", "flores_de-en"]
    chosen = tasks.select(names)
    requests, failures = responses.make_requests(
        chosen, real_data, profile="fixed", limit=3, overrides={"max_new_tokens": NEW}
    )
    assert len(requests) == 15 and not failures
    assert sum(len(r.images) for r in requests) == 6
    model = CheckpointModel(engine, "random", batch_size=4)
    assert _run(model, requests, tmp_path / "whole") == []
    rng, answered = random.Random(1), []
    for lives in (rng.randint(2, 6), rng.randint(2, 6), None):
        mortal = Mortal(model, lives)
        if lives is None:
            _run(mortal, requests, tmp_path / "killed")
        else:
            with pytest.raises(Killed):
                _run(mortal, requests, tmp_path / "killed")
        answered += mortal.answered
    assert sorted(answered) == sorted(request.key for request in requests)
    whole = _responses(tmp_path / "whole")
    assert _responses(tmp_path / "killed") == whole
    assert len(set(whole.values())) > 10


def test_the_command_runs_a_checkpoint(checkpoint, tmp_path, write_jsonl):
    story = {"sentences": ["A.", "B.", "C.", "D."], "endings": ["one", "two"], "answer": 1}
    rows = [{"id": str(i)} | story | {"answer": i % 2} for i in range(4)]
    write_jsonl(tmp_path / "data" / "xstorycloze" / "sw.jsonl", rows)
    rows = [{"id": str(i), "question": f"{i} + 1?", "answer": i + 1} for i in range(3)]
    write_jsonl(tmp_path / "data" / "mgsm" / "en.jsonl", rows)
    flags = ["--tasks=xstorycloze_sw,mgsm_en", f"--model={checkpoint}", "--batch_size=2"]
    flags += [f"--data_dir={tmp_path / 'data'}", f"--output_path={tmp_path / 'out'}"]
    assert run.main([*flags, "--gen_kwargs=max_new_tokens=8"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    # The same story four times, with one gold ending and the other by turns.
    assert results["tasks"]["xstorycloze_sw"]["fixed"]["score"] == 50
    assert results["tasks"]["mgsm_en"]["fixed"]["n"] == 3
    assert results["model"] == str(checkpoint)
    assert results["environment"]["packages"]["jax"] == jax.__version__


@pytest.fixture
def adapters(checkpoint, make_random_model, tmp_path):
    """A folder of peft with random adapters, and one that names its base."""
    model = make_random_model()
    language = dataclasses.replace(model.config.language, lora=LoraConfig(rank=2))
    config = dataclasses.replace(model.config, language=language)
    _, shapes = model_params.abstract(lambda: Pangea(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    params = {n: rng.normal(size=x.shape).astype(np.float32) for n, x in shapes.items()}
    for name, base in (("bare", ""), ("named", str(checkpoint))):
        adapter.save(params, language.lora, tmp_path / name, base=base)
    return tmp_path


def test_adapters_are_evaluated_on_their_base(
    adapters, checkpoint, data_dir, monkeypatch, capsys, read_jsonl
):
    monkeypatch.setattr(pangea_jax, "load", functools.partial(pangea_jax.load, dtype="float32"))

    def ask(out, *words):
        flags = ["--tasks=xstorycloze_sw,mgsm_en", "--limit=2", f"--data_dir={data_dir}"]
        flags += ["--gen_kwargs=max_new_tokens=4", f"--output_path={adapters / out}", *words]
        assert run.main(flags) == 0, capsys.readouterr().err
        rows = read_jsonl(adapters / out / "samples" / "xstorycloze_sw.jsonl")
        return np.array([row["resps"][0][0] for row in rows])

    found = ask("a", f"--model={adapters / 'named'}")
    np.testing.assert_allclose(
        ask("b", f"--model={adapters / 'bare'}", f"--base={checkpoint}"), found
    )
    merged = pangea_jax.load(adapters / "named")
    item = merged.candidates("A. B. C. D.", [" one", " two"])
    wanted = [choice.total for choice in merged.loglikelihood([item])[0]]
    np.testing.assert_allclose(found[0], wanted, rtol=0, atol=1e-3)
    assert np.abs(found - ask("c", f"--model={checkpoint}")).max() > 0.1
    results = json.loads((adapters / "b" / "results.json").read_text("utf-8"))
    assert results["model"] == f"{adapters / 'bare'} on {checkpoint}"
    assert results["config"]["base"] == str(checkpoint)
    flags = ["--tasks=mgsm_en", f"--data_dir={data_dir}", f"--output_path={adapters / 'd'}"]
    capsys.readouterr()
    assert run.main([*flags, f"--model={adapters / 'bare'}"]) == 2
    said = capsys.readouterr().err
    assert "base" in said and said.count("\n") == 1
