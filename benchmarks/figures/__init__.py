"""The figures of docs/technical-report.md: each is drawn from a table of LEDGER.md.

python -m benchmarks.figures        # writes docs/images/*.svg
"""
