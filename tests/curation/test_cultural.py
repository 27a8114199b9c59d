"""The cultural pipeline from files as LAION and img2dataset write them to records, against real servers."""

import base64
import dataclasses
import hashlib
import http.server
import io
import json
import logging
import multiprocessing
import random
import signal
import tarfile
import threading
import time
import types
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

pytest.importorskip("apache_beam", reason="Apache Beam is in requirements-curation.txt")
pytest.importorskip("imagehash", reason="ImageHash is in requirements-curation.txt")
pytest.importorskip("rensa", reason="rensa is in requirements-curation.txt")

from configs.curation import cultural as cultural_config
from pangea_jax import languages
from pangea_jax.curation import cultural, image_text, llm, pipeline
from pangea_jax.data import pangeains, release, runners
from pangea_jax.data.record import Conversation

RUNNER = ["--runner=DirectRunner"]
SENTENCES = {
    "ja": "写真には 満開の桜の下を 歩く人々と 背景に見える 古い木造の寺が 写っています 春の柔らかい光が "
    "石畳を照らし 屋台には団子や 抹茶が並んで 遠くの山には まだ雪が残り 子供たちが 川で遊んでいます",
    "es": "La fotografía muestra una plaza antigua con arcos de piedra, donde varias familias pasean al atardecer. "
    "Al fondo se ve una iglesia barroca y un puesto que vende churros con chocolate caliente.",
    "hi": "तस्वीर में एक पुराना किला दिखाई देता है जिसकी दीवारें लाल बलुआ पत्थर से बनी हैं। सामने रंगीन साड़ियों में "
    "महिलाएँ चल रही हैं और बाईं ओर मसालों की एक छोटी दुकान है।",
    "id": "Gambar ini memperlihatkan pasar terapung di sungai yang ramai, tempat para pedagang menjual buah dan "
    "sayuran dari perahu kayu. Di kejauhan tampak rumah panggung dengan atap merah.",
    "fr": "La photographie montre un marché de village au pied d'un château médiéval. Des étals de fromages et de "
    "pain bordent la rue pavée, et des cyclistes s'arrêtent près de la fontaine.",
}
ENGLISH = (
    "This is an ordinary English sentence about a picture that nobody asked for, and it goes on."
)
CODE_OF = {languages.get(code).english_name: code for code in SENTENCES}


def sentence(code, seed, count=9):
    """Words of a language in an order of their own: no two are alike to MinHash."""
    words = SENTENCES[code].split()
    return " ".join(random.Random(f"{code}{seed}").sample(words, count))


def picture(seed, size=(320, 256), kind="JPEG"):
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


class Web:
    """A server of pictures by path."""

    def __init__(self):
        self.files, self.asked = {}, Counter()
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                web.asked[self.path] += 1
                if self.path.startswith("/moved/"):
                    self.send_response(302)
                    self.send_header("Location", self.path.removeprefix("/moved"))
                    self.end_headers()
                    return
                body = web.files.get(self.path)
                self.send_response(200 if body is not None else 404)
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def web():
    server = Web()
    yield server
    server.close()


PLANTED = {  # id -> what is changed, and what must become of it
    "short": ({"TEXT": "abc"}, "filters", "text is too short"),
    "megabyte": ({"TEXT": "x" * (1 << 20)}, "filters", "text is too long"),
    "narrow": ({"WIDTH": 200}, "filters", "picture is too small"),
    "huge": ({"HEIGHT": 5000}, "filters", "picture is too large"),
    "banner": ({"WIDTH": 1200}, "filters", "aspect ratio"),
    "sizeless": ({"WIDTH": None}, "filters", "size is not known"),
    "nsfw": ({"NSFW": "NSFW"}, "filters", "NSFW tag"),
    "untagged": ({"NSFW": None}, "filters", "no NSFW tag"),
    "klingon": ({"LANGUAGE": "tlh"}, "filters", "language is not wanted"),
    "rude": ({"TEXT": "esto es una palabrota en español"}, "filters", "offensive text"),
    "rude words": ({"TEXT": "un muy mala palabra cualquiera"}, "filters", "offensive text"),
    "numbers": ({"TEXT": "0123456789", "LANGUAGE": ""}, "language", cultural.NO_LANGUAGE),
    "unlike": ({"similarity": 0.3}, "CLIP score", "CLIP score is too low"),
    "unscored": ({"similarity": None}, "CLIP score", "no CLIP score"),
    "alike": ({"TEXT": "{good-1}!"}, "near-duplicates", "alt text is like another"),
    "gone": ({"URL": "{web}/gone.jpg"}, "accessible", "address answers 404"),
    "broken": ({"URL": "{web}/broken.jpg"}, "accessible", "picture is damaged"),
    "file": ({"URL": "file:///etc/passwd"}, "accessible", "address is not of the web"),
    "circle": ({"URL": "{web}/moved/moved/circle"}, "accessible", "address answers 404"),
    "thumbnail": ({"URL": "{web}/small.png"}, "accessible", "picture is too small"),
    "same": ({"URL": "{web}/again.jpg"}, "alike when fetched", "picture is like another"),
}


