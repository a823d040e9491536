"""How the role apt_repository reads keys and apt's sources, and that it leaves nothing half-done."""

import base64
import subprocess
import sys
from pathlib import Path

import apt_repository
import pytest
import yaml
from apt_repository import Repository, RepositoryError, entries, expiry, keys_in, keys_of, source

ROOT = Path(__file__).resolve().parents[2]
ANSIBLE = Path(sys.executable).with_name("ansible-playbook")

# Two keys of nobody; the second ends with 2026.
GOOD = "B9E5457BF32BD65E64B0BA866C2E8E71C6801FA5"
GOOD_KEY = """\
-----BEGIN PGP PUBLIC KEY BLOCK-----
Comment: headers are no part of it

mDMEawaSMhYJKwYBBAHaRw8BAQdAb+2eN0nCWpM8cbjVwUSL44561fiPZWqioQxP
q4Tk+fq0CW5ldyA8bkB4PoiQBBMWCAA4FiEEueVFe/Mr1l5ksLqGbC6OccaAH6UF
AmsGkjICGwMFCwkIBwIGFQoJCAsCBBYCAwECHgECF4AACgkQbC6OccaAH6WuawD/
ZQggL3IZUy2Di3+dVQ0tnOsLCp5qG7qVf68FkgvPTwcBAJZmZ9WIGEr8uw68mc0Q
Ajg8OXfm16EvV2V52UkP0jAI
=uY5n
-----END PGP PUBLIC KEY BLOCK-----
"""
SHORT = "BEC87D43AC909E6EE2642E362E77B9171D397ED0"
SHORT_KEY = """\
-----BEGIN PGP PUBLIC KEY BLOCK-----

mDMEaVW5ABYJKwYBBAHaRw8BAQdAnFKwKvDoyqPRF05J/o9vZShk+LScei3Upkeq
D3fIltK0C3Nob3J0IDxzQHg+iJYEExYIAD4WIQS+yH1DrJCebuJkLjYud7kXHTl+
0AUCaVW5AAIbAwUJAeHcQAULCQgHAgYVCgkICwIEFgIDAQIeAQIXgAAKCRAud7kX
HTl+0KIDAQCneZ0Prewm0jRmF5dXKrcqyN2w1C0V0wR6c36CZNFzzgD/d9e7pro7
jlCWZlSQLQ6nELZwzrKRiDqAq2x0Y7+MoQ8=
=gjA2
-----END PGP PUBLIC KEY BLOCK-----
"""
END_OF_2026 = 1798761600
URI = "https://maker.example/deb/$(ARCH)"


class Apt:
    """A stand-in of apt: it knows what the maker's address has, and whether it takes the repository."""

    def __init__(self) -> None:
        self.key: str | None = GOOD_KEY
        self.complains = ""
        self.proofs: list[Path] = []

    def __call__(self, *command: str) -> subprocess.CompletedProcess[str]:
        complaint = ""
        if command[0].endswith("apt-helper"):
            if self.key is None:
                complaint = "E: Failed to fetch it  404  Not Found"
            else:
                Path(command[-1]).write_text(self.key)
        elif command[0] == "apt-get":
            self.proofs += [
                Path(word.partition("=")[2]) for word in command if word.startswith("Dir::Etc::sourcelist=")
            ]
            complaint = self.complains
        return subprocess.CompletedProcess(command, 100 if complaint else 0, "", complaint)


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "sources.list.d").mkdir()
    monkeypatch.setattr(apt_repository, "ETC", tmp_path)
    return tmp_path


@pytest.fixture
def apt(monkeypatch: pytest.MonkeyPatch) -> Apt:
    stand_in = Apt()
    monkeypatch.setattr(apt_repository, "run", stand_in)
    monkeypatch.setattr("shutil.chown", lambda *_: None)
    return stand_in


def repository(fingerprint: str = GOOD, suite: str = "/") -> Repository:
    arguments = {"name": "maker", "uri": URI, "suite": suite, "key_url": "https://maker.example/key"}
    return Repository(arguments | {"key_fingerprint": fingerprint}, [], "amd64")


def files(etc: Path) -> list[str]:
    return sorted(file.name for file in (etc / "sources.list.d").iterdir())


