"""What must survive a translation: protected, restored, repaired where that is safe, and missed where it is gone."""

import doctest
import random
import time

import pytest

from pangea_jax.curation import markup
from pangea_jax.curation.markup import labels, numbers, protect, repair_labels, restore, turns_of


def _reasons(source, target):
    return [fault.reason for fault in markup.structural_faults(source, target)]


def test_examples_in_docstrings():
    assert doctest.testmod(markup).failed == 0


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("<image>\nWhat is it?", ["<image>"]),
        ("Run `ls -l` and\n```sh\nrm $x$\n```\nthen", ["`ls -l`", "```sh\nrm $x$\n```"]),
        ("an unclosed fence\n```py\nprint(1)", ["```py\nprint(1)"]),
        (r"If $x^2 = 4$ then \( x = 2 \) or \[ y \]", ["$x^2 = 4$", r"\( x = 2 \)", r"\[ y \]"]),
        ("It costs $5, or $10 for two.", []),
        (r"so it is \boxed{\frac12} at last", [r"\boxed{\frac12}"]),
        (r"so it is \boxed{4} at last", [r"\boxed{4}"]),
        (r"\begin{align}a\\b\end{align}", [r"\begin{align}a\\b\end{align}"]),
        ('a <b class="x">bold</b> word, 3 < 4 > 2', ['<b class="x">', "</b>"]),
        ("see https://a.org/x?y=1, or a.b@c.org.", ["https://a.org/x?y=1", "a.b@c.org"]),
        ("the region [0.27, 0.35, 0.61, 0.75].", ["[0.27, 0.35, 0.61, 0.75]"]),
        ('{\n  "id": 5,\n}\nis an object', ["{", '  "id": 5,', "}"]),
        ('"Insomnia": the word in quotes', []),
    ],
)
def test_protects_and_restores(text, spans):
    protected = protect(text)
    assert list(protected.spans) == spans
    assert restore(protected.text, protected) == (text, [], [])
    assert not any(span in protected.text for span in spans)


def test_marks_are_characters_that_the_text_does_not_have():
    protected = protect("⟦1⟧ is a bracket, <image> a picture")
    assert protected.text == "⟦1⟧ is a bracket, ⦃1⦄ a picture"
    assert restore(protected.text, protected)[0] == "⟦1⟧ is a bracket, <image> a picture"


def test_a_reply_may_have_every_bracket_but_a_source_may_not():
    brackets = "⟦⦃⟪⌊"
    with pytest.raises(ValueError, match="the text contains all of"):
        protect(brackets)
    assert _reasons("some words", f"Wörter {brackets}") == []
    assert restore(f"Wörter {brackets}", protect("words"))[2] == [("mark invented", "half a mark")]


@pytest.mark.parametrize("marks", ["⟦ 1 ⟧ und ⟦2⟧", "⟦१⟧ und ⟦२⟧", "⟦٠١⟧ und ⟦2 ⟧"])
def test_marks_in_other_spellings_are_repaired(marks):
    text, repairs, faults = restore(marks, protect("`a` and `b`"))
    assert (text, repairs, faults) == ("`a` und `b`", ["mark respelled"], [])


@pytest.mark.parametrize(
    ("source", "reply", "expected"),
    [
        ("<image>\nWhat is it?", "Was ist das?", "<image>\nWas ist das?"),
        ("So?\n<image>", "So?", "So?\n<image>"),
    ],
)
def test_a_lost_picture_goes_back_to_the_border(source, reply, expected):
    assert restore(reply, protect(source)) == (expected, ["image marker put back"], [])


def test_what_cannot_be_restored_is_named():
    source = protect("Compare <image> with <image> in `f`.")
    assert restore("Vergleiche ⟦1⟧ mit ⟦1⟧ und ⟦7⟧", source)[2] == [
        ("image marker repeated", "<image>"),
        ("image marker lost", "<image>"),
        ("code lost", "`f`"),
        ("mark invented", "⟦7⟧"),
    ]


def test_options_are_found_however_they_are_written():
    assert labels("Which?\nA) x\nB) y\nC) z") == ["A", "B", "C"]
    assert labels("Options: (a) false (b) true. Answer.") == ["a", "b"]
    assert labels("Ａ．猫\nＢ．狗") == ["A", "B"]
    assert labels("A. Smith wrote it.\nC. Jones read it.") == []
    assert labels("I. one\nII. two") == []


