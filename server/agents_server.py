#!/usr/bin/env python3
"""Serve agents/ to the gateway. Settings: AGENTS_SERVER_SOCKET, AGENTS_SERVER_DIRECTORY."""

from function_gemma.agents.server import main

if __name__ == "__main__":
    main()
