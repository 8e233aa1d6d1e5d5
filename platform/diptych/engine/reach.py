"""Asks a port whether anybody listens, before a client library starts to wait for it."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


def listening(uri: str, timeout_s: float = 5.0) -> str:
    """The empty string when the server of a URI accepts connections, or is none (a file, an unknown scheme); else what is wrong."""
    parts = urlsplit(uri)
    port = parts.port or PORTS.get(parts.scheme.split("+")[0])
    if not parts.hostname or port is None:
        return ""
    try:
        socket.create_connection((parts.hostname, port), timeout_s).close()
    except OSError as error:
        return f"{parts.hostname}:{port} does not accept connections ({error.strerror or error})"
    return ""


def without_password(uri: str) -> str:
    """The URI as it may be printed."""
    parts = urlsplit(uri)
    return uri.replace(f":{parts.password}@", ":***@", 1) if parts.password else uri
