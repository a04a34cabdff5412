"""What a fleet will do and cost, with error bars, before it is rented: `millrace plan`.

`facts` has tables of GPUs, prices, models, texts and measured rows. `model` has the time of a step,
its parameters and their fit. `predict` has throughput, latency, memory, energy, cost and choice.
Nothing here starts a server or touches a GPU.
"""
