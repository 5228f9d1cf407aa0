"""How fast, and how much: figures, printed with the machine that they were made on. Tests do not depend on them."""
