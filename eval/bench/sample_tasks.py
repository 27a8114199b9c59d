"""The sample's questions as tasks of one's own, for `eval/run.py --include=FOLDER --tasks=own --model=sample`.

    sample_name     What is this?  The answer must be the name.
    sample_rank     The same question: the likeliest of ten names must be the true one. Chance is 10 %.
    sample_blind    The same, but the picture shows something else: the score of a model that does not look.

They are the first two scores of the sample's own evaluation and the floor of the second (`pangea_jax.sample.tasks`),
about drawings by the artist whose work no part of the sample was trained on.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from pangea_jax.data.record import IMAGE_MARKER
from pangea_jax.sample import emoji
from pangea_jax.sample.sample_store import SampleStore
from pangea_jax.sample.tasks import NAMED, Item, make_items
from pangea_jax.work import atomic

_RANK = {"output_type": "multiple_choice", "doc_to_choice": "names", "target_delimiter": ""}
_TASKS = {
    "sample_name": {
        "task_alias": "Name",
        "doc_to_image": "image",
        "reader": "short",
        "generation_kwargs": {"max_gen_toks": 16},
    },
    "sample_rank": {"task_alias": "Rank of 10", "doc_to_image": "image"} | _RANK,
    "sample_rank_blind": {"task_alias": "Rank, blind", "doc_to_image": "other_image"} | _RANK,
}


def write(folder: Path, languages: Sequence[str], things: int) -> None:
    """Writes three YAMLs, a JSONL file for each language, and the drawings.

    Args:
      things: number of things to ask about in each language; with a multiple of ten, the image-blind score of every
        model is exactly 10 %.
    """
    store, artists = SampleStore(), (emoji.TEST_ARTIST,)
    asked = {"metrics": (NAMED,), "limit": things}
    items = make_items(store, "unseen_artwork", languages, artists, **asked)
    for key in {key for item in items for key in (*item.images, *item.blind_images)}:
        path = folder / _file(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(path, store.image(key))
    for code in languages:
        lines = [json.dumps(_row(i), ensure_ascii=False) for i in items if i.language == code]
        atomic.write_bytes(folder / f"{code}.jsonl", ("\n".join(lines) + "\n").encode())
    common = {"doc_to_text": "{{question}}", "doc_to_target": "name"}
    common |= {"dataset_kwargs": {"data_files": {code: f"{code}.jsonl" for code in languages}}}
    for name, values in _TASKS.items():
        text = yaml.safe_dump({"task": name} | common | values, allow_unicode=True)
        atomic.write_bytes(folder / f"{name}.yaml", text.encode())


def _file(key: str) -> str:
    return f"images/{key.replace('/', '-')}.png"


def _row(item: Item) -> dict:
    """The true name among the others in an order that says nothing."""
    (picture,), (other,) = item.images, item.blind_images
    question = item.question[-1].text.replace(IMAGE_MARKER, "").strip()
    row = {"id": picture, "question": question, "name": item.candidates[0]}
    return row | {
        "names": sorted(item.candidates),
        "image": _file(picture),
        "other_image": _file(other),
    }
