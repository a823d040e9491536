"""What the preflight says of a controller without the lab; the rest is in tests/molecule/preflight."""
