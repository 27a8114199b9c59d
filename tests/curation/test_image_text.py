"""Readers, filters by rule, near-duplicates and fetching."""

import contextlib
import http.server
import io
import itertools
import json
import random
import socket
import tarfile
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

pytest.importorskip("imagehash", reason="ImageHash is in requirements-curation.txt")
pytest.importorskip("rensa", reason="rensa is in requirements-curation.txt")

from pangea_jax.curation import image_text
from pangea_jax.curation.image_text import Fault, Fetch, FetchError, Filters, Pair, Part
from pangea_jax.data import image


def encoded(seed=0, size=(320, 256), kind="JPEG", **settings):
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(buffer, kind, **settings)
    return buffer.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


# Readers


def test_parts_are_row_groups_and_tars_but_not_the_lists_of_tars(tmp_path):
    table = pa.table({"TEXT": ["a", "b", "c"]})
    (tmp_path / "more").mkdir()
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=2)
    pq.write_table(table, tmp_path / "more" / "00000.parquet")
    write_tar(tmp_path / "more" / "00000.tar", {"1.txt": b"a"})
    parts = image_text.find_parts(tmp_path)
    assert [(p.path.removeprefix(f"{tmp_path}/"), p.row_group) for p in parts] == [
        ("b.parquet", 0),
        ("b.parquet", 1),
        ("more/00000.tar", None),
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \*\.parquet"):
        image_text.find_parts(tmp_path / "empty")


def test_laions_columns_are_read_as_they_are(tmp_path):
    row = {"SAMPLE_ID": 2433684022797.0, "URL": "https://a.example/1.jpg", "TEXT": " 富士山 "}
    row |= {"HEIGHT": 300, "WIDTH": 400, "LICENSE": "?", "LANGUAGE": "ja", "NSFW": "UNLIKELY"}
    pq.write_table(pa.Table.from_pylist([row | {"similarity": 0.31}]), tmp_path / "x.parquet")
    (pair,) = image_text.read(Part(str(tmp_path / "x.parquet"), 0))
    size = {"width": 400, "height": 300}
    expected = Pair("2433684022797.0", "富士山", row["URL"], "ja", "UNLIKELY", 0.31, **size)
    assert pair == expected


def test_large_row_groups_are_read_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(image_text, "PART_ROWS", 300)
    rows = [{"URL": "http://a.example/", "TEXT": f"text {n}"} for n in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=700)
    parts = image_text.find_parts(tmp_path)
    places = [(part.row_group, part.first_row) for part in parts]
    assert places == [(0, 0), (0, 300), (0, 600), (1, 0)]
    read = [list(image_text.read(part)) for part in parts]
    assert [len(some) for some in read] == [300, 300, 100, 300]
    assert [pair.text for some in read for pair in some] == [row["TEXT"] for row in rows]
    assert (read[1][0].id, read[3][-1].id) == ("x-0-300", "x-1-299")


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("TEXT", "  ", "no alt text"),
        ("TEXT", 5, "no alt text"),
        ("URL", None, "neither picture nor address"),
        ("LANGUAGE", 7, "field is of the wrong type"),
        ("image", "not bytes", "picture is not bytes"),
    ],
)
def test_rows_of_the_wrong_kind_are_faults(tmp_path, column, value, reason):
    row = {"TEXT": "a text", "URL": "https://a.example/1.jpg", "LANGUAGE": "ja"} | {column: value}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    assert list(image_text.read(Part(str(tmp_path / "x.parquet"), 0))) == [Fault("x-0-0", reason)]


def test_a_file_without_alt_text_is_a_fault_for_each_row(tmp_path):
    pq.write_table(pa.table({"URL": ["a", "b"]}), tmp_path / "x.parquet")
    found = list(image_text.read(Part(str(tmp_path / "x.parquet"), 0)))
    assert found == [Fault(f"x-0-{n}", "no column of alt text") for n in range(2)]


def test_samples_of_a_tar_are_found_where_they_lie(tmp_path):
    body = encoded()
    files = {
        "a/1.jpg": body,
        "a/1.txt": b"one",
        "b/1.txt": b"two",
        "b/1.cls": b"7",
        "b/1.jpg": body,
    }
    write_tar(tmp_path / "x.tar", files)
    first, second = image_text.read(Part(str(tmp_path / "x.tar")))
    assert (first.id, first.text, second.id, second.text) == ("x-1", "one", "x-1", "two")
    assert first.place.read(tmp_path) == second.place.read(tmp_path) == body
    assert first.place.offset != second.place.offset


