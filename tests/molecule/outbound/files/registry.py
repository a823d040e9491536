"""A registry with nothing in it, behind TLS: what a client says shows whether it trusts the certificate.

python3 registry.py CERTIFICATE KEY
"""

import ssl
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer


class Registry(BaseHTTPRequestHandler):
    """Has no image."""

    def do_GET(self) -> None:
        root = self.path == "/v2/"
        body = b"{}" if root else b'{"errors": [{"code": "MANIFEST_UNKNOWN"}]}'
        self.send_response(200 if root else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))  # TLS without it ends as if it were cut off
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 (the method's name in HTTP)


if __name__ == "__main__":
    server = HTTPServer(("", 8443), Registry)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[1], sys.argv[2])
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.serve_forever()
