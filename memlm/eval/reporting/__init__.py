"""Results: summaries, comparisons, pictures and pages."""
