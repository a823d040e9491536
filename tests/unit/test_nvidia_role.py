"""What the role nvidia makes of a host, and the role server of its GPUs, by Ansible's own templating."""

import json
from pathlib import Path
from typing import Any

import probe
import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

ROOT = Path(__file__).resolve().parents[2]
SYSTEMS = ["debian-12", "debian-13", "ubuntu-22.04", "ubuntu-24.04"]
HERE = {"index": "0", "uuid": "GPU-a"}
Host = dict[str, Any]


def load(path: str) -> Any:  # noqa: ANN401 (YAML holds anything)
    return yaml.safe_load((ROOT / path).read_text())


def trusted(value: Any) -> Any:  # noqa: ANN401 (as above)
    if isinstance(value, dict):
        return {name: trusted(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [trusted(inner) for inner in value]
    return trust_as_template(value) if isinstance(value, str) else value


def host(**known: Any) -> Host:  # noqa: ANN401 (what the probe says)
    """What the probe says of a Debian 13 that the role set up, but for what is `known`."""
    toolkit = {name: {"version": "1.20.0-1", "held": True} for name in probe.TOOLKIT}
    pins = f"Package: {' '.join(probe.TOOLKIT)}\nPin: version 1.20.0-1\nPin-Priority: 1001"
    head = load("roles/nvidia/vars/main.yml")["__nvidia_toolkit_pins"].splitlines()[0]
    return {
        "system": "debian-13",
        "architecture": "amd64",
        "kernel": "6.12.48",
        "headers": False,
        "nouveau": False,
        "secure_boot": False,
        "wsl": False,
        "count": 1,
        "driver": "580.95.05",
        "gpus": [HERE],
        "driver_problem": "",
        "packages": toolkit,
        "ours": [],
        "cli": "1.20.0",
        "units": dict.fromkeys(probe.UNITS, "enabled"),
        "devices": ["nvidia.com/gpu=0", "nvidia.com/gpu=GPU-a", "nvidia.com/gpu=all"],
        "pins": f"{head}\n{pins}",
        "ordered": True,
        "record": {"driver": "580.95.05", "holds": probe.TOOLKIT, "packages": probe.TOOLKIT},
        "engine": "29.1.3",
        "engine_cdi": True,
        "users": [],
        **known,
    }


NO_TOOLKIT = {
    "packages": {},
    "cli": "",
    "units": {},
    "devices": [],
    "pins": "",
    "ordered": False,
    "record": {},
}
NO_DRIVER = {"driver": "", "gpus": []}
BARE = {**NO_TOOLKIT, **NO_DRIVER, "engine": "", "engine_cdi": False}
THEIRS = {"record": {"driver": "580.95.05"}, "pins": ""}


def of_version(version: str, *, held: bool = False) -> Host:
    return {name: {"version": version, "held": held} for name in probe.TOOLKIT}


class Role:
    """The variables of the roles nvidia and server on a host."""

    def __init__(self, found: Host, **variables: Any) -> None:  # noqa: ANN401 (as in an inventory)
        stdout = "\n".join(["tun", f"engine {found['engine']}", *found["devices"]])
        self.variables = trusted(
            load("roles/nvidia/defaults/main.yml")
            | load("roles/nvidia/vars/main.yml")
            | load("roles/server/vars/main.yml")
            | load("roles/server/defaults/main.yml")
            | {"checkout_path": "/opt/x"}
            | variables
        ) | {
            "inventory_hostname": "box",
            "__nvidia_probe": {"stdout": json.dumps(found)},
            "__server_devices": {"stdout_lines": stdout.splitlines()},
        }

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 (a variable of any kind)
        return Templar(loader=DataLoader(), variables=self.variables).template(trusted("{{ " + name + " }}"))

    def template(self, value: Any) -> Any:  # noqa: ANN401 (as above)
        return Templar(loader=DataLoader(), variables=self.variables).template(trusted(value))

    def refusals(self) -> list[str]:
        """The messages of check.yml on this host."""
        (task,) = [task for task in load("roles/nvidia/tasks/check.yml") if "loop" in task]
        return [self.template(item["otherwise"]) for item in task["loop"] if not self.template(item["that"])]

    def due(self) -> list[str]:
        return [part for part in ("driver", "toolkit", "cdi") if self[f"__nvidia_{part}_due"]]


def test_a_host_where_all_is_well_is_left_alone() -> None:
    role = Role(host())
    assert (role["__nvidia_wanted"], role.refusals(), role.due()) == (True, [], [])


def test_a_host_without_a_gpu_or_on_its_cpu_is_left_alone() -> None:
    assert Role(host(**BARE, count=0))["__nvidia_wanted"] is False
    assert Role(host(**BARE, count=0)).refusals() == []
    assert Role(host(**BARE), server_accelerator="cpu")["__nvidia_wanted"] is False
    assert Role(host(**BARE), server_accelerator="cpu").refusals() == []


def test_a_bare_host_gets_all_where_that_is_asked_for() -> None:
    role = Role(host(**BARE), nvidia_driver="install")
    assert (role.refusals(), role.due()) == ([], ["driver", "toolkit", "cdi"])
    assert role["__nvidia_driver_packages"] == [
        "nvidia-driver-cuda",
        "nvidia-kernel-open-dkms",
        "linux-headers-6.12.48",
    ]


@pytest.mark.parametrize(
    ("found", "variables", "says"),
    [
        (
            {**BARE, "count": 0},
            {"server_accelerator": "nvidia"},
            "no NVIDIA GPU is on its PCI bus: set it to auto",
        ),
        (BARE, {}, "there are 1 NVIDIA GPU(s) and no driver: set nvidia_driver to install"),
        (
            {**NO_DRIVER, "driver_problem": "nvidia-smi: no"},
            {},
            "a driver that does not work (nvidia-smi: no): reboot",
        ),
        (
            {"driver": "570.1"},
            {},
            "is 570.1, and the CUDA of vLLM's image needs 580 (nvidia_driver_minimum): upgrade",
        ),
        ({"driver": "570.1"}, {"vllm_image": "x/y:1"}, "the CUDA of x/y:1 needs 580"),
        ({"driver": "570.1"}, {"nvidia_driver": "install"}, "is 570.1, and the CUDA"),  # somebody else's
        (
            {**NO_DRIVER, "wsl": True, "driver_problem": "no"},
            {"nvidia_driver": "install"},
            "its driver is that of Windows; update it there",
        ),
        (
            {**NO_TOOLKIT, "system": "arch-1"},
            {},
            "does not know NVIDIA's packages for arch-1: install the NVIDIA Container",
        ),
        (
            {**THEIRS, "cli": "1.17.8", "packages": of_version("1.17.8-1", held=True)},
            {},
            "held at 1.17.8-1, and nvidia_toolkit_version is 1.20.0-1: `apt-mark unhold nvidia-",
        ),
        ({}, {"server_gpus": [0, 1]}, "server_gpus has 1, and there is only 0, GPU-a: name of these, or all"),
        (
            {**BARE, "count": 2},
            {"server_gpus": "3", "nvidia_driver": "install"},
            "server_gpus has 3, and there is only 0, 1",
        ),
    ],
)
def test_what_cannot_end_well_is_refused_with_what_mends_it(found: Host, variables: Host, says: str) -> None:
    refusals = Role(host(**found), **variables).refusals()
    assert [says in refusal for refusal in refusals] == [True]


@pytest.mark.parametrize(
    ("engine", "knows_cdi", "passes"),
    [("26.1.5", False, False), ("26.1.5", True, True), ("24.0.9", False, True), ("", False, True)],
)
def test_an_engine_that_could_use_cdi_and_does_not_is_refused(
    engine: str, *, knows_cdi: bool, passes: bool
) -> None:
    (task,) = [task for task in load("roles/nvidia/tasks/present.yml") if "ansible.builtin.assert" in task]
    role = Role(host(engine=engine, engine_cdi=knows_cdi))
    assert role[task["ansible.builtin.assert"]["that"]] is passes
    assert "features.cdi in /etc/docker/daemon.json" in role.template(
        task["ansible.builtin.assert"]["fail_msg"]
    )


@pytest.mark.parametrize("chosen", ["all", ["all"], "0", [0], ["GPU-a"], ["0", "GPU-a"]])
def test_gpus_are_chosen_by_index_or_uuid(chosen: object) -> None:
    assert Role(host(), server_gpus=chosen).refusals() == []


@pytest.mark.parametrize(
    ("found", "variables", "due"),
    [
        ({}, {"nvidia_toolkit_version": "1.21.0-1"}, ["toolkit"]),
        ({"packages": of_version("1.20.0-1")}, {}, ["toolkit"]),  # ours, and no longer held
        ({"pins": ""}, {}, ["toolkit"]),
        ({**THEIRS, "packages": of_version("1.19.0-1"), "cli": "1.19.0"}, {}, []),  # theirs, and good
        ({**THEIRS, "packages": of_version("1.19.0-1", held=True), "cli": "1.19.0"}, {}, []),
        ({**THEIRS, "packages": {}, "cli": "1.18.2"}, {}, []),  # built by hand
        ({**THEIRS, "packages": of_version("1.17.8-1"), "cli": "1.17.8"}, {}, ["toolkit"]),
        ({"driver": "590.1"}, {}, ["cdi"]),
        ({"devices": []}, {}, ["cdi"]),
        ({"units": dict.fromkeys(probe.UNITS, "disabled")}, {}, ["cdi"]),
        ({"ordered": False}, {}, ["cdi"]),
        ({"units": {}, "ordered": False}, {}, []),  # without the units there is nothing to order
        (
            {
                "driver": "570.1",
                "record": {"driver": "570.1", "holds": [], "packages": ["nvidia-driver-cuda"]},
            },
            {"nvidia_driver": "install"},
            ["driver"],
        ),
        ({**NO_DRIVER, "wsl": True}, {"nvidia_driver": "install"}, ["cdi"]),
    ],
)
def test_only_what_differs_is_done(found: Host, variables: Host, due: list[str]) -> None:
    assert Role(host(**found), **variables).due() == due


@pytest.mark.parametrize(
    ("said", "version", "passes"),
    [
        ("Inst nvidia-driver-cuda (580.95.05-1 NVIDIA [amd64])", "580.95.05", True),
        ("Inst nvidia-driver-cuda [550.163.01-1] (590.1-1 NVIDIA [amd64])", "590.1", True),
        ("Inst nvidia-driver-cuda (550.163.01-1 NVIDIA [amd64])", "550.163.01", False),
        (
            "Inst linux-headers-6.12.48 (6.12.48-1 Debian [amd64])",
            "",
            True,
        ),  # the driver is there, and its module is not
    ],
)
def test_a_driver_is_known_to_be_too_old_before_it_is_installed(
    said: str, version: str, *, passes: bool
) -> None:
    (task,) = [task for task in load("roles/nvidia/tasks/install.yml") if "outgrown" in task["name"]]
    part = {"packages": ["nvidia-driver-cuda"], "minimum": "580"}
    role = Role(host(), **task["vars"], __nvidia_plan={"stdout_lines": [said]}, __nvidia_part=part)
    assert str(role["__nvidia_version"]) == version
    assert role[task["ansible.builtin.assert"]["that"]] is passes


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_system_has_nvidia_s_names(system: str) -> None:
    role = Role(host(**BARE, headers=True) | {"system": system}, nvidia_driver="install")
    assert role.refusals() == []
    tree = system.replace("-", "").replace(".", "")
    base = "https://developer.download.nvidia.com/compute/cuda/repos"
    assert role["__nvidia_driver_uri"] == f"{base}/{tree}/x86_64"
    key, fingerprint = role["__nvidia_system.key"], role["__nvidia_system.fingerprint"]
    assert len(fingerprint) == 40
    assert fingerprint.endswith(key.removesuffix(".pub").upper())
    assert len(role["__nvidia_driver_packages"]) == 2


def test_the_probe_and_the_role_name_the_same_packages() -> None:
    assert load("roles/nvidia/vars/main.yml")["__nvidia_toolkit_packages"] == probe.TOOLKIT
    assert load("roles/nvidia/vars/main.yml")["__nvidia_units"] == probe.UNITS


MANY = [f"nvidia.com/gpu={name}" for name in ("0", "1", "GPU-a", "GPU-b", "all")]


@pytest.mark.parametrize(
    ("found", "variables", "lines"),
    [
        ({**BARE, "count": 0}, {}, []),
        ({}, {"server_accelerator": "cpu"}, []),
        ({}, {}, ["GPU_DRIVER='cdi'", "GPU_DEVICE='nvidia.com/gpu=0'"]),
        ({"devices": ["nvidia.com/gpu=all"]}, {}, ["GPU_DRIVER='cdi'", "GPU_DEVICE='nvidia.com/gpu=all'"]),
        ({"devices": MANY}, {}, ["GPU_DRIVER='cdi'", "GPU_DEVICE='nvidia.com/gpu=0'"]),
        (
            {"devices": MANY},
            {"server_gpus": ["GPU-b", "0"]},
            ["GPU_DRIVER='cdi'", "GPU_DEVICE='nvidia.com/gpu=GPU-b'"],
        ),
        (
            {"devices": MANY, "engine": "24.0.9"},
            {"server_gpus": [1]},
            ["GPU_DRIVER='nvidia'", "GPU_DEVICE='1'"],
        ),
        (
            {"devices": MANY, "engine": "25.0.1"},
            {"server_gpus": 1},
            ["GPU_DRIVER='cdi'", "GPU_DEVICE='nvidia.com/gpu=1'"],
        ),
    ],
)
def test_the_stack_is_told_its_gpu(found: Host, variables: Host, lines: list[str]) -> None:
    role = Role(host(**found), **variables)
    template = (ROOT / "roles/server/templates/compose.env.j2").read_text().partition("{% for")[0]
    first, *rest = role.template(template.rstrip("\n")).splitlines()
    assert rest == lines
    assert ("docker-compose.gpu.yml" in first) is bool(lines)


def test_the_gpu_s_compose_file_reads_what_the_role_writes() -> None:
    (device,) = load("server/docker-compose.gpu.yml")["services"]["vllm-server"]["deploy"]["resources"][
        "reservations"
    ]["devices"]
    assert device == {
        "driver": "${GPU_DRIVER:-cdi}",
        "capabilities": ["gpu"],
        "device_ids": ["${GPU_DEVICE:-nvidia.com/gpu=all}"],
    }


def test_a_gpu_is_found_by_its_class_on_the_bus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    devices = {
        "a": ("0x10de", "0x030200"),
        "b": ("0x10de", "0x030000"),
        "c": ("0x10de", "0x040300"),
        "d": ("0x8086", "0x030000"),
    }
    for name, (vendor, kind) in devices.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    monkeypatch.setattr(probe, "PCI", tmp_path)
    monkeypatch.setattr(probe, "run", lambda *_: (127, "", ""))
    probe.main()
    found = json.loads(capsys.readouterr().out)
    assert (found["count"], found["driver"], found["gpus"]) == (2, "", [])
    assert found.keys() == host().keys()
