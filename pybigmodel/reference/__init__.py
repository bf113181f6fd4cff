"""Every op in a few lines of plain PyTorch: the oracle of the tests, the explanation of the op."""