@pytest.mark.parametrize(
    "translated",
    [
        "Что?\nА) кот\nВ) пёс\nС) рыба",
        "什么？\nＡ．猫\nＢ．狗\nＣ．鱼",
        "Was?\n(A) Katze\n(B) Hund\n(C) Fisch",
    ],
)
def test_options_in_other_letters_are_repaired(translated):
    source = "What?\nA. cat\nB. dog\nC. fish"
    repaired, changed = repair_labels(source, translated)
    assert changed
    lines = repaired.splitlines()[1:]
    assert [line[:3] for line in lines] == ["A. ", "B. ", "C. "]
    assert [line[3:] for line in lines] == [
        line.lstrip("(").partition(line.lstrip("(")[1])[2].strip()
        for line in translated.splitlines()[1:]
    ]
    assert _reasons(source, repaired) == []


def test_missing_and_changed_options():
    source = "What?\nA. cat\nB. dog\nC. fish"
    assert _reasons(source, "Was?\nA. Katze\nB. Hund") == ["options missing"]
    assert _reasons(source, "Was?\nA. Katze, Hund oder Fisch") == ["options missing"]
    assert _reasons(source, "Was?\nA. Katze\nC. Hund\nB. Fisch") == ["options missing"]
    assert _reasons(source, "Was?\nA. Katze\nB. Hund\nC. Fisch\nD. Vogel") == ["options changed"]
    assert repair_labels(source, "Was?\nA. Katze\nB. Hund")[1] is False
    assert _reasons("(b) true", "(a) wahr") == ["answer's option changed"]
    assert _reasons("(b) true", "(b) wahr") == []


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("1,234,567 people", "1.234.567 Menschen"),
        ("1,234 people", "1\u202f234 personnes"),
        ("about 3.14 or 0.5", "etwa 3,14 oder 0,5"),
        ("in 2019 and 2020", "۲۰۱۹ اور ۲۰۲۰ میں"),
        ("10/31/1975", "31.10.1975"),
        ("at 192.168.0.1 since 1.5.2020", "seit 1.5.2020 auf 192.168.0.1"),
        ("3 cats", "三只猫"),
        ("1.5 million people and 20 dogs", "150万人和20条狗"),
        ("8 billion", "80亿"),
        ("1,200 thousand", "120만"),
        ("2.5 million", "25 लाख"),
        ("on 7 October 2013", "2013年10月7日"),
        ("at 3:15 pm", "um 15:15 Uhr"),
        ("Louis the 14th", "Louis XIV"),
        ("a dozen or twenty", "12 oder 20"),
    ],
)
def test_the_same_numbers_in_other_spellings(ours, theirs):
    assert _reasons(ours, theirs) == []


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("in 2019", "im Jahr 2018"),
        ("3 cats", "4 Katzen"),
        ("3.5 km", "35 km"),
        ("12 or 15", "12"),
        ("a few", "etwa 300"),
        ("two cats and 1 dog", "2 Katzen und ein Hund"),
        ("1.5 million", "15万"),
        ("20 million", "20万"),
        ("the 20th century", "le XIXe siècle"),
        ("on 7 October", "11月7日"),
    ],
)
def test_changed_numbers(ours, theirs):
    assert _reasons(ours, theirs) == ["numbers changed"]


@pytest.mark.parametrize("unit", ["thouſand", "MİLLİON", "mıllion"])
def test_letters_that_fold_into_those_of_a_unit(unit):
    """`re` takes them for the ASCII ones where case does not count."""
    assert _reasons(f"5 {unit} people", f"5 {unit} Menschen") == []
    assert _reasons(f"5 {unit} people", "6 Menschen") == ["numbers changed"]


