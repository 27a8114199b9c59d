"""From a table of one's own records to a model that answers better: each command in a process of its own."""

import csv
import json
import shutil

import pytest

import pangea_jax
from configs import finetune
from pangea_jax import checkpoints, experiment
from pangea_jax.data.pipeline import RowSource
from pangea_jax.experiment import Experiment
from pangea_jax.sample import emoji
from pangea_jax.typed_config import build
from tests.launch.conftest import call

QUESTIONS = {"sw": "Hii ni nini?", "id": "Apa ini?"}
# Sixty records train in seconds. All other values are those of the config.
QUICK = {
    "pipeline.row_tokens": 128,
    "pipeline.row_tiles": 5,
    "optimizer.learning_rate": 0.01,
    "checkpoint.every": 1000,
}


@pytest.fixture(scope="module")
def data(emoji_store, tmp_path_factory):
    """Sixty drawings with their names, half in Swahili and half in Indonesian, as a table."""
    folder = tmp_path_factory.mktemp("my_data")
    (folder / "pics").mkdir()
    with (folder / "data.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "image", "question", "answer", "language"])
        for n, concept in enumerate(emoji.load_concepts()[:60]):
            name, language = f"pics/{n}.png", tuple(QUESTIONS)[n % 2]
            picture = emoji_store.image(emoji.image_key("noto", concept.codepoint))
            (folder / name).write_bytes(picture)
            answer = f"{concept.names[language]}, nambari {n}."
            rows.writerow([n, name, QUESTIONS[language], answer, language])
    return folder


@pytest.fixture(scope="module")
def public(make_random_model, emoji_tokenizer, tmp_path_factory):
    """A small random model in the layout of neulab/Pangea-7B-hf."""
    folder, model = tmp_path_factory.mktemp("public"), make_random_model()
    tokens = checkpoints.SpecialTokens.of(emoji_tokenizer)
    checkpoints.save(model, model.config, folder, tokens=tokens)
    shutil.copy(emoji.DIRECTORY / emoji.TOKENIZER, folder)
    return folder


def command(script, *flags):
    """Runs a command; returns what it printed."""
    done = call(script, *flags, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout


def likelihoods(model, conversations, store):
    """The log-likelihood of the answer of each conversation, and what the model answers instead."""
    asked, found = [], []
    for one in conversations:
        picture = {"type": "image", "image": store.image(one.images[0])}
        question, answer = (turn.text for turn in one.turns)
        text = {"type": "text", "text": question.replace("<image>", "").strip()}
        message = {"role": "user", "content": [picture, text]}
        asked.append([message])
        found.append(model.candidates([message], [answer]))
    scores = [one[0].total for one in model.loglikelihood(found)]
    return scores, model.generate(asked, max_new_tokens=12)


@pytest.mark.parametrize(
    ("name", "epochs"), [("public", 6), pytest.param("sample", 12, marks=pytest.mark.slow)]
)
def test_a_table_becomes_a_better_model(name, epochs, data, public, tmp_path):
    base = public if name == "public" else name
    store, workdir = tmp_path / "mine", tmp_path / "run"
    tokenizer = public if name == "public" else emoji.DIRECTORY
    told = command(
        "launch/build_data.py",
        "own",
        f"--source={data}",
        f"--out={store}",
        f"--tokenizer={tokenizer}",
    )
    assert "60 of 60 records, 60 pictures" in told
    arg = f"model={base},data={store},lora=4,epochs={epochs},dtype=float32"
    flags = [f"--config.{key}={value}" for key, value in QUICK.items()]
    told = command(
        "launch/train.py", f"--config=configs/finetune.py:{arg}", f"--workdir={workdir}", *flags
    )
    assert "before training: validation loss" in told and "the best so far" in told

    validation = json.loads((workdir / "results.json").read_text())["validation"]
    before, last = (validation[key]["validation/loss"] for key in ("before", "last"))
    assert last < before - 0.2
    assert {f"validation/loss/{code}" for code in QUESTIONS} <= validation["last"].keys()
    assert (workdir / "loss.png").is_file()

    config = finetune.get_config(arg)
    config.update_from_flattened_dict(QUICK)
    exp = build(Experiment, config)
    opened, _ = experiment.open_data(exp)
    choice = experiment.choose_records(exp, opened)
    held = list(RowSource(opened, choice.held_back))
    assert len(held) == 6 and len(set(choice.rows.tolist())) == 54
    models = [pangea_jax.load(path, dtype="float32") for path in (base, workdir / "adapter")]
    (old, answers), (new, others) = (likelihoods(model, held, opened) for model in models)
    assert sum(new) > sum(old) + 1 and answers != others
    merged = likelihoods(pangea_jax.load(workdir / "model", dtype="float32"), held, opened)
    assert merged[0] == pytest.approx(new, rel=1e-3) and merged[1] == others

    picture = f"--image={data / 'pics' / '0.png'}"
    told = command(
        "launch/chat.py", f"--model={workdir / 'adapter'}", picture, "--prompt=Hii ni nini?"
    )
    assert told.strip()
