"""JSON over Python's own HTTP server, for the servers that models have on the loopback."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler
from typing import Any


class JsonHandler(BaseHTTPRequestHandler):
    """Reads and writes JSON; says nothing by itself, as the client says what it does."""

    def read_json(self) -> Any:
        """What the request's body says. Raises ValueError when it is no JSON."""
        return json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def send_json(self, status: int, content: object) -> None:
        self.send_whole(status, "application/json", json.dumps(content).encode())

    def send_whole(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass
