"""What the preflight says of a controller without the lab, and of a host that is too old; the rest is in tests/molecule/preflight."""
