"""Trains millrace-mini on questions with retrieved clauses: data, run, accuracy."""
