"""Checkpoints survive what happens to them: kill -9, a full disk, flipped bits."""

import errno
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinyllm import checkpoints
from tinyllm.checkpoints import latest, resolve, save, verify
from tinyllm.errors import InputError
from tinyllm.files import read_arrays, read_json, write_arrays, write_json


def fill(number):
    """A writer of a folder that says in each of its files which save it belongs to."""

    def write(folder):
        write_arrays(folder / "model.safetensors", {"w": np.full(500, number)})
        (folder / "tokenizer").mkdir()
        write_json(folder / "tokenizer" / "ranks.json", {"number": number})
        write_json(folder / "config.json", {"number": number})

    return write


def number_in(folder):
    """The number that all files of a verified checkpoint agree on."""
    verify(folder)
    assert (folder / "checksums.json").exists()
    numbers = {read_json(folder / name)["number"] for name in ("config.json", "tokenizer/ranks.json")}
    numbers |= set(read_arrays(folder / "model.safetensors")["w"].tolist())
    assert len(numbers) == 1
    return numbers.pop()


def names(out):
    return sorted(path.name for path in out.iterdir())


def test_save_keeps_the_newest_and_never_deletes_what_it_just_wrote(tmp_path):
    out = tmp_path / "runs" / "a"
    assert latest(out) is None
    for step in (0, 500, 99_999_999, 100_000_000):  # the last name is longer and sorts before as text
        assert save(out, step, fill(step)) == latest(out)
        assert number_in(latest(out)) == step
    assert names(out) == ["step-100000000", "step-99999999"]
    save(out, 7, fill(7), keep=1)
    assert names(out) == ["step-00000007", "step-100000000", "step-99999999"]
    save(out, 100_000_001, fill(1), keep=1)
    assert names(out) == ["step-100000001"]


def test_saving_the_same_step_again_replaces_it(tmp_path):
    for number in (1, 2, 3):
        save(tmp_path, 5, fill(number))
        assert names(tmp_path) == ["step-00000005"]
        assert number_in(latest(tmp_path)) == number


def test_leftovers_of_a_killed_run_are_cleaned_and_nothing_else(tmp_path):
    for name in (
        "step-00000003.partial",
        "step-00000001.deleted",
        "step-00000001.old.deleted",
        "step-notes",
        "step-notes.old",
        "step-12.partial",
        "plots",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "step-00000009").write_text("a file")
    assert latest(tmp_path) is None
    save(tmp_path, 3, fill(3))
    assert names(tmp_path) == [
        "plots",
        "step-00000003",
        "step-00000009",
        "step-12.partial",
        "step-notes",
        "step-notes.old",
    ]
    assert latest(tmp_path).name == "step-00000003"


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    synced, named = set(), []
    fsync, replace = os.fsync, os.replace

    def record(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def check(source, target):
        inside = [source, *Path(source).rglob("*")]
        unsafe = [path for path in inside if path.stat().st_ino not in synced]
        assert not [path for path in unsafe if path.is_file() or os.name != "nt"], "renamed before fsync"
        named.append(Path(target).name)
        replace(source, target)
        synced.discard(tmp_path.stat().st_ino)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "replace", check)

    def by_other_means(folder):
        (folder / "plain").mkdir()
        (folder / "plain" / "notes.txt").write_text("by other means")

    save(tmp_path, 1, by_other_means)
    assert named[-1] == "step-00000001"
    assert os.name == "nt" or tmp_path.stat().st_ino in synced, "the new name itself is not safe"
    write_json(tmp_path / "options.json", {})
    assert named[-1] == "options.json"
    assert os.name == "nt" or tmp_path.stat().st_ino in synced, "the new name itself is not safe"


def test_resolve(tmp_path):
    with pytest.raises(InputError, match="nowhere is not a checkpoint.*no such folder"):
        resolve(tmp_path / "nowhere")
    with pytest.raises(InputError, match="expected config.json or step-.*empty"):
        resolve(tmp_path)
    (tmp_path / "loss.png").touch()
    with pytest.raises(InputError, match="holds loss.png"):
        resolve(tmp_path)
    with pytest.raises(InputError, match="a file, not a folder"):
        resolve(tmp_path / "loss.png")
    save(tmp_path, 3, fill(3))
    newest = save(tmp_path, 12, fill(12))
    assert resolve(str(tmp_path)) == newest
    assert resolve(tmp_path / "step-00000003").name == "step-00000003"