@pytest.mark.parametrize("cut", [0.2, 0.45, 0.9])
def test_a_tar_that_is_cut_off_gives_what_is_whole_and_one_fault(tmp_path, cut):
    files = {}
    for n in range(6):
        files |= {f"{n}.jpg": encoded(n), f"{n}.txt": f"text {n}".encode()}
    write_tar(tmp_path / "x.tar", files)
    whole = list(image_text.read(Part(str(tmp_path / "x.tar"))))
    assert len(whole) == 6
    data = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(data[: int(cut * len(data.rstrip(b"\0")))])
    *pairs, fault = image_text.read(Part(str(tmp_path / "x.tar")))
    assert pairs == whole[: len(pairs)] and len(pairs) == int(cut * 6)
    assert fault.reason == "tar file is damaged or cut off"


def test_numbers_that_no_float_holds_are_unknown(tmp_path):
    stated = {"key": "7", "caption": "a text", "width": 10**400, "similarity": 0.4}
    files = {"1.jpg": encoded(), "1.json": json.dumps(stated).encode()}
    write_tar(tmp_path / "x.tar", files)
    (pair,) = image_text.read(Part(str(tmp_path / "x.tar")))
    assert (pair.id, pair.width, pair.similarity) == ("7", None, 0.4)


def test_files_that_are_too_large_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(image_text, "MAX_PICTURE_BYTES", 1000)
    monkeypatch.setattr(image_text, "MAX_TEXT_BYTES", 10)
    files = {"1.jpg": encoded(), "1.txt": b"one", "2.txt": b"a longer text"}
    write_tar(tmp_path / "x.tar", files)
    found = list(image_text.read(Part(str(tmp_path / "x.tar"))))
    assert found == [
        Fault("x-1", "picture file is too large"),
        Fault("x-2", "txt file is too large"),
    ]


@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_damage_anywhere_loses_rows_to_faults_and_nothing_else(tmp_path, compression):
    rows = [{"URL": f"http://a.example/{n}", "TEXT": f"texto número {n}"} for n in range(40)]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10, compression=compression)
    whole, luck = path.read_bytes(), random.Random(compression)
    lost = 0
    for _ in range(80):
        data = bytearray(whole)
        for place in luck.choices(range(len(data)), k=luck.choice([1, 5, 20])):
            data[place] = luck.randrange(256)
        path.write_bytes(data[: luck.choice([None, luck.randrange(len(data))])])
        found = [row for part in image_text.find_parts(path) for row in image_text.read(part)]
        faults = [row.reason for row in found if isinstance(row, Fault)]
        assert len(found) == 40 or faults == ["Parquet file cannot be read"]
        lost += bool(faults)
    assert 20 < lost < 80


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_broken_pictures_of_every_format_are_a_reason(kind):
    whole, luck = encoded(1, (64, 48), kind), random.Random(kind)
    rules = Filters(min_side=1, languages=None)
    for _ in range(60):
        data = bytearray(whole)
        for place in luck.choices(range(min(len(data), 600)), k=luck.choice([1, 3, 20])):
            data[place] = luck.randrange(256)
        data = bytes(data[: luck.choice([None, luck.randrange(len(data))])])
        reason = rules.reason_of_size(data)
        assert reason is None or reason.startswith("picture") or reason == "aspect ratio"
        with contextlib.suppress(image.ImageError):
            image_text.perceptual_hash(image.preview(data, max_pixels=1 << 20)[0])


def test_file_names_are_safe_whatever_the_id():
    body = encoded(kind="PNG")
    assert image_text.file_name("2433684022797.0", body) == "2433684022797.0.png"
    for id in ("../../etc/passwd", "a/b", "", "x" * 200, "naïve", ".hidden", "a\nb"):
        name = image_text.file_name(id, body)
        assert name.endswith(".png") and len(name) == 28 and name[:24].isalnum()


# Filters


