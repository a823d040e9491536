"""What the lab builds: Debian images, Go programs, vLLM's stand-in, the model, the registry's content.

Every part is named by the digest of its inputs.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from common import CACHE, LAB, LABEL, REGISTRY, ROOT, SUITE, digest, docker, is_current, need, remade, sudo
from steps import call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# The parts of tailscaled that neither the lab nor containerboot uses: half of its compile time.
TAILSCALE_OMIT = """
    appconnectors aws bird captiveportal capture clientupdate cloud completion conn25 dbus debug
    desktop_sessions doctor drive identityfederation kube linuxdnsfight logtail netlog networkmanager
    oauthkey posture relayserver resolved sdnotify synology syspolicy systray tailnetlock taildrop tap tpm
    usermetrics wakeonlan webbrowser webclient
""".split()
GO_PROGRAMS = {
    "tailscale": (
        "ts_include_cli," + ",".join(f"ts_omit_{part}" for part in TAILSCALE_OMIT),
        ("tailscale.com/cmd/tailscaled", "tailscale.com/cmd/containerboot"),
    ),
    "headscale": ("", ("github.com/juanfont/headscale/cmd/headscale",)),
    "crane": ("", ("github.com/google/go-containerregistry/cmd/crane",)),
}

CERTIFICATES = sorted(Path("/usr/local/share/ca-certificates").glob("*.crt"))


def key_of(image: str) -> str:
    """Digest of all that ``image`` is made from, known before it is built."""
    dockerfile = LAB / "images" / f"{image}.Dockerfile"
    if image == "base":
        return digest(dockerfile, SUITE, *CERTIFICATES)
    context: dict[str, list[Path | str]] = {
        "builder": [ROOT / "requirements.txt"],
        "headscale": [go_key("headscale")],
        "laptop": [go_key("tailscale"), ROOT / "requirements.txt"],
        "tailscale": [go_key("tailscale"), LAB / "images" / "apk"],
    }
    return digest(dockerfile, key_of("base"), *context.get(image, []))


def tag_of(image: str) -> str:
    """Name under which Docker holds ``image``."""
    return f"{LABEL}/{image}:{key_of(image)}"


def docker_build(log: TextIO, image: str, folder: Path, argument: str) -> None:
    """Build ``image`` from its Dockerfile with ``folder`` beside it."""
    dockerfile = LAB / "images" / f"{image}.Dockerfile"
    options = ("-t", tag_of(image), "--label", LABEL, "--build-arg", argument, "-f", dockerfile)
    # Debian 12's engine has no buildx beside it: the classic builder does all that is needed here.
    call(log, "docker", "build", "--force-rm", *options, folder, env={**os.environ, "DOCKER_BUILDKIT": "0"})


def build_image(image: str, context: Callable[[], Iterable[Path]] = lambda: ()) -> Callable[[TextIO], str]:
    """A step that builds ``image`` from its Dockerfile, with ``context()`` beside it."""

    def build(log: TextIO) -> str:
        tag = tag_of(image)
        if docker("image", "inspect", "-f", "{{.Id}}", tag):
            return "reused"
        folder = remade(CACHE / "context" / image)
        for path in context():
            shutil.copy(path, folder)
        docker_build(log, image, folder, f"BASE={tag_of('base')}")
        return "built"

    return build


def base(log: TextIO) -> str:
    """Debian from its own packages where mmdebstrap can be had, else from its official image."""
    tag = tag_of("base")
    if docker("image", "inspect", "-f", "{{.Id}}", tag):
        return "reused"
    debian = f"{LABEL}/debian:{SUITE}"
    folder = remade(CACHE / "context" / "base")
    if shutil.which("apt-get"):
        need("mmdebstrap", "mmdebstrap debian-archive-keyring", log)
        bootstrap = ("mmdebstrap", "--variant=minbase", "--include=ca-certificates", SUITE)
        call(log, *sudo(), *bootstrap, folder / "root.tar")
        call(log, "docker", "import", folder / "root.tar", debian)
        call(log, *sudo(), "rm", "-f", folder / "root.tar")
    else:
        debian = f"debian:{SUITE}-slim"
        call(log, "docker", "pull", debian)
    (folder / "ca").mkdir()
    for certificate in CERTIFICATES:
        shutil.copy(certificate, folder / "ca")
    docker_build(log, "base", folder, f"DEBIAN={debian}")
    return "built"


def in_builder(log: TextIO, mounts: dict[Path, str], *command: str) -> None:
    """Run ``command`` in the builder image; it ends with the command and leaves nothing behind."""
    for folder in mounts:
        if not folder.exists():
            folder.mkdir(parents=True)
    volumes = [word for path, inside in mounts.items() for word in ("-v", f"{path}:{inside}")]
    call(log, "docker", "run", "--rm", "--label", LABEL, *volumes, tag_of("builder"), *command)


# ── Programs ─────────────────────────────────────────────────────────────────────────────────────


def go_key(module: str) -> str:
    """Digest of a Go module's pins and build flags."""
    return digest(LAB / "go" / module, json.dumps(GO_PROGRAMS[module]))


def go_binaries(module: str) -> list[Path]:
    """Where the programs of a Go module lie once built."""
    return [CACHE / "bin" / module / Path(program).name for program in GO_PROGRAMS[module][1]]