# Killed


def test_killed_while_replacing_a_step(tmp_path):
    """The old folder, set aside, is the checkpoint until the new one is there, and not a moment longer."""
    old = save(tmp_path, 5, fill(1)).rename(tmp_path / "step-00000005.old")
    assert latest(tmp_path) == resolve(tmp_path) == old

    def refuse(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError):
        save(tmp_path, 5, refuse)
    assert number_in(latest(tmp_path)) == 1
    shutil.copytree(old, tmp_path / "kept")
    newer = save(tmp_path, 5, fill(2))
    (tmp_path / "kept").rename(old)
    assert latest(tmp_path) == newer
    save(tmp_path, 6, fill(3))
    assert names(tmp_path) == ["step-00000005", "step-00000006"]


class Killed(BaseException):
    pass


DEADLY = [
    (os, "replace"),
    (os, "fsync"),
    (os, "mkdir"),
    (os, "unlink"),
    (shutil, "rmtree"),
    (checkpoints, "_crc32"),
]


def die_at(monkeypatch, moment):
    """After `moment` calls that touch the disk every further one has no effect: the process is dead."""
    calls = []

    def mortal(module, name):
        function = getattr(module, name)

        def call(*arguments, **options):
            calls.append(name)
            if name == "rmtree" and len(calls) == moment:  # half of the deletion is done
                for path in [path for path in Path(arguments[0]).rglob("*") if path.is_file()][:2]:
                    os.remove(path)
            if len(calls) >= moment:
                raise Killed
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    for module, name in DEADLY:
        mortal(module, name)


@pytest.mark.parametrize("steps", [(1, 2, 3), (1, 2, 2)])
def test_killed_at_every_single_moment(tmp_path, monkeypatch, steps):
    """kill -9 before the n-th call that touches the disk, for every n: nothing is lost or half there."""
    first, second, third = steps
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a killed process, not a lost power supply
    save(tmp_path / "before", first, fill(1))
    save(tmp_path / "before", second, fill(2))
    for moment in range(1, 200):
        out = tmp_path / str(moment)
        shutil.copytree(tmp_path / "before", out)
        with pytest.MonkeyPatch.context() as patch:
            die_at(patch, moment)
            try:
                save(out, third, fill(3))
                killed = False
            except Killed:
                killed = True
        found = latest(out)
        assert number_in(found) in (2, 3)
        assert number_in(resolve(out)) in (2, 3)
        for folder in out.iterdir():  # whatever looks complete is
            if folder.suffix not in (".partial", ".deleted"):
                number_in(folder)
        save(out, third, fill(3))
        assert number_in(latest(out)) == 3
        assert len(names(out)) == 2 and not [name for name in names(out) if "." in name]
        if not killed:
            assert moment > 20
            return
    raise AssertionError("never ran to its end")


CHILD = """
import sys, types, itertools, numpy as np
sys.modules["tinyllm"] = types.ModuleType("tinyllm")  # without its __init__, which imports every model:
sys.modules["tinyllm"].__path__ = [sys.argv[3]]       # this program starts twenty times
from tinyllm.checkpoints import latest, save, write_arrays, write_json
def write(folder):
    write_arrays(folder / "model.safetensors", {"w": np.full(5000, number)})
    (folder / "tokenizer").mkdir()
    write_json(folder / "tokenizer" / "ranks.json", {"number": number})
    write_json(folder / "config.json", {"number": number})
for number in itertools.count(int(sys.argv[2])):
    save(sys.argv[1], number // 2, write)  # every step twice: replacing is to be safe as well
    print(number, flush=True)
"""


def test_kill_in_a_loop(tmp_path):
    moments, reached = random.Random(0), 0
    for _ in range(20):
        arguments = [str(tmp_path), str(reached + 1), str(Path(checkpoints.__file__).parent)]
        child = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True)
        promised = [child.stdout.readline()]
        try:
            child.wait(moments.uniform(0, 0.04))
        except subprocess.TimeoutExpired:
            child.kill()
        promised += child.communicate()[0].splitlines()
        assert child.returncode != 1  # killed, not failed
        number = number_in(latest(tmp_path))
        assert number >= int(promised[-1]) > reached, "a save that had returned is lost"
        reached = number


