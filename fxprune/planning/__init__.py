"""Makes plans: `analyze` joins regions, costs and scores, and an integer program chooses the regions to remove.

Input: a model and calibration batches. Output: an `Analysis`, and a `Plan` for any budget. The fields of the plan file
are declared in `plan`; `plan_schema` checks them by their annotations.
"""
