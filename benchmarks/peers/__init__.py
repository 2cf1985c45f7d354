"""Comparison with channel pruning by Torch-Pruning."""
