"""What a run has learned outlives kill -9, Ctrl-C, a full disk, a lost file and numbers that explode."""

from __future__ import annotations

import errno
import os
import random
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from autograd import Tensor
from tinyllm import checkpoints
from tinyllm.parallel import DataParallel
from tinyllm.training import Recipe, Trainer

from .helpers import LAPTOP_RUN, POSIX, files, finish, launch, losses, refused, run, same_run

# ---- killed ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_again_and_again_it_ends_as_if_nothing_had_been(tmp_path, book, laptop_run):
    seed = random.randrange(2**32)
    print("seed", seed)  # pytest shows it if the test fails
    rng = random.Random(seed)
    out = tmp_path / "run"
    for kill in range(6):
        before = checkpoints.latest(out)
        begin = ["--resume"] if before else ["--data", book, *LAPTOP_RUN]
        process = launch("train_gpt2", *begin, "--out", out, "--save-every", 1, cwd=tmp_path)
        if kill != 3:  # once while it starts, else in the middle of work
            while checkpoints.latest(out) == before and process.poll() is None:
                time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.15))
        assert process.poll() is None, finish(process).err
        process.kill()
        finish(process)
        checkpoints.verify(checkpoints.latest(out))
    assert 5 <= int(checkpoints.latest(out).name[5:]) < 24
    result = run("train_gpt2", "--out", out, "--resume", cwd=tmp_path)
    assert result.code == 0, result.err
    same_run(out, laptop_run.out)
    assert not [path.name for path in out.rglob("*") if path.suffix in (".partial", ".deleted", ".old")]


def test_killed_before_the_first_checkpoint_it_starts_again(train, tmp_path, book, monkeypatch, tiny_run):
    def power_cut(trainer: Trainer) -> None:
        raise SystemExit("power cut")

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", power_cut)
        assert train("--data", book, "--out", out).code == "power cut"
    (out / "tokens.npy.partial").write_bytes(b"half")
    (out / "step-00000004.partial").mkdir()
    refused(train("--out", out, "--resume"), "holds no checkpoint", "without --resume")
    assert train("--data", book, "--out", out).code == 0
    same_run(out, tiny_run)
    assert not list(out.glob("*.partial"))


# ---- Ctrl-C ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not POSIX, reason="Windows sends no SIGINT to one process")
def test_ctrl_c_saves_says_how_to_go_on_and_that_works(tmp_path, book, laptop_run):
    # A process started in the background may inherit that Ctrl-C is ignored.
    listen = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    arguments = ["--data", book, *LAPTOP_RUN, "--out", "my-run", "--save-every", 100]
    process = launch("train_gpt2", *arguments, cwd=tmp_path, **listen)
    for line in process.stdout:  # lines come through the pipe as they are written
        if line.startswith(b"step     6"):
            break
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130 and "Traceback" not in err
    last = err.splitlines()[-1]
    newest = checkpoints.latest(tmp_path / "my-run")
    step = int(newest.name[5:])
    assert 6 <= step < 24 and last.startswith(f"stopped: saved at step {step}; go on with {sys.executable} ")
    script, *said = shlex.split(last.partition(" examples/")[2])
    assert said == ["--out", "my-run", "--save-every", "100", "--resume"]
    result = run(script.removesuffix(".py"), *said, cwd=tmp_path)
    assert result.code == 0, result.err
    same_run(tmp_path / "my-run", laptop_run.out)


