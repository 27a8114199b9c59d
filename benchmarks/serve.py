"""The server under load, beside transformers' `generate` in batches: the same weights, requests and CPU.

    python -m benchmarks.serve [--requests=64] [--rows=8] [--clients=1,8,32] [--ours]

The 50M-parameter model of `benchmarks/peer.py` in float32 is asked mixed requests over `/v1/completions`, as token ids:
prompts of 32 to 512 tokens without pictures, 16 to 256 new tokens, greedy, streamed. Prints for each number of clients
the requests per second, the time to the first token, and between tokens as the mean of each answer (median and 99th
percentile over the requests). Then the same requests by transformers' `generate`, in batches of `--rows` that are
sorted by new tokens and length. `--ours` leaves transformers out.
"""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import httpx2 as httpx
import numpy as np
import uvicorn

from benchmarks import peer
from pangea_jax.generate.engine import Engine
from pangea_jax.serving import app
from pangea_jax.serving.inputs import Limits

LIMITS = Limits(prompt=512, answer=256, waiting=1000, seconds=3600.0)


class Asked(NamedTuple):
    tokens: list[int]
    new: int


class Told(NamedTuple):
    """Seconds from a request to its first text, and the mean between the tokens after it."""

    first: float
    between: float


class Ids:
    """A vocabulary in which each token is a number in the text, and no token ends an answer."""

    vocab_size, pad_id, im_start_id, im_end_id, image_id = 8192, 8191, 8188, 8189, peer.IMAGE_ID
    newline_ids = (10,)

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return "".join(f"{id} " for id in ids)

    def piece(self, id: int) -> bytes:
        return f"{id} ".encode()


def mix(count: int) -> list[Asked]:
    rng = np.random.default_rng(0)
    lengths, news = rng.integers(32, 513, count), rng.integers(16, 257, count)
    return [
        Asked(rng.integers(0, 8000, length).tolist(), int(new))
        for length, new in zip(lengths, news, strict=True)
    ]


def serve(engine: Engine, rows: int) -> Iterator[str]:
    """Yields the address of a server in a thread of this process."""
    line = socket.socket()
    line.bind(("127.0.0.1", 0))
    application = app.make(engine, "bench", LIMITS, rows=rows)
    server = uvicorn.Server(uvicorn.Config(application, log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [line]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{line.getsockname()[1]}"
    server.should_exit = True
    thread.join()


async def ask_all(url: str, asked: Sequence[Asked], clients: int) -> tuple[float, list[Told]]:
    """Seconds for all requests, of which `clients` are open at a time, and what each was told."""
    limit = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=3600, limits=limit) as client:
        free = asyncio.Semaphore(clients)

        async def one(request: Asked) -> Told:
            body = {"model": "bench", "prompt": request.tokens, "max_tokens": request.new}
            async with free:
                begun = time.perf_counter()
                times = []
                body |= {"stream": True}
                async with client.stream("POST", "/v1/completions", json=body) as reply:
                    reply.raise_for_status()
                    async for line in reply.aiter_lines():
                        if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                            times.append(time.perf_counter())
            # A text may hold several tokens, so the time between them is that of the answer, shared out.
            return Told(times[0] - begun, (times[-1] - times[0]) / (request.new - 1))

        begun = time.perf_counter()
        told = await asyncio.gather(*map(one, asked))
        return time.perf_counter() - begun, told


def of_transformers(theirs, asked: Sequence[Asked], rows: int) -> float:
    """Seconds of `generate` in batches of neighbours by new tokens and length, padded on the left."""
    import torch

    ordered = sorted(asked, key=lambda request: (request.new, len(request.tokens)))
    begun = time.perf_counter()
    for start in range(0, len(ordered), rows):
        part = ordered[start : start + rows]
        width, new = max(len(r.tokens) for r in part), max(r.new for r in part)
        ids = torch.full((len(part), width), peer.PAD_ID)
        mask = torch.zeros((len(part), width), dtype=torch.long)
        for row, request in enumerate(part):
            ids[row, width - len(request.tokens) :] = torch.tensor(request.tokens)
            mask[row, width - len(request.tokens) :] = 1
        settings = dict(do_sample=False, eos_token_id=None, pad_token_id=peer.PAD_ID)
        with torch.no_grad():
            theirs.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, **settings)
    return time.perf_counter() - begun


def report(name: str, seconds: float, asked: Sequence[Asked]) -> str:
    tokens = sum(request.new for request in asked)
    return f"{name:26} {len(asked) / seconds:6.2f} requests/s {tokens / seconds:8.1f} new tokens/s"


def main():
    parser = peer.parser(__doc__)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--ours", action="store_true", help="without transformers")
    args = parser.parse_args()
    asked = mix(args.requests)
    ours, theirs = peer.make_pair()
    ours.language.unstack()  # as `pangea_jax.load` does on a CPU
    engine = Engine(ours, Ids())
    print(peer.machine("torch", "transformers"), flush=True)
    for url in serve(engine, args.rows):
        for clients in map(int, args.clients.split(",")):
            asyncio.run(ask_all(url, asked, clients))  # compiles
            seconds, told = asyncio.run(ask_all(url, asked, clients))
            line = report(f"server, {clients} clients", seconds, asked)
            firsts = [answer.first for answer in told]
            between = [answer.between for answer in told]
            for what, found in (("first token", firsts), ("between tokens", between)):
                middle, late = 1e3 * np.percentile(found, (50, 99))
                line += f"   {what} {middle:.0f} ms, 99 %: {late:.0f} ms"
            print(line, flush=True)
    if not args.ours:
        print(report("transformers, batches", of_transformers(theirs, asked, args.rows), asked))


if __name__ == "__main__":
    main()
