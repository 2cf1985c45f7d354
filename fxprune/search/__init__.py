"""The whole pipeline in one call: `compile` analyzes, plans, applies and heals, and can try many plans.

A model, calibration batches and a budget come in; a pruned model goes out. A new strategy is a function and a row in
`plan_search.STRATEGIES`; what proposes plans is in `surrogate`, what judges them in `agreement`.
"""
