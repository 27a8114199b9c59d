"""A LoRA fine-tune of 20 steps beside transformers' Trainer with peft: equal training and validation losses.

Both get the same 60 records (made here), the same batches, and the same initial adapter, which peft makes and saves.
"""

import io
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from configs import finetune
from pangea_jax import checkpoints, experiment, sharding
from pangea_jax.anyres import layout
from pangea_jax.checkpoints import rounded
from pangea_jax.data.build.write_store import Picture, write_store
from pangea_jax.data.pipeline import RowSource, render_example
from pangea_jax.data.record import Conversation, Turn
from pangea_jax.experiment import Experiment
from pangea_jax.model.params import flatten, unflatten
from pangea_jax.model.vision import CLIP_MEAN, CLIP_STD
from pangea_jax.sample import emoji
from pangea_jax.train import optimizer as optim
from pangea_jax.train.state import init_state
from pangea_jax.typed_config import build

STEPS, EVERY, BATCH, RATE = 20, 5, 4, 5e-3
PINPOINTS = ((28, 56), (56, 28), (56, 56))
SIZES = [(28, 28), (56, 28), (30, 50), (60, 60), (40, 33), (28, 90)]
QUESTIONS = {
    "en": ("What is this?", "A bird number {}."),
    "sw": ("Hii ni nini?", "Ndege nambari {}."),
    "id": ("Apa ini?", "Burung nomor {}."),
}


def pictures():
    for number in range(20):
        width, height = SIZES[number % len(SIZES)]
        random = np.random.default_rng(number)
        coarse = random.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((width, height)).save(file, "PNG")
        yield Picture(f"made/{number}", file.getvalue(), width, height)


def records():
    """20 pictures with a question in three languages each; every fifth has two rounds."""
    for number in range(60):
        code = tuple(QUESTIONS)[number % 3]
        question, answer = QUESTIONS[code]
        turns = [Turn("user", f"<image>{question}"), Turn("assistant", answer.format(number))]
        if number % 5 == 0:
            turns += [Turn("user", question), Turn("assistant", answer.format(number + 100))]
        images = (f"made/{number // 3}",)
        yield Conversation(f"r{number}", "made", code, "", images, tuple(turns)), {}


@pytest.fixture(scope="module")
def base(emoji_tokenizer, tmp_path_factory):
    """A small random model in the public layout, with the sample's vocabulary."""
    torch = pytest.importorskip("torch", reason="torch is in requirements-parity.txt")
    transformers = pytest.importorskip("transformers", reason="see requirements-parity.txt")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = transformers.LlavaNextForConditionalGeneration(
        transformers.LlavaNextConfig(
            vision_config=transformers.CLIPVisionConfig(
                **sizes, num_hidden_layers=2, image_size=28, patch_size=7
            ),
            text_config=transformers.Qwen2Config(
                **sizes,
                vocab_size=emoji_tokenizer.vocab_size,
                num_hidden_layers=2,
                num_key_value_heads=2,
                max_position_embeddings=256,
                tie_word_embeddings=False,
            ),
            image_token_index=emoji_tokenizer.image_id,
            image_grid_pinpoints=[[height, width] for width, height in PINPOINTS],
            tie_word_embeddings=False,
        )
    )
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    shutil.copy(emoji.DIRECTORY / emoji.TOKENIZER, folder)
    return folder


@pytest.fixture(scope="module")
def start(base, tmp_path_factory):
    """peft's own random initial adapter on the base, saved."""
    import torch
    import transformers

    peft = pytest.importorskip("peft", reason="peft is in requirements-parity.txt")
    model = transformers.LlavaNextForConditionalGeneration.from_pretrained(base)
    torch.manual_seed(1)
    targets = r".*language_model\..*\.(q|k|v|o|gate|up|down)_proj"
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    folder = tmp_path_factory.mktemp("start")
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


