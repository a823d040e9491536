"""One maker's apt repository; nothing is written before its key is proven and apt can read its index.

    python3 apt_repository.py '{"name": "docker", "uri": …, "state": "present", "check": false}'

Prints as JSON whether something changed, the file whose entry apt uses, and what is wrong (empty: nothing).
The source is a single file that holds the key as well and is renamed into place: there is no half of it. An
entry that was there before, in any file, is used where its keyring has the key. It needs nothing but apt,
and the key is fetched the way that packages are, through apt's own proxy and certificates.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ETC = Path("/etc/apt")
APT_HELPER = "/usr/lib/apt/apt-helper"
HEAD = "# Written by the role apt_repository of function-gemma-server, which also takes it away.\n"
ARMOR = re.compile(r"-----BEGIN PGP PUBLIC KEY BLOCK-----(.*?)-----END PGP PUBLIC KEY BLOCK-----", re.DOTALL)


class RepositoryError(Exception):
    """What is wrong with a repository, with what mends it."""


@dataclass(frozen=True)
class Entry:
    """A source that apt has already."""

    file: Path
    uri: str
    suite: str
    signed_by: str
    """Paths of keyrings, separated by commas or blanks, or the key itself, as apt has them."""


def length(data: bytes, at: int) -> tuple[int, int]:
    """Return the length that stands at a place of an OpenPGP file, and the place behind it."""
    first = data[at]
    if first < 192:
        return first, at + 1
    if first < 255:
        return ((first - 192) << 8) + data[at + 1] + 192, at + 2
    return int.from_bytes(data[at + 1 : at + 5], "big"), at + 5


def packets(data: bytes) -> list[tuple[int, bytes, bytes]]:
    """Return an OpenPGP file's packets: tag, body, and the whole packet. Ends where it makes no sense."""
    found = []
    at = 0
    while at + 2 < len(data) and data[at] & 0x80:
        start, head = at, data[at]
        if head & 0x40:
            tag = head & 0x3F
            size, at = length(data, at + 1)
        else:
            tag, width = head >> 2 & 0xF, 1 << (head & 3)
            size, at = int.from_bytes(data[at + 1 : at + 1 + width], "big"), at + 1 + width
        found.append((tag, data[at : at + size], data[start : at + size]))
        at += size
    return found


def keys_in(content: bytes) -> dict[str, bytes]:
    """Return the keys of a keyring, armoured or not, by the fingerprints of their primary keys.

    A broken one has none.
    """
    try:
        armoured = ARMOR.findall(content.decode("ascii", "ignore").replace("\r", ""))
        if armoured:
            # Headers before the first empty line and the checksum after the last are not the key's.
            blocks = [re.sub(r"^.*?\n[ .]*\n", "", block, count=1, flags=re.DOTALL) for block in armoured]
            content = b"".join(base64.b64decode(re.split(r"\n\s*=", block)[0]) for block in blocks)
        found = packets(content)
    except (ValueError, IndexError):
        return {}
    keys: dict[str, bytes] = {}
    now = ""
    for tag, body, whole in found:
        if tag == 6:
            v4 = body[:1] <= b"\x04"
            prefix = b"\x99" + len(body).to_bytes(2, "big") if v4 else b"\x9b" + len(body).to_bytes(4, "big")
            now = hashlib.new("sha1" if v4 else "sha256", prefix + body).hexdigest().upper()
            keys[now] = b""
        if now:
            keys[now] += whole
    return keys


def expiry(key: bytes) -> int:
    """Return when a key expires, in seconds since 1970, or 0 for never. Its newest signature says so."""
    found = packets(key)
    made = int.from_bytes(found[0][1][1:5], "big")
    newest, lifetime = 0, 0
    for tag, body, _ in found:
        if tag == 2 and body[:1] in {b"\x04", b"\x06"} and body[1] in {0x10, 0x11, 0x12, 0x13, 0x1F}:
            start = 6 if body[0] == 4 else 8
            end = start + int.from_bytes(body[4:start], "big")
            said: dict[int, int] = {}
            while start < end:
                size, start = length(body, start)
                said[body[start] & 0x7F] = int.from_bytes(body[start + 1 : start + size], "big")
                start += size
            if said.get(2, 0) >= newest:
                newest, lifetime = said.get(2, 0), said.get(9, 0)
    return made + lifetime if lifetime else 0


