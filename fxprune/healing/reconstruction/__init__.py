"""Layer-wise reconstruction: each layer is fitted in closed form to its outputs in the original.

The original and the pruned model run at the same time; `layerwise` pauses both at every layer and calls a fit. To add a
fit, write a function with the signature `Fit` of `least_squares`.
"""
