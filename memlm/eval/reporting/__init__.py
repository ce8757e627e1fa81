"""What was found: summaries, comparisons, pictures and pages."""
