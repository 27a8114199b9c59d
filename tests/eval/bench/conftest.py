"""Made-up data; and the public data beside the repository, if it is there, as eval/bench/documents.py reads it."""

import csv
import gzip
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

BENCH = Path(__file__).resolve().parents[4] / "shared" / "data" / "bench"
XCHAT_FOLDERS = {
    "en": "English",
    "es": "Spanish",
    "hi": "Hindi",
    "id": "Indonesian",
    "ja": "Japanese",
    "ko": "Korean",
    "zh": "Chinese",
    "rw": "Kinyarwanda",
}


def _read_jsonl(path: Path) -> list[dict]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _write_jsonl(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def read_jsonl():
    return _read_jsonl


@pytest.fixture(scope="session")
def write_jsonl():
    return _write_jsonl


@pytest.fixture
def data_dir(tmp_path, write_jsonl):
    return write_little(tmp_path / "data", write_jsonl)


def write_little(folder: Path, write_jsonl) -> Path:
    """Writes a little of MGSM, xGQA, XStoryCloze and xChat, with pictures."""
    for code, label in (("en", "How many?"), ("sw", "Ngapi?"), ("bn", "কত?")):
        rows = [
            {"id": str(i), "question": f"{label} {'x' * i}", "answer": str(i)} for i in range(30)
        ]
        write_jsonl(folder / "mgsm" / f"{code}.jsonl", rows)
    for i in range(3):
        (folder / "xgqa" / "images").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(folder / "xgqa" / "images" / f"{i}.png")
    rows = [
        {"id": str(i), "question": "Who?", "answer": "man", "images": [f"images/{i % 3}.png"]}
        for i in range(9)
    ]
    write_jsonl(folder / "xgqa" / "de.jsonl", rows)
    story = {"sentences": ["A.", "B.", "C.", "D."], "endings": ["one", "two"], "answer": 1}
    write_jsonl(folder / "xstorycloze" / "sw.jsonl", [{"id": str(i)} | story for i in range(4)])
    rubric = {"criteria": "Is it good?"} | {f"score{i}_description": str(i) for i in range(1, 6)}
    row = {
        "system_prompt": "Help.",
        "input": "What?",
        "reference_answer": "That.",
        "rubric": rubric,
    }
    (folder / "xchat").mkdir()
    (folder / "xchat" / "images").symlink_to(folder / "xgqa" / "images")
    rows = [{"id": str(i), "images": ["images/0.png"]} | row for i in range(4)]
    write_jsonl(folder / "xchat" / "en.jsonl", rows)
    return folder


@pytest.fixture(scope="session")
def bench() -> Path:
    """The folder of public data and golden outputs."""
    if not (BENCH / "golden").is_dir():
        pytest.skip("the public evaluation data is not beside the repository")
    return BENCH


@pytest.fixture(scope="session")
def golden(bench):
    """Reads a golden file by name."""

    def read(name: str):
        path = bench / "golden" / name
        return _read_jsonl(path) if ".jsonl" in name else json.loads(path.read_text("utf-8"))

    return read


@pytest.fixture(scope="session")
def xchat_data(bench, tmp_path_factory) -> Path:
    """A data folder with all of xChatBench; pictures are links."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "xchat").mkdir()
    (folder / "xchat" / "images").symlink_to(bench / "xchat" / "images")
    for code, name in XCHAT_FOLDERS.items():
        rows = []
        for path in sorted((bench / "xchat" / "data" / name).glob("*/data.json")):
            for item in json.loads(path.read_text("utf-8")):
                place = f"{item['task']}/{item['instance_idx']}"
                names = ("system_prompt", "input", "reference_answer")
                row = {"id": place} | {field: item[field] for field in names}
                row |= {"rubric": item["score_rubric"], "images": [f"images/{place}.jpg"]}
                rows.append(row)
        _write_jsonl(folder / "xchat" / f"{code}.jsonl", rows)
    return folder


@pytest.fixture(scope="session")
def real_data(bench, xchat_data) -> Path:
    """The data folder with MGSM in seven languages and FLORES in the directions that are there."""
    for path in (bench / "mgsm").glob("mgsm_*.tsv"):
        with path.open(encoding="utf-8", newline="") as lines:
            pairs = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
        rows = [{"id": str(i), "question": q, "answer": a} for i, (q, a) in enumerate(pairs)]
        _write_jsonl(xchat_data / "mgsm" / f"{path.stem.removeprefix('mgsm_')}.jsonl", rows)
    sentences = _read_jsonl(bench / "flores200" / "devtest_core6.jsonl.gz")
    for code in sorted(set(sentences[0]) - {"en"}):
        for source, target in ((code, "en"), ("en", code)):
            rows = [
                {"id": str(i), "source": s[source], "target": s[target]}
                for i, s in enumerate(sentences)
            ]
            _write_jsonl(xchat_data / "flores" / f"{source}-{target}.jsonl", rows)
    return xchat_data


@pytest.fixture(scope="session")
def checkpoint(make_random_model, tmp_path_factory) -> Path:
    """A small model with random weights, saved with the sample's vocabulary."""
    from pangea_jax import checkpoints
    from pangea_jax.generate.engine import SAMPLE_MODEL
    from pangea_jax.sample import emoji

    folder = tmp_path_factory.mktemp("checkpoint")
    model = make_random_model()
    tokenizer = checkpoints.load_tokenizer(SAMPLE_MODEL, emoji.DIRECTORY)
    tokens = checkpoints.SpecialTokens(
        image=tokenizer.image_id, end=tokenizer.im_end_id, pad=tokenizer.pad_id
    )
    checkpoints.save(model, model.config, folder, tokens=tokens)
    shutil.copy(emoji.DIRECTORY / emoji.TOKENIZER, folder)
    return folder
