"""Where a server listens, and who may come in there."""

from __future__ import annotations

import errno
import ipaddress
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from moegguf.checks import check_range
from moegguf.errors import UserError

BACKLOG = 512
KEY_VARIABLE = "MOEGGUF_API_KEY"
"""Of the environment: the key, for a server that is started by the command."""


@dataclass(frozen=True)
class Address:
    """What to listen on; port 0 is any that is free. `tls` holds the certificate's file and its key's."""

    host: str = "127.0.0.1"
    port: int = 8080
    tls: tuple[Path, Path] | None = None

    @classmethod
    def of(cls, host: str, port: int, tls_cert: Path | None, tls_key: Path | None) -> Address:
        """Raises UserError for what can be none."""
        if not isinstance(host, str):
            raise UserError(f"--host {host!r}: expected a name or an address", "127.0.0.1 is this machine alone")
        check_range("--port", port, 0, 65535)
        if (tls_cert is None) != (tls_key is None):
            raise UserError("--tls-cert and --tls-key belong together", "pass both, or none")
        return cls(host, port, (tls_cert, tls_key) if tls_cert else None)


def listen(address: Address) -> socket.socket:
    """A socket that holds `address`, and takes connections when it is served. Raises UserError."""
    family, host = _resolve(address)
    try:
        return socket.create_server((host, address.port), family=family, backlog=BACKLOG)
    except OverflowError:
        raise UserError(f"--port {address.port}: expected a number from 0 to 65535", "0 takes a free one") from None
    except OSError as error:
        reason, mend = _FAULTS.get(error.errno, (error.strerror, "take another --host or --port"))
        raise UserError(f"{address.host} port {address.port}: {reason}", mend) from error


def is_loopback(address: Address) -> bool:
    """Whether this machine alone can reach it. Raises UserError for a host that is not known."""
    return ipaddress.ip_address(_resolve(address)[1].partition("%")[0]).is_loopback


def url(address: Address, listener: socket.socket) -> str:
    """How clients on this machine reach `listener`."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host.partition("%")[0]).is_unspecified:
        host = "localhost"
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if address.tls else 'http'}://{shown}:{port}"


def tls_context(address: Address) -> ssl.SSLContext | None:
    """Raises UserError when certificate and key are none, or do not belong together."""
    if address.tls is None:
        return None
    cert, key = address.tls
    for path in address.tls:
        if not path.is_file():
            raise UserError(f"{path}: no such file", "pass the certificate and its key, both in PEM form")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert, key, password=lambda: "")  # without, it asks at the terminal
    except (ssl.SSLError, OSError, ValueError) as error:
        raise UserError(
            f"{cert} and {key}: no certificate with its key ({_reason(error)})",
            "pass both in PEM form, the key without a passphrase",
        ) from error
    return context


def _resolve(address: Address) -> tuple[socket.AddressFamily, str]:
    try:
        found = socket.getaddrinfo(address.host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {address.host}: unknown host", "127.0.0.1 is this machine alone") from error
    family, _, _, _, where = found[0]
    return family, where[0]


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or str(error)


_FAULTS = {
    errno.EADDRINUSE: ("the port is in use", "take another --port, 0 for any that is free"),
    errno.EADDRNOTAVAIL: ("this machine has no such address", "take another --host"),
    errno.EACCES: ("this user may not take the port", "take a --port from 1024 on"),
}
