"""The formats that weights of linear layers are stored in: a module each, with its `FORMAT`."""
