"""The training loop by itself: learning rate, evaluation, accumulation, saving, Ctrl-C."""

from __future__ import annotations

import json
import math
import re
import signal
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tinyllm import checkpoints
from tinyllm.datasets import Sampler, evaluation_batches
from tinyllm.errors import InputError
from tinyllm.models import GPT2, GPT2Config
from tinyllm.tokenizers import BytePairTokenizer, load_tokenizer, train_bpe
from tinyllm.training import Diverged, Interrupted, Recipe, Trainer, fit

TEXT = "To be, or not to be, that is the question: whether 'tis nobler – in the mind – to suffer. " * 8
RECIPE = Recipe(steps=8, batch=3, context=8, lr=0.01, warmup=2)


@pytest.fixture(scope="module")
def tokenizer() -> BytePairTokenizer:
    return train_bpe(TEXT, 290)


@pytest.fixture(scope="module")
def tokens(tokenizer: BytePairTokenizer) -> np.ndarray:
    return np.array(tokenizer.encode(TEXT), np.uint16)


@pytest.fixture
def make(tokenizer, tokens, tmp_path, monkeypatch):
    """make(recipe, ...): a trainer of a small model, its picture an empty file."""
    monkeypatch.setattr("tinyllm.training.draw_losses", lambda trainer, path: path.write_bytes(b""))

    def make(recipe: Recipe = RECIPE, out: Path = tmp_path / "run", dropout: float = 0.0, **settings: object):
        size = tokenizer.vocabulary_size
        config = GPT2Config(size, 8, 12, 1, 3, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)
        cut = len(tokens) - 50
        model = GPT2(config, seed=1)
        model.to("cpu", np.float64)
        return Trainer(model, tokenizer, tokens[:cut], tokens[cut:], recipe, out, **settings)

    return make


def quiet(text: str) -> None:
    """Say nothing."""


def weights(trainer: Trainer) -> np.ndarray:
    return np.concatenate([p.data.ravel() for p in trainer.model.parameters()])


# ---- the learning rate -----------------------------------------------------------------------------------


def test_the_course_of_the_learning_rate():
    """Up in equal steps to the peak, then half a cosine down to a tenth of it: cos 60° = 1/2, cos 90° = 0."""
    rates = [Recipe(steps=10, warmup=4, context=8, lr=2.0).learning_rate(step) for step in range(11)]
    root = math.sqrt(3) / 2
    cosines = [1, root, 1 / 2, 0, -1 / 2, -root, -1]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0] + [0.2 + 1.8 * (1 + c) / 2 for c in cosines])


def test_a_run_shorter_than_its_warm_up_reaches_the_peak():
    recipe = Recipe(steps=3, context=8, lr=3.0, warmup=100)
    assert [recipe.learning_rate(step) for step in range(3)] == [1.0, 2.0, 3.0]


def test_each_step_is_made_with_its_rate(make, monkeypatch):
    trainer, used = make(), []
    step = trainer.optimizer.step
    note = lambda *run: (used.append(trainer.optimizer.lr), step(*run))
    monkeypatch.setattr(trainer.optimizer, "step", note)
    trainer.run(quiet)
    assert used == [trainer.recipe.learning_rate(step) for step in range(8)] and used[:2] == [0.005, 0.01]


# ---- evaluation ------------------------------------------------------------------------------------------


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


@pytest.mark.parametrize("batch, shards", [(1, 1), (3, 2), (4, 3), (50, 2)])
@pytest.mark.parametrize("length", [2, 8, 9, 10, 50])
def test_evaluation_counts_every_token_but_the_first_once(make, batch, shards, length):
    """Windows of 8 one after the other, the last one short; every token weighs the same."""
    trainer = make(Recipe(steps=1, batch=batch, context=8, shards=shards), dropout=0.5)
    trainer.validation = validation = trainer.validation[:length].astype(np.int64)
    said = []
    trainer._evaluate(said.append)
    nats = []
    for start in range(0, length - 1, 8):
        window = validation[start : start + 9]
        logits = trainer.model(window[None, :-1]).numpy()[0]
        nats += [-log_softmax(row)[target] for row, target in zip(logits, window[1:])]
    assert len(nats) == length - 1
    ((step, loss),) = trainer.progress.validation
    assert step == 0 and loss == pytest.approx(np.mean(nats), abs=1e-12)
    assert f"{loss:.3f} nats/token" in said[0] and "training loss" not in said[0]


