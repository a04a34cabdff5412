"""From retrieved clauses to an answer: prompt, decision, stream."""