@dataclasses.dataclass
class Crawl:
    """A small crawl, what must be dropped before a model is asked, and how the model scores the rest.

    Attributes:
      planted: (id, stage, reason) of every row that is not good.
      good: ids of the others.
      scores: alt text -> quality, subject, country.
      rows: how many there are in all.
    """

    folder: object
    planted: Counter
    good: list
    scores: dict

    @property
    def rows(self):
        return self.planted.total() + len(self.good)


def make_crawl(folder, web, count=12):
    """Parquet files of addresses, one of pictures, one damaged; tar files, one of them cut off."""
    folder.mkdir()
    crawl = Crawl(folder, Counter(), [], {})

    def row(id, number, **changes):
        code = list(SENTENCES)[number % len(SENTENCES)]
        web.files[f"/{number}.jpg"] = picture(number)
        # What is planted behind the scoring must get there.
        crawl.scores[sentence(code, number)] = score_of(
            number if number not in range(100, 200) else 0
        )
        sizes = {"WIDTH": 320, "HEIGHT": 256}
        tags = {"LANGUAGE": code, "NSFW": "UNLIKELY", "similarity": 0.35}
        plain = {"SAMPLE_ID": id, "URL": f"{web.url}/{number}.jpg", "TEXT": sentence(code, number)}
        return plain | sizes | tags | changes

    good = {f"good-{n}": row(f"good-{n}", n) for n in range(count)}
    good["good-2"] |= {"LANGUAGE": "", "URL": f"{web.url}/moved/2.jpg"}
    rows = list(good.values())
    for number, (id, (changes, stage, reason)) in enumerate(PLANTED.items(), 100):
        changes = {
            key: value.replace("{web}", web.url).replace("{good-1}", good["good-1"]["TEXT"])
            if isinstance(value, str)
            else value
            for key, value in changes.items()
        }
        rows.append(row(id, number, **changes))
        crawl.planted[id, stage, reason] += 1
    rows.append(row("good-3", 130))
    crawl.planted["good-3", "near-duplicates", "id is taken"] += 1
    rows.append(row("nothing", 131, TEXT=None))
    last = len(rows) - 1
    crawl.planted[f"a-{last // 16}-{last % 16}", "read", "no alt text"] += 1
    web.files |= {
        "/broken.jpg": picture(12)[:2000],
        "/small.png": picture(14, (100, 100), "PNG"),
        "/again.jpg": picture(5, (640, 512)),
    }
    crawl.good += good
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet", row_group_size=16)
    add_damaged(crawl, [row(f"b{n}", 200 + n) for n in range(16)])
    add_pictures(crawl, [row(f"c{n}", 300 + n) for n in range(6)])
    add_tars(crawl, [row(f"d{n}", 400 + n) for n in range(9)])
    (folder / "notes.txt").write_text("no part of it")
    return crawl


def add_damaged(crawl, rows):
    """A Parquet file of two row groups, the second of them damaged, and one that is none."""
    path = crawl.folder / "b.parquet"
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, path, row_group_size=8, compression="none", write_page_checksum=True)
    group = pq.read_metadata(path).row_group(1)
    column = next(c for c in map(group.column, range(9)) if c.path_in_schema == "TEXT")
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 0xFF
    path.write_bytes(data)
    (crawl.folder / "b0.parquet").write_bytes(b"PAR1 but nothing behind it")
    crawl.planted["b0.parquet", "read", "Parquet file cannot be read"] += 1
    crawl.planted.update((f"b-1-{n}", "read", "row group is damaged") for n in range(8))
    crawl.good += [row["SAMPLE_ID"] for row in rows[:8]]


