"""A drawn graph is DOT text that Graphviz reads, and says what was computed."""

from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import pytest

import autograd.functional as F
from autograd import Tensor, draw, nn, no_grad

NODE = re.compile(r'  (\w+) \[(?:shape=(\w+), )?label="((?:[^"\\]|\\.)*)"\];')
EDGE = re.compile(r"  (\w+) -> (\w+);")


def parse(text):
    """({name: (shape of its box, label)}, [(from, to)]) of DOT text, each line of which must make sense."""
    lines = text.splitlines()
    assert lines[0] == "digraph {" and lines[-1] == "}" and text.endswith("}\n")
    nodes, edges = {}, []
    for line in lines[2:-1]:
        node, edge = NODE.fullmatch(line), EDGE.fullmatch(line)
        assert node or edge, line
        if node:
            assert node[1] not in nodes
            nodes[node[1]] = node[2], node[3]
        else:
            edges.append((edge[1], edge[2]))
    assert {end for edge in edges for end in edge} <= nodes.keys()
    if shutil.which("dot"):
        run = subprocess.run(["dot", "-Tsvg"], input=text.encode(), capture_output=True, check=True)
        assert b"<svg" in run.stdout and not run.stderr
    return nodes, edges


def tensor(*shape, value=0.5):
    return Tensor(np.full(shape, value, np.float32), requires_grad=True)


def test_an_expression():
    a, b = tensor(2, 3), tensor(3)
    out = (a * b + 1.0).sum()
    nodes, edges = parse(draw(out))
    labels = {name: label for name, (_, label) in nodes.items()}
    boxes = sorted(label for shape, label in nodes.values() if shape == "box")
    assert boxes == ["2x3 float32", "3 float32"]
    inner = {label for shape, label in nodes.values() if shape is None}
    assert inner == {r"mul\n2x3 float32", r"add\n2x3 float32", r"sum\nscalar float32"}
    assert sorted((labels[a], labels[b]) for a, b in edges) == [
        ("2x3 float32", r"mul\n2x3 float32"),
        ("3 float32", r"mul\n2x3 float32"),
        (r"add\n2x3 float32", r"sum\nscalar float32"),
        ("constant", r"add\n2x3 float32"),
        (r"mul\n2x3 float32", r"add\n2x3 float32"),
    ]


def test_gradients_show_after_backward():
    x, y = tensor(2, 2, value=3.0), tensor(value=2.0)
    out = (x * x * y).sum()
    before = draw(out)
    assert "grad" not in before and r"scalar float32\nvalue 2" in before
    out.backward()
    after = draw(out)
    nodes, edges = parse(after)
    labels = {label for shape, label in nodes.values() if shape == "box"}
    # dx = 2 x y = 12 four times, of norm 24; dy = the sum of x^2 = 36.
    assert labels == {r"2x2 float32\n|grad| 24", r"scalar float32\nvalue 2\ngrad 36"}
    assert (len(nodes), len(edges)) == tuple(map(len, parse(before)))  # the graph is all there still


def test_a_shared_tensor_is_one_vertex():
    x = tensor(3)
    y = x.exp()
    nodes, edges = parse(draw(y * y + x))
    assert len(nodes) == 4 and len(edges) == 5
    assert sum(label.startswith("exp") for _, label in nodes.values()) == 1
    (exp,) = (name for name, (_, label) in nodes.items() if label.startswith("exp"))
    (mul,) = (name for name, (_, label) in nodes.items() if label.startswith("mul"))
    assert edges.count((exp, mul)) == 2


def test_several_constants_are_several_vertices():
    nodes, edges = parse(draw(tensor(2) * 2.0 + 3.0))
    constants = [name for name, (_, label) in nodes.items() if label == "constant"]
    assert len(constants) == 2 and all(sum(a == c for a, _ in edges) == 1 for c in constants)


def test_leaves_and_what_was_not_recorded():
    assert parse(draw(tensor(2, 1))) == ({"n0": ("box", "2x1 float32")}, [])
    with no_grad():
        assert len(parse(draw(tensor(2) * 2.0))[0]) == 1


def test_a_layer_and_a_deep_graph():
    layer = nn.Linear(3, 2)
    loss = F.cross_entropy(layer(Tensor(np.ones((4, 3), np.float32))), np.array([0, 1, 1, 0]))
    labels = [label for _, label in parse(draw(loss))[0].values()]
    assert {r"linear\n4x2 float32", r"cross_entropy\nscalar float32"} <= set(labels)
    assert {"2x3 float32", "2 float32"} <= set(labels)
    x = tensor(1)
    for _ in range(3000):  # deeper than Python's stack
        x = x.tanh()
    assert draw(x).count("->") == 3000


def test_on_the_stand_in_for_a_gpu(strict_cupy):
    x = Tensor(strict_cupy.asarray([3.0, 4.0]), requires_grad=True)
    out = (x * x).sum()
    out.backward()
    assert r"2 float64\n|grad| 10" in {label for _, label in parse(draw(out))[0].values()}


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.0])
def test_odd_values(value):
    assert f"value {value:.4g}" in draw(tensor(1, value=value))
