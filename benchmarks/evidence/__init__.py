"""Pages of evidence from finished comparisons: `python -m benchmarks.evidence --help`, from the repository's root."""
