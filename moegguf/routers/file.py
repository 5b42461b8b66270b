"""A router as a small file: safetensors, one F32 matrix a site, and strings that say what it is.

`write_router` and `read_router` are each other's inverse. A router that is shared by all layers is stored once for
each role. Names: `blk.LAYER.ROLE.router` or `ROLE.router`, and `trunk.NAME` for trunk tensors trained along.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import safetensors

from moegguf.atomic import atomic_file, check_writable
from moegguf.errors import UserError
from moegguf.recipe import RouterMode
from moegguf.routers import ROLES, Router
from moegguf.routers.safetensors_head import safetensors_head

FORMAT, VERSION = "moegguf-router", "1"
_TRUNK = "trunk."
_NAME = re.compile(r"(?:blk\.(?P<layer>\d{1,5})\.)?(?P<role>\w+)\.router")
_MEND = "use a file that `moegguf route fit`, `route set` or `train` wrote"


def write_router(path: Path, router: Router) -> None:
    """Write `router` to `path`, whole or not at all."""
    with atomic_file(path) as file:
        file.write(router_bytes(router))


def router_bytes(router: Router) -> bytes:
    """The file of `router`, the same for the same router."""
    tensors = {_name(router, layer, role): matrix for (layer, role), matrix in router.matrices.items()}
    tensors |= {_TRUNK + name: values for name, values in sorted(router.trunk.items())}
    about = {
        "experts": list(router.experts),
        "k": router.k,
        "layers": sorted({layer for layer, _ in router.matrices}),
        "always_on": router.always_on,
        "shared": router.shared,
        "std": router.std,
        "seed": router.seed,
        "settings": dict(router.settings),
    }
    texts = {"format": FORMAT, "version": VERSION, "mode": str(router.mode)}
    texts |= {key: json.dumps(value) for key, value in about.items()}
    arrays = {name: np.ascontiguousarray(values, "<f4") for name, values in tensors.items()}
    return safetensors_head(texts, arrays) + b"".join(values.tobytes() for values in arrays.values())


def check_target(path: Path, overwrite: bool) -> None:
    """Raises UserError where no router can be written. `overwrite` lets routers be replaced, but no model's weights."""
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: expected a name that ends in .safetensors", "choose another -o")
    if path.is_file():
        try:
            read_router(path)
        except UserError as error:
            raise UserError(f"{path}: exists already, and is no router", "choose another -o") from error
    check_writable(path, overwrite)


def read_router(path: Path) -> Router:
    """The router in `path`. Raises UserError when it is no such file or a damaged one."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise UserError(f"{path}: is a safetensors file, but no router", _MEND)
            if about.get("version") != VERSION:
                raise UserError(f"{path}: router format {about.get('version')}, this moegguf knows {VERSION}", _MEND)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return _router(about, tensors)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such router file", "check the path") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})", "check the path") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: is no intact safetensors file ({error})", _MEND) from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is a damaged router file ({error!r})", _MEND) from error


def _router(about: dict[str, str], tensors: dict[str, np.ndarray]) -> Router:
    experts, layers = json.loads(about["experts"]), json.loads(about["layers"])
    matrices = {}
    for name, values in tensors.items():
        if name.startswith(_TRUNK):
            continue
        match = _NAME.fullmatch(name)
        if match is None or match["role"] not in ROLES:
            raise ValueError(f"unknown tensor {name}")
        if values.ndim != 2 or len(values) != len(experts) or not np.isfinite(values).all():
            raise ValueError(f"{name} of shape {values.shape} does not give {len(experts)} experts a finite row each")
        for layer in layers if match["layer"] is None else [int(match["layer"])]:
            matrices[layer, match["role"]] = values.astype(np.float32)
    return Router(
        mode=RouterMode(about["mode"]),
        experts=tuple(map(str, experts)),
        k=int(json.loads(about["k"])),
        matrices=dict(sorted(matrices.items())),
        always_on=json.loads(about["always_on"]),
        shared=bool(json.loads(about["shared"])),
        std=json.loads(about["std"]),
        seed=json.loads(about["seed"]),
        settings={str(key): str(value) for key, value in json.loads(about["settings"]).items()},
        trunk={name.removeprefix(_TRUNK): values for name, values in tensors.items() if name.startswith(_TRUNK)},
    )


def _name(router: Router, layer: int, role: str) -> str:
    return f"{role}.router" if router.shared else f"blk.{layer}.{role}.router"
