"""Turns the eight words of a prompt into the tokens that the bundled transformer attends to."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .prompt import SLOTS, VOCABULARY, ids_of, words_of


class Conditioner(ModelMixin, ConfigMixin):
    """One learned vector per word plus one per slot."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, words: int = len(VOCABULARY), slots: int = len(SLOTS), dim: int = 64):
        super().__init__()
        self.word = nn.Embedding(words, dim)
        self.slot = nn.Parameter(torch.randn(slots, dim))

    def forward(self, ids: Tensor) -> Tensor:
        """Embed word indices (B, slots) as tokens (B, slots, dim)."""
        return self.word(ids) + self.slot

    def encode(self, prompts: list[str]) -> Tensor:
        """Embed prompts as tokens (B, slots, dim)."""
        ids = torch.tensor([ids_of(words_of(prompt)) for prompt in prompts], device=self.slot.device)
        return self(ids)