def test_bits_per_byte_do_not_depend_on_the_vocabulary(make, tokenizer):
    """nats a token / ln 2 / (bytes a token): for the same text, all bits over all bytes."""
    trainer = make()
    text = tokenizer.decode_bytes(trainer.validation.tolist())
    assert len(text) > len(text.decode()) > len(trainer.validation)  # bytes, characters and tokens differ
    nats = 2.5
    bits = nats * len(trainer.validation) / math.log(2)
    assert trainer.bits_per_byte(nats) == pytest.approx(bits / len(text), rel=1e-12)


def test_what_is_said_and_when(make):
    trainer, said = make(Recipe(steps=20, batch=2, context=8)), []
    trainer.run(said.append)
    reports = [text for text in said if text.startswith("step")]
    assert [int(text.split()[1]) for text in reports] == [0, 3, 6, 9, 12, 15, 18, 20]
    assert [step for step, _ in trainer.progress.validation] == [0, 3, 6, 9, 12, 15, 18, 20]
    loss = trainer.progress.validation[-1][1]
    last = re.search(r"training loss ([\d.]+) +validation loss ([\d.]+) .* = ([\d.]+) bits/byte", reports[-1])
    said_numbers = [float(x) for x in last.groups()]
    expected = [np.mean(trainer.progress.losses), loss, trainer.bits_per_byte(loss)]
    assert said_numbers == pytest.approx(expected, abs=0.0006)
    assert len(said) == len(reports) + 7  # a sample after each but the first


def test_a_sample_continues_the_validation_text(make, tokenizer):
    trainer = make()
    said, *written = trainer._sample(5).split("\n")
    assert said == f"   after {tokenizer.decode(trainer.validation[:4])!r} it writes:"
    assert len(written[0]) > 5 and all(line.startswith("   | ") for line in written)
    assert trainer._sample(5) == trainer._sample(5)


def test_evaluation_and_samples_leave_no_trace_in_the_training(make, monkeypatch):
    """Also with dropout, which they switch off and whose random numbers they do not use."""
    watched = make(dropout=0.3)
    watched.run(quiet)
    alone = make(out=watched.out.parent / "alone", dropout=0.3, save_every=3)
    monkeypatch.setattr(Trainer, "_evaluate", lambda trainer, say: None)
    monkeypatch.setattr(Trainer, "_sample", lambda trainer, count: "")
    alone.run(quiet)
    assert alone.progress.losses == watched.progress.losses
    assert np.array_equal(weights(alone), weights(watched))


# ---- a step ----------------------------------------------------------------------------------------------


def test_accumulated_passes_are_one_large_batch(make, tmp_path):
    """The same windows, in one pass or in three: the same losses and weights, but for rounding."""
    large = make(Recipe(steps=5, batch=6, context=8, lr=0.01, warmup=1), tmp_path / "a")
    small = make(Recipe(steps=5, batch=2, context=8, lr=0.01, warmup=1, accumulate=3), tmp_path / "b")
    large.run(quiet)
    small.run(quiet)
    np.testing.assert_allclose(small.progress.losses, large.progress.losses, rtol=1e-10)
    np.testing.assert_allclose(weights(small), weights(large), rtol=0, atol=1e-8)


def test_shards_are_one_batch(make, tmp_path):
    whole, cut = make(RECIPE, tmp_path / "a"), make(Recipe(**{**vars(RECIPE), "shards": 3}), tmp_path / "b")
    whole.run(quiet)
    cut.run(quiet)
    np.testing.assert_allclose(cut.progress.losses, whole.progress.losses, rtol=1e-10)


def test_it_learns_by_heart(make):
    trainer = make(Recipe(steps=150, batch=4, context=8, lr=0.03, warmup=10))
    trainer.run(quiet)
    assert np.mean(trainer.progress.losses[-10:]) < 0.5 < 4 < trainer.progress.losses[0]