def add_pictures(crawl, rows):
    """A Parquet file that has pictures as the hub's data sets have them, two of them broken."""
    bodies = [picture(300 + n) for n in range(len(rows))]
    bodies[1] = bodies[1][:3000]
    bodies[2] = b"<html>no picture</html>"
    bodies[3] = picture(300, (400, 320))
    for row, body in zip(rows, bodies, strict=True):
        row["image"] = {"bytes": body, "path": None}
        del row["URL"]
    pq.write_table(pa.Table.from_pylist(rows), crawl.folder / "c.parquet")
    crawl.planted["c1", "pictures", "picture is damaged"] += 1
    crawl.planted["c2", "filters", "picture of no known format"] += 1
    crawl.planted["c3", "near-duplicates", "picture is like another"] += 1
    crawl.good += ["c0", "c4", "c5"]


def add_tars(crawl, rows):
    """A whole tar file with img2dataset's list of it, and one that is cut off in its last picture."""
    pairs = [(row, picture(400 + n)) for n, row in enumerate(rows)]
    write_tar(crawl.folder / "d.tar", pairs[:6], spoil={3: "json", 4: "txt", 5: "jpg"})
    pq.write_table(pa.Table.from_pylist(rows[:6]), crawl.folder / "d.parquet")
    crawl.planted["d-000003", "read", "metadata is not JSON"] += 1
    crawl.planted["d-000004", "read", "text is not UTF-8"] += 1
    crawl.planted["d-000005", "read", "neither picture nor address"] += 1
    path = crawl.folder / "e.tar"
    write_tar(path, pairs[6:], spoil={})
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b"000002.jpg") + 1500])
    crawl.planted["e.tar:000002", "read", "tar file is damaged or cut off"] += 1
    crawl.good += ["d0", "d1", "d2", "d6", "d7"]


