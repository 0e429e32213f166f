"""A picture of the recorded graph, as Graphviz DOT text."""

from __future__ import annotations

import numpy as np

from .tensor import Node, Tensor, _reachable, _vertex


def draw(tensor: Tensor) -> str:
    """DOT text of the graph below a tensor: boxes are leaves, ovals operations, each with its shape.

    After `backward` the leaves show the size of their gradients. Make a picture of it with
    `dot -Tsvg graph.dot -o graph.svg`, or paste it into any Graphviz viewer.
    """
    lines = ["digraph {", '  rankdir="LR"; node [fontname="monospace"];']
    root = _vertex(tensor)
    names: dict[int, str] = {}

    def add(vertex: Node | Tensor) -> str:
        if id(vertex) not in names:
            names[id(vertex)] = f"n{len(names)}"
            lines.append(f"  {names[id(vertex)]} [{_label(vertex)}];")
        return names[id(vertex)]

    for node in _reachable(root):
        for edge in node.edges:
            source = add(edge) if edge is not None else _constant(lines, len(lines))
            lines.append(f"  {source} -> {add(node)};")
    add(root)
    return "\n".join([*lines, "}"]) + "\n"


def _label(vertex: Node | Tensor) -> str:
    shape = "x".join(map(str, vertex.shape)) or "scalar"
    text = f"{shape} {vertex.dtype}"
    if isinstance(vertex, Node):
        return f'label="{vertex.name}\\n{text}"'
    if vertex.size == 1:
        text += f"\\nvalue {vertex.item():.4g}"
    if vertex.grad is not None:
        g = vertex.grad.numpy().astype(np.float64)
        text += f"\\ngrad {g.item():.4g}" if g.size == 1 else f"\\n|grad| {np.sqrt((g * g).sum()):.4g}"
    return f'shape=box, label="{text}"'


def _constant(lines: list[str], number: int) -> str:
    name = f"c{number}"
    lines.append(f'  {name} [shape=plaintext, label="constant"];')
    return name
