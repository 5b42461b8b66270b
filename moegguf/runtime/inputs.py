"""What enters the weights of a running model, as sums of squares per column: any GGUF, any architecture.

Every product of a weight of a layer is read where llama.cpp computes it, so nothing is assumed of the graph: q, k and
v, the output of attention, the router, gate, up and down, of dense FFNs, shared experts and stacked experts alike. For
the last of these each row counts for the expert that it goes through. The same is collected by llama.cpp's own tool
(tools/imatrix/imatrix.cpp), except for stacks whose matrices are not experts, which are left out here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from moegguf.errors import UserError
from moegguf.runtime.model import Model
from moegguf.runtime.nodes import Product, name_of, product_of, values_of
from moegguf.runtime.watch import Watch
from moegguf.squares import Squares, added

OUTPUT = "output.weight"
_LAST = b"result_norm"
"""What enters the output matrix. Nothing of interest comes after it, unless that matrix is."""


class InputSquares:
    """Collects the squares of all inputs; of the output matrix too, if `output`. Close it before the model."""

    def __init__(self, model: Model, *, output: bool = False) -> None:
        self._output = output
        self._read: dict[str, Squares] = {}
        self._of_inputs: dict[tuple[int, int | None, int], Squares] = {}
        self._watch = Watch(model, self._wants, self._take)

    def __enter__(self) -> InputSquares:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self._watch.close()

    def run(self, sequences: Iterable[Sequence[int]]) -> Iterator[tuple[tuple[int, ...], dict[str, Squares]]]:
        """Evaluate sequences of tokens, each on its own; yield, for a few of them at a time and in the order given,
        their lengths and the squares of what entered each weight.

        Raises UserError for a sequence longer than the context and for activations that are NaN or Inf, and
        KeyboardInterrupt at Ctrl-C.
        """
        for lengths, batches in self._watch.batches(sequences):
            total: dict[str, Squares] = {}
            for batch in batches:
                self._read, self._of_inputs = {}, {}
                self._watch.decode(batch)
                total = added(total, self._read)
            yield lengths, total

    def _wants(self, node: int) -> bool:
        product = product_of(node)
        if product is None:
            return not self._output and name_of(node) == _LAST
        if product.weight.startswith("blk."):
            return product.experts is not None or product.n_matrices == 1
        return self._output and product.weight == OUTPUT

    def _take(self, node: int) -> bool:
        product = product_of(node)
        if product is None:
            return False
        squares = self._squares(product)
        self._read[product.weight] = self._read[product.weight] + squares if product.weight in self._read else squares
        return True

    def _squares(self, product: Product) -> Squares:
        """Those of its input, which several weights share."""
        key = product.input, product.experts, product.n_matrices
        if key not in self._of_inputs:
            x = values_of(product.input)
            squares = _of_rows(x) if product.experts is None else _of_experts(x, values_of(product.experts), key[2])
            if not np.isfinite(squares.sums).all():
                raise UserError(
                    f"{product.weight}: what enters it is not finite (NaN or Inf)",
                    "`moegguf inspect --check` says whether the file is damaged; else calibrate one of finer quant",
                )
            self._of_inputs[key] = squares
        return self._of_inputs[key]


def _of_rows(x: np.ndarray) -> Squares:
    rows = x.reshape(-1, x.shape[-1])
    return Squares(np.square(rows).sum(axis=0, dtype=np.float64)[None], np.array([len(rows)]))


def _of_experts(x: np.ndarray, experts: np.ndarray, n: int) -> Squares:
    """`x` is (1, n_tokens, k, n_cols), or with 1 in place of k where all experts of a token see the same;
    `experts` (1, 1, n_tokens, k)."""
    rows, experts = x[0], experts[0, 0]
    squares = np.square(rows)
    sums = np.zeros((n, rows.shape[-1]))
    for expert in range(n):
        token, place = np.nonzero(experts == expert)
        sums[expert] = squares[token, place % rows.shape[1]].sum(axis=0, dtype=np.float64)
    return Squares(sums, np.bincount(experts.ravel(), minlength=n))
