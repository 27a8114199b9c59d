"""Reading text in screenshots of web pages: the 500,000 samples of the paper's Appendix J (Figure 27).

    pip install -r requirements.txt -r requirements-curation.txt "playwright>=1.50,<2"
    apt-get install chromium                     # or: playwright install chromium
    python launch/curate.py ocr --config=configs/curation/ocr.py --config.pages=PAGES --out=data/ocr
    python launch/curate.py ocr --config=configs/curation/ocr.py --config.pages=urls.jsonl --out=data/ocr \\
        --config.browser.network=static

PAGES is a folder of HTML files, best in subfolders named after their language (PAGES/hi/1.html). These pages are shown
without a network: their scripts do not run and their pictures stay empty. Lines of `urls.jsonl` look like
{"url": "https://...", "language": "hi"}. For such pages, "static" loads style sheets, pictures and fonts but runs no
script; "all" runs scripts too. Pages that robots.txt forbids are dropped; files that it forbids are not loaded.

The paper took 50,000 pages per language from CC-News, in ten languages and on several devices and resolutions, and
marked one element of each with a red box. To add a language, add it to `languages` and, if you like, to INSTRUCTIONS.

Nearly every view of an ordinary page becomes a record; report.md says why the others were dropped. A small local page
takes 0.3 s of a core; for other pages the network decides. --runner=DirectRunner --direct_num_workers=16
--direct_running_mode=multi_processing runs sixteen browsers at once. As root, or in a container without user
namespaces, Chromium has no sandbox: set --config.browser.sandbox=False, and only for pages that you trust.
"""

from ml_collections import ConfigDict

from pangea_jax.curation.ocr import OcrConfig
from pangea_jax.typed_config import section

INSTRUCTIONS = {
    "en": (
        "Given a screenshot of a webpage, identify the red bounding box and perform OCR to recognize the text "
        "within that box.",
        "What does the text inside the red box say?",
        "Read out the text that is framed in red on this web page.",
        "Transcribe the element of the page that the red rectangle marks. Give its text only.",
    ),
    "ar": (
        "ما النص المكتوب داخل الإطار الأحمر؟",
        "اقرأ النص الموجود داخل المستطيل الأحمر في لقطة الشاشة.",
    ),
    "es": (
        "¿Qué dice el texto dentro del recuadro rojo?",
        "Transcribe el texto marcado en rojo en esta captura de pantalla.",
    ),
    "fr": (
        "Que dit le texte dans le cadre rouge ?",
        "Transcrivez le texte encadré en rouge sur cette capture d'écran.",
    ),
    "hi": ("लाल बॉक्स के अंदर क्या लिखा है?", "इस स्क्रीनशॉट में लाल घेरे के अंदर का पाठ लिखिए।"),
    "id": (
        "Apa isi teks di dalam kotak merah?",
        "Salin teks yang ditandai kotak merah pada tangkapan layar ini.",
    ),
    "ja": (
        "赤い枠の中には何と書かれていますか。",
        "このスクリーンショットの赤い枠内の文字を書き出してください。",
    ),
    "ko": (
        "빨간 상자 안에 뭐라고 쓰여 있나요?",
        "이 스크린샷에서 빨간 상자 안의 글자를 그대로 적어 주세요.",
    ),
    "pt": (
        "O que diz o texto dentro da caixa vermelha?",
        "Transcreva o texto marcado em vermelho nesta captura de tela.",
    ),
    "zh": ("红框里的文字写了什么?", "请写出这张网页截图中红框内的文字。"),
}


def get_config() -> ConfigDict:
    config = section(OcrConfig, pages="data/pages", instructions=INSTRUCTIONS)
    config.languages = ("en", "zh", "ja", "ko", "id", "hi", "es", "fr", "pt", "ar")
    config.devices = dict(
        laptop=dict(width=1280, height=800),
        desktop=dict(width=1920, height=1080),
        dense=dict(width=1440, height=900, scale=2.0),
        tablet=dict(width=820, height=1180, scale=1.5, mobile=True),
        phone=dict(width=390, height=844, scale=2.0, mobile=True),
    )
    # Say in user_agent how you can be reached. It is added to Chromium's own.
    config.browser.update(network="none", user_agent="pangea_jax")
    return config
