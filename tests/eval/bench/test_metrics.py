"""Metrics and parsers equal the programs they stand for."""

import json
import re
from fractions import Fraction

import numpy as np
import pytest

from eval.bench.metrics import (
    bootstrap,
    captions,
    choices,
    language_rule,
    mmmu,
    numbers,
    ptb,
    squad,
)
from eval.bench.reading.letter import letter as letter_of
from eval.bench.reading.number import number
from eval.bench.reading.truth import truth
from eval.bench.task import Document
from eval.bench.tasks import flores, m3exam, marvl, maxm, mgsm, xgqa

FRUIT = ["Apple pie", "Banana", "Dark red", "Red"]


def test_ptb_tokens_equal_stanford(golden):
    rows = golden("ptb_tokens.jsonl.gz")
    different = [r["text"] for r in rows if " ".join(ptb.tokenize(r["text"])) != r["ptb"]]
    assert len(rows) == 792
    assert not different


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A man, isn't he (tall)?", "a man is n't he -lrb- tall -rrb-"),
        ("It’s 5€ -- half-way...", "it 's 5 $ half-way"),
        ("l'homme d'un c'est j'ai", "l'homme d'un c'est j' ai"),
        ("cannot gonna U.S. etc.", "can not gon na u.s. etc."),
        ("男の人が、橋を歩く。", "男の人が 、 橋を歩く 。"),
        ("सिंहल", "सिंहल"),
        ("සිංහල", "ස හල"),
        ("", ""),
    ],
)
def test_ptb_tokens(text, tokens):
    assert " ".join(ptb.tokenize(text)) == tokens


def test_caption_metrics_equal_pycocoevalcap(bench, golden, read_jsonl):
    expected = golden("coco_caption_metrics.json")
    rows = read_jsonl(bench / "llava_bench_coco" / "caps_boxes_coco2014_val_80.jsonl")
    tokens = [[ptb.tokenize(caption) for caption in row["captions"]] for row in rows]
    rouge = [captions.rouge_l(first, rest) for first, *rest in tokens]
    cider = captions.cider([first for first, *_ in tokens], [rest for _, *rest in tokens])
    np.testing.assert_allclose(rouge, expected["rouge_per_image"], atol=1e-6)
    np.testing.assert_allclose(cider, expected["cider_per_image"], atol=1e-6)
    assert np.mean(rouge) == pytest.approx(expected["ROUGE_L"], abs=1e-12)
    assert cider.mean() == pytest.approx(expected["CIDEr"], abs=1e-9)


def test_rouge_takes_the_best_of_each_reference():
    # Precision 2/2 from the first reference, recall 1/1 from the second: no single reference gives 1.
    assert captions.rouge_l(["a", "b"], [["a", "b", "c", "d"], ["b"]]) == pytest.approx(1.0)
    assert captions.rouge_l([], [["a"]]) == 0
    assert captions.rouge_l([], [[]]) == 1  # two empty captions are equal, as in pycocoevalcap


def test_unsegmented_scripts_are_cut():
    assert captions.caption_tokens("男がiPhone 12を持つ。", "ja") == [
        "男", "が", "iphone", "12", "を", "持", "つ",
    ]  # fmt: skip
    assert captions.caption_tokens("ที่นี่", "th") == ["ที่", "นี่"]
    assert captions.caption_tokens("Bir adam yürüyor.", "tr") == ["bir", "adam", "yürüyor"]


def test_mmmu_parser_equals_the_official_one(bench, golden, read_jsonl):
    rows = read_jsonl(bench / "mmmu" / "val_outputs.jsonl.gz")
    for row, expected in zip(rows, golden("mmmu_parse.jsonl.gz"), strict=True):
        if row["question_type"] == "multiple-choice":
            parsed = mmmu.parse_multiple_choice(
                row["response"], row["all_choices"], row["index2ans"], seed=None
            )
            if expected["random_fallback"]:
                assert parsed is None
            else:
                assert parsed == expected["parsed"]
                assert (parsed == row["answer"]) == expected["correct"]
        else:
            parsed = mmmu.parse_open(row["response"])
            assert sorted(map(str, parsed)) == sorted(map(str, expected["parsed"]))
            assert mmmu.open_is_correct(row["answer"], parsed) == expected["correct"]


