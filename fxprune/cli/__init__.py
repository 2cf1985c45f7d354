"""The command line.

The input is the arguments; the output is a table or JSON, files and an exit status. A new command is a function in
`app`. Steps that several commands share are in `steps`, groups of options in `options`. `runner` turns errors into
messages.
"""
