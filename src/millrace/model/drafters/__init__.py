"""Draft heads: small models that guess the next tokens from the hidden vectors of a large one."""
