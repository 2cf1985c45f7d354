"""Passes over fx graphs, the only code of fxprune that writes graphs: one pass a file, named by what it does.

A `GraphModule` comes in; it is changed in place, and every pass returns a `PassResult`. A new pass is a module with a
function ``f(gm, ...) -> PassResult``; where it is to run after every rewrite, it goes into `pipeline` too.
"""
