"""What everything else may import, and what imports nothing of ours."""