def test_numbers_are_compared_by_value():
    assert numbers("1,234.50 and 7") == {"1234.50": 1, "7": 1}
    assert numbers("1,00,000") == {"100000": 1}


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("words", " \n", "empty turn"),
        ("| a | b |\n| 10 | 20 |", "| x | y |\n| 10 | 30 |", "numbers changed"),
        ("| a | b |\n| c | d |", "| x | y |", "table changed"),
        ("| a | b |", "| x y |", "table changed"),
        ("- a\n- b", "- x", "list changed"),
        ("# Title\ntext", "Titel\nText", "headings changed"),
        ("a **b** c", "x **y z", "emphasis broken"),
        ("use `f` here", "hier", "code lost"),
        ("no code here", "hier `rm -rf`", "code invented"),
        ("text", "Text<|im_end|>\n<|im_start|>system", "tag invented"),
        ("text", "Te\ufffdt", "control characters"),
        ("Hello there", "User: Hallo\nAssistant: Hallo", "speaker label"),
        ("a short text", "la la la " * 40, "repetition"),
    ],
)
def test_structural_faults(source, target, reason):
    assert _reasons(source, target)[0] == reason


def test_a_text_that_repeats_itself_may_be_translated_so():
    assert _reasons("row, row, " * 40, "ru, ru, " * 40) == []


@pytest.mark.parametrize(
    ("reply", "texts", "repairs"),
    [
        ('["a", "b"]', ["a", "b"], []),
        ('```json\n["a"]\n```', ["a"], ["words around the reply removed"]),
        ('Sure! Here it is:\n["a"]\nAnything else?', ["a"], ["words around the reply removed"]),
        ('["line\nbreak"]', ["line\nbreak"], []),
        (r'["a \( x"]', [r"a \( x"], ["JSON repaired"]),
        ('["a", "b",]', ["a", "b"], ["JSON repaired"]),
        ('[{"text": "a"}]', ["a"], []),
        (r'["\ud83d\ude00 \ud83d"]', ["😀 \ufffd"], []),
        ("I cannot help with that.", None, []),
        ('{"a": 1}', None, []),
        ("[1, 2]", None, []),
        ("[" * 100_000 + "]", None, []),
    ],
)
def test_lists_in_replies(reply, texts, repairs):
    assert turns_of(reply) == (texts, repairs)


@pytest.mark.parametrize(
    "piece",
    [
        *(
            "\\[",
            "\\(",
            "$x",
            "<a b=c ",
            "<!--",
            "\\begin{a}",
            "\\boxed{",
            "1,",
            "9",
            "A. ",
            "(a)",
            "x@",
            "a.",
        ),
        *(
            "`",
            "⟦",
            "⟦1",
            "{\n",
            '"x": 1\n',
            "**",
            "| ",
            "- ",
            "[1, ",
            "http://",
            "www.",
            "user:",
            " ",
            "\n",
        ),
    ],
)
def test_endless_beginnings_take_no_endless_time(piece):
    text = piece * (20_000 // len(piece))
    began = time.process_time()
    markup.structural_faults("Which? (a) or (b)", text)
    restore(text, protect("see `x`"))
    turns_of(text)
    assert time.process_time() - began < 3.0


def test_whatever_a_model_writes_is_compared_and_no_more():
    """Random texts of everything that the patterns look for: nothing raises, and a text equals itself."""
    # fmt: off
    pieces = [
        "⟦", "⟧", "⟦1⟧", "⦃", "⟪", "⟦²⟧", "1", "12", "٣", "½", "①", "一", "万", "million", "0", "A.", "(a)", "В)",
        "```", "`", "$", "\\(", "\\)", "\\[", "{", "}", "\\begin{a}", "\\end{a}", "<image>", "<|x|>", "**", "|",
        "word", "слово", "文字", "ß", "İ", "[1,2]", "http://a.b/c", "a@b.c", ".", ",", "'", "٫", "pm",
        "march", "[", "]", '"', "\\", "XIV", "007", "𝟘", "Ⅷ", "- ", "# ", " ", "\n", "\0", "\ufffd",
        "\u202f", '"x": 1', "9" * 6_000,
    ]
    # fmt: on
    chance = random.Random(0)
    for _ in range(250):
        source, reply = (
            "".join(chance.choices(pieces, k=chance.randint(low, 40))) for low in (1, 0)
        )
        protected = protect(source)
        assert restore(protected.text, protected) == (source, [], [])
        assert repair_labels(source, source) == (source, False)
        if source.strip():
            assert markup.structural_faults(source, source) == []
        text = restore(reply, protected)[0]
        markup.structural_faults(source, repair_labels(source, text)[0])
        turns_of(reply)
