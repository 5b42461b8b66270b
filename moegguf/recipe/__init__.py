"""models.toml → a frozen `Recipe`. Everything that can be checked without opening a model is checked here.

    [mix.NAME]
    base = "hf:org/model"                         # gives everything but the experts' FFNs
    trunk = "base"                                # or "mean" of all experts, or the name of one
    experts = [{ name = "math", source = "hf:org/math-model", weight = 0.5, quant = "Q6_K" }, ...]
    mix = "ffn"                                   # or ffn+attention, fine-grained, fine-grained+attention
    layers = [0, "4-7"]                           # only these layers are mixed (default: all)
    router = "gateless"                           # or "router.safetensors", or a table:
                                                  # { mode = "noisy", k = 2, std = 0.02, seed = 0, shared = true }
                                                  # { mode = "ridge", k = 2, lambda = 0.01, temperature = 0.1 }
                                                  # { mode = "hidden", k = 2, tap = "router_input", pool = "mean" }
    domains = { math = "math.jsonl", ... }        # text of each expert's domain: for fits, maps and evaluation
    compact = { size = "1.5x" }                   # gate-less: merge neurons whose copies are alike, to that many times
                                                  # one model's FFNs, or as far as { max_kld = 0.001 } allows
    always_on = "math"                            # not gate-less: this expert runs for every token
    layout = "mixtral"                            # or fused, shared, auto
    quant = "Q4_K_M"                              # or { preset = "Q4_K_M", attn = "Q8_0", tensors = { REGEX = "F16" } }
                                                  # { budget = "12GB" }, { bpw = 4.25 }: types chosen to fit;
                                                  # { plan = "types.json" }: types that --save-plan wrote
                                                  # gate-less, with a budget: split = "neurons", "experts", "none" or
                                                  # "auto" (with layout auto): two precisions in every layer
    round_types = "up"                            # or down: experts of more precisions than a layer holds share them
    imatrix = "imatrix.gguf"                      # from `moegguf calibrate` or llama-imatrix, for few bits; of the
                                                  # mix or its base, and in the table of an expert one of its own
    output = "mix.gguf"

The command line makes the same table from its flags and goes through the same checks, so a flag, a key and
their errors cannot drift apart. All faults are collected and reported at once.
"""

from __future__ import annotations

from moegguf.recipe.file import find_recipes_file, load_recipe, load_recipes, load_tables
from moegguf.recipe.parsing import parse_recipe
from moegguf.recipe.specs import (
    DEFAULT_QUANT,
    FITTED,
    TRUNK_OF_BASE,
    TRUNK_OF_MEAN,
    Budget,
    CompactSpec,
    ExpertSpec,
    FitSpec,
    Layout,
    Mixed,
    Pool,
    QuantSpec,
    Recipe,
    Role,
    Rounding,
    RouterMode,
    RouterSpec,
    Splitting,
    Tap,
)

__all__ = [
    "DEFAULT_QUANT",
    "FITTED",
    "TRUNK_OF_BASE",
    "TRUNK_OF_MEAN",
    "Budget",
    "CompactSpec",
    "ExpertSpec",
    "FitSpec",
    "Layout",
    "Mixed",
    "Pool",
    "QuantSpec",
    "Recipe",
    "Role",
    "Rounding",
    "RouterMode",
    "RouterSpec",
    "Splitting",
    "Tap",
    "find_recipes_file",
    "load_recipe",
    "load_recipes",
    "load_tables",
    "parse_recipe",
]