def build_go(module: str) -> Callable[[TextIO], str]:
    """A step that builds the programs of a Go module, pinned by its go.sum."""

    def build(log: TextIO) -> str:
        out = CACHE / "bin" / module
        if is_current(out, go_key(module)):
            return "reused"
        tags, programs = GO_PROGRAMS[module]
        remade(out)
        in_builder(
            log,
            {
                LAB / "go" / module: "/src:ro",
                CACHE / "go": "/root/go",
                CACHE / "go-build": "/root/.cache/go-build",
                out: "/out",
            },
            "sh",
            "-euc",
            'cd /src; CGO_ENABLED=0 go build -mod=readonly -trimpath -tags "$1" -ldflags "-s -w" -o /out/ $2',
            "sh",
            tags,
            " ".join(programs),
        )
        (out / ".key").write_text(go_key(module))
        return "built"

    return build


# ── vLLM and the model ───────────────────────────────────────────────────────────────────────────

# Three image layers of similar size: unpacked side by side, they take the host half the time of one.
SITE = "opt/venv/lib/python3.13/site-packages"
VLLM_LAYERS = {
    "torch": [f"{SITE}/torch"],
    "vllm": [
        f"{SITE}/{name}" for name in "vllm transformers sympy openai mistral_common numpy numpy.libs".split()
    ],
}
VLLM_REFERENCE = "vllm/vllm-openai-cpu:v0.32.0"


def vllm_key() -> str:
    """Digest of what the stand-in of vLLM is made from."""
    return digest(LAB / "vllm", key_of("vllm"), json.dumps(VLLM_LAYERS))


def build_vllm(log: TextIO) -> str:
    """Install vLLM into .cache/lab/vllm/venv and pack it as layers of an image."""
    out = CACHE / "vllm"
    if is_current(out, vllm_key()):
        return "reused"
    remade(out)
    rest = "".join(f" --exclude={path}" for paths in VLLM_LAYERS.values() for path in paths)
    pack = [
        f"tar -C / -c {' '.join(paths)} | zstd -q -1 -T2 -o /out/{name}.tar.zst"
        for name, paths in VLLM_LAYERS.items()
    ]
    in_builder(
        log,
        {LAB / "vllm": "/src:ro", CACHE / "uv": "/root/.cache/uv", out: "/out", out / "venv": "/opt/venv"},
        "bash",
        "-euo",
        "pipefail",
        "-c",
        "; ".join(
            [
                "/src/build.sh /opt/venv",
                *pack,
                f"tar -C / -c{rest} opt/venv | zstd -q -1 -T2 -o /out/rest.tar.zst",
            ]
        ),
    )
    (out / ".key").write_text(vllm_key())
    return "built"


def push_vllm(log: TextIO) -> str:
    """Append the layers to the stand-in's Debian and put both into the registry."""
    mark = push_key("vllm")
    if mark.is_file() and mark.read_text() == vllm_key():
        return "reused"
    archive = CACHE / "context" / "vllm.tar"
    call(log, "docker", "save", "-o", archive, tag_of("vllm"))
    call(log, crane(), "push", "--insecure", archive, f"{REGISTRY}:5000/{VLLM_REFERENCE}-base")
    archive.unlink()
    layers = [word for name in (*VLLM_LAYERS, "rest") for word in ("-f", CACHE / "vllm" / f"{name}.tar.zst")]
    call(
        log,
        crane(),
        "append",
        "--insecure",
        "-b",
        f"{REGISTRY}:5000/{VLLM_REFERENCE}-base",
        "-t",
        f"{REGISTRY}:5000/{VLLM_REFERENCE}",
        *layers,
    )
    mark.parent.mkdir(exist_ok=True)
    mark.write_text(vllm_key())
    return "pushed"


def train(log: TextIO) -> str:
    """Train the tiny model and its adapters with the stand-in's own torch."""
    out = CACHE / "model"
    key = digest(LAB / "model", vllm_key())
    if is_current(out, key):
        return "reused"
    remade(out)
    in_builder(
        log,
        {LAB / "model": "/src:ro", CACHE / "vllm" / "venv": "/opt/venv:ro", out: "/out"},
        "/opt/venv/bin/python",
        "/src/train.py",
        "/out",
    )
    (out / ".key").write_text(key)
    return "trained"


# ── The registry's content: stand-ins under the real names ───────────────────────────────────────


def push_key(name: str) -> Path:
    """Where the key of the pushed image ``name`` is kept: beside the registry's data."""
    return CACHE / "registry" / "keys" / name


def push(image: str, reference: str) -> Callable[[TextIO], str]:
    """A step that puts a built image into the registry as ``reference``."""

    def work(log: TextIO) -> str:
        mark = push_key(image)
        if mark.is_file() and mark.read_text() == key_of(image) + reference:
            return "reused"
        archive = CACHE / "context" / f"{image}.tar"
        call(log, "docker", "save", "-o", archive, tag_of(image))
        call(log, crane(), "push", "--insecure", archive, f"{REGISTRY}:5000/{reference}")
        archive.unlink()
        mark.parent.mkdir(exist_ok=True)
        mark.write_text(key_of(image) + reference)
        return "pushed"

    return work


def crane() -> Path:
    """The program that writes images into a registry."""
    return CACHE / "bin" / "crane" / "crane"