def pair(**changes):
    plain = {"id": "1", "text": "a temple", "nsfw": "UNLIKELY", "language": "ja", "width": 400}
    return Pair(**(plain | {"height": 300} | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"width": 224, "height": 224}, None),
        ({"width": 223}, "picture is too small"),
        ({"width": 4096, "height": 4096}, None),
        ({"width": 4097, "height": 4096}, "picture is too large"),
        ({"width": 900, "height": 300}, None),
        ({"width": 901, "height": 300}, "aspect ratio"),
        ({"width": 250, "height": 1000}, None),
        ({"width": 250, "height": 1001}, "aspect ratio"),
        ({"text": "12345"}, None),
        ({"text": "1234"}, "text is too short"),
        ({"text": "x" * 5000}, None),
        ({"text": "x" * 5001}, "text is too long"),
        ({"nsfw": "unlikely"}, None),
        ({"nsfw": "UNSURE"}, "NSFW tag"),
        ({"nsfw": ""}, "no NSFW tag"),
        ({"language": "en"}, "language is not wanted"),
        ({"language": "JP"}, None),
        ({"language": ""}, None),
        ({"text": "a BAD—word here"}, "offensive text"),
        ({"text": "a badword here"}, None),
        ({"text": "これは悪口です"}, "offensive text"),
        ({"encoded": encoded(size=(300, 200))}, "picture is too small"),
        ({"encoded": b"no picture"}, "picture of no known format"),
    ],
)
def test_thresholds_are_those_of_the_paper(changes, reason):
    filters = Filters(languages=("ja",), blocked=frozenset({"bad word", "悪口"}))
    assert filters.reason(pair(**changes)) == reason


def test_words_of_any_script():
    assert image_text.words("Ｔokyo's Skytree, 東京!") == ["tokyo", "s", "skytree", "東", "京"]
    assert image_text.words("हिन्दी में, café…") == ["हिन्दी", "में", "café"]
    assert image_text.words("¡¿… — ") == []


# Near-duplicates


def compared(items, alike):
    """What must stay, all compared with all."""
    return [not any(alike(item, other) for other in items[:n]) for n, item in enumerate(items)]


@pytest.mark.parametrize("distance", [0, 1, 4, 7])
def test_alike_pictures_are_found_exactly(distance):
    luck = random.Random(distance)
    hashes = [luck.getrandbits(64) for _ in range(150)]
    for _ in range(250):  # chains of neighbours, exact copies among them
        flips = luck.sample(range(64), luck.randrange(0, distance + 3))
        hashes.append(luck.choice(hashes) ^ sum(1 << bit for bit in flips))
    luck.shuffle(hashes)
    stays = image_text.unlike_earlier_pictures(np.array(hashes, np.uint64), distance)
    assert stays.tolist() == compared(hashes, lambda a, b: (a ^ b).bit_count() <= distance)
    assert 150 <= stays.sum() < 400


def test_a_hundred_thousand_of_one_picture_take_no_time():
    hashes = np.random.default_rng(0).integers(0, 2**64, 100_500, dtype=np.uint64)
    hashes[500:] = hashes[0] ^ (np.uint64(1) << np.arange(100_000, dtype=np.uint64) % np.uint64(64))
    began = time.process_time()
    stays = image_text.unlike_earlier_pictures(hashes)
    assert stays[:500].all() and not stays[500:].any()
    assert time.process_time() - began < 5


def test_no_items_are_no_duplicates():
    assert image_text.unlike_earlier_pictures(np.zeros(0, np.uint64)).tolist() == []
    assert image_text.unlike_earlier_pictures(np.array([5], np.uint64)).tolist() == [True]
    assert image_text.unlike_earlier_texts([]).tolist() == []
    assert image_text.unlike_earlier_texts(["", ""]).tolist() == [True, False]


def test_hashes_are_near_for_the_same_picture_and_far_for_others():
    hashes = [
        image_text.perceptual_hash(Image.open(io.BytesIO(encoded(seed)))) for seed in range(20)
    ]
    far = min((a ^ b).bit_count() for a, b in itertools.combinations(hashes, 2))
    near = []
    for seed, hash in enumerate(hashes):
        again = Image.open(io.BytesIO(encoded(seed, (500, 400), quality=40))).convert("RGB")
        near.append((image_text.perceptual_hash(again) ^ hash).bit_count())
    assert max(near) <= image_text.MAX_HASH_DISTANCE < 10 <= far


def jaccard(a, b):
    a, b = set(image_text.shingles(a)), set(image_text.shingles(b))
    return len(a & b) / len(a | b)


