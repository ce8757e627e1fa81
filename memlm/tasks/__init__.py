"""What is asked: stories and their solver, haystacks, BABILong documents, probes. No model is needed."""
