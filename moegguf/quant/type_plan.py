"""Types chosen tensor by tensor, as a file: to be read, edited by hand and used again.

    {"format": "moegguf type plan", "version": 1, "mix": "demo", "budget": "3MB", "loss": 0.0012,
     "shapes": {"token_embd.weight": [1024, 256], …}, "types": {"token_embd.weight": "Q6_K", …}}

`types` is what there is to edit. `shapes` say which mix it is for: the same names and shapes, or it is refused. A mix
whose neurons are split also has `"split": {"by": "neurons", "fine": 256, "digest": …}`: which neurons are fine follows
from the importance matrix, and the digest says whether it was the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import GGMLQuantizationType as Type

from moegguf.atomic import atomic_file
from moegguf.errors import UserError
from moegguf.quant.presets import parse_type
from moegguf.quant.split import Split
from moegguf.recipe import Splitting
from moegguf.tensor import Planned

FORMAT, VERSION = "moegguf type plan", 1


@dataclass(frozen=True)
class SplitRule:
    """How neurons are split: `fine` of each layer are finer, `digest` is that of which they are."""

    by: Splitting
    fine: int
    digest: str


@dataclass(frozen=True)
class TypePlan:
    """`types` and `shapes` (numpy's) of every tensor that is quantised; `loss` is what was predicted, in nats."""

    path: Path
    chosen_for: str
    types: Mapping[str, Type]
    shapes: Mapping[str, tuple[int, ...]]
    split: SplitRule | None = None

    def types_for(self, planned: Sequence[Planned]) -> Mapping[str, Type]:
        """Its types, if it is for the mix that `planned` are the tensors of. Raises UserError, naming the first tensor
        that does not fit, if it is for another."""
        expected = shapes_of(planned)
        for name in {**expected, **self.shapes}:
            ours, theirs = expected.get(name, "missing"), self.shapes.get(name, "missing")
            if ours != theirs:
                raise UserError(
                    f"{self.path}: is a plan for another mix: {name} is {theirs} in it, in this mix {ours}",
                    "make one for this mix with --budget and --save-plan",
                )
        return self.types


def shapes_of(planned: Sequence[Planned]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that are quantised."""
    return {tensor.name: tensor.shape for tensor in planned if tensor.type is not Type.F32}


def write_type_plan(
    path: Path, mix: str, chosen_for: str, loss: float, planned: Sequence[Planned], split: Split | None = None
) -> None:
    """Write the types of `planned` to `path`, replacing a file that is there."""
    shapes = shapes_of(planned)
    head = {"format": FORMAT, "version": VERSION, "mix": mix, "budget": chosen_for, "loss": loss}
    if split:
        head["split"] = {"by": split.by, "fine": split.n_fine, "digest": split.digest}
    types = {tensor.name: tensor.type.name for tensor in planned if tensor.name in shapes}
    lines = [f'  "{key}": {json.dumps(value)}' for key, value in head.items()]
    lines += [f'  "{key}": {_table(table)}' for key, table in (("shapes", shapes), ("types", types))]
    with atomic_file(path) as file:
        file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())


def _table(table: Mapping[str, object]) -> str:
    """An entry a line, as people edit them."""
    return "{\n" + ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in table.items()) + "\n  }"


def read_type_plan(path: Path) -> TypePlan:
    """The plan in `path`. Raises UserError when it is none, is damaged, or holds types that there are not."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", "check the path given to --plan") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no valid JSON ({error})", "mend that line, or make it again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: is no plan of types", "make one with --budget and --save-plan")
    if content.get("version") != VERSION:
        found = content.get("version")
        raise UserError(f"{path}: plan version {found!r}, this moegguf knows {VERSION}", "make it again")
    types, shapes, chosen_for = (content.get(key) for key in ("types", "shapes", "budget"))
    if not _is_table(types, str) or not _is_table(shapes, list) or not isinstance(chosen_for, str):
        raise UserError(f"{path}: lacks a table of types, a table of shapes or a budget", "make it again")
    if different := [name for name in {**shapes, **types} if (name in types) != (name in shapes)]:
        where = "types" if different[0] in types else "shapes"
        raise UserError(f"{path}: {different[0]} is among the {where} only", "a plan has one type for each tensor")
    parsed, faults = {}, []
    for name, type in types.items():
        try:
            parsed[name] = parse_type(type)
        except UserError as error:
            faults.append(UserError(f"{path}: {name}: {error.message}", error.mend))
    if faults:
        raise UserError.of(faults)
    split = _read_split(path, content["split"]) if "split" in content else None
    return TypePlan(path, chosen_for, parsed, {name: tuple(shape) for name, shape in shapes.items()}, split)


def _read_split(path: Path, found: object) -> SplitRule:
    rule = found if isinstance(found, dict) else {}
    by, fine, digest = (rule.get(key) for key in ("by", "fine", "digest"))
    if by not in (Splitting.NEURONS, Splitting.EXPERTS) or type(fine) is not int or not isinstance(digest, str):
        raise UserError(f"{path}: its split lacks by = neurons or experts, a number fine or a digest", "make it again")
    return SplitRule(Splitting(by), fine, digest)


def _is_table(value: object, kind: type) -> bool:
    return isinstance(value, dict) and all(isinstance(item, kind) for item in value.values())
