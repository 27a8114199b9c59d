"""A small crawl of the web with planted faults, the servers of its pictures, and a model that judges it."""

import dataclasses
import hashlib
import http.server
import io
import json
import tarfile
import threading
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq

from pangea_jax import languages
from pangea_jax.curation import cultural, prompts

from .samples import ENGLISH, SENTENCES, picture, sentence

CODE_OF = {languages.get(code).english_name: code for code in SENTENCES}


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
    "forbidden": ({"URL": "{web}/secret/1.jpg"}, "accessible", "robots.txt forbids it"),
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
        "/robots.txt": b"User-agent: *\nDisallow: /secret/\n",
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
    crawl.good += ["d-000000", "d-000001", "d-000002", "e-000000", "e-000001"]


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
    return quality, prompts.SUBJECTS[number % len(prompts.SUBJECTS)], country


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


def alt_texts(crawl):
    """(id, alt text) of the rows of Parquet files that can be read."""
    files = [pq.ParquetFile(crawl.folder / f"{name}.parquet") for name in "abcd"]
    for number, file in enumerate(files):
        groups = [0] if number == 1 else range(file.num_row_groups)
        rows = file.read_row_groups(list(groups), ["SAMPLE_ID", "TEXT"]).to_pylist()
        for place, row in enumerate(rows):
            if row["TEXT"]:  # d.parquet lists what d.tar holds
                yield f"d-{place:06d}" if number == 3 else row["SAMPLE_ID"], row["TEXT"]


def prompt_of(request):
    content = request["messages"][0]["content"]
    return content if isinstance(content, str) else content[1]["text"]
