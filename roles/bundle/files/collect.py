"""What a host that serves gives into a bundle: what there is, then one part of it at a time.

    python3 collect.py survey CHECKOUT              what serves here, in parts, as one JSON object
    python3 collect.py make CHECKOUT FOLDER PART    make the files of a part (as the survey has it) in FOLDER

`make` prints the files' digests and sizes as JSON. It needs Docker, git, apt and Python 3.9.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROJECT = "function-gemma-server"
STAGING = Path("/var/lib")
# What site.yml installs, by what it is for; of each the host has what its distribution or maker calls so.
PACKAGES = {
    "docker": (
        "docker.io docker-cli docker-compose docker-compose-v2 docker-buildx "
        "docker-ce docker-ce-cli containerd.io docker-compose-plugin docker-buildx-plugin"
    ).split(),
    "nvidia": (
        "nvidia-container-toolkit nvidia-container-toolkit-base "
        "libnvidia-container-tools libnvidia-container1"
    ).split(),
    "tools": ["git", "openssh-client", "ca-certificates", "python3-apt"],
}
# As apt prints what it would fetch: 'ADDRESS' FILE SIZE SHA256:DIGEST
FETCHED = re.compile(r"^'[^']+' (\S+\.deb) (\d+) (\S+)$", re.MULTILINE)

Part = dict[str, Any]
"""kind, name, identity (the same as long as the content is) and bytes (about what its files take)."""


class CollectError(Exception):
    """Why there is nothing to collect, with what mends it."""


def output(*words: str) -> str:
    """Return what a command prints; CollectError with its words where it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CollectError(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def volume(name: str) -> Path:
    """Return where a volume of the stack lies."""
    return Path(output("docker", "volume", "inspect", "-f", "{{.Mountpoint}}", f"{PROJECT}_{name}"))


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ── What there is ────────────────────────────────────────────────────────────────────────────────


def survey(checkout: str) -> dict[str, Any]:
    """Return what serves: release, system, and the parts of a bundle."""
    health = "{{.State.Health.Status}}"
    done = subprocess.run(
        ["docker", "inspect", "-f", health, "vllm-gemma"], capture_output=True, text=True, check=False
    )
    if done.stdout.strip() != "healthy":
        raise CollectError(
            f"it does not serve (vllm-gemma is {done.stdout.strip() or 'not there'}), and what never served "
            "is not bundled: `ansible-playbook site.yml` brings it there"
        )
    base = dict(
        line.split("=", 1)
        for line in output("docker", "exec", "vllm-gemma", "cat", "/run/vllm/vllm.base").splitlines()
    )
    git = ("git", "-c", f"safe.directory={checkout}", "-C", checkout)
    if output(*git, "status", "--porcelain", "--untracked-files=no"):
        raise CollectError(
            f"files in {checkout} differ from its commit, and a bundle holds commits alone: "
            f"`git -C {checkout} status` shows them"
        )
    release = output(*git, "rev-parse", "HEAD")
    refs = output(
        *git, "for-each-ref", "--format=%(refname) %(objectname) %(*objectname)", "refs/heads", "refs/tags"
    )
    return {
        "release": release,
        "refs": {words[0].split("/", 2)[2]: words[-1] for words in map(str.split, refs.splitlines())},
        # The playbooks that install it must be of the same release: these say so without git.
        "server": {
            name: entry.split()[2]
            for entry, _, name in (
                line.partition("\t") for line in output(*git, "ls-tree", "-r", "HEAD", "server").splitlines()
            )
        },
        "system": system(),
        "model": f"{base['SERVER_MODEL']}@{base['SERVER_MODEL_REVISION']}",
        "parts": [
            {
                "kind": "code",
                "name": "the repository",
                "identity": f"{release} {digest(refs)}",
                "bytes": 50 << 20,
            },
            packages(),
            *images(),
            model(base["SERVER_MODEL"]),
            *adapters(),
        ],
        "free": shutil.disk_usage(STAGING).free,
    }


def system() -> dict[str, str]:
    """Return what a host must have in common with this one for its packages and images."""
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )
    return {
        "os": release["ID"].strip('"'),
        "release": release.get("VERSION_ID", "").strip('"'),
        "architecture": output("dpkg", "--print-architecture"),
    }


