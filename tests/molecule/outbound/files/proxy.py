"""The smallest proxy that apt and an engine need: plain requests, and tunnels by CONNECT. Its log names each.

python3 proxy.py PORT
"""

from __future__ import annotations

import http.client
import select
import shutil
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

CONNECTION = {"connection", "proxy-connection", "keep-alive", "transfer-encoding"}  # of one hop, not of two


class Proxy(BaseHTTPRequestHandler):
    """One connection of a client; it ends with the answer."""

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        there = http.client.HTTPConnection(address.netloc, timeout=60)
        path = f"{address.path}?{address.query}".rstrip("?")
        there.putrequest(self.command, path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():  # one name may come several times
            if name.lower() not in CONNECTION:
                there.putheader(name, value)
        there.endheaders()
        answer = there.getresponse()
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in CONNECTION:
                self.send_header(name, value)
        self.end_headers()
        shutil.copyfileobj(answer, self.wfile)

    do_HEAD = do_GET  # noqa: N815 (the method's name in HTTP)

    def do_CONNECT(self) -> None:
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port)), 60) as there:
            self.send_response_only(200)
            self.end_headers()
            to = {self.connection: there, there: self.connection}
            while ready := select.select(list(to), [], [])[0]:
                for end in ready:
                    if not (data := end.recv(1 << 16)):
                        return
                    to[end].sendall(data)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing here: the line below comes first, whatever the answer is."""

    def parse_request(self) -> bool:
        parsed = super().parse_request()
        if parsed:
            print(self.command, self.path, flush=True)
        return parsed


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Proxy).serve_forever()
