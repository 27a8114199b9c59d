"""Reads the list of web pages: a folder of HTML files, or a file that names pages."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pangea_jax.curation.filters import language_code

_SUFFIXES = (".html", ".htm")


@dataclass(frozen=True)
class Page:
    """A web page: `source` is an http(s) address or a local file; `language` is empty if not stated."""

    id: str
    source: str
    language: str = ""

    @property
    def is_local(self) -> bool:
        return not self.source.startswith(("http://", "https://"))


def read_pages(path: str | Path) -> Iterator[Page]:
    """The pages of a folder or a list, in a fixed order.

    A folder: its *.html and *.htm. If the folder that holds a page is named after a language
    (`pages/hi/1.html`), the page is in this language. `*.jsonl`: objects with `url` or `file` (relative to
    the list) and, if known, `language`. Any other file: one address or file per line; `#` starts a comment.

    Raises:
      ValueError: a line is wrong; names it.
      FileNotFoundError: there is no such folder or list.
    """
    path = Path(path)
    if path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES):
            name = file.relative_to(path)
            yield Page(name.as_posix(), str(file), nearest_language(name.parent.name))
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(map(str.strip, lines), 1):
            if line and not line.startswith("#"):
                yield _listed(line, path, f"{path}, line {number}")


def _listed(line: str, path: Path, where: str) -> Page:
    if path.suffix != ".jsonl":
        row = {"url" if "://" in line else "file": line}
    else:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
    named = [row.get(key) for key in ("url", "file")] if isinstance(row, dict) else []
    if sum(isinstance(name, str) and bool(name) for name in named) != 1:
        raise ValueError(f'{where}: expected an object with "url" or "file", got {line:.80}')
    url, file = named
    if url and not url.startswith(("http://", "https://")):
        raise ValueError(f"{where}: expected an address with http:// or https://, got {url:.80}")
    told = row.get("language") or ""
    language = nearest_language(told) if isinstance(told, str) else ""
    if told and not language:
        raise ValueError(f"{where}: unknown language {told!r}")
    return Page(url or file, url or str(path.parent / file), language)


def page_files(source: Path) -> list[Path]:
    """The files that a run depends on: those of a folder, or the list."""
    return [Path(page.source) for page in read_pages(source)] if source.is_dir() else [source]


def nearest_language(tag: str) -> str:
    """The canonical code of a language tag, if need be without its region (`pt-BR`); empty if unknown."""
    return language_code(tag) or language_code(tag.replace("_", "-").partition("-")[0]) or ""