@pytest.fixture
def default_ctrl_c() -> Iterator[None]:
    """Ctrl-C as Python takes it by default; a process started in the background may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_ctrl_c")
def test_ctrl_c_before_training_and_a_second_ctrl_c(train, tmp_path, book, monkeypatch, stop_after):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("tinyllm.token_file.train_bpe", lambda *_: signal.raise_signal(signal.SIGINT))
        code, _, err = train("--data", book, "--out", out)
        assert code == 130 and err.splitlines() == ["", "stopped"]

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    stop_after(5, twice)
    code, _, err = train("--data", book, "--out", out, "--save-every", 2)
    assert code == 130 and err.splitlines()[-1] == "stopped"  # at once: nothing is said to be saved
    assert checkpoints.latest(out).name == "step-00000004"


def test_ctrl_c_at_the_last_step_is_the_end(train, tmp_path, book, stop_after, tiny_run):
    stop_after(10, lambda: signal.raise_signal(signal.SIGINT))
    assert train("--data", book, "--out", tmp_path / "run").code == 0
    same_run(tmp_path / "run", tiny_run)


def test_ctrl_c_is_as_before_when_a_run_is_over(train, tmp_path, book):
    before = signal.getsignal(signal.SIGINT)
    assert train("--data", book, "--steps", 1, "--out", tmp_path / "run").code == 0
    assert signal.getsignal(signal.SIGINT) is before


# ---- a disk that refuses ---------------------------------------------------------------------------------


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def last_line(err: str) -> str:
    return err.rstrip("\n").splitlines()[-1]


@pytest.mark.parametrize("place", ["os.fsync", "tinyllm.files.save_file", "os.replace"])
def test_a_disk_that_fills_up_in_the_middle(train, tmp_path, book, monkeypatch, stop_after, tiny_run, place):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(6, lambda: patch.setattr(place, full))
        code, _, err = train("--data", book, "--out", out, "--save-every", 4)
    assert code == 2 and "Traceback" not in err
    line = last_line(err)
    assert line.startswith("error: cannot write ") and "step-00000008" in line
    assert os.strerror(errno.ENOSPC) in line and "make room" in line
    assert sorted(path.name for path in out.iterdir()) == ["loss.png", "step-00000004", "tokens.npy"]
    checkpoints.verify(out / "step-00000004")
    assert train("--out", out, "--resume", "--save-every", 4).code == 0
    same_run(out, tiny_run)


def test_a_disk_without_room_for_the_picture(train, tmp_path, book, monkeypatch):
    monkeypatch.setattr("tinyllm.training.draw_losses", full)
    code, _, err = train("--data", book, "--steps", 3, "--out", tmp_path / "run")
    assert code == 2 and last_line(err).startswith("error: cannot write ") and "loss.png" in last_line(err)
    checkpoints.verify(checkpoints.latest(tmp_path / "run"))
    assert len(losses(tmp_path / "run")) == 3


def test_a_disk_without_room_for_the_tokens(train, tmp_path, book, monkeypatch):
    monkeypatch.setattr("os.fsync", full)
    refused(train("--data", book, "--out", tmp_path / "run"), "tokens.npy", os.strerror(errno.ENOSPC))
    assert files(tmp_path / "run") == {}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sets Linux's limit on the size of files")
def test_files_that_the_system_does_not_let_grow(tmp_path, book, laptop_run):
    """No patch: the kernel itself refuses the weights' fourth megabyte."""
    import resource

    out = shutil.copytree(laptop_run.out, tmp_path / "run")
    shutil.rmtree(out / "step-00000024")
    before = files(out)
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))}
    code, _, err = run("train_gpt2", "--out", out, "--resume", cwd=tmp_path, **limit)
    assert code == 2 and "Traceback" not in err
    assert last_line(err).startswith(f"error: cannot write {out / 'step-00000024'}")
    assert files(out) == before
    checkpoints.verify(out / "step-00000020")


def test_a_file_where_the_folder_should_be(train, tmp_path, book):
    (tmp_path / "run").write_bytes(b"mine")
    for out in (tmp_path / "run", tmp_path / "run" / "below"):
        refused(train("--data", book, "--out", out), "cannot write", out)
    assert (tmp_path / "run").read_bytes() == b"mine"


def test_a_folder_without_the_right_to_write(train, tmp_path, book, tiny_run):
    out = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(out / "step-00000010")
    before = files(out)
    out.chmod(0o500)
    if os.access(out, os.W_OK):
        pytest.skip("this user may write anywhere")
    try:
        code, _, err = train("--out", out, "--resume")
        assert code == 2 and last_line(err).startswith("error: cannot write ")
        assert files(out) == before
    finally:
        out.chmod(0o700)


# ---- lost and damaged ------------------------------------------------------------------------------------


def test_when_the_newest_checkpoint_is_damaged_the_one_before_goes_on(train, tmp_path, tiny_run):
    out = shutil.copytree(tiny_run, tmp_path / "run")
    weights = out / "step-00000010" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    line = refused(train("--out", out, "--resume"), weights, "damaged")
    assert f"delete {out / 'step-00000010'} to use the checkpoint before it" in line
    shutil.rmtree(out / "step-00000010")  # as it said
    assert train("--out", out, "--resume").code == 0
    same_run(out, tiny_run)


@pytest.mark.parametrize("damage", ["lost", "cut", "changed", "replaced"])
def test_a_damaged_token_file_is_written_again(train, tmp_path, tiny_run, damage):
    out = shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(out / "step-00000010")
    tokens = out / "tokens.npy"
    if damage == "lost":
        tokens.unlink()
    elif damage == "cut":
        tokens.write_bytes(tokens.read_bytes()[:-100])
    elif damage == "changed":
        tokens.write_bytes(tokens.read_bytes()[:-1] + b"\7")
    else:
        np.save(tokens, np.load(tokens)[:500])
    assert train("--out", out, "--resume").code == 0
    same_run(out, tiny_run)
    assert tokens.read_bytes() == (tiny_run / "tokens.npy").read_bytes()


