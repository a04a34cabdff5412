"""`millrace report`: everything that can be measured of a model on a machine, in one file that can
be checked: what ran, what it cost, how right it was, and how it compares with other servers.

Nothing here imports PyTorch but `reference`, which runs as a process of its own.
"""