class Ours:
    """The run of configs/finetune.py in this process: its batches, its losses, its validation losses."""

    def __init__(self, base, start, folder, weights=""):
        write_store(
            folder, name="made", build="none", records={"train": records()},
            images={"made": pictures()},
        )  # fmt: skip
        config = finetune.get_config(
            f"model={base},data={folder},lora=4,batch={BATCH},epochs=2,validation=0.1,dtype=float32"
            + (f",weights={weights}" if weights else "")
        )
        config.init_from, config.steps = str(start), STEPS
        config.reading.rounding = "transformers"
        config.pipeline.update(row_tokens=224, row_tiles=6)
        config.optimizer.update(learning_rate=RATE, warmup_ratio=0.1)
        self.exp = exp = build(Experiment, config)
        mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
        self.store, tokenizer = experiment.open_data(exp)
        self.choice = experiment.choose_records(exp, self.store)
        self.reader = experiment.make_reader(exp, self.store, tokenizer)
        feed = experiment.make_feed(exp, self.store, self.choice, self.reader)
        steps = experiment.number_of_steps(exp, feed)
        optimizer = optim.make_optimizer(exp.optimizer, steps)
        pretrained = experiment.load_initial(exp, mesh)
        graphdef, state, shardings = init_state(
            exp.model, optimizer, mesh, seed=0, frozen=exp.frozen, pretrained=pretrained
        )
        parts = graphdef, shardings, mesh, steps
        self.validator = experiment.make_validator(
            exp, self.store, self.choice, self.reader, *parts
        )
        step = experiment.make_step(exp, graphdef, optimizer, shardings, mesh)
        self.batches, self.losses, self.validation = [], [], [self.validator.run(state, -1)]
        for number, rows in zip(range(steps), feed, strict=False):
            self.batches.append(rows)
            state, metrics = step(state, rows.place(mesh))
            self.losses.append(float(metrics["loss"]))
            if (number + 1) % EVERY == 0:
                self.validation.append(self.validator.run(state, number))

    def examples(self, batches):
        """Each conversation of some batches as arguments of the reference."""
        source = RowSource(self.store, np.arange(60))
        sizes = dict(
            zip(
                self.store.image_index["key"].to_pylist(),
                zip(*(self.store.image_index[n].to_pylist() for n in ("width", "height"))),
                strict=True,
            )
        )
        size_of = {
            tuple(render_example(one, None, self.reader, self.exp.pipeline).tokens.tolist()): sizes[
                one.images[0]
            ]
            for one in source
        }
        for rows in batches:
            yield [
                example for row in range(len(rows)) for example in self._of_row(rows[row], size_of)
            ]

    def _of_row(self, row, size_of):
        first = 0
        for segment in range(1, row.segment_ids.max() + 1):
            here = row.segment_ids == segment
            tokens = row.tokens[here]
            size = size_of[tuple(tokens.tolist())]
            count = layout(size, PINPOINTS, 28, 4, "transformers").num_tiles
            tiles = row.tiles[first : first + count]
            first += count
            labels = np.full(len(tokens), -100)
            trained = row.weights[here][:-1] > 0
            labels[1:][trained] = row.targets[here][:-1][trained]
            pixels = ((tiles / 255 - CLIP_MEAN) / CLIP_STD).transpose(0, 3, 1, 2)
            yield {
                "input_ids": tokens.astype(np.int64),
                "labels": labels.astype(np.int64),
                "pixel_values": pixels.astype(np.float32),
                "image_sizes": np.array(size[::-1], np.int64),
            }


def collate(examples):
    import torch

    def padded(name, value):
        rows = [torch.tensor(example[name]) for example in examples]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    return {
        "input_ids": padded("input_ids", 0),
        "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        "labels": padded("labels", -100),
        "pixel_values": padded("pixel_values", 0.0),
        "image_sizes": torch.tensor(np.stack([example["image_sizes"] for example in examples])),
    }


def train_reference(base, start, folder, train, held_back):
    """(training losses, validation losses) of transformers' Trainer on these examples in this order."""
    import peft
    import torch
    import transformers

    model = transformers.LlavaNextForConditionalGeneration.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(model, start, is_trainable=True)
    losses = []

    class Trainer(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(train)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=len(held_back),
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=round(0.1 * STEPS),
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch",
        eval_strategy="steps",
        eval_steps=EVERY,
        eval_on_start=True,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
    )
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=train,
        eval_dataset=held_back,
        data_collator=collate,
    )
    trainer.train()
    logged = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    return losses, logged


def values_of(base, weights, to):
    """A model in float32 whose kernels have the values of the base's in 8 or 4 bits."""
    config = rounded.in_form(checkpoints.config_from_folder(base), weights)
    params = rounded.whole(flatten(checkpoints.load(base, config)), config)
    tokens = checkpoints.SpecialTokens.of(checkpoints.load_tokenizer(base))
    checkpoints.save(unflatten(params), rounded.plain(config), to, tokens=tokens)
    return to


@pytest.mark.slow
def test_losses_on_a_base_in_4_bits_equal_those_of_the_trainer_on_its_values(base, start, tmp_path):
    """QLoRA: only the adapters train, and the checkpoint of a run would hold only them."""
    ours = Ours(base, start, tmp_path / "store", "nf4")
    assert ours.exp.model.language.weights == "nf4" and ours.exp.checkpoint.base
    train = [one for batch in ours.examples(ours.batches) for one in batch]
    held_back = [
        one for batch in ours.examples(rows for rows, _ in ours.validator.batches) for one in batch
    ]
    below = values_of(base, "nf4", tmp_path / "values")
    losses, validation = train_reference(below, start, tmp_path / "hf", train, held_back)
    np.testing.assert_allclose(ours.losses, losses, rtol=0, atol=1e-3)
    found = [values["validation/loss"] for values in ours.validation]
    np.testing.assert_allclose(found, validation, rtol=0, atol=1e-3)
    assert found[-1] < found[0] - 0.1


def test_losses_equal_those_of_the_trainer(base, start, tmp_path):
    ours = Ours(base, start, tmp_path / "store")
    assert len(ours.choice.held_back) == 6
    train = [one for batch in ours.examples(ours.batches) for one in batch]
    held_back = [
        one for batch in ours.examples(rows for rows, _ in ours.validator.batches) for one in batch
    ]
    assert (len(train), len(held_back)) == (STEPS * BATCH, 6)
    losses, validation = train_reference(base, start, tmp_path / "hf", train, held_back)
    np.testing.assert_allclose(ours.losses, losses, rtol=0, atol=1e-4)
    found = [values["validation/loss"] for values in ours.validation]
    assert len(found) == 1 + STEPS // EVERY
    np.testing.assert_allclose(found, validation, rtol=0, atol=1e-4)
    assert found[-1] < found[0] - 0.1  # it has learnt something
    # The mean over all trained tokens is that of the languages, weighted by their tokens.
    last = ours.validation[-1]
    by_language = [last[f"validation/loss/{code}"] for code in ours.validator.languages]
    assert min(by_language) < last["validation/loss"] < max(by_language)
    assert checkpoints.resolve(start).base == base
