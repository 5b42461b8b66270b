"""The layout that a recipe asks for, or that follows from what it asks for."""

from __future__ import annotations

from collections.abc import Mapping

from moegguf.recipe.quant import BUDGETS
from moegguf.recipe.specs import ExpertSpec, Layout, RouterMode, RouterSpec, Splitting
from moegguf.recipe.values import Reader


def choose_layout(
    read: Reader, value: object, router: RouterSpec, experts: tuple[ExpertSpec, ...], *, must_be_dense: bool
) -> Layout:
    asked = None if value is None else read.choice("layout", value, Layout, extra=("auto",))
    quants = list(dict.fromkeys(expert.quant for expert in experts))
    gateless = router.mode is RouterMode.GATELESS
    if gateless and must_be_dense:
        return _dense_layout(read, asked, quants)
    if len(quants) > 2 or (len(quants) == 2 and not _one_group_per_quant(router, experts)):
        allowed = (
            "one for all experts"
            if not gateless and not router.always_on
            else ("two different ones" if gateless else "one for the always-on expert and one for all others")
        )
        mend = "a layer holds at most two precisions: raise or lower some, or pass --round-types up or down"
        read.fault("experts.quant", quants, allowed, mend)
    if asked is None:
        return Layout.SHARED if len(quants) > 1 or router.always_on else Layout.MIXTRAL
    if asked == "auto":
        fastest = Layout.FUSED if gateless else Layout.MIXTRAL
        return Layout.SHARED if len(quants) > 1 or router.always_on else fastest
    if asked is Layout.FUSED and not gateless:
        read.fault("layout", asked, "mixtral with a router", "fused holds the mean of all experts: no router fits")
    if asked is not Layout.SHARED and len(quants) > 1:
        read.fault("layout", asked, "shared with two precisions", "drop the layout, or give all experts one quant")
    if asked is not Layout.SHARED and router.always_on:
        read.fault("layout", asked, "shared with always_on", "drop the layout")
    if asked is Layout.SHARED and not gateless and not router.always_on:
        read.fault("layout", asked, "mixtral with a router and no always_on", "name an always_on expert")
    return asked


def _dense_layout(read: Reader, asked: Layout | str | None, quants: list[str]) -> Layout:
    """The layout of gate-less mixes that only a dense FFN can hold."""
    if asked not in (None, "auto", Layout.FUSED):
        allowed = "fused for a fine-grained mix, one of some layers, or a compact one"
        read.fault("layout", asked, allowed, "drop the layout")
    if len(quants) > 1:
        read.fault("experts.quant", quants, "one for all experts in layout fused", "give all experts one quant")
    return Layout.FUSED


def _one_group_per_quant(router: RouterSpec, experts: tuple[ExpertSpec, ...]) -> bool:
    """Whether two precisions fall into the two groups of the shared layout."""
    if router.mode is RouterMode.GATELESS:
        return True
    return len({expert.quant for expert in experts if expert.name != router.always_on}) == 1


def choose_split(
    read: Reader,
    table: Mapping[str, object],
    router: RouterSpec,
    experts: tuple[ExpertSpec, ...],
    *,
    must_be_dense: bool,
) -> Splitting:
    quant, layout = table.get("quant"), table.get("layout")
    quant = quant if isinstance(quant, dict) else {}
    is_asked = "split" in quant
    asked = read.choice("quant.split", quant["split"], Splitting) if is_asked else Splitting.AUTO
    if asked in (None, Splitting.NONE) or not (is_asked or layout == "auto"):
        return Splitting.NONE
    needs = {
        "router gateless": not router.is_gateless,
        "a mix of whole FFNs in all layers that is not compact": must_be_dense,
        "one quant for all experts": len({expert.quant for expert in experts}) > 1,
        "a budget": not set(BUDGETS) & set(quant),
        "layout shared or auto": layout in (Layout.MIXTRAL, Layout.FUSED),
        "layout auto": asked is Splitting.AUTO and layout == Layout.SHARED,
    }
    unmet = [f"only with {need}" for need, is_unmet in needs.items() if is_unmet]
    if unmet and is_asked:
        read.fault("quant.split", asked, ", ".join(unmet), f"mend that, or choose split = {str(Splitting.NONE)!r}")
    return Splitting.NONE if unmet else asked
