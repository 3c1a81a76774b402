"""Attention over kept blocks: the reference, what is compared with it, and the statistics that plans are made of."""
