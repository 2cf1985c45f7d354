"""Scores regions: an fx interpreter records gradients and activations, and a criterion computes scores from them.

Input: a captured model and batches. Output: one score per region. To add a criterion, write a function and add a row to
`criteria.CRITERIA`. If it needs values that are not recorded yet, record them in `recorder`.
"""
