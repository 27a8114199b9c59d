"""The cultural pipeline from files as LAION and img2dataset write them to records, against real servers."""

import io
import json
import logging
import multiprocessing
import random
import signal
import types
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

pytest.importorskip("apache_beam", reason="Apache Beam is in requirements-curation.txt")
pytest.importorskip("imagehash", reason="ImageHash is in requirements-curation.txt")
pytest.importorskip("protego", reason="Protego is in requirements-curation.txt")
pytest.importorskip("rensa", reason="rensa is in requirements-curation.txt")

from configs.curation import cultural as cultural_config
from pangea_jax.curation import cultural, reply_store
from pangea_jax.curation.accounting import Dropped, Entered, Passed
from pangea_jax.curation.filters import Filters
from pangea_jax.data.build import archives, pangeains
from pangea_jax.data.record import Conversation
from pangea_jax.typed_config import build
from pangea_jax.work import runners
from pangea_jax.work.restart import WorkError

from .crawl import Crawl, Web, alt_texts, answers, make_crawl, prompt_of
from .samples import ENGLISH, SENTENCES, picture

RUNNER = ["--runner=DirectRunner"]
PROBLEMS = (WorkError, FileNotFoundError, ValueError)


@pytest.fixture
def web():
    server = Web()
    yield server
    server.close()


def make_config(crawl, endpoint, tmp_path):
    config = cultural_config.get_config()
    config.source = str(crawl.folder)
    config.shard_size = 8
    config.languages = tuple(SENTENCES)
    config.blocked_words = str(tmp_path / "blocked.txt")
    (tmp_path / "blocked.txt").write_text("# words\npalabrota\nmala palabra\n", encoding="utf-8")
    config.fetch.private = True
    config.balance = dict(per_subject=None, per_language=None, seed=0)
    common = {"base_url": endpoint.url, "retries": 3, "timeout": 10.0, "concurrency": 4}
    config.scoring_llm.update(common)
    config.llm.update(common, price_in=1.0, price_out=2.0)
    return config


def run(config, out, options):
    return cultural.run(build(cultural.CulturalConfig, config), out, options)


def rows_of(folder):
    return [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text("utf-8").splitlines()
    ]


def results(out):
    """Every file that a run leaves for others, by its path."""
    folders = ("records", "provenance", "dropped")
    paths = [p for f in folders for p in sorted((out / f).rglob("*")) if p.is_file()]
    found = {p.relative_to(out).as_posix(): p.read_bytes() for p in paths}
    return found | {"report.json": (out / "report.json").read_bytes()}


LATE = {"accessible", "alike when fetched"}
TROUBLE = {"malformed": 0.12, "refused": 0.06, "wrong_language": 0.12, "slow": 0.03}
TROUBLE |= {"busy": 0.1, "broken": 0.05, "cut": 0.05}


def test_what_is_planted_is_found_and_all_else_is_kept(tmp_path, web, start_endpoint):
    crawl = make_crawl(tmp_path / "crawl", web)
    endpoint = start_endpoint(answers(crawl.scores))
    config, out = make_config(crawl, endpoint, tmp_path), tmp_path / "out"
    report = run(config, out, RUNNER)
    dropped = Counter((r["id"], r["stage"], r["reason"]) for r in rows_of(out / "dropped"))
    scored = {id for id, stage, _ in dropped if stage in ("quality", "country")}
    assert (
        Counter(e for e in dropped.elements() if e[1] not in ("quality", "country"))
        == crawl.planted
    )
    kept = rows_of(out / "records")
    captions = {r["id"].removesuffix("-caption") for r in kept if r["id"].endswith("-caption")}
    made = [r["id"] for r in kept if not r["id"].endswith("-caption")]
    assert sorted(made) == sorted(set(crawl.good) - scored)
    assert 0 < len(captions) < len(made) and captions <= set(made)
    assert report["entered"] == crawl.rows
    assert report["entered"] + len(captions) == report["kept"] + report["dropped"]
    assert report["kept"] == len(kept)

    assert web.asked["/robots.txt"] == 1
    assert not any(path.startswith("/secret/") for path in web.asked)

    # The model's scores decide, as they were told to.
    of_text = {r["alt_text"]: r for r in rows_of(out / "provenance")}
    for text, (quality, subject, country) in crawl.scores.items():
        if text in of_text:
            row = of_text[text]
            assert (row["quality"], row["subject"], row["country"]) == (quality, subject, country)
            assert quality >= 4 and country != "No specific country"
    assert {stage["stage"]: stage for stage in report["stages"]}["quality"]["dropped"]["quality 3"]
    assert "about 60 %" in (out / "report.md").read_text("utf-8")


