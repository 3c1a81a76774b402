"""PAROAttention: block-sparse, quantised attention for visual diffusion transformers, planned once and applied always."""

__version__ = "0.1.0"
