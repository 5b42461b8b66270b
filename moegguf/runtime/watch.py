"""Evaluate sequences while somebody looks at the nodes of the graph.

llama.cpp calls `cb_eval` for every node, first to ask whether it is wanted, then, once it is computed, to show it
(ggml/src/ggml-backend.cpp). Whoever has seen enough may end the graph, which saves what follows, the output matrix
above all. That is left out where there are other devices than the CPU: a graph then is in parts, and those that follow
would run on what was not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from moegguf.runtime.context import MAX_SEQUENCES, Entry, check_fits, groups, max_outputs
from moegguf.runtime.model import Model

Lengths = tuple[int, ...]


class Watch:
    """A context of its own on the weights of a model. Close it before the model.

    `wants(node)` says whether a node is to be shown; `take(node)` sees it, and says whether the graph is to go on.
    In its last layer llama.cpp keeps only the tokens whose output is asked for, so all of them are.
    """

    def __init__(self, model: Model, wants: Callable[[int], bool], take: Callable[[int], bool]) -> None:
        self._wants, self._take = wants, take
        self._n_ctx = model.n_ctx
        self._n_batch = min(max_outputs(model.vocab.n_tokens), model.n_cells)
        self._n_sequences = min(MAX_SEQUENCES, self._n_batch)
        self._may_end = not model.placement.devices
        self._has_ended = False
        self._error: BaseException | None = None
        self._context = model.open_context(
            n_batch=self._n_batch, n_sequences=self._n_sequences, n_outputs=self._n_batch, on_node=self._on_node
        )

    def close(self) -> None:
        self._context.close()

    def batches(self, sequences: Iterable[Sequence[int]]) -> Iterator[tuple[Lengths, list[list[Entry]]]]:
        """Groups of sequences, in order: the lengths of each, and the batches that evaluate them, for `decode`.

        A group is as many sequences as 512 tokens hold, or one longer one. No sequence is empty. Raises UserError for
        one longer than the context.
        """
        for group in groups(sequences, self._n_batch, self._n_sequences):
            lengths = tuple(map(len, group))
            check_fits(max(lengths), self._n_ctx)
            entries = [
                Entry(token, position, number, has_output=True)
                for number, tokens in enumerate(group)
                for position, token in enumerate(tokens)
            ]
            self._context.forget()
            yield lengths, [entries[at : at + self._n_batch] for at in range(0, len(entries), self._n_batch)]

    def decode(self, batch: Sequence[Entry]) -> None:
        """Evaluate a batch. Raises what `wants` and `take` raised, and KeyboardInterrupt at Ctrl-C."""
        self._has_ended, self._error = False, None
        self._context.decode(batch)
        if self._error:
            raise self._error

    def _on_node(self, node: int, ask: bool, _user_data: int | None) -> bool:
        """ctypes would drop an exception: it is kept, and ends the graph."""
        try:
            return self._asked(node) if ask else self._shown(node)
        except BaseException as error:
            self._error, self._has_ended = error, True
            return ask

    def _asked(self, node: int) -> bool:
        """Once the graph is to end, any node will do: the answer to it is what ends the graph."""
        return self._has_ended or self._wants(node)

    def _shown(self, node: int) -> bool:
        if not self._has_ended:
            self._has_ended = not self._take(node) and self._may_end
        return not self._has_ended
