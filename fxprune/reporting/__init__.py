"""Reports of plans and of pruned models as text, Markdown, HTML and JSON.

The input is a plan or a pruned model, the output a `Report`. `sections` and `history_tables` build the sections from
the rows and columns of `table_model`; `text` and `html` write them. A new section belongs in `sections`, a new output
format in a module of its own.
"""
