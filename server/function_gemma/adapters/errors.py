"""What can go wrong with an adapter. Every message says what is wrong, where, and what mends it.

Each class has the exit status of adapter_manager.py and the HTTP status of the plugin's routes; the table in
server/README.md names them.
"""


class AdapterError(Exception):
    """The one family of errors of adapters; by itself: what was asked for cannot be done as asked."""

    exit_code = 1
    status = 400


class RefusedError(AdapterError):
    """The adapter itself is wrong."""

    exit_code = 3
    status = 422


class NotServedError(AdapterError):
    """There is no adapter of that name, or no generation of it, to do that with."""

    exit_code = 4
    status = 404


class GateError(AdapterError):
    """The new generation answers fewer of its gate's prompts as expected than the gate states."""

    exit_code = 5
    status = 412


class NoAnswerError(AdapterError):
    """The server did not answer, so that nobody knows what it did."""

    exit_code = 6
    status = 503


class StoreError(AdapterError):
    """The store itself is damaged or full: not the fault of whoever asks."""

    exit_code = 7
    status = 500


class EngineError(AdapterError):
    """vLLM did not take the adapter, or the new generation did not answer."""

    exit_code = 8
    status = 502