def source(uri: str, suite: str, components: list[str], key: bytes) -> str:
    """Return the content of a .sources file that holds the key as well."""
    text = base64.b64encode(key).decode()
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    block = ["-----BEGIN PGP PUBLIC KEY BLOCK-----", ".", *lines, "-----END PGP PUBLIC KEY BLOCK-----"]
    fields = ["Types: deb", f"URIs: {uri}", f"Suites: {suite}"]
    fields += [f"Components: {' '.join(components)}"] if components else []
    return HEAD + "\n".join([*fields, "Signed-By:", *(f" {line}" for line in block)]) + "\n"


def entries() -> list[Entry]:
    """Return the sources that apt has, but for disabled ones."""
    found = []
    for file in [ETC / "sources.list", *sorted((ETC / "sources.list.d").glob("*"))]:
        if not file.is_file():
            continue
        text = file.read_text(errors="replace")
        if file.suffix == ".sources":
            text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
            for stanza in re.split(r"\n[ \t]*\n", text):
                fields = {
                    name.lower(): value.strip()
                    for name, value in re.findall(
                        r"^([\w-]+):((?:.*\n?)(?:[ \t].*\n?)*)", stanza, re.MULTILINE
                    )
                }
                if fields.get("enabled", "yes").lower() not in {"no", "false", "0"}:
                    found += [
                        Entry(file, uri, suite, fields.get("signed-by", ""))
                        for uri in fields.get("uris", "").split()
                        for suite in fields.get("suites", "").split()
                    ]
        elif file.suffix == ".list":
            for options, uri, suite in re.findall(
                r"^\s*deb\s+(?:\[(.*?)\]\s*)?(\S+)\s+(\S+)", text, re.MULTILINE
            ):
                signed_by = re.search(r"signed-by=(\S+)", options)
                found.append(Entry(file, uri, suite, signed_by[1] if signed_by else ""))
    return found


def keys_of(entry: Entry) -> dict[str, bytes]:
    """Return the keys that apt takes for an entry."""
    if ARMOR.search(entry.signed_by):
        return keys_in(re.sub(r"^ ", "", entry.signed_by, flags=re.MULTILINE).encode())
    named = [Path(word) for word in re.split(r"[,\s]+", entry.signed_by) if word.startswith("/")]
    trusted = [ETC / "trusted.gpg", *(ETC / "trusted.gpg.d").glob("*")]
    files = [file for file in named or trusted if file.is_file()]
    return {name: key for file in files for name, key in keys_in(file.read_bytes()).items()}


