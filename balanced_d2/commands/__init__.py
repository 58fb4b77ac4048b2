"""The programs: arguments, and calls of the package. Each is a command of ``balanced-d2`` and a
script at the top level of the project or in its ``tools/``."""
