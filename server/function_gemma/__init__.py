"""What function-gemma-server adds to vLLM: adapters that survive, and subagents that use them."""
