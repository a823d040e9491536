"""Finds nothing: a tool of an agent that only the tests have."""

import json

print(json.dumps({"problems": []}))
