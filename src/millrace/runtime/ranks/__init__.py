"""The ranks of one replica: how they meet, watch each other and add up tensors."""
