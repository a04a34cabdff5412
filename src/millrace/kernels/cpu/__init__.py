"""The CPU's fast paths: thin Python over C++ that is compiled on the machine it runs on.

An op here returns NotImplemented if it does not support its arguments, or if the library is not
compiled yet; then the reference runs.
"""
