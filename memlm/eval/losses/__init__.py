"""Loss by position in long documents, with and without the memory of the past."""
