"""Layouts: three ways to store the same mix so that stock llama.cpp computes it.

`lay_out` is the table. Each layout is one file with one function, `lay_out(mix) -> Form`: the architecture,
the metadata that differs from the base's, and every output tensor as slots. All three give the same numbers;
they differ in speed, in what a file can hold and in what can be edited later.

    mixtral   stacked experts and a router                      any router mode
    fused     one dense FFN that is the sum of all experts      gate-less; fastest; any gated architecture
    shared    an always-on group beside a routed stack          two precisions, or an always-on expert
"""

from __future__ import annotations

from moegguf.layouts import fused, mixtral, shared
from moegguf.mix import Mix
from moegguf.recipe import Layout
from moegguf.tensor import Form

_LAYOUTS = {Layout.MIXTRAL: mixtral.lay_out, Layout.FUSED: fused.lay_out, Layout.SHARED: shared.lay_out}


def lay_out(mix: Mix, layout: Layout) -> Form:
    """The output file of `mix` in `layout`, without types."""
    return _LAYOUTS[layout](mix)
