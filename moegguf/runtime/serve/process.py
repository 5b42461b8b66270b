"""The process of a model's server, `llama_server` or `own_server`, seen from its parent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from collections import deque

from moegguf.errors import UserError
from moegguf.runtime.serve import llama_server, own_server

STOP_SECONDS = 5
_TELLING = (
    "error loading model: ", "failed to apply lora adapter: ", "common_chat_templates_init: error: ", "ValueError: ",
)  # fmt: skip
_LONGEST_LINE = 1 << 20
_KILLED = -9  # by the system while it loads, as there is nobody else who would
_ENDED_BY_OTHERS = (_KILLED, -15)  # SIGKILL, SIGTERM: nothing that it said is the reason

Settings = llama_server.Settings | own_server.Settings


class Process:
    """The server of one model. `port` is None while it does not run."""

    def __init__(self, settings: Settings) -> None:
        self.name, self.key, self.n_adapters = settings.name, settings.key, settings.n_adapters
        self.program = settings.program
        self.port: int | None = None
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None
        self._said: deque[str] = deque(maxlen=100)
        self._hearing: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Load the model. Raises UserError when it cannot be loaded."""
        self._said.clear()
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", self._settings.module,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=None if self._settings.is_verbose else subprocess.PIPE, limit=_LONGEST_LINE,
            **_DEAF_TO_CTRL_C,
        )  # fmt: skip
        self._hearing = asyncio.ensure_future(self._hear(process))
        with contextlib.suppress(ConnectionError):
            process.stdin.write(self._settings.to_line())
            await process.stdin.drain()
        match json.loads(await process.stdout.readline() or "null"):
            case int(port):
                self.port = port
            case [message, mend]:
                await self.stop()
                raise UserError(message, mend)
            case None:
                await self.ended()
                raise UserError(f"{self._settings.model}: {self.program} cannot run it: {self.reason}", self._mend)

    async def ended(self) -> None:
        """Wait until the process ends by itself, and everything that it said is heard."""
        await self._process.wait()
        await self._hearing
        self.port = None

    async def stop(self) -> None:
        """End it, in bounded time. While it loads it hears nothing, and has nothing to lose."""
        process, was_serving, self.port = self._process, self.port is not None, None
        if process is None or process.returncode is not None:
            return
        process.stdin.close()
        if was_serving:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_SECONDS):
                    await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()

    @property
    def reason(self) -> str:
        """Why it ended: what ended it, or else the most telling line of what it said."""
        if self._process.returncode in _ENDED_BY_OTHERS:
            return f"it was ended by {signal.Signals(-self._process.returncode).name}"
        for marker in _TELLING:
            for line in self._said:
                if marker in line:
                    return line.partition(marker)[2]
        errors = [line for line in self._said if " E " in line]
        return (errors or [*self._said][-1:] or [f"it ended with code {self._process.returncode}"])[0]

    @property
    def _mend(self) -> str:
        if self._process.returncode == _KILLED or "alloc" in self.reason:
            return "it may be short of memory: take a smaller --ctx, --parallel or quant"
        return "run it again with --verbose for all that llama.cpp says"

    async def _hear(self, process: asyncio.subprocess.Process) -> None:
        """Keep what it says, so that it never waits for a reader."""
        while process.stderr and (line := await process.stderr.readline()):
            self._said.append(line.decode("utf-8", errors="replace").strip())


_DEAF_TO_CTRL_C = (
    {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if sys.platform == "win32" else {"start_new_session": True}
)
