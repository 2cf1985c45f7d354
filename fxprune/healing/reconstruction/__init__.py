"""Layer-wise reconstruction: each layer is fitted in closed form to the outputs that it had in the original.

Both models run side by side; `layerwise` stops at every layer and calls a fit. A new fit has the signature `Fit` of
`least_squares`.
"""
