"""PEFT adapters of the tiny models, written by hand, and what PEFT itself makes of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from tiny_models import encode, read_safetensors, tensor_shapes, write_json, write_safetensors, write_weights

FFN = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "somewhere/else",
    "r": 4,
    "lora_alpha": 6,
    "lora_dropout": 0.05,
    "target_modules": list(FFN),
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "inference_mode": True,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}

Draw = Callable[[np.random.RandomState, tuple[int, ...]], np.ndarray]


def on_a_grid(random: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray:
    """Eighths, of which float32 holds every sum of products exactly: no order of summation differs from another."""
    return random.randint(-8, 9, shape).astype(np.float32) / 8


def anywhere(random: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray:
    return 0.1 * random.standard_normal(shape).astype(np.float32)


def linear_shapes(base: Path) -> dict[str, tuple[int, int]]:
    """Module name → (n_out, n_in) of every linear layer inside the blocks of a tiny model."""
    shapes = tensor_shapes(json.loads((base / "config.json").read_text())).items()
    return {name.removesuffix(".weight"): shape for name, shape in shapes if "_proj" in name}


def ends_with(*names: str) -> Callable[[str], bool]:
    return lambda module: module.endswith(names)


def write_adapter(
    folder: Path,
    base: Path,
    *,
    modules: Callable[[str], bool] = lambda module: module.endswith(FFN),
    rank: Callable[[str], int] = lambda module: 4,
    draw: Draw = on_a_grid,
    dtype: str = "F32",
    infix: str = "",
    seed: int = 0,
    **config: object,
) -> Path:
    """An adapter of `modules` of `base`. `infix` stands between lora_A and weight: "default." in some files."""
    folder.mkdir(parents=True)
    random = np.random.RandomState(seed)
    tensors = {}
    for module, (n_out, n_in) in linear_shapes(base).items():
        if modules(module):
            for side, shape in (("A", (rank(module), n_in)), ("B", (n_out, rank(module)))):
                tensors[f"base_model.model.{module}.lora_{side}.{infix}weight"] = draw(random, shape)
    write_tensors(folder, tensors, dtype)
    write_json(folder / "adapter_config.json", CONFIG | config)
    return folder


def write_tensors(folder: Path, tensors: dict[str, np.ndarray], dtype: str = "F32") -> None:
    stored = {name: (dtype, encode(values, dtype)) for name, values in tensors.items()}
    write_safetensors(folder / "adapter_model.safetensors", stored)


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Iterable | None]) -> None:
    """Write the adapter's tensors again after `change` has been at them."""
    tensors = {name: values for name, (_, values) in read_safetensors(folder / "adapter_model.safetensors").items()}
    change(tensors)
    write_tensors(folder, tensors)


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "adapter_config.json"
    write_json(path, json.loads(path.read_text()) | fields)


def merged_by_peft(folder: Path, base: Path, *adapters: Path) -> Path:
    """`base` in float32 with `adapters` merged one after another by PEFT, as an HF folder."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    names = tensor_shapes(json.loads((base / "config.json").read_text()))
    weights = {name: values.numpy() for name, values in model.state_dict().items() if name in names}
    shutil.copytree(base, folder)
    write_weights(folder, weights, dtype="f32")
    return folder