def test_a_key_is_known_by_its_fingerprint_armoured_or_not() -> None:
    assert list(keys_in(GOOD_KEY.encode())) == [GOOD]
    assert list(keys_in((GOOD_KEY + SHORT_KEY).encode())) == [GOOD, SHORT]
    binary = keys_in(GOOD_KEY.encode())[GOOD] + keys_in(SHORT_KEY.encode())[SHORT]
    assert keys_in(binary) == keys_in((GOOD_KEY + SHORT_KEY).encode())
    assert keys_in(b"<html>Not found</html>") == {}
    assert keys_in(GOOD_KEY.replace("Q", "", 1).encode()) == {}


def test_a_key_s_end_is_known() -> None:
    assert expiry(keys_in(GOOD_KEY.encode())[GOOD]) == 0
    assert 0 <= expiry(keys_in(SHORT_KEY.encode())[SHORT]) - END_OF_2026 <= 24 * 3600


def test_the_source_is_one_file_with_its_key_in_it(etc: Path, apt: Apt) -> None:
    assert repository().add(check=False) == (True, etc / "sources.list.d/function-gemma-maker.sources")
    (entry,) = entries()
    assert (entry.uri, entry.suite) == ("https://maker.example/deb/amd64", "/")
    assert list(keys_of(entry)) == [GOOD]
    assert files(etc) == ["function-gemma-maker.sources"]
    assert repository().add(check=False)[0] is False
    assert apt.proofs


def test_of_several_keys_only_the_expected_one_is_trusted(etc: Path, apt: Apt) -> None:
    apt.key = SHORT_KEY + GOOD_KEY
    repository().add(check=False)
    assert [(entry.file.parent, list(keys_of(entry))) for entry in entries()] == [
        (etc / "sources.list.d", [GOOD])
    ]


@pytest.mark.parametrize(
    ("key", "complains", "says"),
    [
        (None, "", r"cannot be fetched \(Failed to fetch it  404.*maker_repository.*outbound_proxy"),
        (SHORT_KEY, "", f"another key .{SHORT}. than the one expected, {GOOD}.*maker_key_fingerprint"),
        ("<html>", "", "another key .none that can be read."),
        (GOOD_KEY, "W: NO_PUBKEY 0123", f"not signed by the key {GOOD}; compare"),
        (GOOD_KEY, "W: sqv: Missing key 0123, which is needed", f"not signed by the key {GOOD}; compare"),
        (GOOD_KEY, "W: EXPKEYSIG 0123", f"the key {GOOD} has expired; compare"),
        (
            GOOD_KEY,
            "E: Could not resolve 'maker.example'",
            "cannot be read. Is the address.*Could not resolve",
        ),
    ],
)
def test_what_apt_does_not_take_is_refused_and_nothing_is_written(
    etc: Path, apt: Apt, key: str | None, complains: str, says: str
) -> None:
    apt.key, apt.complains = key, complains
    with pytest.raises(RepositoryError, match=says):
        repository().add(check=False)
    assert files(etc) == []


def test_an_expired_key_is_refused_whatever_apt_thinks_of_it(
    etc: Path, apt: Apt, monkeypatch: pytest.MonkeyPatch
) -> None:
    apt.key = SHORT_KEY
    monkeypatch.setattr("time.time", lambda: END_OF_2026 + 48 * 3600)
    with pytest.raises(
        RepositoryError, match=f"the key {SHORT} at https://maker.example/key expired on 2027-01-01"
    ):
        repository(SHORT).add(check=False)
    assert files(etc) == []


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("sources.list.d/old.list", "deb [arch=amd64 signed-by={keyring}] {uri} /\n"),
        ("sources.list.d/old.sources", "Types: deb\nURIs: {uri}\nSuites: /\nSigned-By: {keyring}\n"),
        ("sources.list", "# an older guide\ndeb {uri} /\n"),
    ],
)
@pytest.mark.parametrize("armoured", [True, False])
def test_an_older_entry_is_used_where_its_keyring_has_the_key(
    etc: Path,
    apt: Apt,
    name: str,
    entry: str,
    armoured: bool,  # noqa: FBT001 (a parameter of the test)
) -> None:
    (etc / "trusted.gpg.d").mkdir()
    keyring = etc / "trusted.gpg.d" / "maker.gpg"
    keyring.write_bytes(GOOD_KEY.encode() if armoured else keys_in(GOOD_KEY.encode())[GOOD])
    (etc / name).write_text(entry.format(keyring=keyring, uri=URI))
    before = files(etc)
    assert repository().add(check=False) == (False, etc / name)
    assert apt.proofs == [etc / name]
    assert files(etc) == before
    assert repository().remove(check=False)[0] is False
    assert files(etc) == before


