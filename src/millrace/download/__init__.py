"""`millrace download`: models from the Hugging Face hub or an object store, onto a disk.

A download goes on where it stopped, whatever stopped it, and nothing counts as there before its
digest was checked. `hub` and `object_store` know where bytes come from, `journal` which of them are
on the disk, `fetcher` how they get there, `destination` the folders that they end in.
"""
