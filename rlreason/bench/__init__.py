"""How fast it is, and what this machine can run. Nothing here changes a result."""
