"""The families of models that can be served: a module each, with its `FAMILY`."""