def write_tar(path, pairs, spoil):
    with tarfile.open(path, "w") as tar:
        for number, (row, body) in enumerate(pairs):
            stated = {"key": row["SAMPLE_ID"], "nsfw": "UNLIKELY", "similarity": 0.4}
            files = {
                "json": json.dumps(stated | {"language": row["LANGUAGE"]}).encode(),
                "txt": row["TEXT"].encode(),
                "jpg": body,
            }
            if number in spoil:
                files[spoil[number]] = {"json": b"[" * 100_000, "txt": b"\xff\xfe", "jpg": b""}[
                    spoil[number]
                ]
            for suffix, data in files.items():
                entry = tarfile.TarInfo(f"{number:06d}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def score_of(number):
    """What a good model says of the row: every seventh is poor, every fourth of no country."""
    quality = 3 if number % 7 == 4 else 4 + number % 2
    country = "No specific country" if number % 4 == 3 else ("Japan", "Côte d'Ivoire")[number % 2]
    return quality, cultural.SUBJECTS[number % len(cultural.SUBJECTS)], country


def answers(scores):
    """The model: scores as told, captions and pairs in the language that it is asked for."""

    def answer(request, kind):
        content, prompt = request["messages"][0]["content"], prompt_of(request)
        if "Evaluate Text Quality" in prompt:
            text = prompt.split("[Alt Text]: ")[1].split(" Your goal is to:")[0]
            quality, subject, country = scores.get(text, (5, "Others", "Japan"))
            if kind == "malformed":
                return ("endless " * 5000, "6, all fine", "")[len(text) % 3]
            lines = f"1. Text Quality Score (1-5): {quality}\n2. Subject Category: {subject}"
            return f"{lines}\n3. Country/Region: {country}"
        name = next(n for n in CODE_OF if n in prompt.replace("English", ""))
        code = CODE_OF[name]
        words = sentence(code, hashlib.sha256(prompt.encode()).hexdigest(), 12)
        if kind == "wrong_language":
            words = ENGLISH
        if not isinstance(content, str):
            assert content[0]["image_url"]["url"].startswith("data:image/")
            return "ha " * 3000 if kind == "malformed" else f"{SENTENCES[code]} {words}"
        pairs = [
            {
                "task type": kind_of,
                "instruction": f"{words}?",
                "response": f"{SENTENCES[code]} {words}",
            }
            for kind_of in ("Critical Reasoning", "Cultural Interpretation")
        ]
        if kind == "malformed":
            return json.dumps(pairs)[:-40]
        return f"```json\n{json.dumps(pairs, ensure_ascii=False)}\n```"

    return answer


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
    report = cultural.run(config, out, RUNNER)
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
    report = cultural.run(make_config(crawl, endpoint, tmp_path), out, RUNNER)
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
    pictures = release.Pictures(out / "records", tmp_path / "archives.sqlite")
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


def alt_texts(crawl):
    """(id, alt text) of the rows of Parquet files that can be read."""
    files = [pq.ParquetFile(crawl.folder / f"{name}.parquet") for name in "abcd"]
    for number, file in enumerate(files):
        groups = [0] if number == 1 else range(file.num_row_groups)
        for row in file.read_row_groups(list(groups), ["SAMPLE_ID", "TEXT"]).to_pylist():
            if row["TEXT"]:
                yield row["SAMPLE_ID"], row["TEXT"]


def prompt_of(request):
    content = request["messages"][0]["content"]
    return content if isinstance(content, str) else content[1]["text"]


def run_to_the_end(folder, url, out):
    """In a process of its own, to be killed."""
    logging.disable(logging.CRITICAL)
    crawl = Crawl(folder / "crawl", Counter(), [], {})
    endpoint = types.SimpleNamespace(url=url)
    cultural.run(make_config(crawl, endpoint, folder), out, RUNNER)


def test_stopped_and_killed_ten_times_it_makes_the_same_and_pays_for_nothing_twice(
    tmp_path, web, start_endpoint
):
    crawl = make_crawl(tmp_path / "crawl", web)
    first, second = (start_endpoint(answers(crawl.scores), shares=TROUBLE) for _ in range(2))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    cultural.run(make_config(crawl, first, tmp_path), whole, RUNNER)

    limited = make_config(crawl, second, tmp_path)
    limited.llm.max_calls = 15
    with pytest.raises(llm.BudgetExceeded, match="raise it and start the same command again"):
        cultural.run(limited, killed, RUNNER)
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
    cultural.run(make_config(crawl, second, tmp_path), killed, RUNNER)
    assert results(killed) == results(whole)
    usage = llm.Replies(killed / "work" / "replies.sqlite", llm.ClientConfig("m")).usage()
    # A reply that was on its way when its asker was killed is asked for again, and counted as lost.
    again = second.finished.total() - len(second.finished)
    assert again <= sum(row.lost for row in usage.values()) <= 4 * 10


GOOD_SCORE = {"quality": 4, "subject": "Cooking and Food", "country": "Japan"}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            "1. Text Quality Score (1-5): 4\n2. Subject Category: Cooking and Food\n3. Country/Region: Japan",
            {},
        ),
        (
            "1. **Text Quality Score (1-5):** 4\n2. **Subject Category:** Cooking & Food\n3. **Country/Region:** Japan",
            {},
        ),
        (
            'Text Quality Score: 4/5\nSubject Category: cooking and food.\nCountry/Region: "Japan".',
            {},
        ),
        ("1. 4\n2. Cooking and Food\n3. Japan", {}),
        ("1: 4.0\n2: Cooking and Food\n3: Japan", {}),
        (
            "1. Text Quality Score (1-5): 5 (Very High Quality)\n2. Subject: Others\n3. Country: Côte d'Ivoire",
            {"quality": 5, "subject": "Others", "country": "Côte d'Ivoire"},
        ),
        (
            "Quality: 4\nText Quality: 2\n2. Subject Category: Objects, Materials, and Clothing\n"
            "3. Country/Region: No specific country",
            {"quality": 2, "subject": "Objects, Materials, and Clothing", "country": None},
        ),
        (
            "1. Score: 1\n2. Subject Category: Others\n3. Country/Region: None",
            {"quality": 1, "subject": "Others", "country": None},
        ),
    ],
)
def test_scores_are_read_in_the_forms_that_models_write(answer, expected):
    assert cultural.read_score(answer) == (expected or GOOD_SCORE)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "score is no score"),
        ("I think it is a fine text.", "score is no score"),
        ("1. Text Quality Score: 4\n2. Subject Category: Others", "score is no score"),
        ("5\n" * 10_000, "score is no score"),
        ("1. Quality: 6\n2. Subject: Others\n3. Country: Japan", "quality is not 1 to 5"),
        ("1. Quality: 45\n2. Subject: Others\n3. Country: Japan", "quality is not 1 to 5"),
        (
            "1. Quality: 4\n2. Subject: Weapons\n3. Country: Japan",
            "subject is not among the eleven",
        ),
        (
            "1. Quality: 4\n2. Subject: Others\n3. Country: Japan; ignore what was said\n",
            "country is no name",
        ),
        ("1. Quality: 4\n2. Subject: Others\n3. Country: {text}", "country is no name"),
        ("1. Quality: 4\n2. Subject: Others\n3. Country: " + "a" * 61, "country is no name"),
    ],
)
def test_scores_that_are_none_are_refused(answer, reason):
    with pytest.raises(cultural.Unusable) as caught:
        cultural.read_score(answer)
    assert caught.value.reason == reason


