"""Pictures and texts that several tests are made of."""

import io
import random

import numpy as np
from PIL import Image

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
    # None of the 39 of PangeaIns, and hardly known to the identifier.
    "yo": "Àwòrán náà fi ọjà àtijọ́ kan hàn ní àárín ìlú, níbi tí àwọn obìnrin ti ń ta aṣọ àdìrẹ aláwọ̀ búlúù lábẹ́ igi "
    "ńlá. Ní apá òsì, ọkùnrin kan ń lu ìlù dùndún fún àwọn ọmọdé tó ń jó, àwọn ènìyàn sì ń wò wọ́n pẹ̀lú ayọ̀.",
}
ENGLISH = (
    "This is an ordinary English sentence about a picture that nobody asked for, and it goes on."
)


def sentence(code, seed, count=9):
    """Words of a language in an order of their own: no two are alike to MinHash."""
    words = SENTENCES[code].split()
    return " ".join(random.Random(f"{code}{seed}").sample(words, count))


def picture(seed=0, size=(320, 256), kind="JPEG", **settings):
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(buffer, kind, **settings)
    return buffer.getvalue()
