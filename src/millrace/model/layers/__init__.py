"""The layers that models are made of, each a short forward over the ops in `millrace.kernels`.

A layer knows its weights (this rank's share) and the caches that it is given. It knows no request,
no device and no family: a family hands it what it is made of. A mixer (attention, GDN) or an MLP
returns this rank's partial sum. The next norm does the all-reduce and the residual add, in one
kernel if it can.
"""
