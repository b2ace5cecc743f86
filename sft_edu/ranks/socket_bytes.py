"""How many bytes came in over this process's own TCP connections, as the kernel counted them. Linux only."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from pathlib import Path

# tcpi_bytes_received in struct tcp_info of linux/tcp.h: 8 bytes, 24 times 4, and 3 times 8 come before it.
_OFFSET = 8 + 24 * 4 + 3 * 8
_OPEN_FILES = Path("/proc/self/fd")


def received_bytes() -> int | None:
    """Over all open TCP connections together, headers not counted; None on a system that does not tell."""
    if not hasattr(socket, "TCP_INFO") or not _OPEN_FILES.is_dir():
        return None
    counts = [_of_connection(int(path.name)) for path in list(_OPEN_FILES.iterdir())]
    return sum(count for count in counts if count is not None)


def _of_connection(number: int) -> int | None:
    """None for a file that is no TCP connection."""
    try:
        is_socket = stat.S_ISSOCK(os.fstat(number).st_mode)
        duplicate = os.dup(number) if is_socket else None
    except OSError:  # closed meanwhile
        return None
    if duplicate is None:
        return None
    with socket.socket(fileno=duplicate) as connection, contextlib.suppress(OSError):
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _OFFSET + 8)
            return struct.unpack_from("=Q", info, _OFFSET)[0] if len(info) == _OFFSET + 8 else None
    return None