def test_dropout_is_on_in_training_only_and_new_each_step(make, monkeypatch):
    """With a learning rate near 0 and one window only, losses differ by what dropout drops."""
    trainer = make(Recipe(steps=4, batch=2, context=8, lr=1e-12, accumulate=2), dropout=0.5)
    window = trainer.sampler.next()
    monkeypatch.setattr(trainer.sampler, "next", lambda: window)
    parts = []
    gradients = trainer.parallel.gradients
    monkeypatch.setattr(trainer.parallel, "gradients", lambda *a: parts.append(gradients(*a)) or parts[-1])
    trainer.run(quiet)
    assert len({round(loss, 9) for loss in parts}) == 8  # each part of each step has its own
    assert len({round(loss, 9) for _, loss in trainer.progress.validation}) == 1


# ---- the folder ------------------------------------------------------------------------------------------


def test_the_last_two_checkpoints_are_kept(make):
    trainer = make(save_every=3)
    seen = []
    save = trainer.save

    def watched() -> Path:
        folder = save()
        seen.append(sorted(path.name[-1] for path in trainer.out.glob("step-*")))
        return folder

    trainer.save = watched
    trainer.run(quiet)
    assert seen == [["3"], ["3", "6"], ["6", "8"]]


def test_a_checkpoint_holds_the_run(make, tokenizer):
    trainer = make(options={"data": "book.txt"}, save_every=5)
    trainer.run(quiet)
    folder = checkpoints.latest(trainer.out)
    checkpoints.verify(folder)
    state = checkpoints.read_arrays(folder / "optimizer.safetensors")
    assert state["losses"].tolist() == trainer.progress.losses and int(state["steps"]) == 8
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert training["step"] == 8 and training["options"]["data"] == "book.txt"
    assert training["options"]["recipe"] == {**vars(RECIPE), "betas": [0.9, 0.95]}
    assert [tuple(pair) for pair in training["validation"]] == trainer.progress.validation
    again = GPT2.from_pretrained(folder, np.float64)
    assert np.array_equal(np.concatenate([p.data.ravel() for p in again.parameters()]), weights(trainer))
    assert load_tokenizer(folder).ranks == tokenizer.ranks


def test_a_checkpoint_is_taken_up_only_by_its_own_run(make, tmp_path):
    trainer = make(save_every=5)
    trainer.run(quiet)
    folder = checkpoints.latest(trainer.out)
    good = make(out=tmp_path / "good")
    good.resume(folder)
    assert good.progress == trainer.progress and good.optimizer.steps == 8
    other = make(out=tmp_path / "other")
    other.optimizer.groups.pop()
    with pytest.raises(InputError, match="does not hold the state of this run"):
        other.resume(folder)
    position = checkpoints.read_json(folder / "training.json")["sampler_position"]
    assert position == 8 * trainer.recipe.accumulate
    for change in (
        {"step": 7},
        {"sampler_position": 7},
        {"validation": [1, 2]},
        {"validation": None},
        {"step": "8"},
    ):
        training = {**checkpoints.read_json(folder / "training.json"), **change}
        checkpoints.write_json(folder / "training.json", training)
        with pytest.raises(InputError, match="does not hold the state of this run"):
            make(out=tmp_path / "again").resume(folder)
        whole = {"step": 8, "sampler_position": position, "validation": trainer.progress.validation}
        checkpoints.write_json(folder / "training.json", {**training, **whole})


def test_the_picture_of_the_loss(tokenizer, tokens, tmp_path):
    """A PNG of 8 x 4.5 inches at 130 dots an inch, drawn without a screen."""
    model = GPT2(GPT2Config(tokenizer.vocabulary_size, 8, 12, 1, 3), seed=1)
    trainer = Trainer(model, tokenizer, tokens[:-50], tokens[-50:], RECIPE, tmp_path / "run")
    for losses, validation in (
        ([5.0], [(0, 5.1)]),
        (np.linspace(6, 3, 500).tolist(), [(0, 6.1), (500, 3.2)]),
    ):
        trainer.progress.losses, trainer.progress.validation = losses, validation
        trainer.save()
        data = (tmp_path / "run" / "loss.png").read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
        assert struct.unpack(">II", data[16:24]) == (1040, 585)
        assert 10_000 < len(data) < 200_000


