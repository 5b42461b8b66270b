"""What a command does, end to end. A job brings sides together that know nothing of each other: the build side, the
runtime, and what is measured. Commands and the Python API show what it gives; nothing here prints.

| command | jobs |
|---|---|
| `build` | `preparation`, then `build_report`; as the recipe asks `fitting`, `compaction` and `probing` |
| `route fit`, `route map` | `fit_targets` and `fitting`; `mapping` |
| `calibrate` | `imatrices`, one `calibration` after another |
| `prune` | `pruning`, by `saliency` |
| `train` | `training` |
| `eval` | `evaluation`, of `engines` |
| `measure` | `measuring`, by `divergences` |
| `export ollama` | `modelfiles` |
"""
