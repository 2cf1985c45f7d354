"""Passes that rewrite fx graphs, one kind per file. No other code of fxprune rewrites graphs.

Input: a `GraphModule`, which is changed in place. Output: a `PassResult`. A new pass is a module with a function
``f(gm, ...) -> PassResult``. A pass that must run after every rewrite also goes into `pipeline`.
"""