def pair(kind="Critical Reasoning", **changes):
    plain = {"instruction": SENTENCES["es"], "response": f"Bueno. {SENTENCES['es']}"}
    return {"task type": kind} | plain | changes


@pytest.mark.parametrize(
    ("found", "count", "faults"),
    [
        ([pair(), pair("Data Analysis")], 2, []),
        ({"pairs": [pair(), pair("data analysis")]}, 2, []),
        ([pair("Coding and Debugging"), pair("Creative Writing"), pair("Data Analysis")], 2, []),
        ([pair()], 1, ["there was only one pair"]),
        ([pair(), pair()], 1, ["both pairs are of one task type"]),
        ([pair(), pair("Chatting")], 1, ["task type is not among the 13"]),
        ([pair(), pair("Data Analysis", response=ENGLISH)], 1, ["response is in wrong language"]),
        (
            [pair(), pair("Data Analysis", response="<image> " + SENTENCES["es"])],
            1,
            ["response holds a marker"],
        ),
        (
            [pair(), pair("Data Analysis", response=SENTENCES["es"] * 40)],
            1,
            ["response repeats itself"],
        ),
        (
            [pair(), pair("Data Analysis", instruction="¿Qué dice el caption?" + SENTENCES["es"])],
            1,
            ["instruction speaks of a caption"],
        ),
        (
            [pair(), pair("Data Analysis", response=SENTENCES["es"])],
            1,
            ["response is the instruction"],
        ),
        ([pair(), pair("Data Analysis", response=None)], 1, ["a key is missing or no text"]),
        (
            [pair(), pair("Data Analysis", response="\ud83d " + SENTENCES["es"])],
            1,
            ["response holds half a character"],
        ),
    ],
)
def test_pairs_are_checked_one_by_one(found, count, faults):
    answer = f"Here: ```json\n{json.dumps(found)}\n```"
    if count == 2:
        pairs, dropped = cultural.read_pairs(answer, "es")
    else:  # asked for once more, and kept if that is no better
        with pytest.raises(cultural.Unusable, match="only one pair") as caught:
            cultural.read_pairs(answer, "es")
        pairs, dropped = caught.value.rest
    assert len(pairs) == count and dropped == faults
    assert {p["task type"] for p in pairs} <= set(cultural.TASK_TYPES)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "no JSON of pairs"),
        ("[" * 20_000, "no JSON of pairs"),
        ('{"instruction": ' * 1500, "no JSON of pairs"),
        (json.dumps([pair()])[:-20], "no JSON of pairs"),
        ("x" * 50_000, "answer is too long"),
        (json.dumps([pair("None of them")]), "task type is not among the 13"),
        ("__import__('os').system('true')", "no JSON of pairs"),
    ],
)
def test_answers_without_a_usable_pair_are_refused(answer, reason):
    with pytest.raises(cultural.Unusable) as caught:
        cultural.read_pairs(answer, "es")
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "unit", ["*", "1", "1.", ": ", "[", '["', '{"a":', "[0,", "- 1) ", "<image>", "$"]
)
def test_no_answer_takes_long_to_read(unit):
    began = time.process_time()
    for length in (1_999, 9_999, 27_999):
        answer = (unit * length)[:length]
        for read in (cultural.read_score, lambda a: cultural.read_pairs(a, "es")):
            with pytest.raises(cultural.Unusable):
                read(answer)
    cultural.text_fault((unit * 9_999)[:9_999], "es", 1, 10_000)
    assert time.process_time() - began < 3


def test_prompts_are_the_published_ones():
    assert len(set(cultural.RECAPTION)) == 5 and len(set(cultural.SUBJECTS)) == 11
    assert len(set(cultural.TASK_TYPES)) == 13
    # Appendix B's wording, at places where a slip would show.
    scoring = cultural.SCORING.format(text="T", subjects="; ".join(cultural.SUBJECTS))
    assert scoring.startswith(
        "You are given an [Alt Text] associated with an image from the web. [Alt Text]: T Your"
    )
    assert (
        "Choose from the following categories: Vehicles and Transportation; Cooking and Food; People"
        in scoring
    )
    assert scoring.endswith(
        "Only generate the final result without any additional descriptions or explanations."
    )
    for prompt in cultural.RECAPTION:
        filled = prompt.format(language="L", country="C", subject="S", text="{not a field}")
        assert (
            all(f'"{v}"' in filled or f" {v}" in filled for v in "LCS")
            and "{not a field}" in filled
        )


