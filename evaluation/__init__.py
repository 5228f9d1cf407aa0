"""What a run achieved: comparisons on the fixed evaluation set, picture grids and the report."""