def test_texts_that_are_alike_are_found():
    luck = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(luck.choices(letters, k=6)) for _ in range(400)]
    texts = [" ".join(luck.sample(words, 40)) for _ in range(300)]
    same = [text.upper().replace(" ", "  ") + "!" for text in texts[:100]]
    near = [f"{text} {luck.choice(words)}" for text in texts[100:200]]
    less = [" ".join((*text.split()[:28], *luck.sample(words, 12))) for text in texts[200:]]
    assert min(jaccard(a, b) for a, b in zip(texts[100:], near, strict=False)) > 0.9
    assert max(jaccard(a, b) for a, b in zip(texts[200:], less, strict=False)) < 0.65
    assert max(jaccard(a, b) for a, b in itertools.combinations(texts[:60], 2)) < 0.4
    stays = image_text.unlike_earlier_texts([*texts, *same, *near, *less])
    assert stays[:300].all() and not stays[300:500].any() and stays[500:].all()
    stays = image_text.unlike_earlier_texts(["富士山と桜", "富士山と桜!", "京都の寺"])
    assert stays.tolist() == [True, False, True]


def test_clip_scores_are_cosines_of_the_two_towers(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is in requirements-parity.txt")
    transformers = pytest.importorskip("transformers", reason="it is in requirements-parity.txt")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 300}
    config = transformers.CLIPConfig(
        text_config=sizes | ends | {"max_position_embeddings": 16},
        vision_config=sizes | {"image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
    names = ["<pad>", "<|startoftext|>", "<|endoftext|>", *letters]
    (tmp_path / "vocab.json").write_text(json.dumps({name: n for n, name in enumerate(names)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(tmp_path)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(tmp_path)

    pictures = [Image.open(io.BytesIO(encoded(seed))).convert("RGB") for seed in range(3)]
    texts = ["a temple", "two boats", "a very long text about everything that there is"]
    scores = image_text.ClipScorer(str(tmp_path))(pictures, texts)
    assert scores.shape == (3,) and scores.dtype == np.float32
    for picture, text, score in zip(pictures, texts, scores, strict=True):
        with torch.no_grad():
            pixels = images(picture, return_tensors="pt")
            tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=16)
            out = model(**pixels, **tokens)
        expected = float((out.image_embeds @ out.text_embeds.T).squeeze())
        assert score == pytest.approx(expected, abs=1e-4)
    assert len({round(float(s), 3) for s in scores}) == 3


# Fetching


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/circle"):
            self.send_response(302)
            self.send_header("Location", self.path)
            self.end_headers()
            return
        moved = self.path == "/moved"
        self.send_response(302 if moved else 200)
        self.send_header("Location", "plain")
        self.end_headers()
        for _ in range(50):
            try:
                self.wfile.write(b"x" * 100)
                self.wfile.flush()
            except OSError:
                return
            if self.path in ("/slow", "/moved"):
                time.sleep(0.1)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{found.server_address[1]}"
    found.shutdown()
    found.server_close()


def test_a_picture_is_fetched(server):
    assert Fetch(private=True)(f"{server}/plain") == b"x" * 5000


@pytest.mark.parametrize("path", ["/slow", "/moved"])
def test_a_slow_answer_takes_no_longer_than_the_timeout(server, path):
    began = time.monotonic()
    with contextlib.suppress(FetchError):
        Fetch(private=True, timeout=0.5)(server + path)
    assert time.monotonic() - began < 3  # of the 5 s that the server would take


def test_of_a_redirection_only_the_address_is_read(server):
    assert Fetch(private=True)(f"{server}/moved") == b"x" * 5000


@pytest.mark.parametrize(
    ("path", "settings", "problem"),
    [
        ("/plain", {"max_bytes": 4000}, "too large"),
        ("/slow", {"timeout": 0.2}, "too slow"),
        ("/circle", {}, "circles"),
        ("/plain", {"private": False}, "private"),
    ],
)
def test_what_cannot_be_fetched_says_why(server, path, settings, problem):
    with pytest.raises(FetchError, match=problem):
        Fetch(**({"private": True} | settings))(server + path)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "javascript:alert(1)",
        "http://",
        "http://[::1",
        "",
        "http://a b/",
        "//x/y",
    ],
)
def test_addresses_of_every_broken_kind(url):
    with pytest.raises(FetchError):
        Fetch(private=True, timeout=1.0)(url)


@pytest.mark.parametrize("address", ["10.0.0.1", "169.254.169.254", "::1", "192.168.0.7"])
def test_private_networks_are_not_asked(monkeypatch, address):
    found = [(0, 0, 0, "", (address, 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)
    with pytest.raises(FetchError, match="private"):
        Fetch()("http://looks-public.example/1.jpg")
