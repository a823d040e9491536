"""Adapters on disk: immutable generations, which of them is served, and the lock of whoever changes that.

Nothing here imports vLLM, so that the manager starts at once and the tests need no model.
"""
