"""A model that translates records it knows into three languages, or does what models do instead."""

import json
import re

from configs.curation import translate as default
from pangea_jax.curation import translate
from pangea_jax.typed_config import build

# What the server knows of three languages; * is a number or an animal.
PHRASES = {
    "What is the animal in this picture doing? Answer in one sentence.": (
        "Was tut das Tier auf diesem Bild? Antworte in einem Satz.",
        "Что делает животное на этой картинке? Ответьте одним предложением.",
        "这张图片里的动物在做什么？请用一句话回答。",
    ),
    "The * is sleeping in the warm sun next to the old house.": (
        "Man sieht: * schläft in der warmen Sonne neben dem alten Haus.",
        "Здесь * спит на тёплом солнце рядом со старым домом.",
        "*正在老房子旁边温暖的阳光下睡觉。",
    ),
    "Which animal is shown here?": (
        "Welches Tier ist hier zu sehen?",
        "Какое животное здесь показано?",
        "这里展示的是哪种动物？",
    ),
    "Explain what this program prints:": (
        "Erkläre, was dieses Programm ausgibt:",
        "Объясните, что выводит эта программа:",
        "请解释这个程序输出什么：",
    ),
    "The program prints the number * and then it ends.": (
        "Das Programm gibt die Zahl * aus und endet danach.",
        "Программа выводит число * и затем завершается.",
        "程序输出数字*然后结束。",
    ),
    "What is the value of ⟦1⟧ if ⟦2⟧ holds for it?": (
        "Welchen Wert hat ⟦1⟧, wenn dafür ⟦2⟧ gilt?",
        "Чему равно ⟦1⟧, если для него выполняется ⟦2⟧?",
        "如果⟦2⟧成立，⟦1⟧的值是多少？",
    ),
    "If we subtract * from both sides, we find that ⟦1⟧ is true.": (
        "Wenn wir auf beiden Seiten * abziehen, sehen wir, dass ⟦1⟧ wahr ist.",
        "Если вычесть * из обеих частей, мы увидим, что ⟦1⟧ верно.",
        "如果两边都减去*，我们就会发现⟦1⟧是对的。",
    ),
}
ANIMALS = {
    "dog": ("Hund", "собака", "狗"),
    "cat": ("Katze", "кошка", "猫"),
    "horse": ("Pferd", "лошадь", "马"),
    "cow": ("Kuh", "корова", "牛"),
}
CODES = ("de", "ru", "zh")
NAMES = {"German": 0, "Russian": 1, "Chinese": 2}
SHARES = {"malformed": 0.1, "refused": 0.1, "wrong_language": 0.15, "slow": 0.1}
SHARES |= {"busy": 0.1, "broken": 0.1, "cut": 0.03, "page": 0.1}


def english_records():
    """Twenty conversations, of five kinds, in the form of PangeaIns."""
    records = []
    for animal, number in zip(ANIMALS, (11, 24, 37, 58), strict=True):
        ask, sleeps, which, explain, prints, value, subtract = (
            phrase.replace("*", animal if "sleeping" in phrase else str(number))
            for phrase in PHRASES
        )
        others = [a for a in ANIMALS if a != animal]
        options = f"A. {others[0]}\nB. {animal}\nC. {others[1]}"
        code = f"```python\nprint({number})\n```"
        value = value.replace("⟦1⟧", "$x$").replace("⟦2⟧", f"$x + {number} = 90$")
        subtract = subtract.replace("⟦1⟧", f"$x = {90 - number}$")
        conversations = (
            [f"<image>\n{ask}", sleeps],
            [f"{which}\n{options}\n<image>", "B"],
            [f"{explain}\n{code}", prints],
            [value, subtract],
            [f"<image>\n{ask}", sleeps, f"{which}\n{options}", f"B. {animal}", value, subtract],
        )
        for kind, turns in enumerate(conversations):
            record = {"id": f"{animal}_{kind}", "language": "en", "source": f"own/{kind}"}
            speakers = ["human", "gpt"] * len(turns)
            record["conversations"] = [
                {"from": s, "value": v} for s, v in zip(speakers, turns, strict=False)
            ]
            if "<image>" in str(turns):
                record["image"] = f"own/{animal}.png"
            records.append(record)
    return records


def target_of(request):
    """Which of the three languages a request wants."""
    return NAMES[re.search(r"into (\w+)", request["messages"][0]["content"])[1]]


def _line(line, target):
    if not line.strip() or re.fullmatch(r"\W*\d*\W*", line):
        return line
    match = re.fullmatch(r"([A-C]\. )?(\w+)", line)
    if match:
        return (match[1] or "") + ANIMALS[match[2]][target]
    for phrase, translations in PHRASES.items():
        match = re.fullmatch(re.escape(phrase).replace(r"\*", r"(\w+)"), line)
        if match:
            word = match[1] if match.groups() else ""
            return translations[target].replace("*", ANIMALS.get(word, [word] * 3)[target])
    raise AssertionError(f"the server does not know {line!r}")


def texts_of(request):
    return json.loads(request["messages"][1]["content"])


def translator(request, kind):
    """Translates; or what models do instead."""
    texts = texts_of(request)
    if "into English" in request["messages"][0]["content"]:
        return json.dumps(texts)  # the back-translation is not what is tested here
    target = target_of(request)
    if kind == "malformed":
        return "I have translated it all, as you wished."
    if kind == "wrong_language":
        target = (target + 1) % 3
    translated = [line_by_line(text, target) for text in texts]
    return json.dumps(translated, ensure_ascii=False)


def line_by_line(text, target):
    return "\n".join(_line(line, target) for line in text.split("\n"))


def make_config(folder, endpoint, records=None, **changes):
    """A config that translates `records`, by default the twenty, at an endpoint."""
    source = folder / "english.jsonl"
    records = english_records() if records is None else records
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = default.get_config()
    config.source, config.languages, config.shard_size = str(source), CODES, 6
    config.quality.sample = 5
    settings = {"model": "m", "base_url": endpoint.url, "concurrency": 4, "patience": 20.0}
    config.llm.update(settings)
    for name, value in changes.items():
        config[name] = value
    return config


def run(config, out, options):
    """Translates by a config as a file makes it."""
    return translate.run(build(translate.TranslateConfig, config), out, options)


def lines_of(folder):
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.open()]
