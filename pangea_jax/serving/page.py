"""The page at `/`, where people try a model: a chat with pictures, in the 39 languages of PangeaIns.

The page is a client of the server that serves it: it posts to `v1/chat/completions` and reads the stream. It
asks no other host, and its header forbids it to. The files are in `page/` and are sent as they are. There is no
build step. Each language has its texts in `page/texts/CODE.json`; all of them have the keys of `en.json`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, HTTPException, Request, Response

from pangea_jax import languages

FOLDER = Path(__file__).with_name("page")
SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # The browser then refuses `innerHTML` and its like, so a text can only become text.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # the browser keeps a file, and asks whether it is still the same
}
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}
_RIGHT_TO_LEFT = ("Arab", "Hebr")


@dataclasses.dataclass(frozen=True)
class Credit:
    """Who made example pictures, as their licence asks to be told.

    Attributes:
      title, author, url: the work.
      licence, licence_url: such as `CC-BY-4.0`, and where its text is.
      changed: what was changed.
    """

    title: str
    author: str
    url: str
    licence: str
    licence_url: str
    changed: str


@dataclasses.dataclass(frozen=True)
class Example:
    """A picture that the page offers. One click asks the model about it.

    Attributes:
      file: its name in the page's addresses, such as `twemoji-1f408.webp`.
      data: the encoded picture.
      media_type: such as `image/webp`.
      names: language -> what it shows, for people who do not see it. English must be there.
    """

    file: str
    data: bytes
    media_type: str
    names: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class PageInfo:
    """What the page says about the model, and what it sends.

    Attributes:
      model: the name in requests.
      ability: what the model can do: `pictures`, it answers questions, also about pictures; `drawings`, it only
        names drawings.
      learnt: the languages that it was trained in, if they are not all of the page.
      questions: language -> example questions, where those of the page's texts do not suit the model.
      examples: pictures to try.
      credits: their makers.
      max_pictures: most pictures in a message.
      pictures_start_chat: whether a message with pictures starts a new chat. For models that were not trained on
        pictures in later turns.
      max_side: width and height in pixels that the browser scales larger pictures down to.
      max_tokens: longest answer; None: the server's own limit.
    """

    model: str
    ability: Literal["pictures", "drawings"] = "pictures"
    learnt: Sequence[str] = ()
    questions: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    examples: Sequence[Example] = ()
    credits: Sequence[Credit] = ()
    max_pictures: int = 8
    pictures_start_chat: bool = False
    # The longest side of LLaVA-NeXT's canvases is 4 tiles of 336 pixels.
    max_side: int = 1344
    max_tokens: int | None = None

    def __post_init__(self):
        unknown = {*self.learnt, *self.questions} - {*languages.PANGEAINS}
        if unknown:
            known = " ".join(languages.PANGEAINS)
            raise ValueError(
                f"PageInfo: no languages of the page: {sorted(unknown)}; it has {known}"
            )
        nameless = [example.file for example in self.examples if "en" not in example.names]
        if nameless:
            raise ValueError(f"PageInfo.examples: {nameless} have no English name in `names`")


def sample_info(model: str = "sample") -> PageInfo:
    """The page of the sample model: it names drawings, and eight are offered.

    Four are by an artist of its training, and the same four things by one whom it has never seen. In later turns
    it does not name a new drawing (39 of 40 are right in a first turn, 2 of 40 in a second one), so each starts a
    new chat.
    """
    from pangea_jax.data.store import RecordStore
    from pangea_jax.sample import emoji, sources
    from pangea_jax.sample.licences import IN_SAMPLE, LICENCES
    from pangea_jax.sample.questions import PHRASES
    from pangea_jax.sample.vocabulary import DEFAULT_LANGUAGES

    concepts = {concept.codepoint: concept for concept in emoji.load_concepts()}
    store = RecordStore(emoji.DIRECTORY)
    artists = [artist for artist in sources.ARTISTS if artist.id in ("noto", emoji.TEST_ARTIST)]
    things = ("1f418", "1f352", "1f98b", "1f335")  # elephant, cherries, butterfly, cactus
    return PageInfo(
        model,
        ability="drawings",
        learnt=[code for code in languages.PANGEAINS if code in DEFAULT_LANGUAGES],
        questions={code: phrases.name[:2] for code, phrases in PHRASES.items()},
        examples=[
            Example(
                f"{artist.id}-{thing}.webp",
                store.image(emoji.image_key(artist.id, thing)),
                "image/webp",
                concepts[thing].names,
            )
            for artist in artists
            for thing in things
        ],
        credits=[
            Credit(
                artist.title,
                artist.author,
                artist.url,
                artist.spdx,
                LICENCES[artist.spdx][1],
                IN_SAMPLE,
            )
            for artist in artists
        ],
        max_pictures=2,
        pictures_start_chat=True,
        max_tokens=64,
    )


def router(info: PageInfo) -> APIRouter:
    """Serves the page at `/` and what it needs under `/page/`; none of it asks for a key.

    Raises:
      KeyError: the folder of the page has a file of an unknown kind.
    """
    found = _files(info)
    routes = APIRouter(include_in_schema=False)

    @routes.api_route("/", methods=["GET", "HEAD"])
    def page(request: Request) -> Response:
        return _answer(request, *found["index.html"])

    @routes.api_route("/page/{name:path}", methods=["GET", "HEAD"])
    def file(request: Request, name: str) -> Response:
        if name not in found:
            raise HTTPException(404, "the page has no such file")
        return _answer(request, *found[name])

    return routes


def _files(info: PageInfo) -> dict[str, tuple[bytes, str]]:
    """Name -> content and media type of all that the page may ask for."""
    paths = [path for path in FOLDER.rglob("*") if path.is_file()]
    found = {
        path.relative_to(FOLDER).as_posix(): (path.read_bytes(), _MEDIA_TYPES[path.suffix])
        for path in paths
    }
    for example in info.examples:
        found[f"examples/{example.file}"] = (example.data, example.media_type)
    described = json.dumps(_describe(info), ensure_ascii=False).encode()
    return found | {"info.json": (described, _MEDIA_TYPES[".json"])}


def _describe(info: PageInfo) -> dict[str, Any]:
    """The one JSON that the page reads first: `PageInfo` without bytes, and the languages."""
    described = {
        field.name: getattr(info, field.name)
        for field in dataclasses.fields(info)
        if field.name not in ("examples", "credits")
    }
    known = [languages.LANGUAGES[code] for code in languages.PANGEAINS]
    return described | {
        "examples": [
            {"file": f"examples/{example.file}", "names": dict(example.names)}
            for example in info.examples
        ],
        "credits": [dataclasses.asdict(credit) for credit in info.credits],
        "languages": [
            {
                "code": language.code,
                "name": language.native_name,
                "direction": "rtl" if language.script in _RIGHT_TO_LEFT else "ltr",
                "aliases": language.aliases,
            }
            for language in known
        ],
    }


def _answer(request: Request, content: bytes, media_type: str) -> Response:
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = _HEADERS | {"ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=media_type, headers=headers)
