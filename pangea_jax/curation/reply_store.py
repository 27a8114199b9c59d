"""Replies of models in an SQLite file that threads and processes share, what they cost, and the budget.

A reply is stored under the SHA-256 of its request before it is handed out, so that a pipeline that is
killed and started again asks only what was not answered. What is guaranteed:

    - a stored reply is never asked for again, by any thread or process that shares the file;
    - two callers of the same prompt at the same time make one request: the other waits for it;
    - a request that was under way when its process died is asked again, for its reply went nowhere. Its
      cost may be on the bill, so the most it can have cost stays charged to the budget (`lost`). There are
      at most `concurrency` of these to a killed process;
    - so does that of a request whose answer did not come within `timeout`, for each attempt.

Calls are charged before they are made, with the most they can cost, and settled afterwards; a call that
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
    """The run cannot go on now; what is stored stays, and the same command goes on later."""


class BudgetExceeded(Stop):
    """The next call could cost more than is left of the budget."""


class Usage(NamedTuple):
    """What the calls of one purpose have cost so far.

    Attributes:
      lost: calls that were under way in a killed process, and attempts that were not answered in time.
      estimated: calls, among the others, whose tokens the endpoint did not count: charged as the most that
        they can be.
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
    """The stored replies, which calls are under way, and what they cost.

    Safe for threads and processes of one machine; of several if `journal` is `delete` and the file system
    has locks. A killed process loses nothing that `settle` returned from.

    Args:
      path: of the SQLite file; made if it is not there.
      lease: seconds without `renew` after which another's call counts as that of a dead process.
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
        # What is committed outlives the process; only a power cut may take the last replies.
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
        """The stored answer; or None, and the caller has the right and the money to ask.

        Waits while somebody else asks the same, or while calls under way hold what is left of the budget.

        Raises:
          BudgetExceeded: the call could cost more than is left.
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
        """Whether one more call fits; False if it may fit when the others under way are settled."""
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
                f"{calls:,} calls are made, as many as config.llm.max_calls; raise it and start the same "
                "command again"
            )
        within = self._budget is None or dollars + reserved + most <= self._budget
        return within and (self._max_calls is None or calls + others < self._max_calls)

    def _forget_dead(self, file: sqlite3.Connection) -> None:
        """Ends the claims of processes that are gone. Their calls may have been paid for."""
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
        """Charges an attempt that was not answered; the claim stays, for the next one.

        Raises:
          BudgetExceeded: another attempt could cost more than is left beside the calls under way.
        """
        with self._transaction() as file:
            mine = "SELECT * FROM under_way WHERE key = ? AND owner = ?"
            row = file.execute(mine, (key, self._owner)).fetchone()
            if row is not None:  # else another process took us for dead, and has charged it
                self._charge_lost(file, row)
        with self._transaction() as file:
            if row is not None and not self._affordable(file, key, row["dollars"]):
                raise BudgetExceeded(
                    "an attempt was not answered in time and what is left of config.llm.budget or max_calls "
                    "does not hold another; raise it, or start the same command again"
                )

    def settle(self, key: str, purpose: str, row: Mapping[str, Any], dollars: float) -> None:
        """Stores an answer and charges what it cost."""
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
        """Gives up a claim: the request was not answered."""
        with self._transaction() as file:
            self._end(file, key)

    def _end(self, file: sqlite3.Connection, key: str) -> None:
        file.execute("DELETE FROM under_way WHERE key = ? AND owner = ?", (key, self._owner))

    def renew(self, key: str) -> None:
        """Tells others that the call is still being made."""
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
        return False  # until its lease is over
    if int(pid) == os.getpid():
        return owner not in _OWNERS  # an earlier process of the same number, as in a container
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