def test_records_are_ready_to_be_built_and_say_where_they_come_from(tmp_path, web, start_endpoint):
    crawl = make_crawl(tmp_path / "crawl", web)
    endpoint = start_endpoint(answers(crawl.scores), shares=TROUBLE)
    out = tmp_path / "out"
    report = run(make_config(crawl, endpoint, tmp_path), out, RUNNER)
    dropped, kept = rows_of(out / "dropped"), rows_of(out / "records")
    assert report["entered"] == crawl.rows
    made = sum(row["id"].endswith("-caption") for row in kept)
    assert crawl.rows + made == len(kept) + len(dropped)

    # Nothing is lost to a server that is busy, broken or cut off; only to bad answers.
    bad = {k for k, (content, _) in endpoint.kinds.items() if content not in ("good", "slow")}
    told = [prompt_of(endpoint.requests[key]) for key in bad]
    unlucky = {id for id, text in alt_texts(crawl) if any(text in prompt for prompt in told)}
    for row in dropped:
        if row["stage"] == "scoring":
            assert row["id"] in unlucky, row
    assert {"scoring", "recaption"} <= {row["stage"] for row in dropped}

    built = pangeains.Build(out / "records", tmp_path / "store")
    with runners.Local(1) as go:
        summary = pangeains.build(built, go, max_bad_fraction=0.0)
    assert summary["kept"] == len(kept) and summary["rejected"] == {}
    pictures = archives.Pictures(out / "records", tmp_path / "archives.sqlite")
    pictures.index()
    of_id = {row["id"]: row for row in rows_of(out / "provenance")}
    assert len(of_id) == len(kept)
    for record in kept:
        conversation = Conversation.from_pangeains(record)
        assert conversation.source == "cultural/laion-multi"
        assert conversation.language == of_id[record["id"]]["language"]
        (name,) = conversation.images
        _, place = pictures.find(name)
        assert Image.open(io.BytesIO(pictures.read(place))).size == (320, 256)
        provenance = of_id[record["id"]]
        assert provenance["models"] == {
            "scoring": "meta-llama/Llama-3.1-8B-Instruct",
            "captions": "gemini-1.5-pro",
        }
        assert provenance["prompts"]["recaption"] in {f"P{n}" for n in range(1, 6)}
        assert provenance["filters"]["size"] == [320, 256]
        types = provenance["task_types"]
        assert len(set(types)) == len(types) == len(conversation.turns) // 2
        assert ENGLISH not in "".join(turn.text for turn in conversation.turns)
    usage = json.loads((out / "usage.json").read_text())
    assert sum(row["calls"] for row in usage.values()) == len(endpoint.finished)
    assert set(endpoint.finished.values()) == {1}


def run_to_the_end(folder, url, out):
    """In a process of its own, to be killed."""
    logging.disable(logging.CRITICAL)
    crawl = Crawl(folder / "crawl", Counter(), [], {})
    endpoint = types.SimpleNamespace(url=url)
    run(make_config(crawl, endpoint, folder), out, RUNNER)