def test_an_older_entry_with_another_key_is_refused_with_what_mends_it(etc: Path, apt: Apt) -> None:
    keyring = etc / "maker.asc"
    keyring.write_text(SHORT_KEY)
    (etc / "sources.list.d/old.list").write_text(f"deb [signed-by={keyring}] {URI} /\n")
    with pytest.raises(
        RepositoryError, match=rf"old.list names .* with other keys \({SHORT}\).*Remove that entry"
    ):
        repository().add(check=True)
    assert files(etc) == ["old.list"]
    assert not apt.proofs


@pytest.mark.parametrize(
    "text",
    [f"# deb {URI} /\n", f"deb {URI} stable main\n", "deb https://else.example/ /\n", f"deb-src {URI} /\n"],
)
def test_an_entry_that_is_none_of_this_repository_is_left_alone(etc: Path, apt: Apt, text: str) -> None:
    (etc / "sources.list.d/old.list").write_text(text)
    (etc / "sources.list.d/off.sources").write_text(f"Enabled: no\nTypes: deb\nURIs: {URI}\nSuites: /\n")
    assert repository().add(check=False)[0] is True
    assert apt.proofs


def test_check_mode_asks_nothing_of_the_network_and_writes_nothing(etc: Path, apt: Apt) -> None:
    apt.key = None
    assert repository().add(check=True)[0] is True
    assert files(etc) == []


def test_absent_removes_what_the_role_wrote(etc: Path, apt: Apt) -> None:
    repository().add(check=False)
    assert repository().remove(check=True)[0] is True
    assert files(etc) == ["function-gemma-maker.sources"]
    assert repository().remove(check=False)[0] is True
    assert files(etc) == []
    assert repository().remove(check=False)[0] is False
    assert apt.proofs


def test_a_source_is_in_the_form_that_apt_reads() -> None:
    lines = source("https://x", "trixie", ["stable"], b"key").splitlines()
    assert lines[1:6] == [
        "Types: deb",
        "URIs: https://x",
        "Suites: trixie",
        "Components: stable",
        "Signed-By:",
    ]
    assert lines[6:] == [
        " -----BEGIN PGP PUBLIC KEY BLOCK-----",
        " .",
        f" {base64.b64encode(b'key').decode()}",
        " -----END PGP PUBLIC KEY BLOCK-----",
    ]


def test_absent_needs_the_name_alone_and_present_says_what_it_is_not_told(tmp_path: Path) -> None:
    def included(**variables: str) -> dict[str, object]:
        prefixed = {f"apt_repository_{name}": value for name, value in variables.items()}
        return {"ansible.builtin.include_role": {"name": "apt_repository"}, "vars": prefixed}

    missing = (
        "localhost: the role apt_repository is to make nobody present and is not told "
        "apt_repository_suite, apt_repository_key_url, apt_repository_key_fingerprint: "
        "set it where the role is included"
    )
    refused = {"ansible.builtin.assert": {"that": f"ansible_failed_result.msg | trim == '{missing}'"}}
    tasks = [
        included(name="nobody", state="absent"),
        {
            "block": [included(name="nobody", uri=URI), {"ansible.builtin.meta": "end_play"}],
            "rescue": [refused],
        },
    ]
    play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "tasks": tasks}
    (tmp_path / "play.yml").write_text(yaml.safe_dump([play]))
    words = ["-i", "localhost,", "-e", f"ansible_python_interpreter={sys.executable}", "--check"]
    done = subprocess.run(
        [ANSIBLE, *words, tmp_path / "play.yml"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "rescued=1" in done.stdout
