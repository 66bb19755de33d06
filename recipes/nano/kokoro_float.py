"""Kokoro-82M as it is packaged, its eight-bit products multiplied out: the same model in floating point.

Each of them is a quantised input, an integer product with quantised weights, a bias and a scale; all of it becomes one
product of floating-point weights. Nothing else is changed.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

_PRODUCTS = {"ConvInteger": "Conv", "MatMulInteger": "MatMul"}


def multiplied_out(source: Path, target: Path) -> int:
    """Write the model of `source` to `target`; returns how many products were replaced. Raises ValueError for a graph
    of another make."""
    import onnx  # type: ignore[import-not-found]

    model = onnx.load(str(source))
    graph = _Graph(model.graph)
    replaced = [graph.replace(node) for node in list(model.graph.node) if node.op_type in _PRODUCTS]
    graph.write(replaced)
    part = target.with_suffix(".part")
    onnx.save(model, str(part))
    part.replace(target)
    return len(replaced)


class _Graph:
    """Who makes and who takes each value of an ONNX graph."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.maker = {name: node for node in graph.node for name in node.output}
        self.takers: dict[str, list[Any]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.takers[name].append(node)

    def replace(self, node: Any) -> Any:
        """The floating-point node that stands for an integer product and what follows it up to its scale."""
        from onnx import helper, numpy_helper

        quantised = self.maker[node.input[0]]
        last, bias = node, None
        while last.op_type != "Mul":
            (taker,) = self.takers[last.output[0]]
            if taker.op_type == "Add":
                bias = self._bias(next(name for name in taker.input if name != last.output[0]))
            elif taker.op_type not in ("Cast", "Mul"):
                raise ValueError(f"{node.name} is followed by {taker.op_type}; this is another export of the model")
            last = taker
        scale = next(name for name in last.input if self.maker[name].op_type == "Mul")
        weight_scale = next(name for name in self.maker[scale].input if name in self.constants)
        weight = self._values(node.input[1]) - (self._values(node.input[3]) if len(node.input) > 3 else 0)
        inputs = [quantised.input[0], f"{node.name}_weight"]
        self.graph.initializer.append(numpy_helper.from_array(weight * self._values(weight_scale), inputs[1]))
        if bias is not None:
            inputs.append(f"{node.name}_bias")
            self.graph.initializer.append(numpy_helper.from_array(bias.reshape(-1), inputs[2]))
        made = helper.make_node(_PRODUCTS[node.op_type], inputs, [last.output[0]], name=f"{node.name}_float")
        made.attribute.extend(node.attribute)
        return made

    def _bias(self, name: str) -> np.ndarray:
        """The bias behind its quantisation: what was divided by the scale."""
        while self.maker[name].op_type != "Div":
            name = self.maker[name].input[0]
        return self._values(self.maker[name].input[0])

    def _values(self, name: str) -> np.ndarray:
        from onnx import numpy_helper

        return numpy_helper.to_array(self.constants[name]).astype(np.float32)

    def write(self, made: list[Any]) -> None:
        """Put the new nodes in, leave out what nobody takes any more, and keep the order in which values are made."""
        maker = self.maker | {node.output[0]: node for node in made}
        order: list[Any] = []
        placed: set[int] = set()
        stack = [maker[output.name] for output in self.graph.output]
        while stack:
            node = stack[-1]
            waits = [maker[name] for name in node.input if name in maker and id(maker[name]) not in placed]
            if waits:
                stack += waits
                continue
            stack.pop()
            if id(node) not in placed:
                placed.add(id(node))
                order.append(node)
        used = {name for node in order for name in node.input}
        constants = [tensor for tensor in self.graph.initializer if tensor.name in used]
        nodes = [_copy(node) for node in order]
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(nodes)
        self.graph.initializer.extend(constants)


def _copy(message: Any) -> Any:
    """A protobuf message that deleting the original from its list leaves alone."""
    copy = type(message)()
    copy.CopyFrom(message)
    return copy
