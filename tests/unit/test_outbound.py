"""A way out by a proxy and a CA of one's own: what is refused, and what each program gets."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from outbound import outbound_apt, outbound_certificates, outbound_environment, outbound_problems

SERVER = Path(__file__).parents[2] / "server"
PROXY = "http://proxy.example.org:3128"
KEY = ec.generate_private_key(ec.SECP256R1())
KEY_PEM = KEY.private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
).decode()


def certificate(name: str = "A CA", begin: int = -1, end: int = 1) -> str:
    """A CA's certificate in PEM form, valid from `begin` to `end`, in days from now."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(KEY.public_key())
        .serial_number(1)
        .not_valid_before(now + timedelta(days=begin))
        .not_valid_after(now + timedelta(days=end))
        .sign(KEY, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM).decode()


def test_where_nothing_is_declared_there_is_nothing() -> None:
    assert outbound_problems("", [], "") == []
    assert outbound_apt("", []) == ""
    assert outbound_environment("", []) == {}
    assert outbound_certificates("") == []


@pytest.mark.parametrize("proxy", [PROXY, "http://10.0.0.1:8080/", "http://[fd00::1]:8080"])
def test_a_good_proxy_is_taken(proxy: str) -> None:
    assert outbound_problems(proxy, ["10.0.0.0/8", ".example.org", "registry", "[fd00::1]"], "") == []


@pytest.mark.parametrize(
    "proxy",
    [
        "proxy:3128",
        "https://proxy:3128",
        "http://proxy",
        "socks5://proxy:1080",
        "http://a b:1",
        "http://p:1/x",
    ],
)
def test_what_is_no_proxy_is_refused_with_the_form_it_needs(proxy: str) -> None:
    (problem,) = outbound_problems(proxy, [], "")
    assert problem.startswith(f"outbound_proxy is {proxy}: write http://HOST:PORT")


def test_a_proxy_with_a_password_is_refused_and_the_password_not_shown() -> None:
    (problem,) = outbound_problems("http://user:secret@proxy:3128", [], "")
    assert "has a user or a password" in problem
    assert "secret" not in problem


def test_the_host_itself_and_the_tailnets_name_go_around_the_proxy() -> None:
    wanted = {"no_proxy": "localhost,127.0.0.1,::1,function-gemma-server,a,.b.org"}
    assert outbound_environment(PROXY, ["a", ".b.org"]).items() >= wanted.items()


def test_a_string_where_a_list_belongs_is_refused() -> None:
    (problem,) = outbound_problems(PROXY, "a, .b.org", "")
    assert problem == "outbound_no_proxy is a, .b.org: write a list, [a, .b.org]"


@pytest.mark.parametrize("one", ["http://a", "a b", "a'b"])
def test_what_cannot_go_around_the_proxy_is_refused(one: str) -> None:
    (problem,) = outbound_problems(PROXY, [one], "")
    assert problem.startswith(f"outbound_no_proxy has {one}: write")


def test_apt_goes_by_the_proxy_but_for_the_hosts_that_go_around_it() -> None:
    lines = outbound_apt(PROXY, ["10.77.0.14", ".example.org", "10.0.0.0/8"]).splitlines()
    assert f'Acquire::http::Proxy "{PROXY}";' in lines
    assert f'Acquire::https::Proxy "{PROXY}";' in lines
    assert 'Acquire::http::Proxy::10.77.0.14 "DIRECT";' in lines
    assert len(lines) == 5  # apt knows no domains and no networks


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("no certificate", "holds no certificate in PEM form: `openssl x509 -inform DER"),
        (KEY_PEM + certificate(), "holds a private key, which must not leave the CA"),
        (certificate(begin=-9, end=-2), "holds CN=A CA, which expired on "),
        (certificate(begin=1, end=2), "holds CN=A CA, which is valid from "),
        (certificate() + certificate("Another", -9, -2), "holds CN=Another, which expired on "),
        (certificate().replace("\nMI", "\nXX"), "holds a certificate that cannot be read ("),
        (None, "cannot be read (No such file or directory): correct the path"),
    ],
)
def test_a_file_that_is_no_ca_is_named_with_what_mends_it(
    tmp_path: Path, content: str | None, says: str
) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    (problem,) = outbound_problems("", [], str(path))
    assert problem.startswith(f"outbound_ca_file {path} {says}")


def test_each_certificate_of_a_file_is_one_by_itself_without_the_text_around(tmp_path: Path) -> None:
    both = [certificate("One"), certificate("Two")]
    path = tmp_path / "ca.pem"
    path.write_text("subject=One\n" + "\ncomment\n".join(both))
    assert outbound_problems("", [], str(path)) == []
    assert outbound_certificates(str(path)) == both


# ── What the containers get ──────────────────────────────────────────────────────────────────────


def services(name: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load((SERVER / name).read_text())["services"]
    return found


@pytest.mark.parametrize("name", ["docker-compose.proxy.yml", "docker-compose.ca.yml"])
def test_what_reaches_the_internet_gets_the_proxy_and_the_ca_and_nothing_else_does(name: str) -> None:
    assert services(name).keys() == {"tailscale", "vllm-server"}


def test_an_unset_proxy_is_no_line_in_a_container_nor_in_a_build() -> None:
    names = ["HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"]
    sidecar = services("docker-compose.proxy.yml")["tailscale"]
    # Names alone: compose hands on what .env has, and where it has none, nothing.
    assert sidecar["build"]["args"] == sidecar["environment"] == names
    assert services("docker-compose.proxy.yml")["vllm-server"]["environment"] == names


def test_the_stack_without_them_does_not_name_them() -> None:
    plain = (SERVER / "docker-compose.yml").read_text()
    assert "HTTP_PROXY" not in plain
    assert "SSL_CERT_FILE" not in plain


def test_env_has_the_proxy_in_capitals_and_another_ca_is_another_container() -> None:
    template = SERVER.parent / "roles" / "server" / "templates" / "compose.env.j2"
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True)  # noqa: S701 (no HTML)
    environment.globals["query"] = lambda *_: []
    variables = {
        "__server_compose_files": ["a.yml"],
        "__server_settings": {"compose": []},
        "__outbound_environment": outbound_environment(PROXY, ["a"]),
        "__server_ca_tag": "0123456789ab",
        "outbound_ca_file": "ca.pem",
    }
    lines = environment.from_string(template.read_text()).render(variables).splitlines()
    assert lines == [
        "COMPOSE_FILE='a.yml'",
        f"HTTP_PROXY='{PROXY}'",
        f"HTTPS_PROXY='{PROXY}'",
        "NO_PROXY='localhost,127.0.0.1,::1,function-gemma-server,a'",
        "CA_TAG='0123456789ab'",
    ]
