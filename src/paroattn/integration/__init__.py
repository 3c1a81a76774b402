"""Plans on diffusers models: which layers, how a call reaches the kernel, and the verbs that turn it on and off."""
