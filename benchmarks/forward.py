"""Compares prefill and train step with transformers: same CPU, weights and inputs, in turn in one process.

    python -m benchmarks.forward [--repetitions=9]

A 50M-parameter model in float32 (`benchmarks/peer.py`), a 640x480 picture in five tiles and 32 words per row. The
prefill ends with the last token's logits and the KV cache. The train step is forward, backward, clipping and AdamW of
all parameters. Prints the ratio of the times and the operations per second, compared with a large matrix product.
"""

import dataclasses

import jax
import numpy as np

from benchmarks import peer
from pangea_jax.generate.decode import last_hidden
from pangea_jax.model import params as model_params

WORDS, TRAINED, TRAIN_ROWS = 32, 16, 4


def prefill_pair(ours, theirs):
    """Two functions that read one prompt and return the last token's logits."""
    import torch

    batch, inputs = peer.make_inputs(1, WORDS)
    graphdef, params = model_params.split(ours)

    @jax.jit
    def prefill(params, batch):
        model = model_params.merge(graphdef, params)
        hidden, cache = model.prefill(batch, batch.tokens.shape[1])
        return model.language.logits(last_hidden(hidden, batch.segment_ids)[0]), cache

    @torch.no_grad()
    def reference():
        return theirs(**inputs, use_cache=True, logits_to_keep=1).logits[:, 0].numpy()

    return lambda: prefill(params, batch)[0], reference


def train_pair(ours, theirs):
    """Two functions that take one optimiser step and return the loss before it; and the number of tokens of a row."""
    import torch

    batch, inputs = peer.make_inputs(TRAIN_ROWS, WORDS)
    weights = np.zeros(batch.tokens.shape, np.float32)
    weights[:, -1 - TRAINED : -1] = 1
    batch = dataclasses.replace(batch, targets=np.roll(batch.tokens, -1, axis=1), weights=weights)
    inputs["labels"] = torch.full(inputs["input_ids"].shape, -100)
    inputs["labels"][:, -TRAINED:] = inputs["input_ids"][:, -TRAINED:]
    return peer.our_steps(ours, [batch]), peer.their_steps(theirs, [inputs]), batch.tokens.shape[1]


def main():
    repetitions = peer.parser(__doc__, repetitions=9).parse_args().repetitions
    ours, theirs = peer.make_pair()
    total = sum(parameter.numel() for parameter in theirs.parameters())
    print(peer.machine("torch", "transformers"))
    print(f"{total / 1e6:.1f}M parameters, float32, picture {peer.PICTURE}, {WORDS} words a row")

    prefill, reference = prefill_pair(ours, theirs)
    difference = np.abs(np.asarray(prefill()) - reference()).max()
    print(f"largest difference of a logit {difference:.1e}")
    prefill_times = peer.in_turn(prefill, reference, repetitions)
    print(prefill_times.report("prefill, 1 row"))

    train, reference, tokens = train_pair(ours, theirs)
    print(f"loss {float(train()):.6f}, transformers {reference():.6f}")
    train_times = peer.in_turn(train, reference, repetitions)
    print(train_times.report(f"train step, {TRAIN_ROWS} rows"))

    peak = peer.matmul_flops()
    flops = peer.forward_flops(peer.CONFIG, 1, tokens, 5, 1)
    trained = 3 * peer.forward_flops(peer.CONFIG, TRAIN_ROWS, tokens, 5, TRAINED)
    for name, work, times in (("prefill", flops, prefill_times), ("train", trained, train_times)):
        reached = work / times.ours[:, 0].min()
        print(
            f"{name}: {work / 1e9:.1f} GFLOP, {reached / 1e9:.0f} GFLOP/s at best, {reached / peak:.0%} "
            f"of the {peak / 1e9:.0f} of a 2048 x 2048 product"
        )


if __name__ == "__main__":
    main()
