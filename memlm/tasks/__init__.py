"""What models are asked: stories and their solver, haystacks, BABILong, probes. Needs no model."""
