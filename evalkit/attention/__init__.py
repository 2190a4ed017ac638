"""The sparse MLA attention path and the backends that run it.

Dimension letters, used in shapes throughout: B sequences, T tokens of this step, S cached tokens, H heads,
K selected tokens, C latent (512), R rope (64), L layers, V value head, D hidden, I indexer heads.
"""
