"""The adapters of a backup come back over the tailnet, and no request fails."""

from stack import answers, clients, containers, host, laptop, node, nothing_failed, replaced

SSH = "ssh root@function-gemma-server"
LIST = "docker exec vllm-gemma adapter_manager.py list"


def test_the_adapters_of_a_backup_come_back_and_no_request_fails() -> None:
    saved, before = host(LIST).stdout, containers()
    laptop(f"{SSH} ./backup.sh save >/tmp/backup.tar")
    state = node("cat /var/lib/tailscale/tailscaled.state").stdout
    laptop(f"cd .cache/lab/model && tar c lint | {SSH} ./adapter_manager.py load later -")
    assert host(LIST).stdout != saved
    with clients() as seen:
        laptop(f"{SSH} ./backup.sh restore </tmp/backup.tar", seconds=300)
    assert nothing_failed(seen)
    assert host(LIST).stdout == saved
    assert replaced(before) == {"vllm-gemma"}
    assert node("cat /var/lib/tailscale/tailscaled.state").stdout == state
    answers()


def test_what_is_no_backup_changes_nothing() -> None:
    before = containers()
    wrong = laptop(f"head -c 20000 /tmp/backup.tar | {SSH} ./backup.sh restore", ok=False)
    assert "this is no whole backup" in wrong.words
    assert "nothing has changed" in wrong.words
    assert not replaced(before)
    assert ".restore" not in host("docker exec vllm-gemma ls -A /models/adapters").stdout
