"""Where a file is, as Python's users write it."""

from __future__ import annotations

import os

Location = str | os.PathLike[str]
