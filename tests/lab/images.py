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


def key_of(image: str, suite: str = SUITE) -> str:
    """Digest of all that ``image`` is made from, known before it is built."""
    dockerfile = LAB / "images" / f"{image}.Dockerfile"
    if image == "base":
        return digest(dockerfile, suite, *CERTIFICATES)
    context: dict[str, list[Path | str]] = {
        "builder": [ROOT / "requirements.txt"],
        "headscale": [go_key("headscale")],
        "laptop": [go_key("tailscale"), ROOT / "requirements.txt"],
        "tailscale": [go_key("tailscale"), LAB / "images" / "apk"],
    }
    return digest(dockerfile, key_of("base", suite), *context.get(image, []))


def tag_of(image: str, suite: str = SUITE) -> str:
    """Name under which Docker holds ``image``."""
    return f"{LABEL}/{image}:{key_of(image, suite)}"


def docker_build(log: TextIO, image: str, suite: str, folder: Path, argument: str) -> None:
    """Build ``image`` from its Dockerfile with ``folder`` beside it."""
    dockerfile = LAB / "images" / f"{image}.Dockerfile"
    options = ("-t", tag_of(image, suite), "--label", LABEL, "--build-arg", argument, "-f", dockerfile)
    # Debian 12's engine has no buildx beside it: the classic builder does all that is needed here.
    call(log, "docker", "build", "--force-rm", *options, folder, env={**os.environ, "DOCKER_BUILDKIT": "0"})


def build_image(
    image: str, context: Callable[[], Iterable[Path]] = lambda: (), suite: str = SUITE
) -> Callable[[TextIO], str]:
    """A step that builds ``image`` from its Dockerfile, with ``context()`` beside it, on this Debian."""

    def build(log: TextIO) -> str:
        if docker("image", "inspect", "-f", "{{.Id}}", tag_of(image, suite)):
            return "reused"
        folder = remade(CACHE / "context" / image)
        for path in context():
            shutil.copy(path, folder)
        docker_build(log, image, suite, folder, f"BASE={tag_of('base', suite)}")
        return "built"

    return build


def build_base(suite: str = SUITE) -> Callable[[TextIO], str]:
    """A step that makes Debian from its own packages where mmdebstrap can be had, else from its image."""

    def build(log: TextIO) -> str:
        if docker("image", "inspect", "-f", "{{.Id}}", tag_of("base", suite)):
            return "reused"
        debian = f"{LABEL}/debian:{suite}"
        folder = remade(CACHE / "context" / "base")
        if shutil.which("apt-get"):
            need("mmdebstrap", "mmdebstrap debian-archive-keyring", log)
            bootstrap = ("mmdebstrap", "--variant=minbase", "--include=ca-certificates", suite)
            call(log, *sudo(), *bootstrap, folder / "root.tar")
            call(log, "docker", "import", folder / "root.tar", debian)
            call(log, *sudo(), "rm", "-f", folder / "root.tar")
        else:
            debian = f"debian:{suite}-slim"
            call(log, "docker", "pull", debian)
        (folder / "ca").mkdir()
        for certificate in CERTIFICATES:
            shutil.copy(certificate, folder / "ca")
        docker_build(log, "base", suite, folder, f"DEBIAN={debian}")
        return "built"

    return build


def in_builder(log: TextIO, mounts: dict[Path, str], *command: str) -> None:
    """Run ``command`` in the builder image; it ends with the command and leaves nothing behind."""
    for folder in mounts:
        if not folder.exists():
            folder.mkdir(parents=True)
    volumes = [word for path, inside in mounts.items() for word in ("-v", f"{path}:{inside}")]
    call(log, "docker", "run", "--rm", "--label", LABEL, *volumes, tag_of("builder"), *command)


# ── The makers' repositories ─────────────────────────────────────────────────────────────────────


def build_apt(log: TextIO) -> str:
    """Pack and sign what Docker and NVIDIA offer by apt; the keys' fingerprints lie beside it."""
    out, sources, gpu = CACHE / "apt", LAB / "apt", ROOT / "tests" / "molecule" / "shared" / "gpu"
    key = digest(sources, gpu / "nvidia-smi", key_of("base"))
    if is_current(out, key):
        return "reused"
    remade(out)
    # In the base image, so that nothing of the lab waits for it but the server.
    volumes = [f"-v{sources}:/src:ro", f"-v{gpu}:/gpu:ro", f"-v{out}:/out"]
    call(log, "docker", "run", "--rm", "--label", LABEL, *volumes, tag_of("base"), "/src/build.sh")
    (out / ".key").write_text(key)
    return "built"


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
    put_into_registry(log, "vllm", f"{VLLM_REFERENCE}-base")
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
    package = ROOT / "server" / "function_gemma"  # says what a gate asks
    agents = package / "agents"
    key = digest(LAB / "model", agents / "gate.py", agents / "definition.py", vllm_key())
    if is_current(out, key):
        return "reused"
    remade(out)
    in_builder(
        log,
        {
            LAB / "model": "/src:ro",
            package: "/server/function_gemma:ro",
            CACHE / "vllm" / "venv": "/opt/venv:ro",
            out: "/out",
        },
        "env",
        "PYTHONPATH=/server",
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


def put_into_registry(log: TextIO, image: str, reference: str) -> None:
    """Save a built image and push it as ``reference``."""
    folder = remade(CACHE / "context" / image)  # Docker may have images that this cache did not see built
    call(log, "docker", "save", "-o", folder / "image.tar", tag_of(image))
    call(log, crane(), "push", "--insecure", folder / "image.tar", f"{REGISTRY}:5000/{reference}")
    (folder / "image.tar").unlink()


def push(image: str, reference: str) -> Callable[[TextIO], str]:
    """A step that puts a built image into the registry as ``reference``."""

    def work(log: TextIO) -> str:
        mark = push_key(image)
        if mark.is_file() and mark.read_text() == key_of(image) + reference:
            return "reused"
        put_into_registry(log, image, reference)
        mark.parent.mkdir(exist_ok=True)
        mark.write_text(key_of(image) + reference)
        return "pushed"

    return work


def crane() -> Path:
    """The program that writes images into a registry."""
    return CACHE / "bin" / "crane" / "crane"
