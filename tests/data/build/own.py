"""Sixty records of someone's own data, in every form that the page "Your own data" shows."""

import base64
import csv
import io
import json
import shutil

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from pangea_jax.data.build import pangeains
from pangea_jax.data.build.pangeains import Build
from pangea_jax.work.runners import Local
from tests.data.build.released import encoded, noise

TEXTS = {
    "sw": ("Ni nini kilicho katika picha hii?", "Mraba mdogo wa rangi, nambari {}."),
    "id": ('Apa yang "ada" di dalam gambar ini?', "Sebuah kotak kecil,\nnomor {}."),
    "en": ("What is in this picture, please?", "A small coloured square, number {}."),
}
PICTURES = {f"pics/{n}.png": encoded(noise(16, 12, n), "PNG") for n in range(60)}
ROWS = [
    {
        "id": f"{language}-{n}",
        "image": f"pics/{n}.png",
        "question": TEXTS[language][0],
        "answer": TEXTS[language][1].format(n),
        "language": language,
    }
    for n, language in enumerate(["sw", "id", "en"] * 20)
]


def llava(row, mark="<image>\n"):
    turns = [("human", mark + row["question"]), ("gpt", row["answer"])]
    return {
        "id": row["id"],
        "image": row["image"],
        "conversations": [{"from": speaker, "value": text} for speaker, text in turns],
        "language": row["language"],
    }


def messages(row, content):
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": row["answer"]}]
    return {"id": row["id"], "messages": turns, "language": row["language"]}


def write_pictures(folder):
    for name, data in PICTURES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def array(folder, name="data.json", mark=b""):
    (folder / name).write_bytes(mark + json.dumps([llava(row) for row in ROWS]).encode())


def lines(folder, rows, name="data.jsonl", mark=b""):
    (folder / name).write_bytes(mark + "\n".join(map(json.dumps, rows)).encode())


def table(folder, rows=ROWS, name="data.csv", delimiter=",", encoding="utf-8", columns=None):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    names = list(rows[0])
    writer.writerow(columns or names)
    writer.writerows([[row[name] for name in names] for row in rows])
    (folder / name).write_bytes(text.getvalue().encode(encoding))


def with_pictures(folder):
    """The records as a data set of `datasets`, with the pictures in an Image column."""
    rows = [row | {"image": str(folder / row["image"])} for row in ROWS]
    classes = datasets.ClassLabel(names=["sw", "id", "en"])
    made = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    return made.cast_column("language", classes)


def saved(folder):
    with_pictures(folder).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def saved_splits(folder):
    both = datasets.DatasetDict(train=with_pictures(folder), test=with_pictures(folder).select([0]))
    both.save_to_disk(str(folder / "saved"))
    return folder / "saved"


def hub(folder):
    """As the hub serves it: the bytes of the pictures are in the Parquet file."""
    rows = [{**row, "image": {"bytes": PICTURES[row["image"]], "path": None}} for row in ROWS]
    (folder / "hub/data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "hub/data/train-00000-of-00001.parquet")
    return folder / "hub"


def data_url(row):
    encoded = base64.b64encode(PICTURES[row["image"]]).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}


def parts(row, picture):
    return messages(row, [picture, {"type": "text", "text": row["question"]}])


def metadata(folder, name):
    rows = [{"file_name": row["image"]} | row for row in ROWS]
    rows = [{k: v for k, v in row.items() if k != "image"} for row in rows]
    (lines if name.endswith("jsonl") else table)(folder, rows, name)


RENAMED = {"image": "path", "question": "q", "answer": "a", "language": "lang_tag", "id": "key"}
FORMS = {
    "json": array,
    "json with a mark": lambda f: array(f, mark=b"\xef\xbb\xbf"),
    "json called jsonl": lambda f: array(f, "data.jsonl"),
    "jsonl": lambda f: lines(f, map(llava, ROWS)),
    "jsonl with a mark": lambda f: lines(f, map(llava, ROWS), mark=b"\xef\xbb\xbf"),
    "jsonl called json": lambda f: lines(f, map(llava, ROWS), "data.json"),
    "sharegpt without a mark": lambda f: lines(
        f, [llava(row, "") | {"image": "", "images": [row["image"]]} for row in ROWS]
    ),
    "messages": lambda f: lines(
        f,
        [messages(r, f"<image>\n{r['question']}") | {"images": [r["image"]]} for r in ROWS],
    ),
    "messages of parts": lambda f: lines(
        f, [parts(r, {"type": "image", "image": r["image"]}) for r in ROWS]
    ),
    "parts without paths": lambda f: lines(
        f, [parts(r, {"type": "image"}) | {"images": [r["image"]]} for r in ROWS]
    ),
    "data urls": lambda f: lines(f, [parts(r, data_url(r)) for r in ROWS]),
    "rows of json": lambda f: lines(f, ROWS),
    "csv": table,
    "csv of a spreadsheet": lambda f: table(f, delimiter=";", encoding="utf-8-sig"),
    "csv with other names": lambda f: table(f, columns=[RENAMED[n] for n in ROWS[0]]),
    "tsv": lambda f: table(f, name="data.tsv", delimiter="\t"),
    "absolute paths": lambda f: table(f, [r | {"image": str(f / r["image"])} for r in ROWS]),
    "paths of another machine": lambda f: table(
        f, [r | {"image": f"/home/me/{r['image']}"} for r in ROWS]
    ),
    "save_to_disk": saved,
    "DatasetDict": saved_splits,
    "parquet of the hub": hub,
    "parquet with paths": lambda f: with_pictures(f).to_parquet(str(f / "data.parquet")),
    "metadata.jsonl": lambda f: metadata(f, "metadata.jsonl"),
    "metadata.csv": lambda f: metadata(f, "metadata.csv"),
}
OPTIONS = {
    "csv with other names": {"columns": RENAMED},
    "DatasetDict": {"split": "train"},
}


def build(source, out, max_bad_fraction=0.0, **options):
    options = {"orientation": "upright", "own": "own"} | options
    with Local(1) as run:
        return pangeains.build(
            Build(source, out, **options), run, max_bad_fraction=max_bad_fraction
        )


def built(folder):
    """The bytes of a store, without what names its source."""
    named = ("manifest.json", "summary.json", pangeains.ARCHIVES)
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in named
    }


def copied(folder, to):
    return shutil.copytree(folder, to)
