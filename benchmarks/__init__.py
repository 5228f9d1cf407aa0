"""How fast, and how much: measurements that print figures with the machine they were made on. No test depends on them."""
