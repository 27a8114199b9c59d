"""Stores replies of models, their cost and the budget in an SQLite file that threads and processes share.

A reply is stored under the SHA-256 of its request before it is used. So a pipeline that was killed requests only
the missing replies. These rules hold:

    - No thread or process that shares the file requests a stored reply again.
    - If two callers need the same reply at the same time, one sends the request and the other waits.
    - If a process is killed, its requests in flight are sent again. There are at most `concurrency` of them.
      The endpoint may bill the first request, too, so its maximum cost stays charged to the budget (`lost`).
    - The same holds for each attempt that is not answered within `timeout`.

Before a call is made, the budget is charged with its maximum cost; afterwards, with its real cost. A call that
could exceed the budget is not made.
"""

import contextlib
import os
import socket
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_POLL = 0.05


class Stop(RuntimeError):
    """The run cannot go on now. The stored replies stay; the same command goes on later."""


class BudgetExceeded(Stop):
    """The next call could cost more than what is left of the budget."""


class Usage(NamedTuple):
    """What the calls of one purpose have cost so far.

    Attributes:
      lost: number of calls in flight when their process was killed, and of attempts that timed out.
      estimated: number of calls, of `calls`, whose tokens the endpoint did not count. They are charged with the
        maximum.
    """

    calls: int
    prompt_tokens: int
    completion_tokens: int
    dollars: float
    lost: int = 0
    lost_dollars: float = 0.0
    estimated: int = 0


_SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (
  key TEXT PRIMARY KEY, purpose TEXT, text TEXT, finish_reason TEXT, refusal TEXT,
  prompt_tokens INTEGER, completion_tokens INTEGER, dollars REAL, estimated INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS under_way (
  key TEXT PRIMARY KEY, purpose TEXT, dollars REAL, owner TEXT, renewed REAL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS lost (key TEXT, purpose TEXT, dollars REAL);
CREATE TABLE IF NOT EXISTS total (calls INTEGER, dollars REAL);
INSERT INTO total SELECT 0, 0 WHERE NOT EXISTS (SELECT 1 FROM total);
"""


class Replies:
    """The stored replies, the calls in flight, and their cost.

    Threads and processes of one machine can share it; several machines only if `journal` is `delete` and the file
    system has locks. A killed process loses no reply for which `settle` has returned.

    Args:
      path: the SQLite file; made if it is missing.
      lease: if the call of another process was not renewed for these seconds, that process counts as dead.
      budget, max_calls, journal: see `llm.ClientConfig`.
    """

    def __init__(
        self,
        path: Path,
        *,
        lease: float,
        budget: float | None = None,
        max_calls: int | None = None,
        journal: str = "wal",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._budget, self._max_calls, self._lease = budget, max_calls, lease
        self._lock = threading.RLock()
        self._owner = f"{socket.gethostname()}/{os.getpid()}/{uuid.uuid4().hex}"
        _OWNERS.add(self._owner)
        self._file = sqlite3.connect(
            path, timeout=120.0, isolation_level=None, check_same_thread=False
        )
        self._file.row_factory = sqlite3.Row
        self._file.execute(f"PRAGMA journal_mode={journal}")
        # A commit survives the end of the process. Only a power cut may lose the last replies.
        self._file.execute("PRAGMA synchronous=NORMAL")
        with self._transaction() as file:
            for statement in filter(str.strip, _SCHEMA.split(";")):
                file.execute(statement)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._file.execute("BEGIN IMMEDIATE")
            try:
                yield self._file
            except BaseException:
                self._file.execute("ROLLBACK")
                raise
            self._file.execute("COMMIT")

    def claim(self, key: str, purpose: str, most: float) -> dict[str, Any] | None:
        """The stored answer. None: the caller must send the request, and its maximum cost is reserved.

        Waits while another caller sends the same request, or while calls in flight reserve the rest of the budget.

        Raises:
          BudgetExceeded: the call could cost more than what is left of the budget.
        """
        while True:
            with self._transaction() as file:
                row = file.execute("SELECT * FROM replies WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    return dict(row)
                self._forget_dead(file)
                theirs = file.execute("SELECT 1 FROM under_way WHERE key = ?", (key,)).fetchone()
                if theirs is None and self._affordable(file, key, most):
                    row = (key, purpose, most, self._owner, time.time())
                    file.execute("INSERT INTO under_way VALUES (?, ?, ?, ?, ?)", row)
                    return None
            time.sleep(_POLL)

    def _affordable(self, file: sqlite3.Connection, key: str, most: float) -> bool:
        """Whether the budget allows one more call. False: it may allow it when other calls in flight are settled."""
        if self._budget is None and self._max_calls is None:
            return True
        calls, dollars = file.execute("SELECT calls, dollars FROM total").fetchone()
        others, reserved = file.execute(
            "SELECT COUNT(*), COALESCE(SUM(dollars), 0) FROM under_way WHERE key != ?", (key,)
        ).fetchone()
        if self._budget is not None and dollars + most > self._budget:
            raise BudgetExceeded(
                f"the budget of ${self._budget:,.2f} is spent: ${dollars:,.4f} so far, and the next call "
                f"may cost ${most:,.4f}; raise config.llm.budget and start the same command again"
            )
        if self._max_calls is not None and calls >= self._max_calls:
            raise BudgetExceeded(
                f"{calls:,} calls were made, the maximum by config.llm.max_calls; raise it and start the same "
                "command again"
            )
        within = self._budget is None or dollars + reserved + most <= self._budget
        return within and (self._max_calls is None or calls + others < self._max_calls)

    def _forget_dead(self, file: sqlite3.Connection) -> None:
        """Ends the claims of dead processes, and charges their calls, which may have been billed."""
        dead = [
            row
            for row in file.execute("SELECT * FROM under_way WHERE owner != ?", (self._owner,))
            if _is_dead(row["owner"]) or row["renewed"] + self._lease < time.time()
        ]
        for row in dead:
            self._charge_lost(file, row)
            file.execute("DELETE FROM under_way WHERE key = ?", (row["key"],))

    def _charge_lost(self, file: sqlite3.Connection, row: sqlite3.Row) -> None:
        file.execute("INSERT INTO lost VALUES (?, ?, ?)", tuple(row)[:3])
        file.execute("UPDATE total SET calls = calls + 1, dollars = dollars + ?", (row["dollars"],))

    def lose(self, key: str) -> None:
        """Charges an attempt that was not answered. The claim stays for the next attempt.

        Raises:
          BudgetExceeded: the next attempt could cost more than what the calls in flight leave of the budget.
        """
        with self._transaction() as file:
            mine = "SELECT * FROM under_way WHERE key = ? AND owner = ?"
            row = file.execute(mine, (key, self._owner)).fetchone()
            if row is not None:  # otherwise another process took this one for dead and charged it
                self._charge_lost(file, row)
        with self._transaction() as file:
            if row is not None and not self._affordable(file, key, row["dollars"]):
                raise BudgetExceeded(
                    "an attempt was not answered in time, and what is left of config.llm.budget or max_calls "
                    "is too little for another; raise it, or start the same command again"
                )

    def settle(self, key: str, purpose: str, row: Mapping[str, Any], dollars: float) -> None:
        """Stores an answer and charges its cost."""
        counts = row["prompt_tokens"], row["completion_tokens"], dollars
        answer = row["text"], row["finish_reason"], row["refusal"]
        estimated = row.get("estimated", False)
        with self._transaction() as file:
            new = file.execute(
                "INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (key, purpose, *answer, *counts, estimated),
            )
            self._end(file, key)
            if new.rowcount:
                file.execute(
                    "UPDATE total SET calls = calls + 1, dollars = dollars + ?", (dollars,)
                )

    def release(self, key: str) -> None:
        """Gives up the claim of a request that was not answered."""
        with self._transaction() as file:
            self._end(file, key)

    def _end(self, file: sqlite3.Connection, key: str) -> None:
        file.execute("DELETE FROM under_way WHERE key = ? AND owner = ?", (key, self._owner))

    def renew(self, key: str) -> None:
        """Tells other processes that this call is still in flight."""
        with self._transaction() as file:
            now = time.time()
            file.execute("UPDATE under_way SET renewed = ? WHERE key = ?", (now, key))

    def usage(self) -> dict[str, Usage]:
        with self._transaction() as file:
            self._forget_dead(file)
            paid = file.execute(
                "SELECT purpose, COUNT(*), SUM(prompt_tokens), SUM(completion_tokens), SUM(dollars), "
                "SUM(estimated) FROM replies GROUP BY purpose ORDER BY purpose"
            ).fetchall()
            lost = file.execute("SELECT purpose, COUNT(*), SUM(dollars) FROM lost GROUP BY purpose")
            lost = {purpose: rest for purpose, *rest in lost}
        found = {
            purpose: Usage(*rest, *lost.pop(purpose, ()))._replace(estimated=estimated)
            for purpose, *rest, estimated in paid
        }
        return found | {purpose: Usage(0, 0, 0, 0.0, *rest) for purpose, rest in lost.items()}


_OWNERS: set[str] = set()  # of this process


def _is_dead(owner: str) -> bool:
    host, pid, _ = owner.split("/")
    if host != socket.gethostname():
        return False  # cannot be known before its lease ends
    if int(pid) == os.getpid():
        return owner not in _OWNERS  # an earlier process with the same number, common in containers
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
