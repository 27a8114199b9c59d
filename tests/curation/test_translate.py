"""Translation end to end: a server that answers in every way a model does, faults planted at known places, kills."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("apache_beam", reason="apache-beam is in requirements-curation.txt")
pytest.importorskip("openai", reason="openai is in requirements-curation.txt")
pytest.importorskip("imagehash", reason="ImageHash is in requirements-curation.txt")

from pangea_jax.curation import llm, markup, statistics, translate
from pangea_jax.data.build import pangeains
from pangea_jax.data.record import Conversation
from pangea_jax.data.store import RecordStore
from pangea_jax.work import runners
from pangea_jax.work.restart import WorkError

from .samples import picture
from .translator import (
    CODES,
    PHRASES,
    SHARES,
    english_records,
    line_by_line,
    lines_of,
    make_config,
    run,
    target_of,
    texts_of,
    translator,
)

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT.parent / "shared" / "data" / "pangeains_sample"
OPTIONS = ["--runner=DirectRunner"]


def test_every_record_is_translated_or_dropped_for_the_reason_that_it_had(start_endpoint, tmp_path):
    bad = [
        {"id": name, "language": language, "conversations": []}
        for name, language in (
            ("other", "de"),
            ("no_words", "en"),
            ("no_turns", "en"),
            ("long", "en"),
        )
    ]
    bad[0]["conversations"] = english_records()[0]["conversations"]
    for i, question, answer in ((1, "1 + 1", "2"), (3, "word " * 9_000, "yes")):
        pair = (("human", question), ("gpt", answer))
        bad[i]["conversations"] = [{"from": who, "value": text} for who, text in pair]
    bad[0]["image"] = "own/dog.png"
    endpoint = start_endpoint(translator, shares=SHARES, seed=3)
    config = make_config(tmp_path, endpoint, english_records() + bad)
    with open(config.source, "a") as file:
        file.write("[" * 100_000 + "]" * 100_000 + "\n")
    report = run(config, tmp_path / "out", OPTIONS)

    # What the server did to each record and language, in the order in which it was asked.
    done = {}
    for key, request in endpoint.requests.items():
        if "into English" not in request["messages"][0]["content"]:
            name = request["messages"][1]["content"], target_of(request)
            again = "An earlier translation" in request["messages"][0]["content"]
            done.setdefault(name, {})[again] = endpoint.kinds[key][0]
    expected = Counter()
    reasons = {
        "malformed": ("check", "reply is no list of turns"),
        "wrong_language": ("check", "wrong language"),
        "refused": ("request", "the model declines"),
    }
    for kinds in done.values():
        last = kinds[max(kinds)]
        expected[reasons.get(last, "kept")] += 1
        assert (True in kinds) == (kinds[False] in ("malformed", "wrong_language"))
    assert len(done) == 60 and len(expected) == 4, expected

    assert report["entered"] == 25 and report["kept"] == expected["kept"]
    assert report["entered"] + 2 * 20 == report["kept"] + report["dropped"]
    stages = {row["stage"]: row for row in report["stages"]}
    assert stages["read"]["dropped"] == {
        "not in the source language": 1,
        "nothing to translate": 1,
        "no turns": 1,
        "too long": 1,
        "cannot be read": 1,
    }
    for stage in ("request", "check"):
        wanted = {key[1]: n for key, n in expected.items() if key != "kept" and key[0] == stage}
        assert stages[stage]["dropped"] == wanted
    assert set(endpoint.finished.values()) == {1}

    # What is kept is what the server knows, markup and all, and can be built into a store.
    sources = {record["id"]: record for record in english_records()}
    records, provenance = (
        lines_of(tmp_path / "out" / "records"),
        lines_of(tmp_path / "out" / "provenance"),
    )
    assert len(records) == report["kept"]
    for record, origin in zip(records, provenance, strict=True):
        Conversation.from_pangeains(record)
        source = sources[origin["source_id"]]
        assert record["id"] == f"{source['id']}-{record['language']}"
        assert record.get("image") == source.get("image")
        assert record["source"] == f"translation/{source['source']}"
        target = CODES.index(record["language"])
        for ours, theirs in zip(source["conversations"], record["conversations"], strict=True):
            marked = markup.protect(ours["value"])
            if markup.is_translatable(ours["value"]):
                wanted = markup.restore(line_by_line(marked.text, target), marked)[0]
            else:
                wanted = ours["value"]
            assert theirs == {"from": ours["from"], "value": wanted}
        assert origin["prompts"] == translate.VERSION and origin["model"] == "m"
        assert set(origin["replies"]) <= set(endpoint.finished)
        assert origin["checks"] == dict.fromkeys(translate.CHECKS, "passed")
    usage = json.loads((tmp_path / "out" / "usage.json").read_text())
    assert sum(row["calls"] for row in usage.values()) == endpoint.finished.total()
    measured = [json.loads(line) for line in (tmp_path / "out" / "quality.jsonl").open()]
    assert len(measured) == 5
    assert "read back" in str(report["sections"]["Quality of a sample"])

    # Finished is finished.
    asked = endpoint.asked.total()
    assert run(config, tmp_path / "out", OPTIONS) == report
    assert endpoint.asked.total() == asked


def test_embeddings_and_back_translation_are_measured(start_endpoint, tmp_path):
    """Against numbers counted by hand: a perfect back-translation, and vectors at a known angle."""

    def answer(request, kind):
        if "into English" in request["messages"][0]["content"]:
            back = {PHRASES[p][0]: p for p in PHRASES}
            return json.dumps([back.get(text, text) for text in texts_of(request)])
        return translator(request, kind)

    def embed(text):
        return [1.0, 0.0] if text.isascii() else [0.6, 0.8]

    program = [r for r in english_records() if r["id"] == "dog_2"]
    program[0]["conversations"] = [
        {"from": "human", "value": "Which animal is shown here?"},
        {"from": "gpt", "value": "Explain what this program prints:"},
    ]
    endpoint = start_endpoint(answer, embed=embed)
    config = make_config(tmp_path, endpoint, program, languages=("de",))
    config.quality.embedding_model = "e"
    report = run(config, tmp_path / "out", OPTIONS)
    assert report["sections"]["Quality of a sample"] == {
        "de": "1 of 1 read back, chrF 100.0, similarity 0.600"
    }


def test_fields_that_only_some_servers_know_are_sent(start_endpoint, tmp_path):
    endpoint = start_endpoint(translator)
    config = make_config(tmp_path, endpoint, english_records()[:1])
    config.llm.extra_body = {"chat_template_kwargs": {"enable_thinking": False}}
    assert run(config, tmp_path / "out", OPTIONS)["kept"] == 3
    sent = [request["chat_template_kwargs"] for request in endpoint.requests.values()]
    assert sent
    assert all(kwargs == {"enable_thinking": False} for kwargs in sent)


def _curate(config_file, out, *arguments):
    command = [sys.executable, "launch/curate.py", "translate", f"--config={config_file}"]
    command += [f"--out={out}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_new_language_by_one_config_and_a_budget_that_stops_cleanly(start_endpoint, tmp_path):
    """From the command line: out of money, more money, done; every prompt paid once."""
    endpoint = start_endpoint(lambda request, kind: request["messages"][1]["content"])
    source = tmp_path / "english.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in english_records()))
    config = tmp_path / "yoruba.py"
    config.write_text(
        "from configs.curation import translate\n"
        "def get_config(arg=None):\n"
        "    config = translate.get_config(arg)\n"
        f"    config.source = {str(source)!r}\n"
        '    config.languages = ("yo",)\n'
        '    config.notes.yo = "Write tone marks and underdots."\n'
        '    config.checks = ("structure",)\n'
        "    config.shard_size = 4\n"
        "    config.quality.sample = 0\n"
        f"    config.llm.update(model='m', base_url={endpoint.url!r}, price_in=1.0, price_out=1.0, "
        "max_tokens=500, concurrency=2)\n"
        "    return config\n"
    )
    out = tmp_path / "out"
    stopped = _curate(config, out, "--config.llm.budget=0.006")
    assert stopped.returncode == 75, stopped.stderr
    assert "shards done: the budget of $0.01 is spent" in stopped.stderr
    assert 0 < endpoint.finished.total() < 20
    done = _curate(config, out, "--config.llm.budget=1.0")
    assert done.returncode == 0, done.stderr
    assert f"20 records in {out}/records" in done.stdout
    assert set(endpoint.finished.values()) == {1} and len(endpoint.finished) == 20
    systems = [r["messages"][0]["content"] for r in endpoint.requests.values()]
    assert all("into Yoruba (Yorùbá)" in s and "Write tone marks" in s for s in systems)
    assert _curate(config, out, "--nonsense=1").returncode == 1


def test_a_new_language_is_built_and_counted_under_its_name(start_endpoint, tmp_path):
    """Yoruba with its tone marks, through all checks, which hardly know it, to a store."""
    question, answer = list(PHRASES)[:2]
    animals = {"dog": "Ajá", "cat": "Ológbò", "horse": "Ẹṣin", "cow": "Màlúù"}
    known = {question: "Kí ni ẹranko tó wà nínú àwòrán yìí ń ṣe? Dáhùn pẹ̀lú gbólóhùn kan."}
    for ours, theirs in animals.items():
        known[answer.replace("*", ours)] = (
            f"{theirs} náà ń sùn nínú oòrùn tó móoru lẹ́gbẹ̀ẹ́ ilé àtijọ́ náà."
        )

    def translated(request, kind):
        texts = texts_of(request)
        if "into Yoruba" in request["messages"][0]["content"]:
            texts = ["\n".join(known.get(line, line) for line in t.split("\n")) for t in texts]
        return json.dumps(texts, ensure_ascii=False)

    records = [record for record in english_records() if record["id"].endswith("_0")]
    (tmp_path / "own").mkdir()
    for animal in animals:
        (tmp_path / "own" / f"{animal}.png").write_bytes(picture(kind="PNG"))
    config = make_config(tmp_path, start_endpoint(translated), records, languages=("yo",))
    report = run(config, tmp_path / "out", OPTIONS)
    assert (report["kept"], report["dropped"]) == (4, 0)
    assert config.checks == translate.CHECKS

    build = pangeains.Build(tmp_path / "out" / "records", tmp_path / "store", images=tmp_path)
    with runners.Local(1) as go:
        summary = pangeains.build(build, go, max_bad_fraction=0.0)
    assert (summary["kept"], summary["rejected"]) == (4, {})
    index = RecordStore(tmp_path / "store").index
    assert index["language"].to_pylist() == ["yo"] * 4
    found = statistics.measure(tmp_path / "out", work=tmp_path / "work")
    assert "| Yoruba (yo) | 2 / 2 / 2 |" in found.markdown([])


def test_an_endpoint_that_is_gone_stops_the_run_and_loses_nothing(start_endpoint, tmp_path):
    endpoint = start_endpoint(translator)
    config = make_config(tmp_path, endpoint)
    config.llm.update(patience=0.0, retries=0)
    endpoint.down = True
    with pytest.raises(
        llm.EndpointError, match=r"stopped with 0 of 4 shards done: .* not answered"
    ):
        run(config, tmp_path / "out", OPTIONS)
    endpoint.down = False
    report = run(config, tmp_path / "out", OPTIONS)
    assert (report["entered"], report["kept"], report["dropped"]) == (20, 60, 0)
    assert set(endpoint.finished.values()) == {1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"languages": ("xx",)}, "config.languages: unknown language tag 'xx'"),
        ({"languages": ("de", "de")}, "each once"),
        ({"languages": ("de", "en")}, "other than that of the source"),
        ({"source_language": "xx"}, "config.source_language: unknown language tag 'xx'"),
        ({"limit": -1}, "config.limit is -1; 0 takes all"),
        ({"checks": ("grammar",)}, "config.checks"),
        ({"source": ""}, "config.source is empty"),
        ({"source": "/nowhere"}, "/nowhere"),
    ],
)
def test_wrong_configs_name_the_field(start_endpoint, tmp_path, change, message):
    config = make_config(tmp_path, start_endpoint(translator))
    config.update(change)
    with pytest.raises((ValueError, WorkError), match=message):
        run(config, tmp_path / "out", OPTIONS)


def test_prompts_name_the_language_of_the_source(start_endpoint, tmp_path):
    turns = [{"from": "human", "value": "Que voit-on ?"}, {"from": "gpt", "value": "Un chat."}]
    record = {"id": "chat", "language": "fr", "conversations": turns}
    endpoint = start_endpoint(lambda request, kind: json.dumps(texts_of(request)))
    changes = {"languages": ("de",), "source_language": "fr", "checks": ()}
    config = make_config(tmp_path, endpoint, [record], **changes)
    assert run(config, tmp_path / "out", OPTIONS)["kept"] == 1
    there, back = (request["messages"][0]["content"] for request in endpoint.requests.values())
    assert "from French into German (Deutsch)" in there
    assert "from German into French, as literally as good French allows" in back


def test_a_broken_source_is_one_sentence(tmp_path):
    source = tmp_path / "english.jsonl"
    source.write_text('{"id": 1}\n{"id": ', encoding="utf-8")
    overrides = [f"--config.source={source}", "--config.llm.model=m"]
    done = _curate("configs/curation/translate.py", tmp_path / "out", *overrides)
    assert done.returncode == 1
    assert f"error: {source}, byte 17: line 2" in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_commands_name_the_known_ones():
    command = [sys.executable, "launch/curate.py", "transalte"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "expected one of translate, cultural, ocr, stats, got 'transalte'" in done.stderr


def test_unknown_keys_of_the_config_name_the_nearest(tmp_path):
    done = _curate("configs/curation/translate.py", tmp_path / "out", "--config.llm.modle=m")
    assert done.returncode == 1
    assert "config.llm.modle is an unknown key; did you mean 'model'?" in done.stderr