def test_the_corpus_may_change_as_long_as_the_runs_tokens_are_there(
    train, tmp_path, book, stop_after, tiny_run
):
    data, out = tmp_path / "book.txt", tmp_path / "run"
    text = book.read_bytes()
    data.write_bytes(text)
    stop_after(6, lambda: signal.raise_signal(signal.SIGINT))
    assert train("--data", data, "--out", out).code == 130
    before = files(out / "step-00000006")

    data.write_bytes(text + b"And more.\n")
    (out / "tokens.npy").unlink()
    refused(train("--out", out, "--resume"), "the corpus is not the one", out, "give it back")
    data.unlink()
    refused(train("--out", out, "--resume"), data, "does not exist")
    assert files(out / "step-00000006") == before
    data.write_bytes(text)  # given back
    assert train("--out", out, "--resume").code == 0
    assert losses(out) == losses(tiny_run)

    data.unlink()
    shutil.rmtree(out / "step-00000010")
    assert train("--out", out, "--resume").code == 0  # its own tokens are all that it needs
    assert losses(out) == losses(tiny_run)


# ---- numbers that explode --------------------------------------------------------------------------------


def explode(monkeypatch: pytest.MonkeyPatch, what: str, at: int) -> None:
    """Let a training's loss, one gradient, or the weights become infinite or NaN at a step."""
    gradients, rate, count = DataParallel.gradients, Recipe.learning_rate, iter(range(1, 1000))

    def broken(parallel: DataParallel, *arguments: object) -> float:
        loss = gradients(parallel, *arguments)
        if next(count) != at:
            return loss
        if what == "gradient":
            grad = parallel.parameters[-1].grad.data.copy()
            grad.flat[3] = np.inf
            parallel.parameters[-1].grad = Tensor(grad)
        return np.nan if what == "loss" else loss

    def leap(recipe: Recipe, step: int) -> float:
        return 1e38 if step == at - 1 else rate(recipe, step)

    monkeypatch.setattr(*((Recipe, "learning_rate", leap) if what == "weights" else
                          (DataParallel, "gradients", broken)))  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "what, at, save_every, step, rate, good",
    [
        ("loss", 7, 3, 7, 0.00650, 6),
        ("gradient", 7, 3, 7, 0.00650, 6),
        ("gradient", 1, 3, 1, 0.00333, None),
        ("weights", 5, 2, 6, 0.00831, 4),  # the loss of step 6 is the first to tell
        ("weights", 6, 5, 6, 1e38, 5),  # the validation loss
        ("weights", 5, 5, 5, 1e38, None),  # neither: a checkpoint is due first
        ("weights", 10, 3, 10, 1e38, 9),
    ],
)
def test_a_training_that_diverges(train, tmp_path, book, monkeypatch, what, at, save_every, step, rate, good):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        explode(patch, what, at)
        code, text, err = train("--data", book, "--out", out, "--save-every", save_every)
    assert code == 1 and "Traceback" not in err
    line = last_line(err)
    assert line.startswith(f"error: the training diverged at step {step}: ")
    assert "nan" in line or "inf" in line
    assert f"learning rate {rate:.3g};" in line
    assert f"the last good checkpoint is {out / f'step-{good:08d}' if good else 'none'}:" in line
    assert "smaller --lr" in line and "validation loss nan" not in text
    assert checkpoints.latest(out) == (out / f"step-{good:08d}" if good else None)
    if good:
        checkpoints.verify(out / f"step-{good:08d}")
        arrays = checkpoints.read_arrays(out / f"step-{good:08d}" / "model.safetensors")
        assert all(np.isfinite(array).all() and np.abs(array).max() < 10 for array in arrays.values())
        assert train("--out", out, "--resume").code == 0  # without what made it diverge


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_learning_rate_that_is_far_too_high(train, tmp_path, book):
    code, _, err = train("--data", book, "--out", tmp_path / "run", "--lr", 1e38, "--save-every", 1)
    assert code == 1 and "diverged at step 1: " in last_line(err) and "3.33e+37" in last_line(err)
    assert checkpoints.latest(tmp_path / "run") is None


# ---- elsewhere than in the main thread --------------------------------------------------------------------


def test_a_run_in_another_thread(train, tmp_path, book):
    found = []
    thread = threading.Thread(target=lambda: found.append(train("--data", book, "--out", tmp_path / "run")))
    thread.start()
    thread.join(60)
    assert found[0].code == 0 and len(losses(tmp_path / "run")) == 10


@pytest.mark.skipif(not POSIX, reason="Windows has another error for a pipe without a reader")
def test_a_reader_that_leaves_early_sees_no_traceback(tmp_path, book):
    process = launch("train_gpt2", "--data", book, *LAPTOP_RUN, "--out", tmp_path / "run", cwd=tmp_path)
    process.stdout.read(10)
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(60) == 0
    assert "Traceback" not in err and "Exception ignored" not in err, err
