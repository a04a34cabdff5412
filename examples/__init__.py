"""Worked examples: applications that use Millrace as theirs would."""
