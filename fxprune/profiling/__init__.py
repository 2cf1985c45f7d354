"""What things cost: FLOPs, parameters and milliseconds of a model, its nodes and its regions.

A captured model and one batch come in; numbers by node or region go out. A new cost is counted here; its name goes into
`COSTS` of `fxprune.planning.analysis`, and a field for it into `Totals` and `Candidate`.
"""
