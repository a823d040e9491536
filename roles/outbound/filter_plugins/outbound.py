"""Filters of the role outbound: what is wrong with a proxy or a CA, and the forms that programs want."""

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509

# What is never meant to leave the host.
_OWN = ("localhost", "127.0.0.1", "::1", "function-gemma-server")
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n?", re.DOTALL)
_PROXY = re.compile(r"http://(\[[0-9a-fA-F:]+\]|[\w.-]+):\d{1,5}/?")


def outbound_problems(proxy: str, no_proxy: str | Sequence[str], ca_path: str) -> list[str]:
    """Say what is wrong with each of them, and what mends it; all are empty where nothing is declared."""
    problems = []
    if "@" in proxy:
        # The value itself is not shown: it holds a password.
        problems.append(
            "outbound_proxy has a user or a password, which would stand in the environment of each process: "
            "have the proxy let this host in by its address, or put a proxy of your own before it, and write "
            "http://HOST:PORT"
        )
    elif proxy and not _PROXY.fullmatch(proxy):
        problems.append(
            f"outbound_proxy is {proxy}: write http://HOST:PORT, also for what is https behind it"
        )
    if isinstance(no_proxy, str):  # of which others would read each letter
        problems.append(f"outbound_no_proxy is {no_proxy}: write a list, [{no_proxy}]")
    elif wrong := [one for one in no_proxy if "//" in one or not re.fullmatch(r"[\w.:/*\[\]-]+", one)]:
        problems.append(
            f"outbound_no_proxy has {', '.join(wrong)}: write hosts, domains or addresses, without http://"
        )
    if ca_path and (problem := _ca_problem(Path(ca_path))):
        problems.append(f"outbound_ca_file {ca_path} {problem}")
    return problems


def _ca_problem(path: Path) -> str:
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        return f"cannot be read ({error.strerror}): correct the path, which counts from the inventory"
    if "PRIVATE KEY-----" in text:
        return (
            "holds a private key, which must not leave the CA: give a file with the certificate alone, "
            "`openssl x509 -in FILE -out ca.pem`"
        )
    blocks = _CERTIFICATE.findall(text)
    if not blocks:
        return "holds no certificate in PEM form: `openssl x509 -inform DER -in FILE -out ca.pem` makes it"
    return next(filter(None, map(_certificate_problem, blocks)), "")


def _certificate_problem(block: str) -> str:
    try:
        certificate = x509.load_pem_x509_certificate(block.encode())
    except ValueError as error:
        return f"holds a certificate that cannot be read ({error}): fetch the file anew"
    name, now = certificate.subject.rfc4514_string(), datetime.now(UTC)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if end < now:
        return f"holds {name}, which expired on {end:%Y-%m-%d}: ask for its successor"
    if begin > now:
        return f"holds {name}, which is valid from {begin:%Y-%m-%d} on: see whether this clock is right"
    return ""


def outbound_certificates(ca_path: str) -> list[str]:
    """Return the certificates of a PEM file, each by itself, as update-ca-certificates wants them."""
    return (
        [block.rstrip("\n") + "\n" for block in _CERTIFICATE.findall(Path(ca_path).read_text())]
        if ca_path
        else []
    )


def outbound_environment(proxy: str, no_proxy: Sequence[str]) -> dict[str, str]:
    """Return the environment by which programs find the proxy; empty without one."""
    if not proxy:
        return {}
    around = ",".join(dict.fromkeys((*_OWN, *no_proxy)))
    return {"http_proxy": proxy, "https_proxy": proxy, "no_proxy": around}


def outbound_apt(proxy: str, no_proxy: Sequence[str]) -> str:
    """Return apt's settings; empty without a proxy.

    Of what goes around the proxy apt knows hosts, no domains and no networks.
    """
    if not proxy:
        return ""
    lines = ["// Written by the role outbound from the inventory, which is where to change it."]
    for kind in ("http", "https"):
        lines.append(f'Acquire::{kind}::Proxy "{proxy}";')
        lines += [
            f'Acquire::{kind}::Proxy::{one} "DIRECT";' for one in no_proxy if re.fullmatch(r"\w[\w.-]*", one)
        ]
    return "\n".join(lines) + "\n"


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters of this file by name."""
        return {
            "outbound_apt": outbound_apt,
            "outbound_certificates": outbound_certificates,
            "outbound_environment": outbound_environment,
            "outbound_problems": outbound_problems,
        }
