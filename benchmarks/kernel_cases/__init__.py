"""The cases of kernels_h200.py: every GPU op, its check and what is timed, by section."""
