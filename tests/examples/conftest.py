"""Runs of the example scripts that the tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from threadpoolctl import threadpool_limits

import autograd.functional as F
from tinyllm import cli
from tinyllm.datasets import default_corpus
from tinyllm.models import GPT2Config
from tinyllm.training import Recipe, Trainer

from . import helpers
from .helpers import Result

Call = Callable[..., Result]


@pytest.fixture(scope="module", autouse=True)
def one_blas_thread() -> Iterator[None]:
    """On busy cores, threads that wait for each other take 100 times as long as small products."""
    with threadpool_limits(1, user_api="blas"):
        yield


@pytest.fixture(scope="session")
def modules() -> SimpleNamespace:
    return SimpleNamespace(train=helpers.load("train_gpt2"), generate=helpers.load("generate"))


@pytest.fixture(scope="session")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 7,000 characters."""
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_bytes(default_corpus()[:7000].encode())
    return path


@pytest.fixture(scope="session")
def laptop_run(tmp_path_factory: pytest.TempPathFactory, book: Path) -> SimpleNamespace:
    """A whole run of the script in a process of its own: `folder` it ran in, `out` of the run, `result`."""
    folder = tmp_path_factory.mktemp("laptop")
    result = helpers.run("train_gpt2", "--data", book, *helpers.LAPTOP_RUN, "--save-every", 10, cwd=folder)
    return SimpleNamespace(folder=folder, out=folder / "runs" / "gpt2", result=result)


def caller(module: object, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Call:
    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.run(module.main)
        except SystemExit as stop:
            code = stop.code
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def module(request: pytest.FixtureRequest) -> ModuleType:
    """The example NAME.py, in a file test_NAME.py."""
    return helpers.load(request.path.stem.removeprefix("test_"))


@pytest.fixture
def script(module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Call:
    """script(*arguments): the example of `module` in this process."""
    return caller(module, module.__name__.removeprefix("examples_"), monkeypatch, capsys)


def make_small(modules: SimpleNamespace, patch: pytest.MonkeyPatch, **config: object) -> None:
    """Make the preset a model of 8,000 parameters, its samples short, and its picture an empty file."""
    preset = modules.train.Preset(
        GPT2Config(300, 16, 16, 1, 2, **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **config}),
        Recipe(steps=10, batch=3, context=16, warmup=3, lr=0.01),
        vocabulary=300,
    )
    patch.setitem(modules.train.PRESETS, "laptop", preset)
    patch.setattr("tinyllm.training.draw_losses", lambda trainer, path: path.write_bytes(b""))
    sample = Trainer._sample
    patch.setattr(Trainer, "_sample", lambda trainer, tokens: sample(trainer, 3))


@pytest.fixture
def train(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Iterator[Call]:
    """train(*arguments): train_gpt2.py in this process, its preset a tiny model."""
    make_small(modules, monkeypatch)
    yield caller(modules.train, "train_gpt2", monkeypatch, capsys)
    F.use_fused(True)


@pytest.fixture
def shrink(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """shrink(**config): the tiny model of `train` with these options."""
    return lambda **config: make_small(modules, monkeypatch, **config)


@pytest.fixture
def generate(
    modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Call:
    """generate(*arguments): generate.py in this process."""
    return caller(modules.generate, "generate", monkeypatch, capsys)


@pytest.fixture(scope="session")
def tiny_run(modules: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory, book: Path) -> Path:
    """A run of the tiny model, 10 steps, with its last two checkpoints at 8 and 10. Copy it to change it."""
    out = tmp_path_factory.mktemp("tiny") / "run"
    with pytest.MonkeyPatch.context() as patch:
        make_small(modules, patch)
        arguments = ["--data", str(book), "--out", str(out), "--save-every", "4"]
        patch.setattr(sys, "argv", ["train_gpt2.py", *arguments])
        cli.run(modules.train.main)
    return out


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """stop_after(step, action): one `action()` when training has done that many steps."""
    do = Trainer._step

    def arm(last: int, action: Callable[[], None]) -> None:
        def step(trainer: Trainer) -> float:
            loss = do(trainer)
            if trainer.progress.step == last:
                monkeypatch.setattr(Trainer, "_step", do)
                action()
            return loss

        monkeypatch.setattr(Trainer, "_step", step)

    return arm