@pytest.mark.parametrize(
    ("per_subject", "per_language", "left"),
    [
        (None, None, {"ja": (9, 2, 5), "es": (3,)}),
        (4, None, {"ja": (4, 2, 4), "es": (3,)}),
        (None, 8, {"ja": (3, 2, 3), "es": (3,)}),
        (4, 3, {"ja": (1, 1, 1), "es": (3,)}),
        (None, 2, {"ja": (0, 0, 0), "es": (2,)}),
    ],
)
def test_thresholds_level_subjects_before_languages(per_subject, per_language, left):
    cells = {("ja", "a"): 9, ("ja", "b"): 2, ("ja", "c"): 5, ("es", "a"): 3}
    found = cultural.thresholds(cells, cultural.Balance(per_subject, per_language))
    assert tuple(found.values()) == (*left["ja"], *left["es"])


@pytest.fixture
def job(tmp_path):
    found = pipeline.Job(tmp_path / "job", cultural.STAGES, 8)
    with found.started({}):
        yield found


def test_the_balance_keeps_the_same_rows_in_any_order_and_fewer_of_them_when_lower(job):
    rows = [{"id": str(n), "language": "ja", "subject": "ab"[n % 3 == 0]} for n in range(60)]
    job.split("x", (pipeline.Passed(row) for row in rows))
    job.split("y", (pipeline.Passed(row) for row in reversed(rows)))

    def kept(part, limit, seed=0):
        outcomes = list(
            cultural.balanced(job, part, cultural.Balance(per_subject=limit, seed=seed))
        )
        assert len(outcomes) == 60
        return {o.row["id"] for o in outcomes if isinstance(o, pipeline.Passed)}

    assert len(kept("x", 15)) == 30 and kept("x", 15) == kept("y", 15)
    assert kept("x", 7) < kept("x", 15) and kept("x", 15) != kept("x", 15, seed=1)
    assert len(kept("x", None)) == 60


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
    read = cultural.Filter(tmp_path, image_text.Filters(), Constant)
    found = list(read([{"path": str(tmp_path / "x.parquet"), "row_group": 0}]))
    assert [o.row["similarity"] for o in found if isinstance(o, pipeline.Passed)] == pytest.approx(
        [0.31, 0.6]
    )
    assert [o.reason for o in found if isinstance(o, pipeline.Dropped)] == [
        "CLIP score is too low"
    ] * 2
    assert found[-1] == pipeline.Entered(4)


@pytest.mark.parametrize(
    ("kind", "size"),
    [("JPEG", (300, 200)), ("PNG", (300, 200)), ("BMP", (300, 200)), ("JPEG", (3000, 2000))],
)
def test_pictures_are_shown_as_they_are_or_smaller(kind, size):
    body = picture(1, size, kind)
    head, _, data = cultural.data_url(body, 1024).partition(",")
    shown = base64.b64decode(data)
    if kind != "BMP" and max(size) <= 1024:
        assert shown == body and head == f"data:image/{kind.lower()};base64"
    else:
        assert head == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(shown)).size == ((300, 200) if kind == "BMP" else (1024, 683))


def test_settings_that_cannot_be_carried_out_say_so(tmp_path):
    crawl = Crawl(tmp_path / "nowhere", Counter(), [], {})
    config = make_config(crawl, types.SimpleNamespace(url="http://127.0.0.1:9/v1"), tmp_path)

    def problem(**changes):
        with config.unlocked(), pytest.raises((pipeline.JobError, FileNotFoundError)) as caught:
            config.update(changes)
            cultural.run(config, tmp_path / "out", RUNNER)
        return str(caught.value)

    assert "nowhere: no such file" in problem()
    (tmp_path / "empty").mkdir()
    assert "no *.parquet" in problem(source=str(tmp_path / "empty"))
    assert "config.languages: unknown language tag 'xx'" in problem(languages=("xx",))
    config.balance.per_topic = 3
    assert "config.balance: unknown per_topic; it may have per_" in problem(languages=())
    # One budget is for both models: another would not be kept.
    config.balance = {}
    assert "config.scoring_llm: unknown budget" in problem(scoring_llm={"budget": 5.0})
