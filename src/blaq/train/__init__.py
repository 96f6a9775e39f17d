"""Training runs: recipes, the Lightning module, run directories, comparisons."""
