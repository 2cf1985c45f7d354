"""The command line.

Arguments come in; a table or JSON, files and an exit status go out. A new command is a function in `app`; steps that
several commands share are in `steps`, groups of options in `options`. `runner` turns errors into messages.
"""
