"""The whole pipeline in one call: `compile` analyzes, plans, applies and heals. It can try many plans.

Input: a model, calibration batches and a budget. Output: a pruned model. To add a strategy, write a function and add a
row to `plan_search.STRATEGIES`. Module `surrogate` proposes plans, and `judges` measures how good they are.
"""