class Repository:
    """A maker's repository, as the role's arguments describe it."""

    def __init__(self, arguments: dict[str, str], components: list[str], architecture: str) -> None:
        """Take the role's arguments without their prefix."""
        self.name = arguments["name"]
        self.architecture = architecture
        self.uri = self.plain(arguments["uri"])
        self.suite = arguments["suite"]
        self.components = components
        self.key_url = arguments["key_url"]
        self.fingerprint = re.sub(r"\s", "", arguments["key_fingerprint"]).upper()
        self.file = ETC / "sources.list.d" / f"function-gemma-{self.name}.sources"
        # What mends most of what can be wrong.
        self.compare = (
            "compare with the fingerprint on the maker's own page, "
            f"and put the right one into {self.name}_key_fingerprint"
        )
        self.reach = (
            f"Is the address right ({self.name}_repository), "
            "and does this host reach it, perhaps through a proxy (outbound_proxy)?"
        )

    def plain(self, uri: str) -> str:
        """Return an address in the one form in which two can be compared."""
        return uri.replace("$(ARCH)", self.architecture).rstrip("/")

    def others(self) -> list[Entry]:
        """Return the entries for this repository that are not ours.

        Raises:
            RepositoryError: one takes other keys; apt does not work where two entries name different ones.

        """
        found = [
            entry
            for entry in entries()
            if (self.plain(entry.uri), entry.suite) == (self.uri, self.suite) and entry.file != self.file
        ]
        for entry in found:
            self.proven(
                keys_of(entry),
                f"in the keyring of {entry.file}",
                f"{entry.file} names {entry.uri} with other keys",
                f". Remove that entry and run again, or {self.compare}",
            )
        return found

    def proven(self, keys: dict[str, bytes], where: str, other: str, mend: str) -> bytes:
        """Return the expected key out of those found; an expired one apt takes only here and there.

        Raises:
            RepositoryError: it is not among them, which `other` and `mend` say in full, or it has expired.

        """
        if self.fingerprint not in keys:
            there = ", ".join(keys) or "none that can be read"
            raise RepositoryError(f"{other} ({there}) than the one expected, {self.fingerprint}{mend}")
        end = expiry(keys[self.fingerprint])
        if end and end < time.time():
            day = time.strftime("%F", time.gmtime(end))
            raise RepositoryError(
                f"the key {self.fingerprint} {where} expired on {day}. "
                f"Fetch it anew where its maker has prolonged it, or {self.compare}"
            )
        return keys[self.fingerprint]

    def fetch_key(self, folder: Path) -> bytes:
        """Return the key.

        Raises:
            RepositoryError: it cannot be fetched, or it is another.

        """
        file = folder / "key"
        done = run(APT_HELPER, "download-file", self.key_url, str(file))
        if done.returncode or not file.is_file():
            raise RepositoryError(f"the key {self.key_url} cannot be fetched ({reason(done)}). {self.reach}")
        return self.proven(
            keys_in(file.read_bytes()),
            f"at {self.key_url}",
            f"{self.key_url} has another key",
            f": its maker has changed it, or this is not its maker; {self.compare}",
        )

    def prove(self, file: Path) -> None:
        """Have apt read the repository's index by a source file that lies anywhere.

        Raises:
            RepositoryError: apt cannot reach it or does not trust it.

        """
        options = [f"Dir::Etc::sourcelist={file}", "Dir::Etc::sourceparts=/dev/null"]
        options += ["APT::Get::List-Cleanup=0", "APT::Update::Error-Mode=any", "DPkg::Lock::Timeout=300"]
        done = run("apt-get", "-q", "update", *(word for option in options for word in ("-o", option)))
        if done.returncode == 0:
            return
        said = done.stdout + done.stderr
        if re.search(r"EXPKEYSIG|KEYEXPIRED|not live|[Ee]xpired on", said):
            why = f"the key {self.fingerprint} has expired; {self.compare}"
        elif re.search(r"NO_PUBKEY|Missing key|BADSIG|not signed", said):
            why = f"it is not signed by the key {self.fingerprint}; {self.compare}"
        else:
            why = f"it cannot be read. {self.reach}"
        raise RepositoryError(f"apt does not take {self.uri} {self.suite}: {why} (apt: {reason(done)})")

    def add(self, *, check: bool) -> tuple[bool, Path]:
        """Have the repository among apt's sources; return whether that changed it, and the file.

        Raises:
            RepositoryError: it cannot be had as described; nothing was written.

        """
        others = self.others()
        if others:
            if not check:
                self.prove(others[0].file)
            # Ours from before beside another's would be the conflict.
            return self.remove(check=check)[0], others[0].file
        if check:
            return not self.file.is_file(), self.file
        # apt reads and fetches as a user of its own.
        with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
            shutil.chown(folder, "_apt")
            content = source(self.uri, self.suite, self.components, self.fetch_key(Path(folder)))
            proof = Path(folder) / "proof.sources"
            proof.write_text(content)
            self.prove(proof)
        if self.file.is_file() and self.file.read_text() == content:
            return False, self.file
        new = self.file.with_suffix(".new")  # apt reads no file of that name
        new.write_text(content)
        new.replace(self.file)
        return True, self.file

    def remove(self, *, check: bool) -> tuple[bool, Path]:
        """Take our source away; another's stays."""
        there = self.file.is_file()
        if there and not check:
            self.file.unlink()
        return there, self.file


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of apt's in plain English."""
    environment = {"LC_ALL": "C.UTF-8", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """Return what apt complains of, in one line."""
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line[:2] in {"E:", "W:"}]
    return " ".join(dict.fromkeys(line[2:].strip() for line in lines)) or f"status {done.returncode}"


def main() -> None:
    """Do what the first argument says and print what came of it."""
    os.umask(0o022)  # what apt's own user reads
    arguments = json.loads(sys.argv[1])
    answer = {"changed": False, "source": "", "problem": ""}
    try:
        architecture = run("dpkg", "--print-architecture").stdout.strip()
        repository = Repository(arguments, arguments["components"], architecture)
        act = repository.add if arguments["state"] == "present" else repository.remove
        changed, file = act(check=arguments["check"])
        answer |= {"changed": changed, "source": str(file)}
    except RepositoryError as error:
        answer["problem"] = str(error)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
