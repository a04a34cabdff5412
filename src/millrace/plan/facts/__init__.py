"""Tables with their sources: GPUs, prices, models, kinds of text, measured rows."""
