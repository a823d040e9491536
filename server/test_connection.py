#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.11"
# dependencies = ["openai>=3,<4"]
# ///
"""Ask the server one question and say which hop failed if no answer comes.

Run it on any machine of the tailnet: `uv run test_connection.py`, or with a Python that has openai.
It tries everything once: what it reports is what a caller meets now.

Exit codes: 0 answered; 2 wrong arguments; 3 the name does not resolve; 4 no connection; 5 no answer in time;
6 an HTTP error; 7 the model is not served; 8 an answer that says nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import openai

if TYPE_CHECKING:
    from collections.abc import Iterator

BASE_URL = "http://function-gemma-server:8000/v1"
PROMPT = "Which tool should run next for src/app.py?"


class CheckFailedError(Exception):
    """A hop failed: the exit code, and one line that names the hop and what to do."""

    def __init__(self, code: int, message: str) -> None:
        """Keep the exit code beside the message."""
        super().__init__(message)
        self.code = code


def base_url(text: str) -> str:
    """Accept an http(s) URL with a host."""
    try:
        url = urlsplit(text)
        usable = url.scheme in {"http", "https"} and url.hostname and url.port != 0
    except ValueError:  # raised by a port out of range and by a malformed IPv6 address
        usable = False
    if not usable:
        raise argparse.ArgumentTypeError(f"{text!r} is no URL such as {BASE_URL}")
    return text


def assignment(text: str) -> str:
    """Take NAME out of model=NAME."""
    key, _, name = text.partition("=")
    if key != "model" or not name:
        raise argparse.ArgumentTypeError(f"{text!r} should be model=NAME")
    return name


def seconds(text: str) -> float:
    """Accept a positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of seconds")
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    description, _, exit_codes = str(__doc__).rpartition("\n\n")
    parser = argparse.ArgumentParser(description=description, epilog=exit_codes)
    default = "default: %(default)s"
    model = parser.add_mutually_exclusive_group()
    model.add_argument("assigned", nargs="?", type=assignment, metavar="model=NAME", help="as --model NAME")
    model.add_argument("--model", metavar="NAME", help="base model or adapter; default: the base model")
    parser.add_argument("--base-url", type=base_url, default=BASE_URL, metavar="URL", help=default)
    parser.add_argument(
        "--timeout", type=seconds, default=60.0, metavar="SECONDS", help=f"per step; {default}"
    )
    parser.add_argument("--prompt", default=PROMPT, help=default)
    return parser.parse_args(argv)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and all that led to it: the OSError lies below openai's error and the HTTP library's."""
    while error is not None:
        yield error
        if isinstance(error, BaseExceptionGroup):  # a name with several addresses: one error for each
            for member in error.exceptions:
                yield from causes(member)
        error = error.__cause__ or error.__context__


def explain(error: openai.APIError, url: str, timeout: float) -> CheckFailedError:
    """Say which hop an error of the openai client belongs to."""
    parts = urlsplit(url)
    where = parts.netloc.rpartition("@")[2]
    chain = list(causes(error))
    if isinstance(error, openai.APIStatusError):
        said = error.body.get("message") if isinstance(error.body, dict) else error.response.reason_phrase
        advice = "On the server: docker compose ps; docker compose logs gateway vllm-server"
        if error.status_code == 404:
            advice = "Does --base-url end in /v1?"
        return CheckFailedError(6, f"HTTP {error.status_code} from {error.request.url}: {said}. {advice}")
    # By name: the class moved between the HTTP libraries that openai has used.
    if any(type(cause).__name__ == "ConnectTimeout" for cause in chain):
        return CheckFailedError(
            4,
            f"connection: {where} did not accept one within {timeout:g} s. Is the node up (tailscale ping "
            f"{parts.hostname}), and does the tailnet's policy grant this machine its port?",
        )
    if isinstance(error, openai.APITimeoutError):
        return CheckFailedError(
            5,
            f"answer: {where} took the request, but nothing came within {timeout:g} s. "
            "Is the model still starting? On the server: docker compose logs vllm-server",
        )
    if any(isinstance(cause, socket.gaierror) for cause in chain):
        return CheckFailedError(
            3,
            f"name: {parts.hostname} does not resolve. Is this machine on the tailnet (tailscale status), "
            "with MagicDNS on?",
        )
    if any(isinstance(cause, ConnectionRefusedError) for cause in chain):
        return CheckFailedError(
            4,
            f"connection: {where} refused it; nothing listens. On the server: docker compose ps gateway",
        )
    reason = next((cause for cause in reversed(chain) if isinstance(cause, OSError)), chain[-1])
    return CheckFailedError(4, f"connection: {where}: {reason}. On the server: docker compose ps gateway")


def connect(url: str, wait: float) -> openai.AsyncOpenAI:
    """Make the client; it connects at its first request."""
    try:
        # The key is given so that an OPENAI_API_KEY of the environment is not sent to this server.
        return openai.AsyncOpenAI(base_url=url, api_key="none", timeout=wait, max_retries=0)
    except (
        Exception
    ) as error:  # InvalidURL of the HTTP library below openai, which is not always the same one
        raise CheckFailedError(2, f"--base-url {url}: {error}") from error


async def ask(url: str, model: str | None, prompt: str, wait: float) -> tuple[str, str]:
    """Return the model that answered and its reply on one line; raise CheckFailedError naming the hop."""
    async with connect(url, wait) as client:
        try:
            served = [entry.id for entry in (await client.models.list()).data]
            if not served or (model and model not in served):
                raise CheckFailedError(
                    7,
                    f"model: {model or 'the base'} is not served; served: {', '.join(served) or 'none'}."
                    " For an adapter: ansible-playbook load_adapter.yml -e name=NAME, or on the server: "
                    "docker compose exec vllm-server adapter_manager.py load NAME PATH",
                )
            asked = model or served[0]  # vLLM lists the base model first
            completion = await client.chat.completions.create(
                model=asked, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=64
            )
            reply = (completion.choices[0].message.content or "").split()
        except openai.APIError as error:
            raise explain(error, url, wait) from error
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            # openai does not check the shape of a 200: it trips over what another kind of server answers.
            message = f"reply: what answers at {url} is no OpenAI server. Is --base-url right?"
            raise CheckFailedError(8, message) from error
    if not reply:
        raise CheckFailedError(
            8, f"reply: {asked} answered with nothing. On the server: docker compose logs vllm-server"
        )
    return asked, " ".join(reply)


def main(argv: list[str] | None = None) -> int:
    """Check once, print one line, return the exit code."""
    args = parse(argv)
    try:
        model, reply = asyncio.run(ask(args.base_url, args.model or args.assigned, args.prompt, args.timeout))
    except CheckFailedError as failure:
        print(f"FAILED: {' '.join(str(failure).split())}", file=sys.stderr)
        return failure.code
    print(f"SUCCESS: {model} answered: {reply}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