def digest(text: str) -> str:
    """Return a few digits that differ where the text does."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def images() -> list[Part]:
    """Return the images that run, by the names under which they do."""
    filters = ("--filter", f"label=com.docker.compose.project={PROJECT}")
    running = output(
        "docker", "ps", *filters, "--filter", "label=com.docker.compose.oneoff=False", "-q"
    ).split()
    names = set(output("docker", "inspect", "-f", "{{.Config.Image}}", *running).split())
    parts = []
    for name in sorted(names):
        identity, size = output("docker", "image", "inspect", "-f", "{{.Id}} {{.Size}}", name).split()
        parts.append({"kind": "image", "name": name, "identity": identity, "bytes": int(size)})
    return parts


def model(name: str) -> Part:
    """Return the base model as entrypoint.sh left it."""
    folder = volume("models-base") / name
    done = folder / ".complete"
    # A model that is fetched anew is another directory with another mark.
    identity = f"{done.read_text().strip()} {done.stat().st_mtime_ns}"
    return {"kind": "model", "name": name, "identity": identity, "bytes": size_of(folder)}


def adapters() -> list[Part]:
    """Return the adapters that are served."""
    listed = json.loads(output("docker", "exec", "vllm-gemma", "adapter_manager.py", "history", "--json"))
    served = [one for one in listed["adapters"] if one["serves"] and not one["quarantined"]]
    store = volume("models-adapters") if served else Path()
    return [
        {
            "kind": "adapter",
            "name": one["name"],
            "identity": one["serves"],
            "bytes": size_of(store / one["name"] / one["serves"]),
            "source": one["source"],
        }
        for one in served
    ]


def packages() -> Part:
    """Return what apt would fetch for a host that has none of it."""
    installed = dict(
        line.split(" ", 1)
        for line in output(
            "dpkg-query", "-W", "-f", "${Package} ${Version} ${db:Status-Status}\n"
        ).splitlines()
        if line.endswith(" installed")
    )
    roots = {kind: [name for name in names if name in installed] for kind, names in PACKAGES.items()}
    # Indexes may have been removed to save space; a repository that is away shows below, if it is needed.
    subprocess.run(["apt-get", "update", "-q"], capture_output=True, check=False)
    wanted, gone = [], []
    for name in (name for names in roots.values() for name in names):
        version = installed[name].split()[0]
        if f" {version} " in f"{output('apt-cache', 'madison', name)} ".replace("|", " "):
            wanted.append(f"{name}={version}")
        else:  # a point release has taken its place
            wanted.append(name)
            gone.append(f"{name} {version}")
    files = FETCHED.findall(apt(wanted, "--print-uris"))
    return {
        "kind": "packages",
        "name": "the packages",
        "identity": digest(str(sorted(files))),
        "bytes": sum(int(size) for _, size, _ in files),
        "roots": roots,
        "wanted": wanted,
        "gone": gone,
    }


def apt(wanted: list[str], option: str, archives: str = "") -> str:
    """Ask apt-get for packages with all that they need, as if nothing were installed nor fetched before."""
    with tempfile.TemporaryDirectory() as folder:
        nothing = Path(folder, "status")
        nothing.touch()
        return output(
            "apt-get",
            "install",
            "-y",
            "--no-install-recommends",
            *("-o", f"Dir::State::status={nothing}"),
            *("-o", f"Dir::State::extended_states={folder}/extended"),
            *("-o", f"Dir::Cache::pkgcache={folder}/pkgcache"),
            *("-o", "Dir::Cache::srcpkgcache="),
            *("-o", "Debug::NoLocking=1"),
            *("-o", "APT::Sandbox::User=root"),
            *("-o", f"Dir::Cache::archives={archives or folder}"),
            "-qq",
            option,
            *wanted,
        )


# ── One part ─────────────────────────────────────────────────────────────────────────────────────


def make(checkout: str, folder: Path, part: Part) -> dict[str, dict[str, Any]]:
    """Make the files of a part in a folder and return what each is, by its name in the bundle."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    {
        "code": lambda: make_code(checkout, folder),
        "packages": lambda: make_packages(folder, part),
        "image": lambda: make_image(folder, part["name"]),
        "model": lambda: make_model(folder, part["name"]),
        "adapter": lambda: make_adapter(folder, part),
    }[part["kind"]]()
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            total = hashlib.sha256()
            while chunk := file.read(1 << 20):
                total.update(chunk)
        size = path.stat().st_size
        files[path.relative_to(folder).as_posix()] = {"sha256": total.hexdigest(), "size": size}
    # Whoever logged in fetches it, be it that this runs through sudo.
    output("chown", "-R", os.environ.get("SUDO_UID", "0"), str(folder))
    return files


