"""What breaks on a host by itself mends by itself."""

from stack import ANSWERS, PROMPT, answers, ask, containers, host, reaches, replaced, until

HEALER = "function-gemma-heal.service"


def test_the_tailnet_answers_again_after_a_restart_of_the_pod_and_a_run_of_the_healer() -> None:
    host("docker restart -t 1 function-gemma-pod")
    host(f"systemctl start {HEALER}", seconds=300)
    until("the laptop reaches the gateway again", lambda: reaches("/agents/"))
    answers()


def test_a_container_that_was_removed_comes_back_by_a_run_of_the_healer() -> None:
    host("docker rm -f gateway-gemma agents-gemma")
    host(f"systemctl start {HEALER}", seconds=300)
    until("the laptop reaches the gateway again", lambda: reaches("/agents/"))
    answers()


def test_the_healer_is_silent_where_all_is_well() -> None:
    before, since = containers(), host("date '+%F %T'").last
    host(f"systemctl start {HEALER}")
    assert "heal.sh:" not in host(f"journalctl -u {HEALER} --since '{since}'").stdout
    assert not replaced(before)


def test_vllm_comes_back_by_itself_after_a_kill() -> None:
    before = containers()
    init = host("docker inspect -f '{{.State.Pid}}' vllm-gemma").last  # Docker's, whose child is vLLM
    host(f"kill -9 $(cat /proc/{init}/task/{init}/children)")
    assert ask("lint") == ANSWERS[PROMPT]["lint"]  # the gateway lets it wait
    assert replaced(before) == {"vllm-gemma"}
