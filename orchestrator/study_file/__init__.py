"""The study file.

Its schema, the rules between its keys, reading it, and errors in plain words. Modules, each importing only those before
it: `yaml_text`, `rules`, `explain`, `entries`, `schema`, `load`.
"""
