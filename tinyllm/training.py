"""The training loop, and a run that survives whatever stops it.

Everything that a step depends on is a function of the options and the step's number (the batch, the learning
rate, the random numbers of dropout) or is in the checkpoint (weights, optimizer). So a resumed run goes on
exactly as if it had never stopped.
"""

from __future__ import annotations

import math
import signal
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from autograd import optim
from tinyllm import checkpoints, plots
from tinyllm.datasets import Batch, Sampler, bytes_per_token, evaluation_batches
from tinyllm.errors import InputError
from tinyllm.files import write_files
from tinyllm.generation import stream
from tinyllm.parallel import DataParallel
from tinyllm.tokenizers import Tokenizer


class Diverged(RuntimeError):
    """The loss or the gradient became infinite or not a number; nothing was saved after that."""


class Interrupted(Exception):
    """Ctrl-C: the run was saved and can be resumed."""


@dataclass(frozen=True)
class Recipe:
    """How to train: all numbers that the result depends on, apart from the model and the data."""

    steps: int = 1000
    batch: int = 16  # sequences in one forward and backward pass
    context: int = 128  # tokens in a sequence
    accumulate: int = 1  # passes before a step
    lr: float = 2e-3  # the peak; it ends at a tenth of it
    warmup: int = 100  # steps
    weight_decay: float = 0.1  # of matrices
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # the largest norm of a step's gradient
    seed: int = 0
    shards: int = 1  # threads that a batch is cut onto

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "context", "accumulate", "shards"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, but must be 1 or more")
        if not 0 < self.lr < math.inf:
            raise InputError(f"the learning rate is {self.lr}, but must be a number above 0")
        if self.seed < 0:
            raise InputError(f"the seed is {self.seed}, but must be 0 or more")

    def learning_rate(self, step: int) -> float:
        """The rate of a step counted from 0."""
        warmup = min(self.warmup, self.steps)
        return optim.warmup_cosine(step, self.lr, warmup, self.steps, floor=0.1 * self.lr)


@dataclass
class Progress:
    """How far a run has come: the loss of each step, and (step, nats a token) on the validation split."""

    losses: list[float]
    validation: list[tuple[int, float]]

    @property
    def step(self) -> int:
        return len(self.losses)