def test_mmmu_rules():
    named = {"A": "the left valve", "B": "the right valve"}
    assert mmmu.parse_multiple_choice("(A) or rather (B).", "AB", named, seed=None) == "B"
    assert (
        mmmu.parse_multiple_choice("I am sure it is the left valve", "AB", named, seed=None) == "A"
    )
    assert mmmu.parse_multiple_choice("B. the valve", "AB", named, seed=None) == "B"
    assert mmmu.parse_multiple_choice("USA is", "AB", named, seed=None) == "A"
    assert mmmu.parse_multiple_choice("no idea", "AB", named, seed=None) is None
    drawn = {mmmu.parse_multiple_choice("no idea", "AB", named, seed=str(i)) for i in range(9)}
    assert drawn == {"A", "B"}
    assert 0.5 in mmmu.parse_open("Half of it, so the answer is 0.5 N.")
    assert mmmu.open_is_correct("1234.50", mmmu.parse_open("= 1,234.5"))
    assert not mmmu.open_is_correct("7", mmmu.parse_open("the answer is 17"))


def test_paper_parsers_keep_their_quirks(golden):
    quirks = golden("parser_quirks.json")
    for row in quirks["cvqa_m3exam_letter_parser"]:
        letter, drawn = choices.paper_letter(row["response"], row["options"], seed="x")
        assert (None if drawn else letter) == row["parsed"], row
    for row in quirks["m3exam_standardize_options"]:
        assert m3exam.paper_options(row["options"]) == row["result"]
    for row in quirks["m3exam_standardize_answer"]:
        assert m3exam.paper_answer(row["answer"]) == row["result"]
    for row in quirks["maxm"]:
        assert maxm.paper_relaxed(row["pred"], row["gold"]) == row["relaxed_accuracy"], row
    for row in quirks["marvl"]:
        assert (row["target"] in marvl.paper_reading(row["pred"])) == row["correct"], row
    for row in quirks["xgqa"]:
        assert (row["target"] in row["pred"].lower()) == row["correct"]


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("(c)", "C"),
        ("B.", "B"),
        ("Ｂ", "B"),
        ("The answer is B", "B"),
        ("The answer is (C) because A is wrong", "C"),
        ("答案：D", "D"),
        ("الإجابة: ب", "B"),
        ("คำตอบคือ ข", "B"),
        ("Jawaban: A", "A"),
        ("The answer is a banana", "B"),
        ("dark red", "C"),
        ("It is Dark Red.", "C"),
        ("A. Apple pie", "A"),
        ("A man eats something", None),
        ("C or D", None),
        ("A. Apple pie\nB. Banana\nC. Dark red\nD. Red", None),
        ("B. Banana\nIt is yellow.", "B"),
        ("(E)", None),
        ("I don't know", None),
        ("", None),
    ],
)
def test_letters_are_read_properly(response, letter):
    assert letter_of(response, FRUIT) == letter


def test_options_in_other_scripts_are_recognised():
    assert letter_of("答案是香蕉", ["苹果", "香蕉", "葡萄", "西瓜"]) == "B"


def test_m3exam_options_keep_their_numbers():
    assert m3exam.paper_options(["2 apples", "3 apples"]) == ["(A) apples", "(B) apples"]
    assert m3exam._options(["2 apples", "3 apples"]) == ["(A) 2 apples", "(B) 3 apples"]
    assert m3exam._options(["A. one", "B. two"]) == ["(A) one", "(B) two"]
    assert m3exam._options(["1. 1945", "2. 1954"]) == ["(A) 1945", "(B) 1954"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("2,125 or 2.125 or 18.00", [2125, 2125, 18]),
        ("1,14,200", [114200]),
        ("১৮টি", [18]),
        ("๑๘ แล้ว ౧౮", [18, 18]),
        ("٢٬١٢٥ و ٣٫٥", [2125, Fraction(7, 2)]),
        ("1.000,50", [Fraction(2001, 2)]),
        ("0.125", [Fraction(1, 8)]),
        ("16-3=13, -5", [16, 3, 13, -5]),
        ("none", []),
    ],
)
def test_numbers(text, values):
    assert numbers.find(text) == values


