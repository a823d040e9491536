"""The node in userspace mode, where tailscaled hands what the tailnet sends to 127.0.0.1 of the pod."""

from collections.abc import Iterator

import pytest

from stack import answers, inspect, lab_up, playbook
from test_tailnet import listening, test_nothing_but_ssh_the_gateway_and_peerapi_answers_the_laptop

__all__ = ["test_nothing_but_ssh_the_gateway_and_peerapi_answers_the_laptop"]


@pytest.fixture(scope="module", autouse=True)
def userspace() -> Iterator[None]:
    """The lab's stack without the tunnel device; afterwards with it again."""
    lab_up()
    playbook("site.yml", "-e", "server_networking=userspace", seconds=900)
    yield
    playbook("site.yml", seconds=900)
    answers()


def test_the_model_answers_and_the_sidecar_has_no_device() -> None:
    answers()
    sidecar = inspect("function-gemma-server")["tailscale-vllm"]["HostConfig"]
    assert not sidecar["Devices"]
    assert {name.removeprefix("CAP_") for name in sidecar["CapAdd"]} == {"SETGID", "DAC_OVERRIDE"}


def test_the_gateway_alone_listens_on_the_loopback_that_the_tailnet_reaches() -> None:
    # Whatever the policy allows. The other addresses of 127.0.0.0/8 are not handed to.
    reached = {"127.0.0.1", "0.0.0.0", "::1", "::", "*"}  # noqa: S104 - what is looked for
    ends = listening() - listening("tailscaled")  # PeerAPI, which asks who calls
    assert {port for where, port in ends if where in reached} == {8000}
