"""Our checkpoints in lmms-eval: the command line of lmms-eval with one more model, `pangea_jax`.

    pip install lmms-eval
    python -m eval.bench.lmms_eval_adapter --model pangea_jax \\
        --model_args pretrained=CHECKPOINT --tasks mme --batch_size 8

`pretrained` is what `pangea_jax.load` takes. Pictures, marks and the chat template follow the wrapper of Pangea's
authors (`lmms_eval/models/pangea.py`), except that it ignores stop strings. Written for lmms-eval 0.7; nothing else in
this project needs it.
"""

import collections
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pangea_jax
from eval.bench.task import IMAGE_MARK
from pangea_jax.generate.engine import Engine
from pangea_jax.generate.likelihood import LogLikelihood

# The defaults of Pangea's wrapper, for settings that a task leaves out.
_MAX_NEW_TOKENS = 1024
_WINDOW = 32  # batches; the decoded pictures of all questions would not fit into memory
_GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}


class Answerer:
    """Answers the questions of lmms-eval with an engine, in the order of the questions."""

    def __init__(self, engine: Engine, batch_size: int, *, system_prompt: str = ""):
        self._engine, self._batch_size, self._system = engine, batch_size, system_prompt

    def conversation(self, text: str, pictures: Sequence[Any]) -> list[dict]:
        """The wrapper's conversation: a text without marks gets all pictures in front, and a text with marks only as
        many pictures as it has marks."""
        if pictures and IMAGE_MARK in text:
            pictures = pictures[: text.count(IMAGE_MARK)]
        system = [{"role": "system", "content": self._system}] if self._system else []
        images = {"images": list(pictures)} if pictures else {}
        return [*system, {"role": "user", "content": text} | images]

    def generate(self, asked: Sequence[tuple[str, Sequence[Any], Mapping[str, Any]]]) -> list[str]:
        """The answer to each (text, pictures, settings).

        Raises:
          ValueError: the settings ask for beam search, which is not implemented.
        """
        answers = [""] * len(asked)
        window = _WINDOW * self._batch_size
        for start in range(0, len(asked), window):
            groups = collections.defaultdict(list)  # the questions with equal settings
            for i, (text, pictures, wanted) in enumerate(asked[start : start + window], start):
                chosen = _settings(wanted)
                conversation = self.conversation(text, pictures)
                prompt = self._engine.read(conversation, chosen["max_new_tokens"])
                groups[tuple(chosen.items())].append((i, prompt))
            for chosen, members in groups.items():
                places, prompts = zip(*members, strict=True)
                texts = self._engine.generate(prompts, batch_size=self._batch_size, **dict(chosen))
                for i, text in zip(places, texts, strict=True):
                    answers[i] = text
        return answers

    def loglikelihood(self, asked: Sequence[tuple[str, Sequence[Any], str]]) -> list[LogLikelihood]:
        """The log-likelihood of each continuation, from (text, pictures, continuation)."""
        found = []
        for start in range(0, len(asked), self._batch_size):
            items = [
                self._engine.candidates(self.conversation(text, pictures), [continuation])
                for text, pictures, continuation in asked[start : start + self._batch_size]
            ]
            scores = self._engine.loglikelihood(items, batch_size=self._batch_size)
            found += [score for (score,) in scores]
        return found


def _settings(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """lmms-eval's generation settings as those of `Engine.generate`."""
    if (wanted.get("num_beams") or 1) > 1:
        raise ValueError(f"num_beams={wanted['num_beams']}: there is no beam search; use 1")
    until = wanted.get("until") or ()
    chosen = {"max_new_tokens": int(wanted.get("max_new_tokens") or _MAX_NEW_TOKENS)}
    for name, default in _GREEDY.items():
        chosen[name] = wanted.get(name) or default
    # transformers ignores the temperature of a call that does not sample; the wrapper samples above 0.
    if wanted.get("do_sample") is False:
        chosen["temperature"] = 0.0
    return chosen | {"stop_strings": (until,) if isinstance(until, str) else tuple(until)}


@functools.cache
def model_class() -> type:
    """A subclass of lmms-eval's model. It is made on first use, because lmms-eval may not be installed.

    Raises:
      ImportError: lmms-eval is not installed.
    """
    from lmms_eval.api.model import lmms

    class PangeaJax(lmms):
        """`pretrained`: what `pangea_jax.load` takes; `dtype`: float32, bfloat16 (default) or float16."""

        is_simple = True

        def __init__(
            self,
            pretrained: str,
            batch_size: int | str = 8,
            dtype: str | None = None,
            system_prompt: str = "",
            device: str | None = None,
            max_batch_size: int | None = None,
        ):
            super().__init__()
            # lmms-eval passes these two to every model; JAX uses all devices.
            del device, max_batch_size
            rows = 8 if batch_size == "auto" else int(batch_size)
            engine = pangea_jax.load(pretrained, dtype=dtype, mesh="auto")
            self._answerer = Answerer(engine, rows, system_prompt=system_prompt)

        def _read(self, request) -> tuple[str, list[Any], Any]:
            """(text, pictures, settings) of a request, or (text, pictures, continuation)."""
            text, wanted, doc_to_visual, doc_id, task, split = request.args
            document = self.task_dict[task][split][doc_id]
            pictures = [picture for picture in doc_to_visual(document) or () if picture is not None]
            return text, pictures, wanted(document) if callable(wanted) else wanted

        def generate_until(self, requests) -> list[str]:
            return self._answerer.generate([self._read(request) for request in requests])

        def loglikelihood(self, requests) -> list[tuple[float, bool]]:
            """(mean loss, whether greedy decoding gives the continuation); lmms-eval picks the smallest loss."""
            scores = self._answerer.loglikelihood([self._read(request) for request in requests])
            return [(-score.total / score.tokens, score.greedy) for score in scores]

        def generate_until_multi_round(self, requests) -> list[str]:
            raise ValueError("pangea_jax does not support tasks with several rounds")

    return PangeaJax


def __getattr__(name: str):
    """lmms-eval's registry looks `PangeaJax` up in this module."""
    if name == "PangeaJax":
        return model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    try:
        from lmms_eval.__main__ import cli_evaluate
        from lmms_eval.models import MODEL_REGISTRY_V2
        from lmms_eval.models.registry_v2 import ModelManifest
    except ImportError as error:
        sys.exit(f"{error}: pip install 'lmms-eval>=0.7,<0.8', in an environment of its own")
    manifest = ModelManifest(
        "pangea_jax", simple_class_path="eval.bench.lmms_eval_adapter.PangeaJax"
    )
    MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)
    cli_evaluate()


if __name__ == "__main__":
    main()
