"""What regions are worth: gradients and activations are recorded by an interpreter, and criteria make scores of them.

A captured model and batches come in; one number a region goes out. A new criterion is a function and a row in
`criteria.CRITERIA`. What it needs beyond the present record is recorded in `recorder`.
"""