def test_spaces_group_digits_only_where_asked():
    assert numbers.find("2 125") == [2, 125]
    assert numbers.find("2 125", space_groups=True) == [2125]


def test_endless_digits_are_no_error():
    assert numbers.find("7" * 10_000) == [int("7" * 40)]
    assert number("The answer is " + "1.1" * 3000, "en") is not None


def test_mgsm_exemplars(bench):
    data = json.loads((bench / "mgsm" / "exemplars.json").read_text("utf-8"))
    strict = {}
    for language, exemplars in data["MGSM_EXEMPLARS"].items():
        golds = [data["EXEMPLAR_NUMBER_ANSWERS"][int(number) - 1] for number in exemplars]
        read = [number(e["a"], language) for e in exemplars.values()]
        assert read == golds, language
        pattern = mgsm._WORDS[language][2]
        strict[language] = sum(bool(re.findall(pattern, e["a"])) for e in exemplars.values())
    assert strict.pop("bn") == 0  # the paper's zero
    assert set(strict.values()) == {8}


@pytest.mark.parametrize(
    ("language", "text", "value"),
    [
        ("en", "5+6=11. The answer is 11. Anything else? I have 2 more.", 11),
        ("en", "Answer:\n\n**18**", 18),
        ("en", "That makes 3 boxes, so 7.", 7),
        ("bn", "5 + 6 = 11। উত্তর হল ১১।", 11),
        ("ja", "5 + 6 = 11です。答えは11です。", 11),
        ("fr", "La réponse est 2 125.", 2125),
        ("th", "คำตอบคือ ๑๑", 11),
        ("en", "no number", None),
    ],
)
def test_mgsm_final_number(language, text, value):
    assert number(text, language) == value


def test_chrf_equals_sacrebleu_on_real_translations(bench, golden, read_jsonl):
    references = read_jsonl(bench / "flores200" / "devtest_core6.jsonl.gz")
    expected = {row["pair"]: row for row in golden("flores_sacrebleu.json")}
    seen = 0
    for row in read_jsonl(bench / "flores_mt_outputs" / "outputs.jsonl.gz"):
        target = row["pair"].split("-")[1]
        if target not in references[0]:
            continue
        scored = [
            _score_flores(hypothesis, reference[target])
            for hypothesis, reference in zip(row["hyps"], references, strict=True)
        ]
        sums = np.sum([s.statistics for s in scored], axis=0)
        gold = expected[row["pair"]]
        assert flores.DATASET.combine(sums, "paper") == pytest.approx(gold["chrf"], abs=0.01)
        sentences = [100 * s.metrics["chrf"] for s in scored[:20]]
        np.testing.assert_allclose(sentences, gold["sentence_chrf_first20"], atol=0.01)
        seen += 1
    assert seen == 10


def _score_flores(hypothesis, reference):
    document = Document("1", {"source": "", "target": reference})
    return flores.DATASET.score(document, hypothesis, flores.DATASET.subsets[0], "paper")


def test_xgqa_equality_gives_the_published_figure():
    """The normalisation changes nothing where both sides are plain words."""
    assert squad.normalize("The Man.", unicode_punctuation=True) == "man"
    subset = xgqa.DATASET.subsets[0]
    document = Document("1", {"question": "?", "answer": "man", "images": []})
    paper = xgqa.DATASET.score(document, "a woman", subset, "paper")
    fixed = xgqa.DATASET.score(document, "a woman", subset, "fixed")
    assert (paper.metrics["exact_match"], fixed.metrics["exact_match"]) == (1, 0)
    right = xgqa.DATASET.score(document, "The man.", subset, "fixed")
    assert right.metrics == {"exact_match": 1, "contains_words": 1}


@pytest.mark.parametrize(
    ("response", "read"),
    [
        ("(b)", "true"),
        ("b", "true"),
        ("It is not true", "false"),
        ("是", "true"),
        ("Hapana", "false"),
        ("unknown", None),
        ("true or false", None),
        ("(a) false", "false"),
    ],
)
def test_marvl_readings(response, read):
    assert truth(response, "sw" if response == "Hapana" else None) == read


