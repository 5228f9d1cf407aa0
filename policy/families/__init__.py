"""Model families, a file each. policy/family.py says what one is, policy/source.py which there are."""
