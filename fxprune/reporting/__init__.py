"""Reports of plans and of pruned models as text, Markdown, HTML and JSON.

A plan or a pruned model comes in; a `Report` goes out. Sections are made once, in `sections` and `history_tables`, of
the rows and columns of `table_model`; `text` and `html` write them. A new section goes into `sections`, a new output
format into a module of its own.
"""
