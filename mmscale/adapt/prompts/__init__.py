"""Prompts: words that are chosen, and vectors that are learned, for a model whose weights stay as they are."""