def test_squad_scores():
    scores = squad.scores(squad.normalize("The big dog!"), [squad.normalize("big cat"), "dog"])
    assert scores == {"f1": pytest.approx(2 / 3), "exact_match": 0.0, "contains": 1.0}
    assert squad.normalize("2006年。", unicode_punctuation=True) == "2006年"
    assert squad.normalize("2006年。") == "2006年。"
    assert squad.normalize("an se", articles=False) == "an se"


def test_language_rule():
    assert language_rule.is_language("这是一只猫坐在桌子上。", "zh")
    assert not language_rule.is_language("This is a cat that sits on the table.", "zh")
    assert language_rule.is_language("42", "ja")
    # The rule reads the first 80 characters: the scores are defined so.
    mixed = (
        "This is a cat that sits on the table and looks at the dog in front of the house. "
        + 20 * "El gato está sentado en la mesa y mira al perro. "
    )
    assert language_rule.is_language(mixed, "en")
    assert not language_rule.is_langdetect_language("42", "ja")


def _mean(sums):
    return sums[..., 0] / sums[..., 1]


def test_bootstrap_interval_covers_the_binomial():
    rng = np.random.default_rng(0)
    rows = [(str(i), (float(hit), 1.0)) for i, hit in enumerate(rng.random(400) < 0.3)]
    drawn = bootstrap.draw_subsets({"x": rows}, _mean)["x"]
    share = np.mean([values[0] for _, values in rows])
    assert drawn.std() == pytest.approx(np.sqrt(share * (1 - share) / 400), rel=0.1)
    low, high = bootstrap.interval(drawn)
    assert low < share < high


def test_clusters_widen_the_interval():
    """Ten questions on each picture, all right or all wrong: a tenth of the information."""
    hits = np.random.default_rng(0).random(60) < 0.5
    clustered = [(f"image {i // 10}", (float(hits[i // 10]), 1.0)) for i in range(600)]
    alone = [(str(i), values) for i, (_, values) in enumerate(clustered)]
    widths = [
        np.subtract(*bootstrap.interval(bootstrap.draw_subsets({"x": rows}, _mean)["x"])[::-1])
        for rows in (clustered, alone)
    ]
    assert widths[0] / widths[1] == pytest.approx(np.sqrt(10), rel=0.15)


def test_shared_clusters_are_drawn_together():
    rows = [(f"image {i}", (float(i % 3 == 0), 1.0)) for i in range(90)]
    drawn = bootstrap.draw_subsets({"en": rows, "sw": rows}, _mean)
    np.testing.assert_array_equal(drawn["en"], drawn["sw"])
    apart = bootstrap.draw_subsets({"en": rows, "sw": [(f"x{c}", v) for c, v in rows]}, _mean)
    assert abs(np.corrcoef(apart["en"], apart["sw"])[0, 1]) < 0.1


def test_small_languages_keep_their_size():
    """One subset of ten clusters beside one of a thousand: no draw may be without the small one."""
    small = [(f"s{i}", (float(i < 5), 1.0)) for i in range(10)]
    large = [(f"l{i}", (float(i < 500), 1.0)) for i in range(1000)]
    drawn = bootstrap.draw_subsets({"large": large, "small": small}, _mean)
    assert np.isfinite(drawn["small"]).all()
    assert drawn["small"].std() == pytest.approx(np.sqrt(0.25 / 10), rel=0.1)


def test_paired_test():
    rng = np.random.default_rng(0)
    ability = rng.random(300)

    def run(bonus):
        hits = ability < 0.5 + bonus
        rows = [(str(i), (float(hit), 1.0)) for i, hit in enumerate(hits)]
        return bootstrap.draw_subsets({"x": rows}, _mean)["x"]

    base, better = run(0.0), run(0.05)
    (low, _), p_value = bootstrap.compare(better, base)
    assert p_value < 0.01 and low > 0
    assert bootstrap.compare(base, base) == ((0, 0), 1)