# ---- stopping --------------------------------------------------------------------------------------------


def test_ctrl_c_ends_after_the_step_and_saves(make, monkeypatch):
    trainer = make(save_every=100)
    handler = signal.getsignal(signal.SIGINT)
    update = trainer.optimizer.step

    def step(*run) -> None:
        if trainer.progress.step == 4:
            signal.raise_signal(signal.SIGINT)  # in the middle of the fifth step
        update(*run)

    monkeypatch.setattr(trainer.optimizer, "step", step)
    with pytest.raises(Interrupted):
        trainer.run(quiet)
    assert trainer.progress.step == 5 and checkpoints.latest(trainer.out).name == "step-00000005"
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_weights_that_were_never_good_are_not_trained(make):
    trainer = make()
    trainer.model.parameters()[0].data[0, 0] = np.nan
    with pytest.raises(Diverged, match="diverged at step 0: validation loss nan.*checkpoint is none"):
        trainer.run(quiet)
    assert not trainer.out.exists()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_ctrl_c_saves_no_broken_weights(make, monkeypatch):
    trainer = make(save_every=100)
    monkeypatch.setattr(Recipe, "learning_rate", lambda recipe, step: 1e200 if step == 2 else 1e-3)
    update = trainer.optimizer.step

    def step(*run) -> None:
        update(*run)
        if trainer.progress.step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainer.optimizer, "step", step)
    with pytest.raises(Diverged, match="diverged at step 3: .* learning rate 1e\\+200"):
        trainer.run(quiet)
    assert checkpoints.latest(trainer.out) is None


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"batch": 0}, {"context": -1}, {"accumulate": 0}, {"shards": 0}, {"seed": -1}]
    + [{"lr": lr} for lr in (0.0, -1.0, math.inf, math.nan)],
    ids=str,
)
def test_recipes_that_cannot_be_followed(wrong):
    with pytest.raises(InputError, match=re.escape(str(*wrong.values()))):
        Recipe(**wrong)


# ---- fit: the same steps, and nothing kept ---------------------------------------------------------------


@pytest.fixture
def experiment(make):
    """(the trainer that it is compared with, fit with its model, batches and validation, ready to run)."""
    trainer = make(out=Path("never"))
    sampler = Sampler(trainer.sampler.tokens, RECIPE.batch, RECIPE.context, RECIPE.seed)

    def batch(step: int):
        sampler.position = step
        return sampler.next()

    batches = lambda: evaluation_batches(trainer.validation, RECIPE.batch, RECIPE.context)
    return trainer, lambda batch=batch, every=3, recipe=RECIPE: fit(
        make().model, batch, recipe, "experiment", batches, every
    )


def test_fit_takes_the_trainers_steps(experiment, monkeypatch):
    trainer, run = experiment
    progress = run()
    monkeypatch.setattr(trainer, "save", lambda: None)
    trainer.run(quiet)
    assert progress.losses == trainer.progress.losses
    assert [step for step, _ in progress.validation] == [0, 3, 6, 8]
    theirs = dict(trainer.progress.validation)
    assert all(loss == theirs[step] for step, loss in progress.validation)


def test_ctrl_c_ends_fit_early_and_keeps_what_it_learned(experiment, capsys):
    _, run = experiment
    handler = signal.getsignal(signal.SIGINT)
    full = run()
    sampled = []

    def batch(step: int):
        sampled.append(step)
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        return original(step)

    original = run.__defaults__[0]
    progress = run(batch)
    assert sampled == [0, 1, 2, 3, 4] and progress.losses == full.losses[:5]
    assert [step for step, _ in progress.validation] == [0, 3, 5]
    assert "experiment stopped early, after step 5" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_stops_fit_at_once(experiment):
    def batch(step: int):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        experiment[1](batch)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_fit_that_diverges_says_where(experiment):
    with pytest.raises(Diverged, match="experiment diverged at step [2-8]: loss .*: use a smaller learning"):
        experiment[1](recipe=replace(RECIPE, lr=1e150, warmup=1))
