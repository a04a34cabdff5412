"""The CPU's fast paths: thin Python over C++ that is compiled on the machine it runs on.

An op here returns NotImplemented where it does not take what it is given, or where the library is
not there (yet); then the reference runs.
"""
