"""What the project claims, each claim by one command: many runs of workers/local.py, then a table and figures."""