def test_stopped_and_killed_ten_times_it_makes_the_same_and_pays_for_nothing_twice(
    tmp_path, web, start_endpoint
):
    crawl = make_crawl(tmp_path / "crawl", web)
    first, second = (start_endpoint(answers(crawl.scores), shares=TROUBLE) for _ in range(2))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(make_config(crawl, first, tmp_path), whole, RUNNER)

    limited = make_config(crawl, second, tmp_path)
    limited.llm.max_calls = 15
    with pytest.raises(
        reply_store.BudgetExceeded, match="raise it and start the same command again"
    ):
        run(limited, killed, RUNNER)
    assert second.finished.total() == 15
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pangea_jax.curation.cultural", "apache_beam", "openai", __name__]
    )
    luck = random.Random(0)
    for _ in range(10):
        process = context.Process(target=run_to_the_end, args=(tmp_path, second.url, killed))
        process.start()
        process.join(luck.uniform(0.2, 1.5))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    second.wait_until_idle()
    run(make_config(crawl, second, tmp_path), killed, RUNNER)
    assert results(killed) == results(whole)
    usage = reply_store.Replies(killed / "work" / "replies.sqlite", lease=600.0).usage()
    # A reply that was on its way when its asker was killed is asked for again, and counted as lost.
    again = second.finished.total() - len(second.finished)
    assert again <= sum(row.lost for row in usage.values()) <= 4 * 10


class Constant:
    """Scores every text by its length: a scorer is whatever takes pictures and texts."""

    def __call__(self, pictures, texts):
        assert all(picture.mode == "RGB" for picture in pictures)
        return np.array([len(text) / 100 for text in texts], np.float32)


def test_any_scorer_can_take_the_place_of_the_sources_similarity(tmp_path):
    rows = [{"TEXT": "x" * n, "similarity": 0.9, "image": picture(n)} for n in (29, 31, 60)]
    rows.append({"TEXT": "y" * 50, "similarity": 0.2, "image": None, "URL": "https://a.example/1"})
    for row in rows:
        row.update(LANGUAGE="es", NSFW="UNLIKELY", WIDTH=300, HEIGHT=300)
    pq.write_table(
        pa.Table.from_pylist([{"URL": None} | row for row in rows]), tmp_path / "x.parquet"
    )
    read = cultural.FilterPairs(tmp_path, Filters(), Constant)
    found = list(read([{"path": str(tmp_path / "x.parquet"), "row_group": 0}]))
    assert [o.row["similarity"] for o in found if isinstance(o, Passed)] == pytest.approx(
        [0.31, 0.6]
    )
    assert [o.reason for o in found if isinstance(o, Dropped)] == ["CLIP score is too low"] * 2
    assert found[-1] == Entered(4)


def test_settings_that_cannot_be_carried_out_say_so(tmp_path):
    crawl = Crawl(tmp_path / "nowhere", Counter(), [], {})
    config = make_config(crawl, types.SimpleNamespace(url="http://127.0.0.1:9/v1"), tmp_path)

    def problem(**changes):
        with config.unlocked(), pytest.raises(PROBLEMS) as caught:
            config.update(changes)
            run(config, tmp_path / "out", RUNNER)
        return str(caught.value)

    assert "nowhere: no such file" in problem()
    (tmp_path / "empty").mkdir()
    assert "no *.parquet" in problem(source=str(tmp_path / "empty"))
    assert "config.languages: unknown language tag 'xx'" in problem(languages=("xx",))
    config.balance.per_topic = 3
    assert "config.balance.per_topic is an unknown key; did you mean" in problem(languages=())
    # One budget is for both models: another would not be kept.
    config.balance = {}
    unknown = "config.scoring_llm.budget is an unknown key"
    assert unknown in problem(scoring_llm={"model": "m", "budget": 5.0})


def test_plans_are_those_of_earlier_versions():
    config = build(cultural.CulturalConfig, cultural_config.get_config())
    plan = cultural._plan(config, cultural._filters(config), [])
    assert set(plan["fetch"]) == {"timeout", "private", "robots", "user_agent"}
    assert set(plan["llm"]) == {"model", "temperature", "max_tokens", "extra_body"}
    assert set(plan["scoring_llm"]) == set(plan["llm"])


def test_tags_may_be_written_as_a_command_line_has_them():
    config = cultural_config.get_config()
    config.filters.nsfw = ("UNLIKELY,unsure",)  # of --config.filters.nsfw=UNLIKELY,unsure
    config = build(cultural.CulturalConfig, config)
    assert cultural._filters(config).nsfw == ("UNLIKELY", "UNSURE")
