"""What the preflight refuses, seen without a host: the controller, the inventory, the variables and the adapters."""
