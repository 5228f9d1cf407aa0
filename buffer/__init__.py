"""The trajectory buffer: orders, their life cycle, the journal and the Arrow store. Plain Python, no Ray."""
