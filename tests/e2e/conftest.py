"""The lab and the deployed stack, brought up once; a run that finds them reuses them."""

from collections.abc import Iterator

import pytest

import common as lab
from stack import ROOT, answers, lab_up, laptop, playbook, server


@pytest.fixture(scope="session", autouse=True)
def deployed() -> None:
    """The stack on the host, of the working tree's code and the lab's inventory."""
    lab_up()
    playbook("site.yml", seconds=900)
    answers()


@pytest.fixture(scope="session", autouse=True)
def acquainted(deployed: None) -> None:  # noqa: ARG001 - the node's host key is made with the node
    """The laptop knows the node's SSH host key, as after a person's first `ssh` there."""
    laptop("rm -f /root/.ssh/known_hosts")
    laptop("ssh -o StrictHostKeyChecking=accept-new root@function-gemma-server true")


@pytest.fixture
def settings() -> Iterator[None]:
    """What the test changes in the host's settings and secrets is as before when it ends."""
    server("umask 077 && tar -cf /run/e2e.tar .env *.env secrets")
    yield
    # But the tags of the images, which update.sh keeps in .env: they stay those of what serves by now.
    server(
        "tags=$(grep _TAG= .env) && rm -rf secrets && tar -xf /run/e2e.tar && rm /run/e2e.tar "
        '&& sed -i /_TAG=/d .env && echo "$tags" >>.env'
    )


@pytest.fixture(scope="session")
def adapters() -> str:
    """Where the laptop has the trained adapters."""
    return f"/home/checkout/{lab.CACHE.relative_to(ROOT)}/model"