def make_code(checkout: str, folder: Path) -> None:
    """Put all commits of the checkout into one file, from which git clones."""
    git = ("git", "-c", f"safe.directory={checkout}", "-C", checkout)
    output(*git, "bundle", "create", "-q", str(folder / "code.bundle"), "HEAD", "--branches", "--tags")


def make_packages(folder: Path, part: Part) -> None:
    """Pack the packages and their index, a repository of apt's plainest form."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        (Path(place) / "partial").mkdir()
        apt(part["wanted"], "--download-only", place)
        debs = sorted(Path(place).glob("*.deb"))
        index = []
        for deb in debs:
            fields = output("dpkg-deb", "--field", str(deb))
            content = deb.read_bytes()
            index.append(
                f"{fields}\nFilename: ./{deb.name}\nSize: {len(content)}\n"
                f"SHA256: {hashlib.sha256(content).hexdigest()}\n"
            )
        Path(place, "Packages").write_text("\n".join(index))
        names = ["Packages", *(deb.name for deb in debs)]
        output("tar", "-cf", str(folder / "packages.tar"), "-C", place, *names)


def make_image(folder: Path, name: str) -> None:
    """Save an image as `docker load` takes it, packed with what the host has."""
    packers = (("zstd", "zst", "-q -3 -T0"), ("pigz", "gz", "-1"), ("gzip", "gz", "-1"))
    program, suffix, options = next(packer for packer in packers if shutil.which(packer[0]))
    place = folder / "images"
    place.mkdir()
    with (place / f"{re.sub('[/:]', '_', name)}.tar.{suffix}").open("wb") as file:
        save = subprocess.Popen(["docker", "save", name], stdout=subprocess.PIPE)
        packed = subprocess.run([program, *options.split()], stdin=save.stdout, stdout=file, check=False)
        if save.wait() or packed.returncode:
            raise CollectError(f"docker save {name} | {program}: it failed; is there room in {folder}?")


def make_model(folder: Path, name: str) -> None:
    """Pack the model's directory with its mark; weights do not get smaller by compression."""
    output("tar", "-cf", str(folder / "model.tar"), "-C", str(volume("models-base") / name), ".")


def make_adapter(folder: Path, part: Part) -> None:
    """Copy an adapter's directory."""
    source = volume("models-adapters") / part["name"] / part["identity"]
    shutil.copytree(source, folder / "adapters" / part["name"])


def main() -> None:
    """Answer with JSON, or end with 1 and a sentence."""
    try:
        if sys.argv[1] == "survey":
            print(json.dumps(survey(sys.argv[2])))
        else:
            print(json.dumps(make(sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4]))))
    except (CollectError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
