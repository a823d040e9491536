"""Subagents: what one is (definition), who serves them (server), who pulls them (client)."""