class Steps:
    """The steps of the optimizer that a recipe asks for, whatever the batches hold.

    The model has loss(inputs, targets, reduction) -> Tensor. Use it inside `with steps.parallel`.
    """

    def __init__(self, model: Any, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        self.optimizer = optim.AdamW(
            optim.decay_groups(model, recipe.weight_decay), recipe.lr, recipe.betas, eps=1e-8
        )
        self.parallel = DataParallel(model, recipe.shards)

    def take(self, step: int, batches: Sequence[Batch]) -> float:
        """Step number `step`, from 0, on batches (inputs, targets); returns the mean loss before it.

        Raises:
            Diverged: the loss or the gradient is not finite; the weights are untouched.
        """
        self.optimizer.lr = self.recipe.learning_rate(step)
        self.optimizer.zero_grad()
        self.model.train()
        losses = [
            self.parallel.gradients(inputs, targets, (self.recipe.seed, step, part), len(batches))
            for part, (inputs, targets) in enumerate(batches)
        ]
        loss = float(np.mean(losses))
        norm = optim.clip_grad_norm(self.parallel.parameters, self.recipe.clip, self.parallel.map)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(f"loss {loss}, gradient norm {norm}")
        self.optimizer.step(self.parallel.map)
        return loss


def mean_loss(model: Any, parallel: DataParallel, batches: Iterable[Batch]) -> float:
    """Nats a target over all batches, in evaluation mode."""
    total, count = 0, 0
    model.eval()
    for inputs, targets in batches:
        nats, n = parallel.loss(inputs, targets)
        total, count = total + nats, count + n
    return float((total / count).sum())


def fit(
    model: Any,
    batch: Callable[[int], Batch],
    recipe: Recipe,
    label: str = "",
    validation: Callable[[], Iterable[Batch]] | None = None,
    every: int = 100,
) -> Progress:
    """Train for an experiment of minutes, which keeps nothing on the disk; a progress bar shows it.

    batch(step) gives the step's inputs and targets (the recipe's accumulate, batch and context are up to it),
    validation() batches on which to measure the loss before the first, after each `every` and after the last
    step. Ctrl-C ends the training early and keeps what it has learned so far; a second one stops at once.

    Raises:
        Diverged: a loss that is not finite.
    """
    steps, progress = Steps(model, recipe), Progress([], [])

    def evaluate() -> None:
        progress.validation.append((progress.step, mean_loss(model, steps.parallel, validation())))

    with steps.parallel, _interrupts() as interrupted:
        if validation:
            evaluate()
        bar = tqdm(range(recipe.steps), desc=label, unit="step", dynamic_ncols=True, leave=False)
        for step in bar:
            try:
                progress.losses.append(steps.take(step, [batch(step)]))
            except Diverged as error:
                raise Diverged(
                    f"{label} diverged at step {step + 1}: {error}: use a smaller learning rate"
                ) from None
            bar.set_postfix_str(f"loss {progress.losses[-1]:.3f}", refresh=False)
            last = step + 1 == recipe.steps or interrupted()
            if validation and ((step + 1) % every == 0 or last):
                evaluate()
            if interrupted():
                tqdm.write(f"{label} stopped early, after step {step + 1}")
                break
    model.eval()
    return progress


class Trainer:
    """Trains a causal model on a row of tokens and keeps the run in the folder `out`.

    train, validation: tokens (N,). options: what else the run's user chose; a resumed run must be the same.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        train: np.ndarray,
        validation: np.ndarray,
        recipe: Recipe,
        out: str | Path,
        options: dict[str, Any] | None = None,
        save_every: int = 200,
    ) -> None:
        self.model, self.tokenizer, self.recipe, self.out = model, tokenizer, recipe, Path(out)
        self.options = {**(options or {}), "recipe": {**asdict(recipe), "betas": list(recipe.betas)}}
        self.save_every = save_every
        self.sampler = Sampler(train, recipe.batch, recipe.context, recipe.seed)
        # 100 batches tell the loss well enough, and a large corpus would take hours.
        self.validation = validation[: 100 * recipe.batch * recipe.context + 1]
        self.bytes_per_token = bytes_per_token(tokenizer, self.validation)
        self.steps = Steps(model, recipe)
        self.optimizer, self.parallel = self.steps.optimizer, self.steps.parallel
        self.progress = Progress([], [])

    def bits_per_byte(self, loss: float) -> float:
        """Nats a token as bits a byte of text, which compares models with different vocabularies."""
        return loss / (math.log(2) * self.bytes_per_token)

    def run(self, say: Callable[[str], None] = tqdm.write, sample_tokens: int = 48) -> None:
        """Train to the last step; evaluate, show a sample and save on the way.

        Raises:
            Diverged: a loss or gradient that is not finite, before it touches the weights or a checkpoint.
            Interrupted: Ctrl-C, after saving.
            InputError: the disk refused a checkpoint; the one before it is intact.
        """
        recipe = self.recipe
        evaluate_every = min(math.ceil(recipe.steps / 8), 1000)
        tokens_a_step = recipe.batch * recipe.context * recipe.accumulate
        with self.parallel, _interrupts() as interrupted:
            if not self.progress.validation:
                self._evaluate(say)
            bar = tqdm(
                total=recipe.steps * tokens_a_step,
                initial=self.progress.step * tokens_a_step,
                unit="tok",
                unit_scale=True,
                dynamic_ncols=True,
                smoothing=0.1,
            )
            with bar:
                while self.progress.step < recipe.steps:
                    loss = self._step()
                    step = self.progress.step
                    bar.set_description(f"step {step}/{recipe.steps} loss {loss:.3f}", refresh=False)
                    bar.update(tokens_a_step)
                    if step % evaluate_every == 0 or step == recipe.steps:
                        self._evaluate(say)
                        say(self._sample(sample_tokens))
                    if step % self.save_every == 0 or step == recipe.steps or interrupted():
                        self._check_weights()
                        self.save()
                    if interrupted() and step < recipe.steps:
                        raise Interrupted

    def _step(self) -> float:
        """One step of the optimizer; returns the mean loss before it."""
        step = self.progress.step
        self.sampler.position = self._sampler_position()
        batches = [self.sampler.next() for _ in range(self.recipe.accumulate)]
        try:
            loss = self.steps.take(step, batches)
        except Diverged as error:
            raise self._diverged(step + 1, str(error)) from None
        self.progress.losses.append(loss)
        return loss

    def _sampler_position(self) -> int:
        """The batch that the next step begins with."""
        return self.progress.step * self.recipe.accumulate

    def _check_weights(self) -> None:
        """Raise Diverged if the last update broke the weights, which else the next step's loss would show."""
        self.model.eval()
        (loss,), _ = self.parallel.loss(*self.sampler.next())
        if not math.isfinite(loss):
            raise self._diverged(self.progress.step, f"loss {loss} after the update")

    def _diverged(self, step: int, what: str) -> Diverged:
        last = checkpoints.latest(self.out)
        return Diverged(
            f"the training diverged at step {step}: {what}, learning rate {self.optimizer.lr:.3g}; nothing "
            f"was saved, the last good checkpoint is {last or 'none'}: start again with a smaller --lr"
        )

    def _evaluate(self, say: Callable[[str], None]) -> None:
        """Measure the loss on the validation split."""
        started, step = time.perf_counter(), self.progress.step
        batches = evaluation_batches(self.validation, self.recipe.batch, self.recipe.context)
        loss = mean_loss(self.model, self.parallel, batches)
        if not math.isfinite(loss):
            raise self._diverged(step, f"validation loss {loss}")
        self.progress.validation.append((step, loss))
        recent = self.progress.losses[-50:]
        trained = f"training loss {np.mean(recent):.3f}   " if recent else ""
        say(
            f"step {step:5d}   {trained}validation loss {loss:.3f} nats/token = "
            f"{self.bits_per_byte(loss):.3f} bits/byte   ({time.perf_counter() - started:.1f} s)"
        )

    def _sample(self, tokens: int) -> str:
        """What the model writes now, after a prompt from the validation split."""
        prompt = np.asarray(self.validation[: min(8, max(1, self.recipe.context // 2))]).astype(np.int64)
        new = stream(self.model, prompt[None], tokens, temperature=0.8, top_k=50, seed=0)
        # A model may have more rows than its tokenizer has tokens; they stand for nothing.
        text = self.tokenizer.decode([i for (i,) in new if i < self.tokenizer.vocabulary_size])
        lines = textwrap.indent(text, "   | ", lambda line: True)
        return f"   after {self.tokenizer.decode(prompt)!r} it writes:\n{lines}"

    def save(self) -> Path:
        """Write a checkpoint, complete in itself, and the picture of the loss."""

        def write(folder: Path) -> None:
            self.model.save_pretrained(folder)
            self.tokenizer.save(folder)
            state = {**self.optimizer.state_dict(), "losses": np.array(self.progress.losses, np.float64)}
            checkpoints.write_arrays(folder / "optimizer.safetensors", state)
            checkpoints.write_json(
                folder / "training.json",
                {
                    "step": self.progress.step,
                    "sampler_position": self._sampler_position(),
                    "validation": self.progress.validation,
                    "bytes_per_token": self.bytes_per_token,
                    "options": self.options,
                },
            )

        folder = checkpoints.save(self.out, self.progress.step, write)
        write_files(self.out, {"loss.png": lambda path: draw_losses(self, path)})
        return folder

    def resume(self, folder: Path) -> None:
        """Take up the optimizer and the progress of a checkpoint whose weights the model has already.

        Raises:
            InputError: a damaged checkpoint, or one of another run.
        """
        state = checkpoints.read_arrays(folder / "optimizer.safetensors")
        training = checkpoints.read_json(folder / "training.json")
        try:
            losses = state.pop("losses").tolist()
            self.optimizer.load_state_dict(state)
            self.progress = Progress(losses, [(int(s), float(x)) for s, x in training["validation"]])
            if (training["step"], training["sampler_position"]) != (len(losses), self._sampler_position()):
                raise ValueError(f"step {training['step']} with {len(losses)} losses")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{folder} does not hold the state of this run: {error}") from None


def draw_losses(trainer: Trainer, path: Path) -> None:
    """The loss curve: every step faintly, its running mean, the validation loss, and bits per byte."""
    figure, axes = plots.figure()
    plots.training_curve(axes, trainer.progress.losses, "training", "tab:blue")
    at, validation = np.array(trainer.progress.validation).reshape(-1, 2).T
    axes.plot(at, validation, "o-", color="tab:orange", label="validation")
    plots.finish(axes, xlabel="step", ylabel="nats a token", title=f"{trainer.out.name}: cross-entropy loss")
    axes.set_xlim(left=0)
    scale = trainer.bits_per_byte(1.0)
    right = axes.secondary_yaxis("right", functions=(lambda x: x * scale, lambda x: x / scale))
    right.set_ylabel("bits a byte")
    figure.savefig(path, format="png", dpi=130)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back until the step is done; a second one stops at once."""
    pressed = False

    def press(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    try:
        before = signal.signal(signal.SIGINT, press)
    except ValueError:  # not in the main thread, where Ctrl-C does not arrive anyway
        yield lambda: False
        return
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
