"""A checkpoint's tensors as a forward pass takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlxedge.errors import CorruptFileError
from mlxedge.ops import load_reference

if TYPE_CHECKING:
    import numpy as np

    from mlxedge.sources.checkpoint import Checkpoint, SourceTensor


class Weights:
    """The tensors of a checkpoint as matrices and vectors of a forward pass.

    ``nbytes`` counts the matrices that were read. Raises CorruptFileError for a tensor that is
    missing or has another shape.
    """

    def __init__(self, checkpoint: Checkpoint, ops: Any) -> None:
        self.nbytes = 0
        self._ops = ops
        self._tensors = checkpoint.tensors
        self._path = checkpoint.origin.path

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def matrix(self, name: str, rows: int, cols: int) -> Any:
        return self._part(self.tensor(name, (rows, cols)), 0, rows)

    def _part(self, tensor: SourceTensor, start: int, stop: int) -> Any:
        parts = tensor.read_rows(start, stop)
        matrix = self._ops.Matrix(parts, tensor.encoding, stop - start, tensor.cols)
        self.nbytes += matrix.nbytes
        return matrix

    def products(self, name: str, x: Any, outs: Sequence[Any], add_to: Any = None) -> list[Any]:
        """``out = x @ W.T + b`` of a linear layer whose rows are those of all ``outs`` in turn, and
        then ``add_to += out``."""
        tensor = self.tensor(name, (sum(out.width for out in outs), x.width))
        bias = self.optional(name.removesuffix("weight") + "bias")
        found, start = [], 0
        for out in outs:
            stop = start + out.width
            part = None if bias is None else bias[start:stop]
            found.append(self._ops.Product(self._part(tensor, start, stop), out, part, add_to))
            start = stop
        return found

    def picked(self, name: str, x: Any, outs: Sequence[Any], rows: Sequence[Any]) -> list[Any]:
        """``out = x @ W[rows].T + b[rows]``, with rows (an index int64) for each of ``outs``."""
        tensor = self.tensor(name, (sum(out.width for out in outs), x.width))
        bias = self.optional(name.removesuffix("weight") + "bias")
        parts, found = tensor.read(), []
        for out, index in zip(outs, rows, strict=True):
            some = {part: values[index] for part, values in parts.items()}
            matrix = self._ops.Matrix(some, tensor.encoding, out.width, tensor.cols)
            self.nbytes += matrix.nbytes
            found.append(self._ops.Product(matrix, out, None if bias is None else bias[index]))
        return found

    def experts(self, name: str, count: int, x: Any, out: Any) -> Any:
        """``out = x @ W[e].T + b[e]`` for the slots of each of ``count`` experts."""
        tensor = self.tensor(name, (count, out.width, x.width))
        matrix = self._ops.Matrix(tensor.read(), tensor.encoding, count * out.width, x.width)
        self.nbytes += matrix.nbytes
        bias = self.optional(name.removesuffix("weight") + "bias")
        return self._ops.ExpertProduct(
            matrix, out, None if bias is None else bias.reshape(count, out.width)
        )

    def vector(self, name: str) -> np.ndarray:
        """f32 ``[size]``."""
        tensor = self.tensor(name)
        vector = load_reference().decode(tensor.read(), tensor.encoding)
        return vector.reshape(-1)

    def optional(self, name: str) -> np.ndarray | None:
        return self.vector(name) if name in self._tensors else None

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> SourceTensor:
        if name not in self._tensors:
            raise CorruptFileError(self._path, f"the tensor {name} is missing")
        tensor = self._tensors[name]
        if shape is not None and tensor.shape != shape:
            raise CorruptFileError(
                self._path, f"the tensor {name} is {list(tensor.shape)}, not {list(shape)}"
            )
        return tensor
