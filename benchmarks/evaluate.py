"""Evaluation in batches, compared with a loop over documents in transformers: same CPU, weights and prompts.

    python -m benchmarks.evaluate [--documents=72] [--questions=8] [--new_tokens=64] [--batch_size=auto]

The model has 47M random float32 parameters (`benchmarks/peer.py`, the sample's vocabulary). A third of the documents
have a picture of 640x480, the others have none; their prompts have 60 to 650 tokens. Eight questions are about one
picture. (In PangeaBench, xGQA has 258 questions per picture, XM100 36, CVQA 4 and the others 1.) Our side is
`eval/bench/checkpoint_model.py`, as `eval/run.py` runs it. The other side is `generate` of transformers' LLaVA-NeXT
with a KV cache, one document after the other, on token ids and pixels from our reader. Both times include reading and
generating. No answer ends early. Our side runs twice, first with the time for compiling, then without. The program
prints documents per second, whether the answers are the same, and the time that the arithmetic alone would take at the
speed of a large matrix product. It takes five minutes on two cores.
"""

import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import peer
from eval.bench.checkpoint_model import CheckpointModel
from eval.bench.models import Request
from eval.bench.responses import in_order
from eval.bench.task import Document, Generation, Prompt
from eval.bench.tasks import ALL_TASKS
from pangea_jax.checkpoints import SpecialTokens
from pangea_jax.data.reader import ReadingPolicy
from pangea_jax.data.tokenizer import load_tokenizer
from pangea_jax.generate.engine import Engine
from pangea_jax.sample import emoji

WORDS = ("paka", "mbwa", "nyumba", "what", "river", "the", "over", "kalamu", "mountain", "chakula")


def make_pair():
    """Our engine, and transformers' model with the same weights."""
    tokenizer = load_tokenizer(emoji.DIRECTORY)
    language = dataclasses.replace(peer.CONFIG.language, vocab_size=tokenizer.vocab_size)
    config = dataclasses.replace(peer.CONFIG, language=language)
    pad = tokenizer.pad_id
    model, theirs = peer.make_pair(config, SpecialTokens(tokenizer.image_id, end=pad, pad=pad))
    model.language.unstack()  # as `pangea_jax.load` does on a CPU
    return Engine(model, tokenizer, policy=ReadingPolicy(rounding="transformers")), theirs


class Endless:
    """An engine whose answers never end early, so that both sides do the same work."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def serve(self, *args, **kwargs):
        return self._engine.serve(*args, stop=[], **kwargs)


def make_requests(documents: int, questions: int, new_tokens: int, folder: Path) -> list[Request]:
    """Questions of 10 to 120 words, every third about a picture, in the order of `eval/run.py`."""
    rng = np.random.default_rng(0)
    requests = []
    for i in range(documents):
        words = " ".join(rng.choice(WORDS, rng.integers(10, 121)))
        images = ()
        if i % 3 == 0:
            path = folder / f"{i // 3 // questions}.png"
            if not path.exists():
                noise = rng.integers(0, 256, (12, 16, 3), np.uint8)
                Image.fromarray(noise).resize((640, 480)).save(path)
            images = (path,)
        prompt = Prompt(f"{words}?", tuple(map(str, images)))
        document = Document(str(i), {"text": words})
        generation = Generation(max_new_tokens=new_tokens)
        requests.append(Request(ALL_TASKS["xgqa_en"], document, prompt, generation, images))
    return in_order(requests)


def one_by_one(engine: Engine, theirs, requests: list[Request], new_tokens: int) -> dict[str, str]:
    """The answers of transformers' `generate` by document id, one document after the other."""
    import torch

    answers = {}
    for request in requests:
        prompt = _read(engine, request, new_tokens)
        ids = torch.tensor(prompt.tokens[None], dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if request.images:
            inputs["pixel_values"] = peer.their_pixels(prompt.tiles[None])
            inputs["image_sizes"] = torch.tensor([Image.open(request.images[0]).size[::-1]])
        with torch.no_grad():
            out = theirs.generate(
                **inputs,
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=engine.tokenizer.pad_id,
            )
        answers[request.document.id] = engine.tokenizer.decode(out[0, ids.shape[1] :].tolist())
    return answers


def least_seconds(engine: Engine, requests: list[Request], new_tokens: int) -> tuple[float, float]:
    """(seconds to read all prompts, seconds to generate) at the speed of a large matrix product.

    It assumes no padding, and no time to load weights and caches from memory.
    """
    language = engine.config.language
    reading = generating = 0.0
    for request in requests:
        prompt = _read(engine, request, new_tokens)
        T, N = len(prompt.tokens), len(prompt.tiles)
        reading += peer.forward_flops(engine.config, 1, T, N, 1)
        # A new token runs the decoder once; its queries see all tokens before it.
        one = peer.forward_flops(engine.config, 1, 1, 0, 1)
        seen = T + new_tokens / 2
        attention = 4 * language.layers * language.heads * language.head_width * seen
        generating += (new_tokens - 1) * (one + attention)
    rate = peer.matmul_flops()
    return reading / rate, generating / rate


def _read(engine: Engine, request: Request, new_tokens: int):
    text, images = request.prompt.with_marks(), list(map(str, request.images))
    message = {"role": "user", "content": text} | ({"images": images} if images else {})
    return engine.read([message], new_tokens)


def main():
    parser = peer.parser(__doc__)
    parser.add_argument("--documents", type=int, default=72)
    parser.add_argument("--questions", type=int, default=8, help="about one picture")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--batch_size", default="auto")
    args = parser.parse_args()
    engine, theirs = make_pair()
    print(peer.machine("torch", "transformers"))
    rows = None if args.batch_size == "auto" else int(args.batch_size)
    model = CheckpointModel(Endless(engine), "ours", batch_size=rows)
    with tempfile.TemporaryDirectory() as folder:
        requests = make_requests(args.documents, args.questions, args.new_tokens, Path(folder))
        sides = {
            "ours, with compiling": lambda: {
                request.document.id: text for request, text in model.generate(requests)
            },
            "transformers": lambda: one_by_one(engine, theirs, requests, args.new_tokens),
        }
        sides["ours"] = sides["ours, with compiling"]
        one_by_one(engine, theirs, requests[:1], 2)  # warm-up
        seconds, answers = {}, {}
        for name, side in sides.items():
            start = time.perf_counter()
            answers[name] = side()
            seconds[name] = time.perf_counter() - start
            print(f"{name:22} {args.documents / seconds[name]:7.2f} documents/s", flush=True)
        reading, generating = least_seconds(engine, requests, args.new_tokens)
    same = sum(answers["ours"][i] == text for i, text in answers["transformers"].items())
    print(f"{same} of {args.documents} answers are the same")
    for name in ("ours", "ours, with compiling"):
        print(f"{name}: {seconds['transformers'] / seconds[name]:.2f} times as fast")
    share = (reading + generating) / seconds["ours"]
    print(
        f"the arithmetic alone: {reading:.1f} s for prompts and {generating:.1f} s for new tokens, {share:.0%} of "
        f"the {seconds['ours']:.1f} s of ours and {(reading + generating) / seconds['transformers']:.0%} of "
        f"the {seconds['transformers']:.1f} s of transformers"
    )


if __name__ == "__main__":
    main()
