#!/usr/bin/env python3
"""Ask a service on its Unix socket: `healthcheck.py SOCKET PATH`, exit 0 when it answers 200.

What a service does before it listens (waits for a model, loads it) stands in the file beside the socket that
ends in .waiting. It is printed, so that `docker inspect` shows it and the healer knows that a restart would
not help.
"""

import socket
import sys
from pathlib import Path

SECONDS = 4


def main() -> int:
    """Return the exit status; what is wrong goes to stdout, where Docker keeps it."""
    address, path = sys.argv[1:]
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(SECONDS)
            connection.connect(address)
            connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(4096), b"")).decode(errors="replace")
    except (FileNotFoundError, ConnectionRefusedError) as error:
        waiting = Path(address).with_suffix(".waiting")
        print(f"waiting: {waiting.read_text().strip()}" if waiting.exists() else f"{address}: {error}")
        return 1
    except OSError as error:
        print(f"{address}: {error}")
        return 1
    head, _, body = answer.partition("\r\n\r\n")
    print(head.partition("\r\n")[0], body)
    return 0 if head.split()[1:2] == ["200"] else 1


if __name__ == "__main__":
    sys.exit(main())
