"""The only code of fxprune that writes graphs. Every pass is ``f(gm, ...) -> PassResult``."""
