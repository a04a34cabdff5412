"""All documents read again overnight, for a new rule: one batch, a page of findings, its price."""
