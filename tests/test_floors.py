"""The floors of the house: examples -> tinyllm -> autograd -> kernels, imports downwards only.

Read from the sources with `ast`, so that an import inside a function counts too.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ["kernels", "autograd", "tinyllm", "examples"]  # from the ground up
SOURCES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in SOURCES]
ON_CUPY = {"autograd/backend.py"}
# Below the floors nothing but NumPy; what each package adds to it. The optional ones are extras.
THIRD_PARTY = {
    "kernels": {"numpy", "cupy"},
    "autograd": {"numpy", "cupy", "cupyx", "ml_dtypes"},
    "tinyllm": {"numpy", "ml_dtypes", "safetensors", "tiktoken", "tokenizers", "tqdm", "matplotlib"}
    | {"threadpoolctl", "huggingface_hub", "regex", "jinja2", "sacrebleu"},
    "examples": {"numpy", "tqdm", "matplotlib"},
}
# Models that are a published variation of another, or wrap any: there the subclass is the lesson.
VARIATIONS = {"gpt3": {"gpt2"}, "mistral": {"llama"}, "bert_tasks": {"bert"}}
WRAPPERS = {"lora", "instructgpt", "__init__"}


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)


def imports_of(source: ast.Module, name: str) -> set[str]:
    """The full names that a source imports: `from . import fused` in autograd/nn.py is autograd.fused."""
    package = name.removesuffix(".py").split("/")[:-1]
    found = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            found |= {".".join([*base, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                assert node.args and isinstance(node.args[0], ast.Constant), f"{name}: an import of what?"
                found.add(node.args[0].value)
    return found


def imports(name: str) -> set[str]:
    return imports_of(tree(name), name)


def test_the_sources_were_found():
    assert {"autograd/tensor.py", "tinyllm/models/gpt2.py", "examples/train_gpt2.py"} <= set(NAMES)


def test_every_kind_of_import_is_seen():
    source = """
import a.b, c as d
from e.f import g
from . import h
from .i import j
from .. import k
from ..l.m import n
def function():
    import o
    importlib.import_module("p")
    __import__("q")
"""
    expected = {"a.b", "c", "e.f.g", "x.y.h", "x.y.i.j", "x.k", "x.l.m.n", "o", "p", "q"}
    assert imports_of(ast.parse(source), "x/y/z.py") == expected


@pytest.mark.parametrize("name", NAMES)
def test_imports_run_downwards_only(name):
    floor = name.split("/")[0]
    tops = {module.split(".")[0] for module in imports(name)} - {"__future__"}
    foreign = tops - set(sys.stdlib_module_names) - set(FLOORS)
    assert foreign <= THIRD_PARTY[floor], f"{name} imports {foreign - THIRD_PARTY[floor]}"
    above = tops & set(FLOORS[FLOORS.index(floor) + 1 :])
    assert not above, f"{name} imports {above}, a floor above its own"
    if floor == "kernels":
        assert not tops & set(FLOORS) - {"kernels"}
    assert "tests" not in tops


@pytest.mark.parametrize("name", NAMES)
def test_cupy_comes_through_the_backend(name):
    cupy = {module for module in imports(name) if module.split(".")[0] in ("cupy", "cupyx")}
    assert not cupy or name in ON_CUPY or name.startswith("kernels/"), f"{name} imports {cupy}"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_pickled(name):
    """Neither directly nor by what pickles underneath: np.load with allow_pickle, shelve, joblib, torch."""
    pickling = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    assert not {module.split(".")[0] for module in imports(name)} & pickling
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant) and node.value.value is False


MODELS = [name for name in NAMES if name.startswith("tinyllm/models/")]


@pytest.mark.parametrize("name", MODELS)
def test_no_model_imports_another(name):
    own, models = Path(name).stem, {Path(model).stem for model in MODELS} - {"__init__"}
    if own in WRAPPERS:
        return
    others = set()
    for module in imports(name):
        parts = module.split(".")
        if parts[:2] == ["tinyllm", "models"]:
            assert parts[2:] and parts[2] in models, f"{name} imports {module}: which model is that?"
            others.add(parts[2])
    assert others - {own} <= VARIATIONS.get(own, set()), f"{name} imports {others}"


def public_functions(body: list[ast.stmt], prefix: str = ""):
    """(name, function) for each function and method whose path has no private name; __init__ is public."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if not node.name.startswith("_") or re.fullmatch("__(init|call|enter|exit)__", node.name):
                yield prefix + node.name, node


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("examples/")])
def test_public_functions_have_type_hints(name):
    bare = []
    for path, function in public_functions(tree(name).body):
        arguments = function.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        every += [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
        static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in function.decorator_list)
        if "." in path and not static:
            every = every[1:]  # self or cls
        bare += [f"{path}({a.arg})" for a in every if a.annotation is None]
        bare += [f"{path} -> ?"] if function.returns is None else []
    assert not bare, f"{name}: without a type hint: {', '.join(bare)}"


def test_type_hints_are_looked_for_everywhere():
    source = """
def shown(a, *b, c: int, **d): pass
def _hidden(a): pass
class Shown:
    def __init__(self, e): pass
    def method(self, f: int) -> None: pass
class _Hidden:
    def method(self, g): pass
"""
    found = [path for path, _ in public_functions(ast.parse(source).body)]
    assert found == ["shown", "Shown.__init__", "Shown.method"]