# The disk refuses, or damages


@pytest.mark.parametrize("broken", ["fsync", "replace", "mkdir"])
def test_a_full_disk_at_any_call(tmp_path, monkeypatch, broken):
    save(tmp_path, 1, fill(1))
    save(tmp_path, 2, fill(2))
    function = getattr(os, broken)
    for moment in range(1, 100):
        calls = []

        def full(*arguments, calls=calls, moment=moment, **options):
            calls.append(arguments)
            if len(calls) == moment:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, broken, full)
            try:
                save(tmp_path, 2, fill(3), keep=9)
            except InputError as error:
                assert "No space left on device" in str(error) and str(tmp_path) in str(error)
                assert "\n" not in str(error)
        assert number_in(latest(tmp_path)) in (2, 3)
        assert number_in(tmp_path / "step-00000001") == 1
        assert not list(tmp_path.rglob("*.partial"))
        if len(calls) < moment:
            return
    raise AssertionError("never ran to its end")


def test_errors_of_the_writer_leave_no_partial_folder(tmp_path):
    save(tmp_path, 1, fill(1))
    for error, seen in (
        (OSError(errno.ENOSPC, "No space left on device"), InputError),
        (KeyError("a bug"), KeyError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):

        def write(folder, error=error):
            (folder / "half").write_text("half")
            raise error

        with pytest.raises(seen):
            save(tmp_path, 2, write)
        assert names(tmp_path) == ["step-00000001"]


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "out").write_text("in the way")
    for out in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(InputError, match="cannot write .*out.*choose another folder") as error:
            save(out, 1, fill(1))
        assert "\n" not in str(error.value)
    assert latest(tmp_path / "out") is None


def test_verify_notices_every_flip_and_truncation(tmp_path):
    folder = save(tmp_path, 1, fill(1))
    verify(folder)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        good = path.read_bytes()
        for size in [len(good) * part // 16 for part in range(16)]:
            path.write_bytes(good[:size])
            with pytest.raises(InputError) as error:
                verify(folder)
            assert "\n" not in str(error.value) and str(folder) in str(error.value)
        for place in random.Random(0).sample(range(len(good)), min(len(good), 150)):
            flipped = bytearray(good)
            flipped[place] ^= 1 << place % 8
            path.write_bytes(flipped)
            try:
                verify(folder)
            except InputError:
                continue
            assert path.name == "checksums.json"  # its white space; every other byte of it counts
            assert read_json(path) == read_json_of(good, tmp_path)
        path.write_bytes(good)
        verify(folder)
        path.rename(tmp_path / "away")
        if path.name != "checksums.json":
            with pytest.raises(InputError, match=f"{path.name} is missing"):
                verify(folder)
        (tmp_path / "away").rename(path)


def read_json_of(content, folder):
    (folder / "copy.json").write_bytes(content)
    return read_json(folder / "copy.json")


def test_a_published_folder_has_no_checksums_and_passes(tmp_path):
    write_json(tmp_path / "config.json", {})
    verify(tmp_path)


def test_arrays_and_json_come_back_as_they_were(tmp_path):
    arrays = {
        "m": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "step": np.array(7),
        "none": np.zeros((0, 2)),
        "state": np.array([2**64 - 1], np.uint64),
    }
    write_arrays(tmp_path / "new" / "optimizer.safetensors", arrays, {"kind": "adamw"})
    found = read_arrays(tmp_path / "new" / "optimizer.safetensors")
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert np.array_equal(found[name], array)
    value = {"state": 2**127 + 1, "loss": 0.1, "text": "naïve \u2028", "list": [None, True]}
    write_json(tmp_path / "training.json", value)
    assert read_json(tmp_path / "training.json") == value
    with pytest.raises(InputError, match="cannot read .*absent"):
        read_json(tmp_path / "absent.json")
    with pytest.raises(InputError, match="cannot read .*absent"):
        read_arrays(tmp_path / "absent.safetensors")
