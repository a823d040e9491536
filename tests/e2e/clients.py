"""Callers of the server on the laptop: `clients.py COUNT PAUSE`, plain Python.

The first line of standard input is a JSON object: for each model what it answers to PROMPT. Each client asks,
every other time for a stream, and pauses for PAUSE seconds, until standard input ends. The result is one JSON
object: requests, a count of each kind of failure, of each maker named by x-served-by, and each
request's [start, seconds, whether it was answered rightly].
"""

import json
import sys
import threading
import time
from collections import Counter
from http.client import HTTPConnection, HTTPException
from itertools import count

HOST, PROMPT = "function-gemma-server", "Who are you?"
SECONDS = 150  # the gateway lets a request wait for two minutes


def ask(model: str, *, stream: bool) -> tuple[str, str]:
    """Return the answer and who made it; what is not a whole answer is an error."""
    connection = HTTPConnection(HOST, 8000, timeout=SECONDS)
    messages = [{"role": "user", "content": PROMPT}]
    body = json.dumps({"model": model, "messages": messages, "temperature": 0, "stream": stream})
    try:
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    if response.status != 200:
        raise HTTPException(f"status {response.status}")
    maker = response.headers["x-served-by"] or "nobody"
    if not stream:
        return json.loads(text)["choices"][0]["message"]["content"], maker
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    if events[-1:] != ["[DONE]"]:
        raise HTTPException("the stream ended early")
    deltas = [json.loads(event)["choices"] for event in events[:-1]]
    return "".join(choice["delta"].get("content") or "" for choices in deltas for choice in choices), maker


def main() -> None:
    """Ask until told to end."""
    clients, pause = int(sys.argv[1]), float(sys.argv[2])
    answers: dict[str, str] = json.loads(sys.stdin.readline())
    failures, makers, times = Counter[str](), Counter[str](), list[tuple[float, float, bool]]()
    end = threading.Event()

    def client(number: int) -> None:
        models = list(answers)
        for turn in count(number):
            model, start = models[turn % len(models)], time.time()
            right = False
            try:
                answer, maker = ask(model, stream=turn // len(models) % 2 == 0)
            except (OSError, HTTPException, ValueError) as error:
                failures[f"{type(error).__name__}: {error}"] += 1
            else:
                makers[maker] += 1
                right = answer == answers[model]
                if not right:
                    failures[f"{model} answered: {answer}"] += 1
            times.append((start, time.time() - start, right))
            if end.wait(pause):
                return

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    end.set()
    for thread in threads:
        thread.join()
    print(json.dumps({"requests": len(times), "failures": failures, "makers": makers, "times": times}))


if __name__ == "__main__":
    main()
