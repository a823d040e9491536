"""What can go wrong with an adapter. Every message says what is wrong, where, and what mends it."""


class AdapterError(Exception):
    """The one family of errors of adapters; by itself: what was asked for cannot be done as asked."""


class NotServedError(AdapterError):
    """No adapter of that name is served or set aside."""


class NoAnswerError(AdapterError):
    """The server did not answer, so that nobody knows what it did."""


class StoreError(AdapterError):
    """The store itself is damaged: not the fault of whoever asks."""
