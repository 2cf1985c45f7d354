"""Measures costs: FLOPs, parameters and milliseconds of a model, its nodes and its regions.

Input: a captured model and one batch. Output: numbers per node or per region. A new cost is counted here. Add its name
to `COSTS` of `fxprune.planning.analysis` and a field to `Totals` and `Candidate`.
"""
