"""Judges of open answers: an endpoint, or replies in a file.

Each reply with a score in it is stored, so its question is asked once. A question without one is asked again by the
next run.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from eval.bench import documents
from eval.bench.endpoint import Endpoint
from eval.bench.task import Failed, JudgeRequest, digest

ATTEMPTS = 3  # to get a readable reply; the paper's library tried ten times


class Question(NamedTuple):
    """A question to a judge about one response."""

    task: str
    doc_id: str
    request: JudgeRequest


class ReplayJudge:
    """Replies from a file: lines with `task`, `doc_id` and `reply`."""

    def __init__(self, path: Path):
        self.name, self._path = f"replay:{path.name}", path
        self._replies: dict[tuple[str, str], str | None] = documents.read_answers(path, "reply")
        for (task, doc_id), reply in self._replies.items():
            if not isinstance(reply, str | None):
                kind = type(reply).__name__
                raise documents.DataError(
                    f"{path}: the reply to {task} {doc_id!r} is {kind}, expected a text"
                )

    def replies(
        self, questions: Sequence[Question], readable: Callable[[str], bool]
    ) -> list[str | Failed | None]:
        """The judge's text for each question, in order, or the reason why there is none."""
        missing = Failed(f"no reply in {self._path.name}")
        return [self._replies.get((task, doc_id), missing) for task, doc_id, _ in questions]


class EndpointJudge:
    """A judge behind an OpenAI-compatible endpoint.

    Args:
      cache: JSONL file to which each readable reply is appended; its question is not asked again.

    Raises:
      DataError: a line of the cache is not of this class.
    """

    def __init__(self, endpoint: Endpoint, cache: Path):
        self.name, self._endpoint, self._cache_path = endpoint.model, endpoint, cache
        self._cache: dict[str, str] = {}
        if cache.exists():
            documents.drop_cut_line(cache)
            self._cache = dict(_cached(cache))

    def replies(
        self, questions: Sequence[Question], readable: Callable[[str], bool]
    ) -> list[str | Failed]:
        """The judge's text for each question, in order, or the reason why there is none.

        A reply that is not `readable` has no score in it; the judge is asked again, `ATTEMPTS` times in all. The last
        reply is then returned, so that it is shown, but it is not stored.
        """
        keys = [
            digest([self.name, request.system, request.user, dict(request.params)])
            for *_, request in questions
        ]
        pending = dict(zip(keys, questions, strict=True))
        found: dict[str, str | Failed] = {}
        for key in self._cache.keys() & pending:
            if readable(self._cache[key]):
                found[key] = self._cache[key]
                del pending[key]
        self._cache_path.parent.mkdir(parents=True, exist_ok=True)
        with self._cache_path.open("a", encoding="utf-8") as file:
            answers = self._endpoint.map(
                list(pending), lambda key: self._ask(pending[key].request, readable)
            )
            for key, reply in answers:
                found[key] = reply
                if isinstance(reply, Failed) or not readable(reply):
                    continue
                self._cache[key] = reply
                where = {"task": pending[key].task, "doc_id": pending[key].doc_id}
                row = {"key": key, **where, "judge": self.name, "reply": reply}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
        return [found[key] for key in keys]

    def _ask(self, request: JudgeRequest, readable) -> str | Failed:
        texts = {"system": request.system, "user": request.user}
        messages = [{"role": role, "content": text} for role, text in texts.items()]
        for _ in range(ATTEMPTS):
            reply = self._endpoint.chat(messages, **request.params)
            if isinstance(reply, Failed) or readable(reply):
                return reply
        return reply


def _cached(path: Path) -> Iterator[tuple[str, str]]:
    """(key, reply) of each line of a judge's cache."""
    for number, row in documents.read_lines(path):
        pair = [row.get(name) if isinstance(row, dict) else None for name in ("key", "reply")]
        if not all(isinstance(value, str) for value in pair):
            raise documents.DataError(
                f"{path}, line {number}: expected the texts key and reply; delete the line, and its question is asked "
                "again"
            )
        yield pair[0], pair[1]


Judge = ReplayJudge | EndpointJudge
