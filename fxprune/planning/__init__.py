"""From a model to a plan: `analyze` joins regions, costs and scores, an integer program chooses the regions that go.

A model and calibration batches come in; an `Analysis` goes out, and a `Plan` for any budget. A field of the plan file
is declared in `plan`; `plan_schema` checks it by its annotation.
"""
